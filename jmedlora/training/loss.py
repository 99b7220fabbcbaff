"""The losses of a micro-batch, over the tokens of its answers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Collated(NamedTuple):
    """A micro-batch as tensors; the rows of the first adapter come first, and so on.

    input_ids: (B, T), padded on the right. positions: (N,), places in the flattened (B * T) whose next token belongs to
    an answer. targets: (N,), those next tokens. adapters: (N,), the adapter that each of them belongs to.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    adapters: Tensor


def labelled_tokens(length: int, prompt_length: int) -> int:
    """Tokens of a row that the loss counts: those of the answer; the very first token of a row is never predicted."""
    return length - max(prompt_length, 1)


def collate(rows: Sequence[Sequence[Mapping[str, Any]]], pad_token: int, device: torch.device, is_filler: bool = False) -> Collated:
    """rows: of each adapter, `input_ids` and `prompt_length` of its rows of the micro-batch; of a filler, nothing belongs to an answer."""
    width = max(len(row["input_ids"]) for own in rows for row in own)
    input_ids = torch.full((sum(map(len, rows)), width), pad_token, dtype=torch.int64)
    positions, targets, adapters = [], [], []
    for place, (adapter, row) in enumerate((adapter, row) for adapter, own in enumerate(rows) for row in own):
        ids = torch.as_tensor(row["input_ids"], dtype=torch.int64)
        first = len(ids) if is_filler else max(int(row["prompt_length"]), 1)
        input_ids[place, : len(ids)] = ids
        positions.append(torch.arange(first - 1, len(ids) - 1) + place * width)
        targets.append(ids[first:])
        adapters.append(torch.full((len(ids) - first,), adapter))
    return Collated(input_ids.to(device), *(torch.cat(parts).to(device) for parts in (positions, targets, adapters)))


class AnswerLoss(nn.Module):
    """The module that DeepSpeed is given: summed cross entropy over labelled positions, one sum per adapter.

    Computed in fp32, or in fp64 for a model in fp64. Backbone and head are called as modules, so that ZeRO-3's hooks gather
    their weights, and the head sees labelled positions only. There is no attention mask: attention looks back only, so padding
    on the right reaches no labelled position.
    """

    def __init__(self, model: PreTrainedModel, adapters: int):
        super().__init__()
        self.model = model
        self._adapters = adapters

    def forward(self, input_ids: Tensor, positions: Tensor, targets: Tensor, adapters: Tensor) -> Tensor:
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        assert head is not None
        logits = head(hidden.flatten(0, 1).index_select(0, positions))
        precise = logits if logits.dtype == torch.float64 else logits.float()
        losses = nn.functional.cross_entropy(precise, targets, reduction="none")
        return losses.new_zeros(self._adapters).index_add(0, adapters, losses)
