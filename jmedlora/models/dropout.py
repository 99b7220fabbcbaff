"""Dropout whose masks are a pure function of run seed, step, row and module.

No random stream is drawn from, so masks do not change with padding, batch composition, micro-batches, device,
resumption, or when gradient checkpointing computes a layer twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jmedlora.data.mixing import combine, key_from

_SPREAD = -0x61C8864F  # 0x9E3779B1 as a signed 32-bit integer: odd, its multiples are evenly spread
_FIRST = 0x2C1B3C6D
_SECOND = 0x297A2D39


class DropoutContext:
    """What the masks of one micro-batch depend on, shared by all layers of one adapter.

    `enter` is called before each forward; masks hold until the next call, so that a backward may compute them again.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._modules: list[np.ndarray] = []
        self._keys: Tensor | None = None

    def register(self, name: str) -> int:
        """The place of a module, to be asked for with `keys`."""
        self._modules.append(key_from("dropout", name))
        return len(self._modules) - 1

    def enter(self, step: int, rows: Sequence[int], device: torch.device) -> None:
        """Sets the optimizer step and the data row of each sequence of the micro-batch."""
        if not self._modules:
            return
        of_rows = combine(key_from("dropout", self._seed, step), np.asarray(rows, dtype=np.uint64))
        of_modules = combine(np.concatenate(self._modules)[:, None], of_rows[None, :])
        self._keys = torch.from_numpy((of_modules >> np.uint64(32)).astype(np.uint32).view(np.int32)).to(device)

    def keys(self, place: int) -> Tensor:
        """One 32-bit key per sequence of the micro-batch for one module, (B,) int32."""
        if self._keys is None:
            raise RuntimeError("dropout masks asked for before DropoutContext.enter")
        return self._keys[place]


def keep_mask(keys: Tensor, positions: int, channels: int, probability: float) -> Tensor:
    """Which values are kept, (B, positions, channels) bool: each dropped with `probability`, counted from the row's start."""
    counter = torch.arange(positions * channels, dtype=torch.int32, device=keys.device).mul_(_SPREAD)
    mixed = counter.unsqueeze(0) + keys.unsqueeze(1)
    shifted = torch.empty_like(mixed)
    for shift, factor in ((15, _FIRST), (12, _SECOND)):
        # torch shifts signed integers arithmetically; the mask takes the copies of the sign away again
        torch.bitwise_right_shift(mixed, shift, out=shifted)
        mixed.bitwise_xor_(shifted.bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
    threshold = min(round(probability * 2**32), 2**32 - 1) - 2**31
    return (mixed >= threshold).view(-1, positions, channels)


class _Dropped(torch.autograd.Function):
    """Scaled masking that keeps only the bool mask for the backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (values * keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return (gradients[0] * keep).mul_(ctx.scale), None, None


class KeyedDropout(nn.Module):
    """Takes the place of nn.Dropout in one LoRA layer; input (B, positions, channels)."""

    def __init__(self, probability: float, name: str, context: DropoutContext):
        super().__init__()
        self.p = probability
        self._context = context
        self._place = context.register(name)

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return values
        _, positions, channels = values.shape
        keep = keep_mask(self._context.keys(self._place), positions, channels, self.p)
        return _Dropped.apply(values, keep, 1 / (1 - self.p))
