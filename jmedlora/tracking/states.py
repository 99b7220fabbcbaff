"""What MLflow should say of a run's state, and where a run is to be seen: from plan and storage alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from jmedlora.plan.layout import Storage
from jmedlora.plan.records import Record, read_metrics, read_run, read_training
from jmedlora.plan.specs import BaseSpec, Plan, RunSpec

MlflowStatus = Literal["SCHEDULED", "RUNNING", "FINISHED", "FAILED", "KILLED"]
STATUS: dict[str, MlflowStatus] = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


@dataclass(frozen=True)
class State:
    """`ended`: seconds since the epoch, None for a run that has not ended."""

    status: MlflowStatus
    ended: float | None = None

    def once_over(self, ending: MlflowStatus, last: float | None) -> State:
        """A running one when nothing works on it any more: it failed, or was killed with its sweep.

        last: when the run was heard of for the last time.
        """
        return replace(self, status="KILLED" if ending == "KILLED" else "FAILED", ended=last)


def state_of_run(stored: Record | None) -> State:
    """From run.json."""
    if stored is None:
        return State("SCHEDULED")
    status = STATUS[stored["status"]]
    return State(status) if status == "RUNNING" else State(status, stored.get("finished"))


def state_of_base(plan: Plan, storage: Storage, base: BaseSpec) -> State:
    """A base is done with the last of its evaluations: nothing else tells its end."""
    stored = [read_metrics(storage, base.run_key, 0, item) for item in plan.asked_of(base)]
    times = [metrics["time"] for metrics in stored if metrics is not None]
    if not times:
        return State("SCHEDULED")
    return State("FINISHED", max(times)) if len(times) == len(stored) else State("RUNNING")


def last_heard(plan: Plan, storage: Storage, spec: RunSpec | BaseSpec) -> float | None:
    """When a run that is not over was heard of for the last time: its last optimizer step, or the last evaluation of a base."""
    if isinstance(spec, RunSpec):
        records = read_training(storage, spec.run_key)
        return records[-1]["time"] if records else (read_run(storage, spec.run_key) or {}).get("started")
    stored = [read_metrics(storage, spec.run_key, 0, item) for item in plan.asked_of(spec)]
    return max((metrics["time"] for metrics in stored if metrics is not None), default=None)


def shown_by(plan: Plan, run_key: str) -> list[str]:
    """The runs and bases whose children show the evaluations of one: itself and, of a base, the runs that start from it."""
    return [run_key, *(run.run_key for run in plan.runs if run.base_key == run_key)]
