"""Peak of real tensor allocations of training steps on the CPU, against the plan's estimate: `python -m tests.bench.allocations`.

The profiler reports every call of torch's CPU allocator; the largest sum of what lives at once, from the first step on, is
the peak, weights and optimizer included.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

from jmedlora.plan.memory import memory_of
from jmedlora.training.process import ensure_process_group, this_worker
from tests.bench.cases import CPU_CASES, QUICK_CASES, Case
from tests.bench.rig import rig_of


def measured_peak(case: Case, steps: int = 2) -> dict[str, float]:
    """Bytes: `resident` before the first step's forward of the second step, `peak` of the steps."""
    worker = this_worker()
    gc.collect()
    with profile(profile_memory=True, use_cpu=True) as told, rig_of(case, worker) as rig:
        rig.step()
        gc.collect()
        with torch.autograd.profiler.record_function("measured"):
            for _ in range(steps - 1):
                rig.step()
        del rig
    events = list(_walk(told.kineto_results.experimental_event_tree()))
    begin = next(event for event in events if event.name == "measured")
    calls = sorted((event for event in events if event.name == "[memory]"), key=lambda event: event.start_time_ns)
    before = calls[0].extra_fields.total_allocated - calls[0].extra_fields.alloc_size
    peak = max(call.extra_fields.total_allocated for call in calls if begin.start_time_ns <= call.start_time_ns <= begin.end_time_ns)
    resident = [call for call in calls if call.start_time_ns < begin.start_time_ns][-1].extra_fields.total_allocated
    return {"resident": float(resident - before), "peak": float(peak - before)}


def _walk(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _walk(event.children)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ensure_process_group()
    rows = []
    for case in QUICK_CASES if asked.quick else CPU_CASES:
        found = measured_peak(case)
        estimate = memory_of(case.spec(), 1, case.shape, on_gpu=False, pack=case.adapters).total
        rows.append({"case": str(case), **found, "estimate": estimate})
        print(f"{case!s:90} peak {found['peak'] / 1e6:7.2f} MB, estimated {estimate / found['peak'] - 1:+.1%}", flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
