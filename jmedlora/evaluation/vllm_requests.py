"""Questions as requests to a vLLM engine: greedy answers, and log-likelihoods of choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jmedlora.evaluation.batching import Asked
from jmedlora.evaluation.generation import StopRule
from jmedlora.evaluation.journal import AnswersSoFar
from jmedlora.evaluation.results import Likelihoods
from jmedlora.evaluation.vllm_engine import VllmEngine

AT_ONCE = 1024
"""Requests of one call: the engine makes its own batches of them, and what is lost when it is killed are the answers of one call."""
LINE_BREAK = "\n"


def generate(
    engine: VllmEngine,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Sequence[Any],
    token_ids: Sequence[list[int]],
    max_new_tokens: int,
    so_far: Sequence[AnswersSoFar],
    on_batch: Callable[[int], None] | None = None,
    marker: str | None = None,
) -> list[tuple[list[str], int]]:
    """For each adapter (None: the bare base) the most likely answer to each prompt, and the tokens that all took.

    They end where `decode_together` ends them, and `so_far` is used as there.
    """
    stop = StopRule(base, tokenizer, marker)

    def decode(asked: list[Asked]) -> list[list[int]]:
        # Without a marker an answer mostly ends with its first line break. One that does not goes on without a rule of vLLM's.
        answers = _continued(engine, stop, adapters, token_ids, asked, [[] for _ in asked], max_new_tokens, marker is None)
        short = [place for place, answer in enumerate(answers) if not _is_through(answer, stop, max_new_tokens)]
        if short:
            begun = [answers[place] for place in short]
            ended = _continued(engine, stop, adapters, token_ids, [asked[place] for place in short], begun, max_new_tokens, False)
            for place, answer in zip(short, ended, strict=True):
                answers[place] = answer
        return answers

    _ask_in_parts(len(token_ids), decode, so_far, 1, on_batch)
    made = []
    for own in so_far:
        tokens: list[list[int]] = [own.answers[prompt] for prompt in range(len(token_ids))]
        made.append(([stop.text(answer) for answer in tokens], sum(map(len, tokens))))
    return made


def choose(
    engine: VllmEngine,
    adapters: Sequence[Any],
    token_ids: Sequence[list[int]],
    choices: Sequence[Sequence[list[int]]],
    so_far: Sequence[AnswersSoFar],
    on_batch: Callable[[int], None] | None = None,
) -> list[list[Likelihoods]]:
    """For each adapter and prompt the log-likelihoods of its choices, as `weigh_choices` gives them."""
    params = engine.vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)

    def weigh(asked: list[Asked]) -> list[dict[str, list[Any]]]:
        whole = [(each, [*token_ids[each.prompt], *choice]) for each in asked for choice in choices[each.prompt]]
        outputs = engine.ask([ids for _, ids in whole], [params] * len(whole), [adapters[each.adapter] for each, _ in whole])
        sums = (_sum_behind(len(token_ids[each.prompt]), ids, output) for (each, ids), output in zip(whole, outputs, strict=True))
        return [
            {"sums": [next(sums) for _ in choices[each.prompt]], "tokens": [len(choice) for choice in choices[each.prompt]]}
            for each in asked
        ]

    _ask_in_parts(len(token_ids), weigh, so_far, max((len(own) for own in choices), default=1), on_batch)
    return [
        [Likelihoods(tuple(own.answers[prompt]["sums"]), tuple(own.answers[prompt]["tokens"])) for prompt in range(len(token_ids))]
        for own in so_far
    ]


def _sum_behind(prompt_tokens: int, ids: list[int], output: Any) -> float:
    """The log-likelihood (nats) of what stands behind a prompt."""
    return sum(output.prompt_logprobs[place][ids[place]].logprob for place in range(prompt_tokens, len(ids)))


def _ask_in_parts(
    prompts: int,
    answer: Callable[[list[Asked]], list[Any]],
    so_far: Sequence[AnswersSoFar],
    width: int,
    on_batch: Callable[[int], None] | None,
) -> None:
    """Has every adapter answer what its `so_far` does not answer yet, which takes what is; a prompt makes `width` requests.

    Adapter by adapter, so that what all prompts begin with is in the cache. `on_batch` is told the number of answers so far.
    """

    def tell() -> None:
        if on_batch is not None:
            on_batch(sum(len(own.answers) for own in so_far))

    if any(own.answers for own in so_far):
        tell()
    rest = [Asked(adapter, prompt) for adapter, own in enumerate(so_far) for prompt in range(prompts) if prompt not in own.answers]
    at_once = max(1, AT_ONCE // width)
    for start in range(0, len(rest), at_once):
        asked = rest[start : start + at_once]
        answers = answer(asked)
        for adapter, own in enumerate(so_far):
            if new := {each.prompt: given for each, given in zip(asked, answers, strict=True) if each.adapter == adapter}:
                own.add(new)
        tell()


def _continued(
    engine: VllmEngine,
    stop: StopRule,
    adapters: Sequence[Any],
    token_ids: Sequence[list[int]],
    asked: Sequence[Asked],
    begun: Sequence[list[int]],
    max_new_tokens: int,
    until_break: bool,
) -> list[list[int]]:
    """Answers of which the beginning is known, cut where the rule ends them; `until_break`: or behind their first line break."""
    until: dict[str, Any] = {"stop": [LINE_BREAK]} if until_break else {"detokenize": False}
    params = [
        engine.vllm.SamplingParams(temperature=0.0, max_tokens=max_new_tokens - len(answer), stop_token_ids=sorted(stop.ends), **until)
        for answer in begun
    ]
    prompts = [[*token_ids[each.prompt], *answer] for each, answer in zip(asked, begun, strict=True)]
    outputs = engine.ask(prompts, params, [adapters[each.adapter] for each in asked])
    return [_cut([*answer, *output.outputs[0].token_ids], stop) for answer, output in zip(begun, outputs, strict=True)]


def _cut(answer: list[int], stop: StopRule) -> list[int]:
    return next((answer[:end] for end in range(1, len(answer) + 1) if stop(answer[:end])), answer)


def _is_through(answer: list[int], stop: StopRule, max_new_tokens: int) -> bool:
    return len(answer) >= max_new_tokens or stop(answer)
