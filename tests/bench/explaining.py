"""Where an arm's time goes, by kinds of operators: what a ratio that misses its target is explained with."""

from __future__ import annotations

import time

import torch
from torch.profiler import ProfilerActivity, profile

from tests.bench.measuring import Arm

_KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::baddbmm_"),
    "attention": ("scaled_dot_product",),
    "optimizer": ("Optimizer.", "_fused_adamw_", "linalg_vector_norm", "_foreach"),
    "copies": ("aten::copy_", "aten::cat", "index", "aten::fill_"),
    "logits": ("softmax", "argmax", "nll_loss"),
}


def where_time_goes(arm: Arm, name: str) -> str:
    """Shares of the time of a further turn, under torch's profiler, which itself slows many small calls down."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        before = time.process_time()
        arm()
        total = time.process_time() - before
    seconds = dict.fromkeys([*_KINDS, "other operators"], 0.0)
    for event in profiled.key_averages():
        kind = next((kind for kind, parts in _KINDS.items() if _is_one(event.key, parts)), "other operators")
        seconds[kind] += event.self_cpu_time_total / 1e6
    told = ", ".join(f"{kind} {spent / total:.0%}" for kind, spent in seconds.items() if spent / total >= 0.005)
    outside = max(0.0, 1 - sum(seconds.values()) / total)
    return f"where the time of {name} goes: {told}, outside operators {outside:.0%} ({torch.get_num_threads()} thread)"


def _is_one(key: str, parts: tuple[str, ...]) -> bool:
    """Whether an operator is one of these: with `aten::` by its whole name, else by a part of it."""
    return any(key == part or (not part.startswith("aten::") and part in key) for part in parts)
