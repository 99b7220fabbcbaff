"""Everything that only a GPU can tell, in one call: `python -m tests.bench.gpu --out FOLDER`.

Correctness first, then memory against the plan's estimates, then speed against a plain loop and transformers' generate.
Rows go to gpu.json as they come; a failure is a row too, and does not end the rest. No Ray, no MLflow.
`--tiny` takes tiny shapes, also on the CPU (where memory is not measured); `--only correctness,memory,timing` takes parts.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from jmedlora.models.random_models import random_base
from jmedlora.plan.memory import GIGABYTE, memory_of
from jmedlora.training.process import Worker, ensure_process_group, this_worker
from tests.bench import gpu_checks, gpu_timing
from tests.bench.cases import Case, memory_cases, pack_cases, timing_cases
from tests.bench.rig import rig_of

SECTIONS = ("correctness", "memory", "timing", "packs")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "accelerate", "numpy")


class Rows:
    """What was found so far, in a file."""

    def __init__(self, file: Path):
        self._file = file
        self._rows: list[dict[str, Any]] = []

    def add(self, section: str, make: Callable[[], dict[str, Any]], **facts: Any) -> dict[str, Any]:
        """Adds what `make` gives, or how it failed; prints it in a line."""
        started = time.perf_counter()
        try:
            row = {"section": section, **facts, **make()}
        except Exception as error:
            row = {"section": section, **facts, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        free_memory()
        row["took_s"] = round(time.perf_counter() - started, 1)
        self._rows.append(row)
        self._file.write_text(json.dumps(self._rows, indent=1, ensure_ascii=False), encoding="utf-8")
        print(" ".join(f"{key}={_short(value)}" for key, value in row.items()), flush=True)
        return row


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def machine(worker: Worker) -> dict[str, Any]:
    """Versions and device."""
    found: dict[str, Any] = {name: version(name) for name in LIBRARIES}
    found["python"] = platform.python_version()
    if worker.device.type == "cuda":
        facts = torch.cuda.get_device_properties(worker.device)
        found |= {"device": facts.name, "memory_gb": facts.total_memory / GIGABYTE, "cuda": torch.version.cuda}
    return found


def correctness(rows: Rows, worker: Worker) -> None:
    """This device against the CPU, and resumed against undisturbed runs."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        specs = gpu_checks.specs_of(folder)
        expected: dict[str, Any] = {}
        rows.add("cpu", lambda: expected.update(gpu_checks.on_the_cpu(folder)) or {})
        for name, spec in specs.items():
            rows.add("training", lambda n=name, s=spec: gpu_checks.compare_training(folder, n, s, expected["losses"][n]), run=name)
        for name, spec in specs.items():
            rows.add("resume", lambda n=name, s=spec: gpu_checks.compare_resumed(folder, n, s), run=name)
        for family in gpu_checks.FAMILIES:
            rows.add("scores", lambda f=family: gpu_checks.compare_scores(f, expected["scores"][f], str(worker.device)), family=family)


def memory(rows: Rows, worker: Worker, tiny: bool, match: str) -> None:
    """Peaks of two steps against the estimates; a base model is made once for the cases that follow each other."""
    base: Any = None
    held: tuple[object, ...] = ()
    for case in (each for each in memory_cases(tiny) if match in str(each)):
        kind = (case.shape, case.precision, case.compute)
        if kind != held or case.stage == 3:
            base, held = None, ()
            free_memory()
            started = time.perf_counter()
            try:
                base, held = random_base(case.family, case.shape, case.precision, case.compute, True, worker.device), kind
                base = base.to("cpu") if case.stage == 3 and case.precision != "nf4" else base
            except Exception as error:
                print(f"base of {case}: {error}", flush=True)
                continue
            print(f"base of {case.name} {case.precision}: {time.perf_counter() - started:.1f} s", flush=True)
        rows.add("memory", lambda c=case, b=base: peak_of(c, b, worker), case=str(case))
        if case.stage == 3:
            base, held = None, ()


def peak_of(case: Case, base: Any, worker: Worker) -> dict[str, Any]:
    """Allocated and reserved bytes at the peak of the second step, and the estimate of both."""
    estimate = memory_of(case.spec(), 1, case.shape, on_gpu=worker.device.type == "cuda", pack=case.adapters)
    items = {name: round(size / GIGABYTE, 3) for name, size in estimate.items.items()}
    expected = {"estimate_gb": estimate.total / GIGABYTE, "items": items}
    if worker.device.type != "cuda":
        with rig_of(case, worker, base) as rig:
            return {"loss": rig.step(), **expected}
    try:
        with rig_of(case, worker, base) as rig:
            rig.step()
            torch.cuda.reset_peak_memory_stats()
            resident = torch.cuda.memory_allocated()
            loss = rig.step()
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            free, total = torch.cuda.mem_get_info()
            outside = total - free - torch.cuda.memory_reserved()
    except torch.OutOfMemoryError:
        return {"error": "out of memory", **expected}
    overhead = estimate.items["CUDA and allocator"]
    return {
        "loss": loss,
        "resident_gb": resident / GIGABYTE,
        "allocated_gb": allocated / GIGABYTE,
        "reserved_gb": reserved / GIGABYTE,
        "outside_gb": outside / GIGABYTE,
        "used_gb": (reserved + outside) / GIGABYTE,
        "error_of_allocated": (estimate.total - overhead) / allocated - 1,
        "error_of_used": estimate.total / (reserved + outside) - 1,
        **expected,
    }


def timing(rows: Rows, worker: Worker, tiny: bool, match: str) -> None:
    """Steps and answers per second, ours and others' in turns."""
    for case in (each for each in timing_cases(tiny) if match in str(each)):
        steps = 2 if tiny or case.shape.layers >= 80 else 5
        rows.add("steps", lambda c=case, n=steps: gpu_timing.compare_steps(c, worker, n), case=str(case))
    for name in ("calm-7b", "llama-7b") if not match else ():
        rows.add("generation", lambda n=name: gpu_timing.compare_generation(n, tiny, worker), case=name)


def packs(rows: Rows, worker: Worker, tiny: bool, match: str) -> None:
    """Steps of 1, 4 and 8 adapters over one base against as many steps of a plain loop."""
    for name, cases in pack_cases(tiny).items():
        if match not in name:
            continue
        free_memory()
        first = cases[0]
        base = random_base(first.family, first.shape, first.precision, first.compute, True, worker.device)
        for case in cases:
            tokens = case.input_tokens + case.target_tokens
            rows.add("packs", lambda c=case, b=base: gpu_timing.compare_steps(c, worker, 3, b), case=str(case), tokens=tokens)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--match", default="", help="only cases of memory and steps whose description holds this")
    asked = parser.parse_args()
    ensure_process_group()
    worker = this_worker()
    rows = Rows(asked.out / "gpu.json")
    rows.add("machine", lambda: machine(worker))
    wanted = asked.only.split(",")
    if "correctness" in wanted:
        correctness(rows, worker)
    if "memory" in wanted:
        memory(rows, worker, asked.tiny, asked.match)
    if "timing" in wanted:
        timing(rows, worker, asked.tiny, asked.match)
    if "packs" in wanted:
        packs(rows, worker, asked.tiny, asked.match)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
