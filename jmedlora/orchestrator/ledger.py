"""Who drives a sweep, and how far it is: both told from storage alone."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from jmedlora.config.clock import now
from jmedlora.plan.layout import Storage, SweepFolder
from jmedlora.plan.records import read_run, steps_of
from jmedlora.plan.retention import removed_but_asked
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, Plan, RunSpec


class HeldByAnother(Exception):
    """Another living driver works on the sweep; the message says which."""


@contextmanager
def driver_lock(folder: SweepFolder) -> Iterator[None]:
    """Holds the sweep for this process: an operating-system lock, so that a killed driver never blocks its rerun."""
    folder.ledger.mkdir(parents=True, exist_ok=True)
    with (folder.ledger / "driver.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise HeldByAnother(f"held by {file.read().strip() or 'a driver that has just started'}") from None
        _tell(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}")
        yield
        _tell(file.fileno(), "")


def _tell(file: int, holder: str) -> None:
    """For people who look; the lock holds without it, so that a full disk does no harm."""
    with suppress(OSError):
        os.ftruncate(file, 0)
        os.write(file, holder.encode())


@dataclass(frozen=True)
class Job:
    """One evaluation that is to be done: a checkpoint, or a bare base at step 0."""

    run_key: str
    step: int
    evaluation: EvaluationSpec
    base: BaseSpec


def all_jobs(plan: Plan) -> list[Job]:
    """Every evaluation of the plan: bases first, then run by run."""
    bases = {base.run_key: base for base in plan.bases}
    specs: list[BaseSpec | RunSpec] = [*plan.bases, *plan.runs]
    return [
        Job(spec.run_key, step, evaluation, bases[spec.base_key] if isinstance(spec, RunSpec) else spec)
        for spec in specs
        for step in steps_of(spec)
        for evaluation in plan.asked_of(spec)
    ]


def is_done(job: Job, storage: Storage) -> bool:
    return storage.run(job.run_key).is_evaluated(job.evaluation.folder, job.step)


def is_ready(job: Job, storage: Storage) -> bool:
    """True where the checkpoint is committed; a base needs none."""
    return job.step == 0 or storage.run(job.run_key).is_committed(job.step)


def run_status(run: RunSpec, storage: Storage) -> str:
    """waiting, running, interrupted, finished or failed; a finished run whose checkpoints are not all there counts as waiting.

    Checkpoints whose weights a keep rule has removed are there as far as this goes.
    """
    record = read_run(storage, run.run_key)
    if record is None:
        return "waiting"
    folder = storage.run(run.run_key)
    if record["status"] == "finished" and not all(folder.is_committed(step) for step in run.checkpoint_steps):
        return "waiting"
    return str(record["status"])


@dataclass(frozen=True)
class Standing:
    """Where a sweep stands."""

    runs: dict[str, list[str]]
    """status -> run keys."""
    errors: dict[str, str]
    """run key -> error of a failed run."""
    evaluations_done: int
    evaluations: int
    checkpoints: int
    """Checkpoints of the plan that are there, with their weights or without."""
    checkpoints_removed: int
    """Those of them whose weights a keep rule has removed."""

    @property
    def is_evaluated(self) -> bool:
        """True where every evaluation of the plan is done."""
        return self.evaluations_done == self.evaluations

    @property
    def is_complete(self) -> bool:
        return not any(keys for status, keys in self.runs.items() if status != "finished") and self.is_evaluated

    def as_json(self) -> str:
        return json.dumps(
            {
                "runs": self.runs,
                "errors": self.errors,
                "evaluations_done": self.evaluations_done,
                "evaluations": self.evaluations,
                "checkpoints": self.checkpoints,
                "checkpoints_removed": self.checkpoints_removed,
                "time": now(),
            },
            indent=2,
        )


def standing(plan: Plan, storage: Storage) -> Standing:
    """Counts what storage holds of a plan; a finished run of which a removed checkpoint is to be evaluated counts as waiting."""
    runs: dict[str, list[str]] = {"finished": [], "running": [], "interrupted": [], "waiting": [], "failed": []}
    errors = {}
    trained_again = removed_but_asked(plan, storage)
    checkpoints = removed = 0
    for run in plan.runs:
        status = run_status(run, storage)
        runs["waiting" if status == "finished" and run.run_key in trained_again else status].append(run.run_key)
        if status == "failed":
            errors[run.run_key] = str((read_run(storage, run.run_key) or {}).get("error"))
        folder = storage.run(run.run_key)
        checkpoints += sum(map(folder.is_committed, run.checkpoint_steps))
        removed += sum(map(folder.is_removed, run.checkpoint_steps))
    jobs = all_jobs(plan)
    return Standing(runs, errors, sum(is_done(job, storage) for job in jobs), len(jobs), checkpoints, removed)
