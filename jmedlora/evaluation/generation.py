"""Greedy answers to prompts, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jmedlora.config.faults import BadInput, Fault
from jmedlora.data.tokenisation import encode_prompt
from jmedlora.evaluation.batching import Asked, answer_in_batches
from jmedlora.evaluation.journal import AnswersSoFar
from jmedlora.evaluation.metrics import answer_is_complete
from jmedlora.evaluation.prefix import Prefix, read_prompts, read_shared_prefix
from jmedlora.evaluation.resident import Resident

# Finished rows are dropped from a batch once they are a quarter of it: dropping copies the cache, keeping computes them in vain.
_KEPT_SHARE = 0.75


@dataclass(frozen=True)
class EncodedPrompts:
    """Token ids of prompts in their order; `truncated` of them were longer than the model can take and lost their beginning."""

    token_ids: list[list[int]]
    truncated: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.token_ids))


@dataclass(frozen=True)
class Generation:
    """Answers in the prompts' order, decoded without special tokens and uncut, and what they took in tokens."""

    texts: list[str]
    prompt_tokens: int
    new_tokens: int
    truncated_prompts: int


def max_prompt_tokens(model: PreTrainedModel, max_new_tokens: int) -> int:
    """What the model's positions leave for a prompt; raises BadInput where that is nothing."""
    positions: int = model.config.max_position_embeddings
    if max_new_tokens >= positions:
        raise BadInput([Fault("evaluation", "max_new_tokens", f"{max_new_tokens} leaves no room for a prompt", f"less than {positions}")])
    return positions - max_new_tokens


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_tokens: int, is_chat: bool = False) -> EncodedPrompts:
    """Encode prompts (of a chat: its rendered template); one of more than `max_tokens` tokens keeps its end, where the question is."""
    token_ids = [encode_prompt(tokenizer, prompt, None, is_chat) for prompt in prompts]
    too_long = [i for i, ids in enumerate(token_ids) if len(ids) > max_tokens]
    for i in too_long:
        token_ids[i] = encode_prompt(tokenizer, prompts[i], max_tokens, is_chat)
    return EncodedPrompts(token_ids, len(too_long))


def decode_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: EncodedPrompts,
    max_new_tokens: int,
    batch_size: int,
    device: torch.device | str,
    on_batch: Callable[[int], None] | None = None,
    marker: str | None = None,
) -> Generation:
    """The answers of a model as it is; the rest as in `decode_together`."""
    so_far = [AnswersSoFar(batch_size)]
    return decode_together(Resident(model, device), tokenizer, prompts, max_new_tokens, batch_size, so_far, on_batch, marker)[0]


@torch.inference_mode()
def decode_together(
    resident: Resident,
    tokenizer: PreTrainedTokenizerBase,
    prompts: EncodedPrompts,
    max_new_tokens: int,
    batch_size: int,
    so_far: Sequence[AnswersSoFar],
    on_batch: Callable[[int], None] | None = None,
    marker: str | None = None,
) -> list[Generation]:
    """Answer each prompt with the most likely token at every step, in batches of prompts of similar length; for each resident adapter.

    A row ends at an end-of-sequence token, or once a line break follows text, since only the first line is scored; with a
    `marker`, once a line break follows the text behind it.
    What the model's generation_config says of sampling or penalties plays no part. A batch holds at most `batch_size` prompts of
    each adapter. `on_batch` is called after each batch with the number of answers so far. Prompts that an adapter's `so_far` (token
    ids by position) answers are not asked again, and it takes what is answered. A batch that does not fit into memory is halved.
    """
    stop = StopRule(resident.model, tokenizer, marker)
    token_ids = prompts.token_ids
    prefix = read_shared_prefix(resident, token_ids)

    def decode(asked: list[Asked]) -> list[list[int]]:
        return _decode_batch(resident, asked, token_ids, prefix, stop, max_new_tokens)

    answer_in_batches(token_ids, decode, so_far, batch_size, on_batch=on_batch)
    made = []
    for own in so_far:
        answers: list[list[int]] = [own.answers[prompt] for prompt in range(len(token_ids))]
        made.append(Generation([stop.text(answer) for answer in answers], prompts.tokens, sum(map(len, answers)), prompts.truncated))
    return made


class StopRule:
    """Says when an answer is finished, and what it says."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, marker: str | None):
        configured = model.generation_config.eos_token_id if model.generation_config is not None else None
        self.ends: set[int] = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id} - {None}
        self._tokenizer = tokenizer
        self._marker = marker
        self._breaks_line: dict[int, bool] = {}

    def text(self, answer: list[int]) -> str:
        text = self._tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def __call__(self, answer: list[int]) -> bool:
        """True when the last token of `answer` finishes it."""
        last = answer[-1]
        if last in self.ends:
            return True
        if last not in self._breaks_line:
            self._breaks_line[last] = len(f"{self.text([last])}|".splitlines()) > 1
        return self._breaks_line[last] and answer_is_complete(self.text(answer), self._marker)


def _decode_batch(
    resident: Resident, asked: list[Asked], token_ids: list[list[int]], prefix: Prefix, stop: StopRule, max_new_tokens: int
) -> list[list[int]]:
    """New tokens of each prompt that is asked, a finishing end-of-sequence token among them."""
    read = read_prompts(resident, asked, token_ids, prefix, max_new_tokens)
    logits, mask, positions, cache = read.logits, read.mask, read.positions, read.cache
    answers: list[list[int]] = [[] for _ in asked]
    rows = list(range(len(asked)))
    running = [True] * len(rows)
    resident.enter([each.adapter for each in asked])
    for step in range(max_new_tokens):
        chosen = logits.argmax(-1)
        for i, token in enumerate(chosen.tolist()):
            if running[i]:
                answers[rows[i]].append(token)
                running[i] = not stop(answers[rows[i]])
        if not any(running) or step + 1 == max_new_tokens:
            break
        if sum(running) <= _KEPT_SHARE * len(running):
            kept = [i for i, still in enumerate(running) if still]
            index = torch.tensor(kept, device=resident.device)
            cache.batch_select_indices(index)
            chosen, mask, positions = chosen[index], mask[index], positions[index]
            rows, running = [rows[i] for i in kept], [True] * len(kept)
            resident.enter([asked[row].adapter for row in rows])
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        output = resident.model(
            input_ids=chosen[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits, positions = output.logits[:, -1], positions + 1
    return answers
