"""How much faster than what others would write: `python -m tests.bench.ratios [--only NAMES] [--full]`, or `make bench`.

Both arms of a ratio run in turns (ABAB) in one run, with the same threads; ratios are medians, with their spread and how far the scores
of both arms are apart beside them. Printed as one table and written to results/bench/bench.json: a list of `name, baseline, ratio,
spread, exactness, machine`. Baselines: B0 a fresh Ray Train worker group per run, as users of Ray write sweeps today; B1 one warm process,
run after run, HF Trainer and PEFT.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.workload import EPOCHS, RANKS, Workload, build, shared_baseline, write_sweep

ROOT = Path(__file__).parents[2]
Arm = Callable[[], tuple[float, dict[str, Any]]]
"""Does the work once; seconds, and what came out."""


@dataclass(frozen=True)
class Row:
    """One ratio: how many times as long the baseline takes."""

    name: str
    baseline: str
    ratio: float
    spread: str
    exactness: str
    machine: str
    ours_s: list[float]
    baseline_s: list[float]


def machine() -> str:
    """What was measured on."""
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, one thread a process"


def in_turns(ours: Arm, baseline: Arm, pairs: int) -> tuple[list[tuple[float, dict[str, Any]]], list[tuple[float, dict[str, Any]]]]:
    """Both arms so many times; with one pair, ours before and after."""
    taken: tuple[list[Any], list[Any]] = ([], [])
    for _ in range(pairs):
        taken[0].append(ours())
        taken[1].append(baseline())
    if pairs == 1:
        taken[0].append(ours())
    return taken


def compared(name: str, baseline_name: str, ours: Arm, baseline: Arm, pairs: int, same: Callable[[Any, Any], str]) -> Row:
    """The row of two arms."""
    mine, others = in_turns(ours, baseline, pairs)
    own, their = [seconds for seconds, _ in mine], [seconds for seconds, _ in others]
    ratio = statistics.median(their) / statistics.median(own)
    spread = f"{min(their) / max(own):.2f} to {max(their) / min(own):.2f}"
    found = same(mine[-1][1], others[-1][1])
    return Row(name, baseline_name, ratio, spread, found, machine(), [round(each, 2) for each in own], [round(each, 2) for each in their])


# ---------------------------------------------------------------- whole sweeps


def our_command(workload: Workload, **keys: Any) -> Arm:
    """`jmedlora sweep` from the command to its report, with nothing warm: a storage and a cache of its own."""

    def run() -> tuple[float, dict[str, Any]]:
        folder = Path(tempfile.mkdtemp(dir=workload.folder))
        file = write_sweep(workload, folder, **keys)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JMEDLORA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        environment.pop("RAY_ADDRESS", None)
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "jmedlora.cli", "sweep", str(file), f"storage={folder / 'results'}"],
            env=environment, cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        scores = _scores_of(folder / "results/sweeps/bench/report/table.csv")
        shutil.rmtree(folder)
        return seconds, {"gestalt": scores}

    return run


def _scores_of(table: Path) -> dict[str, float]:
    with table.open(encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["method"] != "base"]
    return {f"{row['lora_rank']} {float(row['epochs']):g}": float(row["gestalt_score"]) for row in rows}


def ray_tune(workload: Workload) -> Arm:
    """B0, by the shared script."""
    script = shared_baseline()
    assert script is not None

    def run() -> tuple[float, dict[str, Any]]:
        ranks, epochs = (",".join(map(str, values)) for values in (RANKS, EPOCHS))
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(script), "run", "--work", str(workload.folder), "--ranks", ranks, "--epochs", epochs],
            capture_output=True, text=True,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        told = json.loads(done.stdout.splitlines()[-1])
        assert not told["errors"], done.stderr[-3000:]
        return seconds, {"gestalt": {f"{run['rank']} {run['epochs']}": run["gestalt"] for run in told["runs"]}}

    return run


def warm(arm: str, workload: Workload) -> Arm:
    """An arm of `tests.bench.warm`, in a process that stays."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.warm", arm, str(workload.folder)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip

    def run() -> tuple[float, dict[str, Any]]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        told = json.loads(process.stdout.readline())
        return told["seconds"], told

    return run


def same_scores(ours: dict[str, Any], others: dict[str, Any]) -> str:
    """How far the mean Gestalt scores of both arms are apart: their data orders and initial adapters differ, so they only resemble."""
    assert ours["gestalt"].keys() == others["gestalt"].keys()
    apart = max(abs(ours["gestalt"][key] - others["gestalt"][key]) for key in ours["gestalt"])
    return f"{len(ours['gestalt'])} runs; Gestalt scores at most {apart:.3f} apart (other data orders and initial adapters)"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="names of ratios, with commas")
    parser.add_argument("--full", action="store_true", help="the small model on 240 rows")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    parser.add_argument("--pairs", type=int, help="so many of every ratio")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        rows = []
        for name, make in _ratios(Path(place), asked.full, asked.pairs).items():
            if not asked.only or name in asked.only.split(","):
                print(f"measuring {name}", flush=True)
                rows.append(make())
                _write(rows, asked.out)


def _ratios(place: Path, full: bool, pairs: int | None) -> dict[str, Callable[[], Row]]:
    built: dict[tuple[str, int, int], Workload] = {}

    def workload(size: str, train: int, questions: int) -> Workload:
        asked = (size, train, questions)
        if asked not in built:
            built[asked] = build(place / f"{size}-{train}", *asked)
        return built[asked]

    def tiny() -> Workload:
        return workload("tiny", 64, 20)

    def small() -> Workload:
        return workload("small", 240 if full else 80, 40)

    found = {
        "warm-tiny": lambda: compared("warm-tiny", "B1", warm("ours", tiny()), warm("plain", tiny()), pairs or 2, same_scores),
        "warm-small": lambda: compared("warm-small", "B1", warm("ours", small()), warm("plain", small()), pairs or 1, same_scores),
    }
    if shared_baseline() is not None:
        found |= {
            "makespan-tiny": lambda: compared("makespan-tiny", "B0", our_command(tiny()), ray_tune(tiny()), pairs or 2, same_scores),
            "makespan-small": lambda: compared("makespan-small", "B0", our_command(small()), ray_tune(small()), pairs or 1, same_scores),
        }
    return found


def _write(rows: list[Row], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps([asdict(row) for row in rows], ensure_ascii=False, indent=1), encoding="utf-8")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "baseline", "ratio", "spread", "ours, s", "baseline, s", "exactness"):
        table.add_column(column)
    for row in rows:
        seconds = (", ".join(map(str, each)) for each in (row.ours_s, row.baseline_s))
        table.add_row(row.name, row.baseline, f"{row.ratio:.2f}", row.spread, *seconds, row.exactness)
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
