"""When a sweep was first started, and how its last start ended: kept in its ledger, so that MLflow can be written again with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from jmedlora.config.clock import now
from jmedlora.data.atomic import write_json
from jmedlora.plan.layout import Storage
from jmedlora.plan.records import finished_metrics, read_run
from jmedlora.plan.specs import BaseSpec, Plan, RunSpec

Ending = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True)
class SweepRecord:
    """Times in seconds since the epoch; `finished` is None until the last start has ended."""

    started: float
    status: Literal["running", "finished", "failed", "interrupted"]
    finished: float | None


def begin_sweep(plan: Plan, storage: Storage) -> None:
    """Told when a driver starts; the first start counts as the sweep's."""
    known = _read(_file(plan, storage))
    _write(plan, storage, SweepRecord(known.started if known else now(), "running", None))


def end_sweep(plan: Plan, storage: Storage, status: Ending) -> None:
    """Told when a driver ends."""
    _write(plan, storage, SweepRecord(read_record(plan, storage).started, status, now()))


def read_record(plan: Plan, storage: Storage) -> SweepRecord:
    """What is stored; where nothing is, what follows from the sweep's runs and evaluations."""
    return _read(_file(plan, storage)) or _derived(plan, storage)


def how_it_ended(plan: Plan, storage: Storage) -> tuple[Ending, float]:
    """Of a sweep that no driver works on: how its last start ended, and when; of a driver that was killed, when a run was last heard of."""
    record = read_record(plan, storage)
    if record.status == "running":
        record = _derived(plan, storage)
    assert record.status != "running"
    return record.status, record.finished or record.started


def began(plan: Plan, storage: Storage, spec: RunSpec | BaseSpec) -> float | None:
    """When a run, or the first evaluation of a base, began; None for one that has not."""
    if isinstance(spec, RunSpec):
        return (read_run(storage, spec.run_key) or {}).get("started")
    return min((metrics["time"] - metrics["seconds"] for _, _, metrics in finished_metrics(plan, storage, spec)), default=None)


def last_evaluated(plan: Plan, storage: Storage) -> float | None:
    """When the last evaluation of a sweep ended; None where there is none."""
    return max((metrics["time"] for spec in _specs(plan) for _, _, metrics in finished_metrics(plan, storage, spec)), default=None)


def _derived(plan: Plan, storage: Storage) -> SweepRecord:
    begun = [start for spec in _specs(plan) if (start := began(plan, storage, spec)) is not None]
    runs = [read_run(storage, run.run_key) or {} for run in plan.runs]
    ended = [run["finished"] for run in runs if run.get("finished")] + [time for time in [last_evaluated(plan, storage)] if time]
    is_done = all(run.get("status") == "finished" for run in runs) and all(
        storage.run(spec.run_key).is_evaluated(item.folder, step)
        for spec in _specs(plan)
        for step in (spec.checkpoint_steps if isinstance(spec, RunSpec) else [0])
        for item in plan.asked_of(spec)
    )
    status: Ending = "finished" if is_done else "failed" if any(run.get("status") == "failed" for run in runs) else "interrupted"
    return SweepRecord(min(begun, default=now()), status, max(ended, default=None))


def _specs(plan: Plan) -> Iterator[RunSpec | BaseSpec]:
    yield from plan.bases
    yield from plan.runs


def _file(plan: Plan, storage: Storage) -> Path:
    return storage.sweep(plan.sweep).ledger / "sweep.json"


def _write(plan: Plan, storage: Storage, record: SweepRecord) -> None:
    write_json(_file(plan, storage), asdict(record))


def _read(path: Path) -> SweepRecord | None:
    """None also for a damaged file: all but the exact times follows from the rest of storage."""
    try:
        return SweepRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
