"""The actors that evaluate: started, fed from the queue, replaced when they die."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from jmedlora.config.faults import first_line
from jmedlora.config.parts import ResourcesConfig
from jmedlora.evaluation.journal import journal_progress
from jmedlora.orchestrator.environment import ON_HEAD, worker_environment
from jmedlora.orchestrator.errors import refusals, told
from jmedlora.orchestrator.evaluation_lease import evaluation_lease
from jmedlora.orchestrator.evaluation_queue import EvaluationQueue, JobId, is_api
from jmedlora.orchestrator.ledger import Job
from jmedlora.plan.layout import Storage
from jmedlora.plan.records import Record, read_metrics
from jmedlora.plan.specs import BaseSpec, EvaluationSpec

if TYPE_CHECKING:
    from jmedlora.evaluation.making import AnyEvaluator

POLL_S = 0.5


@ray.remote
class EvaluationActor:
    """Holds one resident base model; takes another in its place when asked for one."""

    def __init__(self, name: str, storage_root: str, sources: str, offline: bool, threads: int, tracker: ActorHandle):
        if threads:  # an actor that only asks elsewhere needs no torch
            import torch  # here, and not at the top: the driver of a sweep needs none either

            torch.set_num_threads(threads)
        self._name = name
        self._storage, self._sources, self._offline = Storage(Path(storage_root)), Path(sources), offline
        self._tracker = tracker
        self._resident = ""
        self._evaluator: AnyEvaluator | None = None

    def evaluate(self, base: BaseSpec, run_key: str, step: int, evaluation: EvaluationSpec, what: str) -> Record:
        """Scores one checkpoint (or the base at step 0), stores and tracks the result. Raises EvaluatedElsewhere."""
        from jmedlora.evaluation.making import make_evaluator

        self._tracker.evaluation_started.remote(self._name, what)
        metrics: Record | None = None
        try:
            with refusals(), evaluation_lease(self._storage, run_key, step, evaluation):
                if (metrics := read_metrics(self._storage, run_key, step, evaluation)) is not None:
                    return metrics  # another sweep has just done it
                if self._evaluator is None or self._resident != base.run_key:
                    self._evaluator = None  # the old model's memory is freed before the new one is loaded
                    self._evaluator = make_evaluator(base, self._sources, self._offline)
                    self._resident = base.run_key
                metrics = self._evaluator.evaluate(run_key, step, evaluation, self._storage)
            return metrics
        finally:
            self._tracker.evaluation_ended.remote(self._name, metrics)


@dataclass
class _Slot:
    """A place for one actor, and what it is doing."""

    name: str
    behind_address: bool = False
    """For models behind an address: it waits for answers, beside the actors that compute."""
    actor: ActorHandle | None = None
    job: Job | None = None
    result: Any = None
    resident: str = ""
    run_key: str = ""


@dataclass
class EvaluationPool:
    """Feeds jobs to actors as their checkpoints are committed."""

    jobs: list[Job]
    storage: Storage
    sources: Path
    offline: bool
    resources: ResourcesConfig
    tracker: ActorHandle
    names: dict[str, str]
    actors: int
    cpus: float
    gpus: float

    def __post_init__(self) -> None:
        self._slots = [_Slot(f"evaluation-{i}-{uuid.uuid4().hex[:6]}") for i in range(self.actors)]
        if any(map(is_api, self.jobs)):
            self._slots.append(_Slot(f"evaluation-api-{uuid.uuid4().hex[:6]}", behind_address=True))
        self._queue = EvaluationQueue(self.jobs, self.storage)

    @property
    def failures(self) -> dict[JobId, str]:
        """What could not be evaluated, and why."""
        return self._queue.failures

    def serve(self, more_to_come: Callable[[], bool], stopping: Callable[[], bool] = lambda: False) -> None:
        """Works until nothing is ready and `more_to_come` says that no checkpoint will follow; then the actors end.

        Once `stopping` says so, nothing is begun, and the actors end with what they are at: it is gone on with at the next start.
        """
        try:
            while not stopping():
                last_round = not more_to_come()
                self._queue.look()
                self._assign()
                running = [slot.result for slot in self._slots if slot.job is not None]
                if running:
                    ray.wait(running, timeout=POLL_S)
                    self._collect()
                elif last_round and not self._queue.has_ready:
                    return
                else:
                    time.sleep(POLL_S)
        finally:
            for slot in self._slots:
                self._end(slot)

    def _assign(self) -> None:
        for slot in self._slots:
            if slot.job is None and (job := self._queue.take(slot.resident, slot.run_key, slot.behind_address)):
                self._start(slot, job)
        for metrics in self._queue.settled():
            self.tracker.evaluation_ended.remote("", metrics)

    def _start(self, slot: _Slot, job: Job) -> None:
        if slot.actor is None:
            threads = 0 if slot.behind_address else max(1, round(self.resources.evaluation.cpus))
            # keys of addresses are in the environment of the head, and nowhere else
            place = {"num_cpus": 0, "resources": ON_HEAD} if slot.behind_address else {"num_cpus": self.cpus, "num_gpus": self.gpus}
            slot.actor = EvaluationActor.options(  # type: ignore[attr-defined]
                **place, runtime_env={"env_vars": worker_environment(self.resources, max(1, threads), self.offline)}
            ).remote(slot.name, str(self.storage.root), str(self.sources), self.offline, threads, self.tracker)
        evaluation = job.evaluation
        asked = f"{evaluation.benchmark.name} {evaluation.shots}-shot {evaluation.prompt.name} {evaluation.scoring}"
        what = f"{self.names[job.run_key]} step {job.step} {asked}"
        slot.job, slot.resident, slot.run_key = job, job.base.run_key, job.run_key
        slot.result = slot.actor.evaluate.remote(job.base, job.run_key, job.step, evaluation, what)

    def _collect(self) -> None:
        for slot in self._slots:
            if slot.job is None or not ray.wait([slot.result], timeout=0)[0]:
                continue
            job, slot.job = slot.job, None
            try:
                self._queue.finished(job, ray.get(slot.result))
            except RayTaskError as error:
                self._refused(slot, job, error.cause)
            except RayError as death:  # killed, out of memory, or its node is gone
                self._end(slot)
                self.tracker.evaluation_ended.remote(slot.name, None)
                progress = journal_progress(self.storage, job.run_key, job.step, job.evaluation)
                self._queue.died(job, _death(death, job), progress)
            slot.result = None

    def _refused(self, slot: _Slot, job: Job, error: BaseException) -> None:
        """An evaluation raised an error, which trying again would meet again, unless another sweep is at it."""
        kinds = {kind.__name__ for kind in type(error).__mro__}  # by name: the driver of a sweep has no torch
        if "EvaluatedElsewhere" in kinds:
            self._queue.postponed(job)
            time.sleep(POLL_S)
        elif "AdapterDamaged" in kinds:
            self._queue.damaged(job, told(error))
        elif "OutOfMemoryError" in kinds:
            self._end(slot)  # the next evaluation finds the GPU's memory free and in one piece
            helps = "fewer shots, a quantised model or a GPU with more of it would help"
            self._queue.failed(job, f"memory does not suffice for the model and one prompt: {helps} ({told(error)})")
        else:
            self._queue.failed(job, told(error))

    def _end(self, slot: _Slot) -> None:
        if slot.actor is not None:
            ray.kill(slot.actor)
        slot.actor, slot.resident, slot.run_key = None, "", ""


def _death(death: RayError, job: Job) -> str:
    if isinstance(death, OutOfMemoryError):
        batch = job.evaluation.batch_size
        return f"the node ran out of memory: evaluate.batch_size below {batch}, fewer evaluation actors or more memory would help"
    return f"the evaluation actor died: {first_line(death)}"
