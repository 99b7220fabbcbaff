"""The masks of `keep_mask` applied on a GPU in one pass, without ever being stored: torch's own operations take five and keep a bool."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _apply(values, keys, thresholds, scale, out, per_row, rows_of_keys, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < per_row
    own = row % rows_of_keys
    mixed = (place.to(tl.uint32) * 0x9E3779B1) + tl.load(keys + own).to(tl.uint32, bitcast=True)
    mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D
    mixed = (mixed ^ (mixed >> 12)) * 0x297A2D39
    keep = mixed.to(tl.int32, bitcast=True) >= tl.load(thresholds + own)
    value = tl.load(values + row * per_row + place, mask=inside, other=0.0)
    tl.store(out + row * per_row + place, tl.where(keep, value * tl.load(scale + own).to(value.dtype), 0.0), mask=inside)


def apply_keyed(values: Tensor, keys: Tensor, thresholds: Tensor, scale: Tensor) -> Tensor:
    """values (B, T, C), contiguous, with what the masks drop set to zero and the rest scaled; keys, thresholds, scale: (B or fewer,).

    Where there are fewer keys than rows, they hold for each following set of as many rows alike.
    """
    values = values.contiguous()
    out = torch.empty_like(values)
    per_row = values[0].numel()
    _apply[(len(values), triton.cdiv(per_row, _BLOCK))](values, keys, thresholds, scale, out, per_row, len(keys), BLOCK=_BLOCK)
    return out
