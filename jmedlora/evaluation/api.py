"""Scoring a model behind an address: the same questions, prompts and files as for a model with weights here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.locate import cache_dir
from jmedlora.config.parts import ApiSource, ModelConfig
from jmedlora.data.benchmarks import load_benchmark
from jmedlora.data.prompts import render_messages, render_prompt
from jmedlora.evaluation.answer_cache import Answer, AnswerCache
from jmedlora.evaluation.endpoint import address_of, ask_endpoint
from jmedlora.evaluation.results import Answers, Checkpoint, asked_rows, write_results
from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import EvaluationSpec


@dataclass(frozen=True)
class Cost:
    """Money at the configured prices; discounts such as those for repeated prompts are not known here."""

    now: float
    """What this call had to ask for."""
    total: float
    """All answers, also those that an earlier call paid for."""
    currency: str


def cost_of(source: ApiSource, answers: Sequence[Answer]) -> Cost | None:
    """What the answers cost; None unless both prices are configured and the server told the tokens of every answer."""
    if source.input_price is None or source.output_price is None:
        return None
    money = []
    for answer in answers:
        if answer.prompt_tokens is None or answer.new_tokens is None:
            return None
        money.append((answer.prompt_tokens * source.input_price + answer.new_tokens * source.output_price) / 1e6)
    paid_now = (price for price, answer in zip(money, answers, strict=True) if not answer.cached)
    return Cost(math.fsum(paid_now), math.fsum(money), source.currency)


class ApiEvaluator:
    """Asks one model behind an address; has the shape of `Evaluator`, and loads nothing."""

    def __init__(self, model: ModelConfig, sources: Path):
        """`sources` is the folder of named sources; answers are kept below `$JMEDLORA_CACHE`. Raises BadInput for a model with weights."""
        if not isinstance(model.source, ApiSource):
            raise BadInput([Fault(f"model {model.name}", "source.kind", f"{model.source.kind} has no address to ask", "api")])
        self._name = model.name
        self._source = model.source
        self._sources = sources
        self._cache = AnswerCache(cache_dir() / "answers")

    def evaluate(
        self,
        run_key: str,
        step: int,
        evaluation: EvaluationSpec,
        storage: Storage,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """Have the benchmark's questions answered; writes predictions.jsonl, then metrics.json, and returns the metrics.

        `on_progress(done, total)` is called with numbers of questions. Tokens that the server did not tell are missing from the
        sums and counted in `answers_without_tokens`; `cost` is that of all answers, `cost_now` that of those asked for by this call.
        Raises BadInput when key, prompt, scoring or benchmark do not fit or answers cannot be kept, EndpointFailed when a question
        cannot be answered.
        """
        started = time.perf_counter()
        self._check(evaluation)
        self._cache.check()
        questions, examples = asked_rows(evaluation, load_benchmark(evaluation.benchmark, self._sources))
        render = render_messages if self._source.endpoint == "chat" else render_prompt
        prompts = [render(evaluation.prompt, question.as_instruction(), examples) for question in questions]
        total = len(prompts)
        on_answer = (lambda done: on_progress(done, total)) if on_progress else None
        answers = ask_endpoint(self._source, prompts, evaluation.max_new_tokens, self._cache, on_answer)
        facts = {"adapter_digest": None, **self._facts(answers), "seconds": time.perf_counter() - started}
        texts = [answer.text for answer in answers]
        return write_results(storage, run_key, step, evaluation, questions, Answers(texts, []), facts)

    def evaluate_together(
        self, checkpoints: Sequence[Checkpoint], evaluation: EvaluationSpec, storage: Storage, pack: int
    ) -> list[dict[str, Any]]:
        """One after the other, since an address has no adapters of ours; raises as `evaluate` does."""
        return [self.evaluate(*checkpoint, evaluation, storage) for checkpoint in checkpoints]

    def _check(self, evaluation: EvaluationSpec) -> None:
        where = f"model {self._name}"
        if evaluation.scoring != "generate":
            told = f"{evaluation.scoring} is not to be had: an address gives answers, not the choices' probabilities"
            raise BadInput([Fault(where, "scoring", told, "generate")])
        if evaluation.prompt.chat and self._source.endpoint == "completions":
            told = f"completions takes plain text, and prompt {evaluation.prompt.name} is a chat"
            raise BadInput([Fault(where, "source.endpoint", told, "chat, or a prompt without chat")])

    def _facts(self, answers: Sequence[Answer]) -> dict[str, Any]:
        told = [answer for answer in answers if answer.prompt_tokens is not None and answer.new_tokens is not None]
        cost = cost_of(self._source, answers)
        return {
            "prompt_tokens": sum(answer.prompt_tokens or 0 for answer in answers),
            "new_tokens": sum(answer.new_tokens or 0 for answer in answers),
            "answers_without_tokens": len(answers) - len(told),
            "cut_answers": sum(answer.finish_reason == "length" for answer in answers),
            "cached_answers": sum(answer.cached for answer in answers),
            "cost": cost.total if cost else None,
            "cost_now": cost.now if cost else None,
            "currency": self._source.currency if cost else None,
            "device": address_of(self._source),
            "served_model": self._source.model,
        }
