"""Greedy answers to prompts, in batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from jmedlora.config.faults import BadInput, Fault
from jmedlora.data.tokenisation import encode_prompt
from jmedlora.evaluation.metrics import first_line_is_complete

# Finished rows are dropped from a batch once they are a quarter of it: dropping copies the cache, keeping computes them in vain.
_KEPT_SHARE = 0.75

# Prompts of one batch differ in length by at most this: what a longer one adds, all others are padded with.
_WIDEST_SHARE, _SLACK_TOKENS = 1.3, 32


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


def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    device: torch.device | str,
) -> Generation:
    """Answer each prompt greedily with at most `max_new_tokens` tokens; see `encode_prompts` and `decode_greedily`."""
    encoded = encode_prompts(tokenizer, prompts, max_prompt_tokens(model, max_new_tokens))
    return decode_greedily(model, tokenizer, encoded, max_new_tokens, batch_size, device)


def max_prompt_tokens(model: PreTrainedModel, max_new_tokens: int) -> int:
    """What the model's positions leave for a prompt; raises BadInput where that is nothing."""
    positions: int = model.config.max_position_embeddings
    if max_new_tokens >= positions:
        raise BadInput([Fault("evaluation", "max_new_tokens", f"{max_new_tokens} leaves no room for a prompt", f"less than {positions}")])
    return positions - max_new_tokens


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_tokens: int) -> EncodedPrompts:
    """Encode prompts; one of more than `max_tokens` tokens keeps its end, where the question is."""
    token_ids = [encode_prompt(tokenizer, prompt, None) for prompt in prompts]
    too_long = [i for i, ids in enumerate(token_ids) if len(ids) > max_tokens]
    for i in too_long:
        token_ids[i] = encode_prompt(tokenizer, prompts[i], max_tokens)
    return EncodedPrompts(token_ids, len(too_long))


@torch.inference_mode()
def decode_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: EncodedPrompts,
    max_new_tokens: int,
    batch_size: int,
    device: torch.device | str,
    on_batch: Callable[[int], None] | None = None,
) -> Generation:
    """Answer each prompt with the most likely token at every step, in batches of prompts of similar length.

    A row ends at an end-of-sequence token, or once a line break follows text, since only the first line is scored.
    What the model's generation_config says of sampling or penalties plays no part. `on_batch` is called after each batch
    with the number of prompts answered so far.
    """
    stop = _StopRule(model, tokenizer)
    token_ids = prompts.token_ids
    order = sorted(range(len(token_ids)), key=lambda i: (len(token_ids[i]), i))
    prefix = _read_shared_prefix(model, token_ids, device)
    answers: list[list[int]] = [[] for _ in token_ids]
    answered = 0
    for rows in _batches(order, token_ids, batch_size):
        batch = _decode_batch(model, [token_ids[row] for row in rows], prefix, stop, max_new_tokens, device)
        for row, answer in zip(rows, batch, strict=True):
            answers[row] = answer
        answered += len(rows)
        if on_batch is not None:
            on_batch(answered)
    return Generation([stop.text(answer) for answer in answers], prompts.tokens, sum(map(len, answers)), prompts.truncated)


def _batches(order: list[int], token_ids: list[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Runs of `order`, which goes from short to long, of at most `batch_size` prompts that need little padding together."""
    batch: list[int] = []
    for row in order:
        too_long = batch and len(token_ids[row]) > _WIDEST_SHARE * len(token_ids[batch[0]]) + _SLACK_TOKENS
        if too_long or len(batch) == batch_size:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class _StopRule:
    """Says when an answer is finished, and what it says."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        configured = model.generation_config.eos_token_id if model.generation_config is not None else None
        self._end = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id} - {None}
        self._tokenizer = tokenizer
        self._breaks_line: dict[int, bool] = {}

    def text(self, answer: list[int]) -> str:
        text = self._tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def __call__(self, answer: list[int]) -> bool:
        """True when the last token of `answer` finishes it."""
        last = answer[-1]
        if last in self._end:
            return True
        if last not in self._breaks_line:
            self._breaks_line[last] = len(f"{self.text([last])}|".splitlines()) > 1
        return self._breaks_line[last] and first_line_is_complete(self.text(answer))


@dataclass(frozen=True)
class _Prefix:
    """The tokens that all prompts begin with, and the model's keys and values for them, as one row."""

    length: int
    cache: DynamicCache

    def repeated(self, rows: int) -> DynamicCache:
        cache = copy.deepcopy(self.cache)
        if self.length:
            cache.batch_repeat_interleave(rows)
        return cache


def _read_shared_prefix(model: PreTrainedModel, prompts: list[list[int]], device: torch.device | str) -> _Prefix:
    """Run the model once over what all prompts share (the template, the examples), leaving each at least one token of its own."""
    cache = DynamicCache(config=model.config)
    # What the first and the last in lexicographic order share is shared by all between them.
    first, last = min(prompts, default=[]), max(prompts, default=[])
    most = min((len(prompt) - 1 for prompt in prompts), default=0)
    length = next((i for i in range(most) if first[i] != last[i]), most)
    if length:
        model.base_model(input_ids=torch.tensor([first[:length]], device=device), past_key_values=cache, use_cache=True)
    return _Prefix(length, cache)


def _decode_batch(
    model: PreTrainedModel, prompts: list[list[int]], prefix: _Prefix, stop: _StopRule, max_new_tokens: int, device: torch.device | str
) -> list[list[int]]:
    """New tokens of each prompt, a finishing end-of-sequence token among them.

    Laid out as prefix, padding, rest of the prompt, new tokens; padding is masked and takes no position.
    """
    rests = [prompt[prefix.length :] for prompt in prompts]
    width = max(map(len, rests))
    tokens = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests], device=device)
    mask = torch.tensor([[1] * prefix.length + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests], device=device)
    positions = (mask.cumsum(1) - 1).clamp_(min=0)[:, prefix.length :]
    cache = prefix.repeated(len(prompts))
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    running = [True] * len(rows)
    for step in range(max_new_tokens):
        output = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        chosen = output.logits[:, -1].argmax(-1)
        for i, token in enumerate(chosen.tolist()):
            if running[i]:
                answers[rows[i]].append(token)
                running[i] = not stop(answers[rows[i]])
        if not any(running) or step + 1 == max_new_tokens:
            break
        if sum(running) <= _KEPT_SHARE * len(running):
            kept = [i for i, still in enumerate(running) if still]
            index = torch.tensor(kept, device=device)
            cache.batch_select_indices(index)
            chosen, mask, positions = chosen[index], mask[index], positions[index]
            rows, running = [rows[i] for i in kept], [True] * len(kept)
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return answers
