"""Dropout whose masks are a pure function of run seed, step, row and module.

No random stream is drawn from, so masks do not change with padding, batch composition, micro-batches, device, the other
adapters of a pack, resumption, or when gradient checkpointing computes a layer twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jmedlora.data.mixing import combine, key_from

_SPREAD = -0x61C8864F  # 0x9E3779B1 as a signed 32-bit integer: odd, its multiples are evenly spread
_FIRST = 0x2C1B3C6D
_SECOND = 0x297A2D39


class RowsOfAdapter(NamedTuple):
    """What one adapter has in a micro-batch, and what its dropout depends on."""

    rows: Sequence[int]
    """Numbers of the data rows."""
    step: int = 0
    """Optimizer step (1-based)."""


@dataclass(frozen=True)
class Chances:
    """Dropout of one adapter."""

    seed: int
    probability: float


class Masks(NamedTuple):
    """The masks of one layer for a micro-batch: of each row or, where every adapter has the same, of the rows of one."""

    keep: Tensor
    """(B, T, C) bool; on a GPU the keys it follows from, (B,) int32."""
    scale: Tensor
    """(B, 1, 1): what kept values are multiplied by."""
    thresholds: Tensor
    """(B,) int32; see `keep_mask`."""

    def apply(self, rows: Tensor) -> Tensor:
        """rows * keep * scale, (B, T, C)."""
        if self.keep.dim() == 1:
            from jmedlora.models.dropout_kernel import apply_keyed

            return apply_keyed(rows, self.keep, self.thresholds, self.scale)
        repeats = len(rows) // len(self.keep)
        return (rows.reshape(repeats, *self.keep.shape) * self.keep).mul_(self.scale).view(rows.shape)


class KeyedDropout:
    """The dropout of all layers and adapters of a pack; `enter` is called before each forward, masks hold until the next call."""

    def __init__(self, chances: Sequence[Chances], layers: Sequence[str], device: torch.device):
        """layers: their names, which masks depend on; asked for by their places in this sequence."""
        self._chances = chances
        self._layers = np.concatenate([key_from("dropout", name) for name in layers])
        self._device = device
        self._keys: Tensor | None = None
        self._thresholds = self._scale = torch.empty(0)

    def enter(self, adapters: Sequence[RowsOfAdapter]) -> None:
        """Sets the rows of each adapter, in the order of the batch."""
        told = list(zip(self._chances, adapters, strict=True))
        if all((chances, tuple(own.rows), own.step) == (told[0][0], tuple(told[0][1].rows), told[0][1].step) for chances, own in told):
            told = told[:1]  # equal masks for all
        of_rows = [
            combine(key_from("dropout", chances.seed, own.step), np.asarray(own.rows, dtype=np.uint64)) for chances, own in told if own.rows
        ]
        keys = combine(self._layers[:, None], np.concatenate(of_rows)[None, :])
        probabilities = np.repeat([chances.probability for chances, _ in told], [len(own.rows) for _, own in told])
        thresholds = np.minimum(np.rint(probabilities * 2**32), 2**32 - 1).astype(np.int64) - 2**31
        self._keys = torch.from_numpy((keys >> np.uint64(32)).astype(np.uint32).view(np.int32)).to(self._device)
        self._thresholds = torch.from_numpy(thresholds.astype(np.int32)).to(self._device)
        self._scale = torch.from_numpy(1 / (1 - probabilities)).to(self._device)[:, None, None]

    def masks(self, layer: int, positions: int, channels: int, dtype: torch.dtype) -> Masks:
        """For one layer and rows of `positions` tokens and `channels` values each."""
        if self._keys is None:
            raise RuntimeError("dropout masks asked for before KeyedDropout.enter")
        keys = self._keys[layer]
        keep = keys if _has_kernel(keys.device) else keep_mask(keys, positions, channels, self._thresholds)
        return Masks(keep, self._scale.to(dtype), self._thresholds)


@lru_cache
def _has_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("triton") is not None


def keep_mask(keys: Tensor, positions: int, channels: int, thresholds: Tensor) -> Tensor:
    """Which values are kept, (B, positions, channels) bool, counted from the row's start.

    keys: (B,) int32, one per row. thresholds: (B,) int32, of 2**32 equally likely values those below which a value is dropped.
    """
    counter = torch.arange(positions * channels, dtype=torch.int32, device=keys.device).mul_(_SPREAD)
    mixed = counter.unsqueeze(0) + keys.unsqueeze(1)
    shifted = torch.empty_like(mixed)
    for shift, factor in ((15, _FIRST), (12, _SECOND)):
        # torch shifts signed integers arithmetically; the mask takes the copies of the sign away again
        torch.bitwise_right_shift(mixed, shift, out=shifted)
        mixed.bitwise_xor_(shifted.bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
    return (mixed >= thresholds.unsqueeze(1)).view(-1, positions, channels)
