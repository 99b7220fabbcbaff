"""What all prompts of an evaluation begin with: run through the model once for each adapter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from jmedlora.evaluation.batching import unless_out_of_memory
from jmedlora.evaluation.resident import Resident


@dataclass(frozen=True)
class Prefix:
    """The tokens that all prompts begin with, and the model's keys and values for them, a row for each adapter."""

    length: int
    cache: DynamicCache


@dataclass(frozen=True)
class PromptBatch:
    """Prompts laid out as prefix, padding, rest of the prompt; padding is masked and takes no position.

    tokens, positions: (rows, width of the rests); mask: (rows, prefix + width); cache: the prefix, a row per prompt.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
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


def lay_out(prompts: list[list[int]], adapters: Sequence[int], prefix: Prefix, room: int, device: torch.device | str) -> PromptBatch:
    """One batch of prompts behind the prefixes of their adapters. room: tokens that the cache has place for behind the prompts."""
    rests = [prompt[prefix.length :] for prompt in prompts]
    width = max(map(len, rests))
    tokens = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests], device=device)
    mask = torch.tensor([[1] * prefix.length + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests], device=device)
    positions = (mask.cumsum(1) - 1).clamp_(min=0)[:, prefix.length :]
    cache = copy.copy(prefix.cache)
    index = torch.tensor(adapters, device=device)
    cache.layers = [_of_rows(layer, index, width + room) for layer in prefix.cache.layers]
    return PromptBatch(tokens, mask, positions, cache)


def _of_rows(layer: CacheLayerMixin, index: torch.Tensor, room: int) -> CacheLayerMixin:
    """A layer of the prefix for a batch whose rows belong to the adapters that `index` tells."""
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
        self._room = room
        self._length = prefix.get_seq_length()
        self._held: list[torch.Tensor] = []
        if self._length:
            self._begin(prefix.keys[index], prefix.values[index])

    def _begin(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.lazy_initialization(keys, values)
        self._held = [new.new_empty(*new.shape[:2], self._length + self._room, new.shape[3]) for new in (keys, values)]
        self._append(0, keys, values)

    def _append(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._length = start + keys.shape[2]
        for held, new in zip(self._held, (keys, values)):
            held[:, :, start : self._length] = new
        self.keys, self.values = (held[:, :, : self._length] for held in self._held)

    def get_seq_length(self) -> int:
        return self._length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self._held:
            self._append(self._length, key_states, value_states)
        else:
            self._room -= key_states.shape[2]
            self._length = key_states.shape[2]
            self._begin(key_states, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._held = [held.index_select(0, indices) for held in self._held]
        self.keys, self.values = (held[:, :, : self._length] for held in self._held)
