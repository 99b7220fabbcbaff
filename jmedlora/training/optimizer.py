"""AdamW that clips each parameter group by its own norm, within its own step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class GroupClippingAdamW(torch.optim.AdamW):
    """One group per adapter, each with its own `max_grad_norm` (None: not clipped); the norm before clipping stays in `grad_norm`.

    With `sharded`, each worker holds its part of every group's gradients (ZeRO 1 to 3), and norms are summed over the workers.
    A group that `is_skipped`, or whose norm is not finite, is left as it is.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], sharded: bool):
        # fused: one pass over weights, gradients and moments, which for many small tensors is most of a step
        super().__init__([{"max_grad_norm": None, "grad_norm": 0.0, "is_skipped": False, **group} for group in groups], fused=True)
        self._sharded = sharded
        self._armed = False

    def arm(self) -> None:
        """Lets steps count from now on: DeepSpeed's ZeRO may take one with zero gradients while it is built, which
        would leave Adam's bias correction a step ahead and weights decayed before the first step."""
        self._armed = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if not self._armed:
            return
        # ZeRO calls this once per group, with the other groups hidden or empty.
        for group in self.param_groups:
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if gradients:
                self._clip(group, gradients)
        super().step(closure)

    def _clip(self, group: dict[str, Any], gradients: list[Tensor]) -> None:
        precise = torch.promote_types(gradients[0].dtype, torch.float32)
        squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=precise)).square().sum()
        if self._sharded:
            dist.all_reduce(squares)
        norm = group["grad_norm"] = squares.sqrt().item()
        if group["is_skipped"] or not math.isfinite(norm):
            for parameter in group["params"]:
                parameter.grad = None
        elif group["max_grad_norm"] is not None:
            share = min(1.0, group["max_grad_norm"] / (norm + 1e-6))
            if share < 1.0:
                torch._foreach_mul_(gradients, share)
