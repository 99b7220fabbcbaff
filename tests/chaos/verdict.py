"""Whether a disturbed sweep came out as an undisturbed one: adapters, table, losses, MLflow, and what was done twice."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from jmedlora.plan.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Storage
from jmedlora.plan.records import read_training
from jmedlora.tracking.experiment import ROLE, RUN_KEY, SWEEP_ROLE
from tests.chaos.simulation import Outcome, draw, play
from tests.chaos.world import Stuck

STARTS_BESIDE_FAULTS = 2
_ENDS_A_WORKER = ("kill worker", "kill trial", "kill driver", "power lost", "disk full", "damaged while training")
_MAY_LOSE_A_RUN = ("damaged while training", "damaged result", "power lost")
_ENDS_AN_EVALUATION = ("kill evaluation actor", "kill driver", "power lost", "stop driver", "disk full", "damaged result")


class Reference:
    """What undisturbed sweeps give, computed once for each set of sweeps."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._known: dict[tuple[str, ...], dict[str, Any]] = {}

    def of(self, names: list[str]) -> dict[str, Any]:
        key = tuple(names)
        if key not in self._known:
            root = self._folder / "-".join(names) / "results"
            root.mkdir(parents=True)
            self._known[key] = _told(play(0, root, names, []))
            shutil.rmtree(root.parent)
        return self._known[key]


def problems_of(seed: int, root: Path, reference: Reference, with_mlflow: bool = False) -> tuple[list[str], list[str], list[str]]:
    """What is wrong with a seed's outcome, a line each; what happened in it; and its faults."""
    names, faults = draw(seed)
    root.mkdir(parents=True)
    expected = reference.of(names)
    try:
        outcome = play(seed, root, names, faults, with_mlflow)
    except Stuck as stuck:
        return [str(stuck)], stuck.log, faults
    told = _told(outcome)
    problems = [line for what in ("adapters", "tables", "losses", "points") for line in _difference(what, told[what], expected[what])]
    problems += told["mlflow"] + _in_vain(outcome, expected)
    return problems, outcome.world.log, [f"{fault.kind}{'' if fault.is_done else ' (missed)'}" for fault in outcome.faults]


def _difference(what: str, found: dict[Any, Any], expected: dict[Any, Any]) -> list[str]:
    """One line about the first of what differs, or none."""
    keys = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    if not keys:
        return []
    return [f"{len(keys)} {what} differ, such as {keys[0]}: {found.get(keys[0])!s:.300} in place of {expected.get(keys[0])!s:.300}"]


def _told(outcome: Outcome) -> dict[str, Any]:
    storage = Storage(outcome.root)
    runs = {run.run_key: run for sweep in outcome.sweeps for run in sweep.plan.runs}
    children, faults = _mlflow(outcome)
    return {
        "adapters": {
            (key, step): _digests(storage.run(key).checkpoint(step)) for key, run in runs.items() for step in run.checkpoint_steps
        },
        "tables": {sweep.plan.sweep: (storage.sweep(sweep.plan.sweep).report / "table.csv").read_bytes() for sweep in outcome.sweeps},
        "losses": {key: [(line["step"], line["loss"]) for line in read_training(storage, key)] for key in runs},
        "points": children,
        "mlflow": faults,
        "steps": outcome.work.steps,
        "answered": outcome.work.answered,
    }


def _digests(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)]


def _mlflow(outcome: Outcome) -> tuple[dict[Any, Any], list[str]]:
    """The points of every child without their times, and what is wrong with runs."""
    points: dict[Any, Any] = {}
    faults = []
    for sweep in outcome.sweeps:
        name = sweep.plan.sweep
        experiment = outcome.mlflow.get_experiment_by_name(name)
        runs = outcome.mlflow.search_runs([experiment.experiment_id])
        keys = Counter(run.data.tags.get(RUN_KEY, SWEEP_ROLE) for run in runs)
        planned = {SWEEP_ROLE, *(spec.run_key for spec in (*sweep.plan.runs, *sweep.plan.bases))}
        if keys != Counter(planned):
            faults.append(f"MLflow holds of {name} {dict(keys)}")
        faults += [
            f"MLflow: {run.info.run_name} is {run.info.status}" for run in runs if run.info.status != "FINISHED" and ROLE in run.data.tags
        ]
        for run in runs:
            for metric in run.data.metrics:
                history = outcome.mlflow.get_metric_history(run.info.run_id, metric)
                key = (name, run.data.tags.get(RUN_KEY), metric)
                if metric.endswith(("_change", "_p", "_p_holm")):  # of every report; the last one counts
                    history = sorted(history, key=lambda point: point.timestamp)[-1:]
                points[key] = sorted((point.step, round(point.value, 6)) for point in history if not metric.endswith("tokens_per_s"))
    return points, faults


def _taken_twice_by_sweeps(outcome: Outcome) -> int:
    """Steps that chance may have taken twice: a run that one sweep holds is no beginning for what another trains meanwhile."""
    sweeps_of: dict[str, set[str]] = defaultdict(set)
    steps_of: dict[str, dict[str, int]] = defaultdict(dict)
    for sweep in outcome.sweeps:
        for run in sweep.plan.runs:
            sweeps_of[run.trajectory_key].add(sweep.plan.sweep)
            steps_of[run.trajectory_key][run.run_key] = run.total_steps
    return sum(sum(steps.values()) - max(steps.values()) for key, steps in steps_of.items() if len(sweeps_of[key]) > 1)


def _in_vain(outcome: Outcome, expected: dict[str, Any]) -> list[str]:
    """Work that was done again without need: a fault costs what was not saved yet, and no more."""
    problems = []
    kinds = [fault.kind for fault in outcome.faults if fault.is_done]
    runs = {run.run_key: run for sweep in outcome.sweeps for run in sweep.plan.runs}
    longest = max(run.total_steps for run in runs.values())
    between = max(run.steps_per_epoch for run in runs.values())
    lanes = 2 * len(outcome.sweeps)
    allowed = sum(kind in _ENDS_A_WORKER for kind in kinds) * between * lanes + sum(kind in _MAY_LOSE_A_RUN for kind in kinds) * longest
    allowed += _taken_twice_by_sweeps(outcome)
    extra = outcome.work.steps.total() - expected["steps"].total()
    if extra > allowed:
        problems.append(f"{extra} steps more than undisturbed, {allowed} could be lost")
    if (
        not any(kind in _ENDS_AN_EVALUATION for kind in kinds)
        and outcome.work.answered != expected["answered"]
        and len(outcome.sweeps) == 1
    ):
        problems.append("evaluations were repeated")
    starts = sum(sweep.starts for sweep in outcome.sweeps)
    if starts > len(outcome.sweeps) * (1 + STARTS_BESIDE_FAULTS * len(kinds)):
        problems.append(f"{starts} starts")
    return problems
