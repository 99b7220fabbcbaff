"""How much faster than what others would write: `python -m tests.bench.ratios [--only NAMES] [--full]`, or `make bench`.

Both arms of a ratio run in turns (ABAB) in one run, with the same threads, each ratio in a process of its own. Ratios are medians, with
their spread and how exact ours is beside them. They are written to results/bench/bench.json as they come, each in place of an earlier
one: a list of `name, baseline, ratio, spread, exactness, machine`, and more. `--table` prints it as docs/performance.md has it.

Baselines: B0 a fresh Ray Train worker group per run, as users of Ray write sweeps today; B1 one warm process, run after run, HF Trainer and
PEFT (of a step: PEFT and torch's AdamW); B2 a Python loop over the adapters of each layer; the others as their rows say.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.measuring import BenchFile, Row
from tests.bench.workload import Workload, build, shared_baseline


@dataclass(frozen=True)
class Places:
    """Where workloads are built, and how large."""

    folder: Path
    is_full: bool = False

    def tiny(self, questions: int = 20) -> Workload:
        return self._built("tiny", 64, questions)

    def small(self) -> Workload:
        return self._built("small", 240 if self.is_full else 80, 40)

    def _built(self, size: str, train: int, questions: int) -> Workload:
        folder = self.folder / f"{size}-{train}-{questions}"
        is_there = (folder / "rows.json").is_file()
        return Workload(folder, shared_baseline() is not None) if is_there else build(folder, size, train, questions)


Measure = Callable[[Places, int], list[Row]]


# Each imports what it measures when it runs, in a process of its own.


def _makespan_tiny(places: Places, pairs: int) -> list[Row]:
    from tests.bench.sweeps import makespan

    return makespan("makespan-tiny", places.tiny(), pairs)


def _makespan_tiny_warm(places: Places, pairs: int) -> list[Row]:
    from tests.bench.sweeps import makespan_warm

    return makespan_warm("makespan-tiny-warm", places.tiny(), pairs)


def _makespan_small(places: Places, pairs: int) -> list[Row]:
    from tests.bench.sweeps import makespan

    return makespan("makespan-small", places.small(), pairs)


def _warm_tiny(places: Places, pairs: int) -> list[Row]:
    from tests.bench.cores import compared

    return compared("warm-tiny", places.tiny(), pairs)


def _warm_small(places: Places, pairs: int) -> list[Row]:
    from tests.bench.cores import compared

    return compared("warm-small", places.small(), pairs)


def _step_short(places: Places, pairs: int) -> list[Row]:
    from tests.bench.steps import step_short

    return step_short(pairs)


def _step_long(places: Places, pairs: int) -> list[Row]:
    from tests.bench.steps import step_long

    return step_long(pairs)


def _single(places: Places, pairs: int) -> list[Row]:
    from tests.bench.steps import single

    return single(pairs)


def _eval_generate(places: Places, pairs: int) -> list[Row]:
    from tests.bench.answers import eval_generate

    return eval_generate(places.tiny(questions=100), pairs)


def _next_run(places: Places, pairs: int) -> list[Row]:
    from tests.bench.trials import next_run

    return next_run(places.tiny(), pairs)


def _checkpoint_bytes(places: Places, pairs: int) -> list[Row]:
    from tests.bench.trials import checkpoint_bytes

    return checkpoint_bytes(places.tiny())


@dataclass(frozen=True)
class Ratio:
    """A name of the bench."""

    measure: Measure
    pairs: int
    """Turns of both arms: five where an arm takes less than a minute, two where less than five, else one, with ours before and after."""
    targets: dict[str, float]
    """By baseline: at least, but of bytes at most."""
    is_against_b0: bool = False
    """Measured only where the shared baseline's script is."""


RATIOS = {
    "step-short": Ratio(_step_short, 5, {"B1": 1.8, "B2": 1.2}),
    "step-long": Ratio(_step_long, 5, {"B1": 1.0}),
    "single": Ratio(_single, 5, {"peft": 0.97}),
    "eval-generate": Ratio(_eval_generate, 5, {"reload": 5.0, "lm-eval": 5.0}),
    "checkpoint-bytes": Ratio(_checkpoint_bytes, 1, {"adapter": 1.05}),
    "next-run": Ratio(_next_run, 5, {"new-group": 20.0}),
    "warm-tiny": Ratio(_warm_tiny, 2, {"B1": 3.0}),
    "makespan-tiny": Ratio(_makespan_tiny, 2, {"B0": 6.0}, is_against_b0=True),
    "makespan-tiny-warm": Ratio(_makespan_tiny_warm, 2, {"B0": 10.0}, is_against_b0=True),
    "warm-small": Ratio(_warm_small, 1, {"B1": 3.0}),
    "makespan-small": Ratio(_makespan_small, 1, {"B0": 6.0}, is_against_b0=True),
}
"""In the order in which they are measured: the quick ones first."""


def in_its_own_process(measure: Measure, places: Places, pairs: int) -> list[Row]:
    """What a measurement gives: libraries, threads and environment variables of one do not reach the next."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
        return pool.submit(measure, places, pairs).result()


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of bench.json in Markdown, with their targets, in the order of the bench."""
    order = list(RATIOS)
    lines = ["| name | baseline | target | measured | spread | ours | baseline's | exactness |", "|---|---|---|---|---|---|---|---|"]
    for row in sorted((row for row in rows if row["name"] in RATIOS), key=lambda row: order.index(row["name"])):
        target = RATIOS[row["name"]].targets[row["baseline"]]
        told, ratio = (f"at most {target:g}", f"{row['ratio']:.3f}") if row["unit"] == "bytes" else (f"{target:g}", f"{row['ratio']:.2f}")
        amounts = (f"{', '.join(f'{each:.3g}' for each in row[arm])} {row['unit']}" for arm in ("ours", "theirs"))
        lines.append(f"| {' | '.join([row['name'], row['baseline'], told, ratio, row['spread'], *amounts, row['exactness']])} |")
    notes = dict.fromkeys(f"- {row['name']}: {note}" for name in order for row in rows if row["name"] == name for note in row["notes"])
    return "\n".join([*lines, "", *notes])


def _show(rows: Sequence[Row]) -> None:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "baseline", "ratio", "target", "spread", "exactness"):
        shown.add_column(column)
    for row in rows:
        shown.add_row(row.name, row.baseline, f"{row.ratio:.3g}", f"{RATIOS[row.name].targets[row.baseline]:g}", row.spread, row.exactness)
    console = Console(width=180)
    console.print(shown)
    for note in dict.fromkeys(note for row in rows for note in row.notes):
        console.print(f"  {note}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="names of ratios, with commas")
    parser.add_argument("--full", action="store_true", help="the small model on 240 rows")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    parser.add_argument("--pairs", type=int, help="so many of every ratio")
    parser.add_argument("--table", action="store_true", help="measure nothing; print what was measured, in Markdown")
    asked = parser.parse_args()
    file = BenchFile(asked.out)
    if asked.table:
        print(table(file.rows()))
        return
    wanted = asked.only.split(",") if asked.only else list(RATIOS)
    if unknown := sorted(set(wanted) - RATIOS.keys()):
        parser.error(f"--only: {', '.join(unknown)}; there are: {', '.join(RATIOS)}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as place:
        for name, ratio in RATIOS.items():
            if name not in wanted:
                continue
            if ratio.is_against_b0 and shared_baseline() is None:
                print(f"{name}: not measured, since the baseline's script is not here (JMEDLORA_SHARED_DATA)", flush=True)
                continue
            started = time.monotonic()
            print(f"measuring {name}", flush=True)
            rows = in_its_own_process(ratio.measure, Places(Path(place), asked.full), asked.pairs or ratio.pairs)
            file.put(rows)
            _show(rows)
            print(f"{name} took {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
