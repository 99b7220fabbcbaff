"""The loss of a micro-batch, over the tokens of its answers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel


class Collated(NamedTuple):
    """A micro-batch as tensors.

    input_ids: (B, T), padded on the right. positions: (N,), places in the flattened (B * T) whose next token belongs to
    an answer. targets: (N,), those next tokens.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor


def labelled_tokens(length: int, prompt_length: int) -> int:
    """Tokens of a row that the loss counts: those of the answer; the very first token of a row is never predicted."""
    return length - max(prompt_length, 1)


def collate(rows: Sequence[Mapping[str, Any]], pad_token: int, device: torch.device) -> Collated:
    """rows: `input_ids` and `prompt_length` of each row of the micro-batch."""
    width = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token, dtype=torch.int64)
    positions, targets = [], []
    for place, row in enumerate(rows):
        ids = torch.as_tensor(row["input_ids"], dtype=torch.int64)
        first = max(int(row["prompt_length"]), 1)
        input_ids[place, : len(ids)] = ids
        positions.append(torch.arange(first - 1, len(ids) - 1) + place * width)
        targets.append(ids[first:])
    return Collated(input_ids.to(device), torch.cat(positions).to(device), torch.cat(targets).to(device))


class AnswerLoss(nn.Module):
    """The module that DeepSpeed is given: summed cross entropy (fp32) over labelled positions.

    Backbone and head are called as modules, so that ZeRO-3's hooks gather their weights, and the head sees labelled
    positions only. There is no attention mask: attention looks back only, so padding on the right reaches no labelled position.
    """

    def __init__(self, adapted: PeftModel):
        super().__init__()
        self.adapted = adapted

    def forward(self, input_ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        model: PreTrainedModel = self.adapted.get_base_model()
        hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        assert head is not None
        logits = head(hidden.flatten(0, 1).index_select(0, positions))
        return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
