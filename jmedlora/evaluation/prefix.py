"""What all prompts of an evaluation begin with: run through the model once."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Prefix:
    """The tokens that all prompts begin with, and the model's keys and values for them, as one row."""

    length: int
    cache: DynamicCache

    def repeated(self, rows: int) -> DynamicCache:
        """A cache of its own for a batch of `rows` prompts."""
        cache = copy.deepcopy(self.cache)
        if self.length:
            cache.batch_repeat_interleave(rows)
        return cache


@dataclass(frozen=True)
class PromptBatch:
    """Prompts laid out as prefix, padding, rest of the prompt; padding is masked and takes no position.

    tokens, positions: (rows, width of the rests); mask: (rows, prefix + width); cache: the prefix, a row per prompt.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    cache: DynamicCache


def read_shared_prefix(model: PreTrainedModel, prompts: list[list[int]], device: torch.device | str) -> Prefix:
    """Run the model once over what all prompts share (the template, the examples), leaving each at least one token of its own."""
    cache = DynamicCache(config=model.config)
    # What the first and the last in lexicographic order share is shared by all between them.
    first, last = min(prompts, default=[]), max(prompts, default=[])
    most = min((len(prompt) - 1 for prompt in prompts), default=0)
    length = next((i for i in range(most) if first[i] != last[i]), most)
    if length:
        model.base_model(input_ids=torch.tensor([first[:length]], device=device), past_key_values=cache, use_cache=True)
    return Prefix(length, cache)


def lay_out(prompts: list[list[int]], prefix: Prefix, device: torch.device | str) -> PromptBatch:
    """One batch of prompts behind their shared prefix."""
    rests = [prompt[prefix.length :] for prompt in prompts]
    width = max(map(len, rests))
    tokens = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests], device=device)
    mask = torch.tensor([[1] * prefix.length + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests], device=device)
    positions = (mask.cumsum(1) - 1).clamp_(min=0)[:, prefix.length :]
    return PromptBatch(tokens, mask, positions, prefix.repeated(len(prompts)))
