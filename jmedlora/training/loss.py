"""The losses of a micro-batch, over the tokens of its answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from jmedlora.models.lora import TrainedWeights


class Row(NamedTuple):
    """A row to train on: its tokens (int32), of which the first `prompt_length` are the prompt."""

    tokens: np.ndarray
    prompt_length: int


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


def collate(rows: Sequence[Sequence[Row]], pad_token: int, device: torch.device, is_filler: bool = False) -> Collated:
    """rows: those of each adapter; of a filler, nothing belongs to an answer."""
    flat = [(adapter, row) for adapter, own in enumerate(rows) for row in own]
    width = max(len(row.tokens) for _, row in flat)
    input_ids = np.full((len(flat), width), pad_token, dtype=np.int64)
    positions, targets, adapters = [], [], []
    for place, (adapter, (tokens, prompt_length)) in enumerate(flat):
        first = len(tokens) if is_filler else max(prompt_length, 1)
        input_ids[place, : len(tokens)] = tokens
        positions.append(np.arange(first - 1, len(tokens) - 1) + place * width)
        targets.append(tokens[first:])
        adapters.append(np.full(len(tokens) - first, adapter))
    return Collated(*(torch.from_numpy(_joined(parts)).to(device) for parts in ([input_ids], positions, targets, adapters)))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64, copy=False)


class AnswerLoss(nn.Module):
    """The module that DeepSpeed is given: summed cross entropy over labelled positions, one sum per adapter.

    Computed in fp32, or in fp64 for a model in fp64. Adapters, backbone and head are called as modules, so that ZeRO-3's hooks gather
    their weights, and the head sees labelled positions only. There is no attention mask: attention looks back only, so padding
    on the right reaches no labelled position.
    """

    def __init__(self, model: PreTrainedModel, weights: TrainedWeights):
        super().__init__()
        self.model = model
        self.weights = weights

    def forward(self, input_ids: Tensor, positions: Tensor, targets: Tensor, adapters: Tensor) -> Tensor:
        anchor = self.weights()
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        assert head is not None
        logits = head(hidden.flatten(0, 1).index_select(0, positions))
        precise = logits if logits.dtype == torch.float64 else logits.float()
        losses = nn.functional.cross_entropy(precise, targets, reduction="none")
        return losses.new_zeros(len(self.weights)).index_add(0, adapters, losses) + anchor
