"""What all prompts of an evaluation begin with: run through the model once for each adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from jmedlora.evaluation.batching import Asked, unless_out_of_memory
from jmedlora.evaluation.resident import Resident
from jmedlora.plan.memory import TOKENS_READ_AT_ONCE


@dataclass(frozen=True)
class Prefix:
    """The tokens that all prompts begin with, and the model's keys and values for them, a row for each adapter."""

    length: int
    cache: DynamicCache


@dataclass(frozen=True)
class ReadPrompts:
    """A batch of prompts that have been run through the model: prefix, padding, rest of each; padding is masked and takes no position."""

    logits: torch.Tensor
    """(rows, vocabulary): of the first token behind each prompt."""
    mask: torch.Tensor
    """(rows, prefix + widest rest)"""
    positions: torch.Tensor
    """(rows, 1): of the first token behind each prompt."""
    cache: DynamicCache


def read_shared_prefix(resident: Resident, prompts: list[list[int]]) -> Prefix:
    """Run each adapter once over what all prompts share (the template, the examples), leaving each at least one token of its own."""
    # What the first and the last in lexicographic order share is shared by all between them.
    first, last = min(prompts, default=[]), max(prompts, default=[])
    most = min((len(prompt) - 1 for prompt in prompts), default=0)
    length = next((i for i in range(most) if first[i] != last[i]), most)
    if not length:
        return Prefix(0, DynamicCache(config=resident.model.config))
    return Prefix(length, _read(resident, first[:length], list(range(len(resident)))))


def _read(resident: Resident, tokens: list[int], adapters: list[int]) -> DynamicCache:
    """Keys and values for the tokens, a row for each of the adapters: all at once, or in halves where memory does not suffice."""

    def read(adapters: list[int]) -> DynamicCache:
        cache = DynamicCache(config=resident.model.config)
        resident.enter(adapters)
        rows = torch.tensor([tokens] * len(adapters), device=resident.device)
        resident.model.base_model(input_ids=rows, past_key_values=cache, use_cache=True)
        return cache

    whole = unless_out_of_memory(read, adapters)
    if whole is None:
        half = len(adapters) // 2
        whole, other = (_read(resident, tokens, part) for part in (adapters[:half], adapters[half:]))
        for layer, more in zip(whole.layers, other.layers, strict=True):
            layer.keys, layer.values = torch.cat([layer.keys, more.keys]), torch.cat([layer.values, more.values])
    return whole


def read_prompts(resident: Resident, asked: Sequence[Asked], token_ids: Sequence[list[int]], prefix: Prefix, room: int) -> ReadPrompts:
    """Runs the prompts that are asked through the model, behind the prefixes of their adapters.

    room: tokens that the cache has place for behind the prompts. Long batches are read in parts, which need less padding and stay
    in the processor's cache.
    """
    rests = [token_ids[each.prompt][prefix.length :] for each in asked]
    width = max(map(len, rests))
    cache = _cache(prefix, asked, width + room, resident)
    parts = [list(range(len(asked)))]
    if all(isinstance(layer, _GrowingInPlace) for layer in cache.layers):
        parts = list(_parts(asked, rests, TOKENS_READ_AT_ONCE[torch.device(resident.device).type]))
    if len(parts) == 1:
        logits = _read_part(resident, asked, rests, prefix, cache)
    else:
        logits = _read_parts(resident, asked, rests, prefix, cache, parts)
    mask = torch.tensor([[1] * prefix.length + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests], device=resident.device)
    return ReadPrompts(logits, mask, mask.sum(1, keepdim=True), cache)


def _parts(asked: Sequence[Asked], rests: Sequence[list[int]], most: int) -> Iterator[list[int]]:
    """Rows that are read at once, about `most` tokens: of prompts of similar length, each with all its adapters."""
    rows_of: dict[int, list[int]] = {}
    for row, each in enumerate(asked):
        rows_of.setdefault(each.prompt, []).append(row)
    part: list[int] = []
    for rows in sorted(rows_of.values(), key=lambda rows: len(rests[rows[0]])):
        if part and (len(part) + len(rows)) * len(rests[rows[0]]) > most:
            yield sorted(part)
            part = []
        part += rows
    yield sorted(part)


def _read_parts(
    resident: Resident, asked: Sequence[Asked], rests: Sequence[list[int]], prefix: Prefix, cache: DynamicCache, parts: Sequence[list[int]]
) -> torch.Tensor:
    width, order = max(map(len, rests)), []
    logits = []
    for rows in parts:
        longest = max(len(rests[row]) for row in rows)
        own = _cache(prefix, [asked[row] for row in rows], longest, resident)
        logits.append(_read_part(resident, [asked[row] for row in rows], [rests[row] for row in rows], prefix, own))
        index = torch.tensor(rows, device=resident.device)
        for whole, part in zip(cache.layers, own.layers, strict=True):
            whole.take_over(index, part, prefix.length, prefix.length + width)
        order += rows
    return torch.cat(logits)[torch.tensor(order, device=resident.device).argsort()]


def _read_part(resident: Resident, asked: Sequence[Asked], rests: Sequence[list[int]], prefix: Prefix, cache: DynamicCache) -> torch.Tensor:
    width = max(map(len, rests))
    tokens = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests], device=resident.device)
    mask = torch.tensor([[1] * prefix.length + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests], device=resident.device)
    resident.enter([each.adapter for each in asked])
    output = resident.model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_(min=0)[:, prefix.length :],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


def _cache(prefix: Prefix, asked: Sequence[Asked], room: int, resident: Resident) -> DynamicCache:
    """A cache for rows that begin with the prefixes of their adapters. room: tokens that are to come."""
    index = torch.tensor([each.adapter for each in asked], device=resident.device)
    cache = copy.copy(prefix.cache)
    cache.layers = [_of_rows(layer, index, room) for layer in prefix.cache.layers]
    return cache


def _of_rows(layer: CacheLayerMixin, index: torch.Tensor, room: int) -> CacheLayerMixin:
    if type(layer) is DynamicLayer:
        return _GrowingInPlace(layer, index, room)
    own = copy.copy(layer)  # of a sliding window, which is no longer than that
    own.batch_select_indices(index)
    return own


class _GrowingInPlace(DynamicLayer):
    """Keys and values with room behind them: transformers' own layer copies all there is for every new token."""

    def __init__(self, prefix: DynamicLayer, index: torch.Tensor, room: int):
        """index: the rows of the prefix that this begins with. room: tokens that are to come."""
        super().__init__()
        self._rows, self._capacity = len(index), prefix.get_seq_length() + room
        self._length = 0
        self._held: list[torch.Tensor] = []
        if prefix.get_seq_length():
            self.update(prefix.keys[index], prefix.values[index])

    def get_seq_length(self) -> int:
        return self._length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        start = self._length
        self._grow(start + key_states.shape[2], key_states, value_states)
        for held, new in zip(self._held, (key_states, value_states)):
            held[:, :, start : self._length] = new
        return self.keys, self.values

    def _grow(self, length: int, *alike: torch.Tensor) -> None:
        if not self._held:
            self.lazy_initialization(*alike)
            # Zeros, since what stays empty is masked, which is a product with zero
            self._held = [new.new_zeros(self._rows, new.shape[1], self._capacity, new.shape[3]) for new in alike]
        self._length = length
        self.keys, self.values = (held[:, :, :length] for held in self._held)

    def take_over(self, rows: torch.Tensor, part: _GrowingInPlace, start: int, length: int) -> None:
        """Puts into these rows what `part` has from token `start` on, at the end of `length` tokens."""
        self._grow(length, part.keys, part.values)
        for held, new in zip(self._held, (part.keys, part.values)):
            held[rows, :, length - (part._length - start) : length] = new[:, :, start:]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._held = [held.index_select(0, indices) for held in self._held]
        self._grow(self._length)
