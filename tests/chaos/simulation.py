"""Whole sweeps under faults drawn from a seed, in one process: `python -m tests.chaos.simulation --seed N` repeats one.

Driver, scheduler, ledger, records, checkpoints, states, evaluation queue and pool, journal, tracker and report are the
program's own; Ray, the models, the clock, the disk's moods and (but for `--mlflow`) MLflow are simulated. What must come
out is what an undisturbed sweep gives: see `tests.chaos.verdict`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from rich.console import Console

from jmedlora.config.sweep import SweepConfig
from jmedlora.orchestrator import driver
from jmedlora.plan.planner import open_sweep
from jmedlora.plan.specs import Plan
from jmedlora.tracking.location import tracking_uri
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.mlflow_server import MemoryServer
from tests.chaos.rig import Cluster
from tests.chaos.work import Work
from tests.chaos.world import Process, Stuck, World

SWEEPS = {
    "first": "grid: {model: [tiny-llama], method: [lora], rank: [8, 4], epochs: [2, 1]}\npack: 2",
    "second": "grid: {model: [tiny-llama], method: [lora], rank: [8], epochs: [2, 3]}",
    "apart": "grid: {model: [tiny-llama], method: [lora], rank: [8], epochs: [2, 3]}\npack: 1\nshare_prefixes: false",
}
"""Two trajectories of two runs each, in one pack; and, beside these, one that has a run in common with them, or its runs one by one."""
_COMMON = """
data: sample
benchmarks: [{preset: sample, filters: {first: 6}}]
shots: [0, 1]
prompts: [alpaca-ja]
training: {learning_rate: 5e-3, batch_size: 16, gradient_checkpointing: false, length_grouping: false, seed: 0}
evaluate: {every: epoch, max_new_tokens: 8, batch_size: 2}
resources: {max_failures: 2, evaluation: {actors: 2}}
"""
MOST_FAULTS = 4
STEP_S = (1.0, 120.0)
"""Seconds of an optimizer step: a state at every checkpoint alone, or every third step too."""
MOST_STARTS = 30
AWAY_STEPS = 3
"""How long a user takes to start a sweep again, in optimizer steps."""
UNDISTURBED_S = 15.0
"""In steps: about how long an undisturbed sweep takes."""


@dataclass
class Sweep:
    """A sweep that its user starts again until it is done."""

    config: SweepConfig
    plan: Plan
    starts: int = 0
    starts_at: float = 0.0
    """When its user comes back to it."""
    process: Process | None = None
    ends: list[str] = field(default_factory=list)
    """How each start ended."""

    @property
    def is_done(self) -> bool:
        return bool(self.ends) and self.ends[-1] == "0"


@dataclass
class Outcome:
    """What a seed has left."""

    root: Path
    sweeps: list[Sweep]
    work: Work
    world: World
    mlflow: Any
    faults: list[Fault]


def play(seed: int, root: Path, names: list[str], faults: list[str], with_mlflow: bool = False) -> Outcome:
    """Runs sweeps together, `faults` among it, until they are done. Raises Stuck where they do not get there."""
    world = World(seed, root)
    work = Work(world, world.rng.choice(STEP_S))
    sweeps = [Sweep(config.model_copy(update={"storage": str(root)}), plan) for config, plan in map(_open, names)]
    mlflow = MlflowClient(tracking_uri(driver.Storage(root))) if with_mlflow else MemoryServer()
    cluster = Cluster(world, work, mlflow)
    moments = sorted(world.rng.uniform(0, UNDISTURBED_S * work.step_s) for _ in faults)
    drawn = [Fault(kind, moment) for kind, moment in zip(faults, moments, strict=True)]

    def on_turn() -> None:
        for fault in drawn:
            if not fault.is_done and fault.moment <= world.seconds:
                fault.strike(world, cluster, sweeps)
        for sweep in sweeps:
            _attend(sweep, world, AWAY_STEPS * work.step_s)

    with cluster.installed():
        on_turn()
        world.run(lambda: all(sweep.is_done for sweep in sweeps), on_turn)
        world.kill_all()
    return Outcome(root, sweeps, work, world, mlflow, drawn)


@lru_cache
def _open(name: str) -> tuple[SweepConfig, Plan]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.yaml"
        file.write_text(SWEEPS[name] + _COMMON, encoding="utf-8")
        return open_sweep(str(file), [])


def _attend(sweep: Sweep, world: World, away_s: float) -> None:
    """What the user does: looks how a start has ended, and starts again unless all is done."""
    process = sweep.process
    if process is not None and process.is_over:
        if process.is_dead:
            end = "killed"
        elif process.error is not None:
            end = f"{type(process.error).__name__}: {process.error}"
        else:
            end = " ".join([str(process.value.exit_code), *process.value.problems])
        sweep.ends.append(end)
        world.tell(f"driver of {sweep.plan.sweep} ended: {end}")
        process.end_children()
        sweep.process = None
        sweep.starts_at = max(world.seconds + away_s, world.full_until)  # whoever starts it again has made room first
    if sweep.process is None and not sweep.is_done and sweep.starts_at <= world.seconds:
        sweep.starts += 1
        if sweep.starts > MOST_STARTS:
            raise Stuck(f"{sweep.plan.sweep} is started again and again", world.log)
        sweep.process = world.start(f"driver of {sweep.plan.sweep}", _driver(sweep))


def _driver(sweep: Sweep) -> Callable[[], Any]:
    return lambda: driver.run_sweep(sweep.config, sweep.plan, None, Console(file=StringIO()))


def draw(seed: int) -> tuple[list[str], list[str]]:
    """The sweeps and faults of a seed."""
    rng = World(seed, Path()).rng
    drawn = rng.random()
    beside = ["second"] if drawn < 0.2 else ["apart"] if drawn < 0.4 else []
    return ["first", *beside], [rng.choice(list(FAULTS)) for _ in range(rng.randint(1, MOST_FAULTS))]


def main() -> int:
    from tests.chaos.verdict import Reference, problems_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="this seed alone, with all that happens in it")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--mlflow", action="store_true", help="a real MLflow on sqlite in place of the simulated one")
    arguments = parser.parse_args()
    seeds = [arguments.seed] if arguments.seed is not None else range(arguments.first, arguments.first + arguments.seeds)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(Path(folder) / "reference")
        for seed in seeds:
            started = time.monotonic()
            root = Path(folder) / str(seed) / "results"
            problems, outcome, faults = problems_of(seed, root, reference, arguments.mlflow)
            failed += bool(problems)
            print(f"seed {seed}: {', '.join(faults)}: {'; '.join(problems) or 'equal'} ({time.monotonic() - started:.1f} s)", flush=True)
            if arguments.seed is not None:
                print("\n".join(outcome))
            shutil.rmtree(root.parent, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
