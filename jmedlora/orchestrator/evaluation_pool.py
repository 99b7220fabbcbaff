"""The actors that evaluate: started, fed from the queue, replaced when they die."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from jmedlora.config.faults import first_line
from jmedlora.config.parts import EvaluationResources, ResourcesConfig
from jmedlora.evaluation.journal import journal_progress
from jmedlora.evaluation.results import Checkpoint
from jmedlora.orchestrator.environment import ON_HEAD, worker_environment
from jmedlora.orchestrator.errors import refusals, told
from jmedlora.orchestrator.evaluation_lease import EvaluatedElsewhere, evaluation_lease
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

    def __init__(
        self,
        name: str,
        storage_root: str,
        sources: str,
        offline: bool,
        threads: int,
        tracker: ActorHandle,
        resources: EvaluationResources,
        at_once: int,
    ):
        if threads:  # an actor that only asks elsewhere needs no torch
            import torch  # here, and not at the top: the driver of a sweep needs none either

            torch.set_num_threads(threads)
        self._name = name
        self._storage, self._sources, self._offline = Storage(Path(storage_root)), Path(sources), offline
        self._tracker = tracker
        self._resources, self._at_once = resources, at_once
        self._resident = ""
        self._evaluator: AnyEvaluator | None = None

    def evaluate(self, base: BaseSpec, checkpoints: Sequence[Checkpoint], evaluation: EvaluationSpec, what: str) -> list[Record | Trouble]:
        """Scores checkpoints at once (or the base at step 0), stores and tracks the results; of each its metrics, or what is wrong.

        What is wrong with all of them is raised.
        """
        self._tracker.evaluation_started.remote(self._name, what)
        outcomes: dict[Checkpoint, Record | Trouble] = {}
        try:
            with refusals(), ExitStack() as leases:
                waiting = []
                for checkpoint in checkpoints:
                    try:
                        leases.enter_context(evaluation_lease(self._storage, *checkpoint, evaluation))
                    except EvaluatedElsewhere as held:
                        outcomes[checkpoint] = Trouble.of(held)
                        continue
                    if (metrics := read_metrics(self._storage, *checkpoint, evaluation)) is not None:
                        outcomes[checkpoint] = metrics  # another sweep has just done it
                    else:
                        waiting.append(checkpoint)
                if waiting:
                    scored = self._resident_evaluator(base).evaluate_together(waiting, evaluation, self._storage, len(waiting))
                    told = (Trouble.of(outcome) if isinstance(outcome, Exception) else outcome for outcome in scored)
                    outcomes |= zip(waiting, told, strict=True)
            return [outcomes[checkpoint] for checkpoint in checkpoints]
        finally:
            self._tracker.evaluation_ended.remote(self._name, None)
            for outcome in outcomes.values():
                if not isinstance(outcome, Trouble):
                    self._tracker.evaluation_ended.remote(self._name, outcome)

    def _resident_evaluator(self, base: BaseSpec) -> AnyEvaluator:
        from jmedlora.evaluation.making import make_evaluator

        if self._evaluator is None or self._resident != base.run_key:
            self._evaluator = None  # the old model's memory is freed before the new one is loaded
            self._evaluator = make_evaluator(base, self._sources, self._offline, self._resources, self._at_once)
            self._resident = base.run_key
        return self._evaluator


class Trouble(NamedTuple):
    """Why an evaluation has no result, in words alone: the driver of a sweep has no torch, of which an error may be."""

    kinds: frozenset[str]
    """Names of the error's type and of what that is derived from."""
    told: str

    @classmethod
    def of(cls, error: BaseException) -> Trouble:
        return cls(frozenset(kind.__name__ for kind in type(error).__mro__), told(error))


@dataclass
class _Slot:
    """A place for one actor, and what it is doing."""

    name: str
    behind_address: bool = False
    """For models behind an address: it waits for answers, beside the actors that compute."""
    actor: ActorHandle | None = None
    jobs: list[Job] = field(default_factory=list)
    """Of one base and with the same evaluation."""
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
    at_once: int = 1
    """How many adapters are evaluated at once, at most; with 1 all is as if there were no packs."""

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
                running = [slot.result for slot in self._slots if slot.jobs]
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
            if not slot.jobs and (jobs := self._queue.take(slot.resident, slot.run_key, slot.behind_address, self.at_once)):
                self._start(slot, jobs)
        for metrics in self._queue.settled():
            self.tracker.evaluation_ended.remote("", metrics)

    def _start(self, slot: _Slot, jobs: list[Job]) -> None:
        if slot.actor is None:
            threads = 0 if slot.behind_address else max(1, round(self.resources.evaluation.cpus))
            # keys of addresses are in the environment of the head, and nowhere else
            place = {"num_cpus": 0, "resources": ON_HEAD} if slot.behind_address else {"num_cpus": self.cpus, "num_gpus": self.gpus}
            slot.actor = EvaluationActor.options(  # type: ignore[attr-defined]
                **place, runtime_env={"env_vars": worker_environment(self.resources, max(1, threads), self.offline)}
            ).remote(
                slot.name,
                str(self.storage.root),
                str(self.sources),
                self.offline,
                threads,
                self.tracker,
                self.resources.evaluation,
                self.at_once,
            )
        first = jobs[0]
        evaluation = first.evaluation
        more = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
        asked = f"{evaluation.benchmark.name} {evaluation.shots}-shot {evaluation.prompt.name} {evaluation.scoring}"
        what = f"{self.names[first.run_key]} step {first.step}{more} {asked}"
        slot.jobs, slot.resident, slot.run_key = jobs, first.base.run_key, first.run_key
        slot.result = slot.actor.evaluate.remote(first.base, [Checkpoint(job.run_key, job.step) for job in jobs], evaluation, what)

    def _collect(self) -> None:
        for slot in self._slots:
            if not slot.jobs or not ray.wait([slot.result], timeout=0)[0]:
                continue
            jobs, slot.jobs = slot.jobs, []
            try:
                self._settle(slot, jobs, ray.get(slot.result))
            except RayTaskError as error:
                self._refused(slot, jobs, Trouble.of(error.cause))
            except RayError as death:  # killed, out of memory, or its node is gone
                self._end(slot)
                self.tracker.evaluation_ended.remote(slot.name, None)
                for job in jobs:
                    progress = journal_progress(self.storage, job.run_key, job.step, job.evaluation)
                    self._queue.died(job, _death(death, job), progress, in_company=len(jobs) > 1)
            slot.result = None

    def _settle(self, slot: _Slot, jobs: Sequence[Job], outcomes: Sequence[Record | Trouble]) -> None:
        for job, outcome in zip(jobs, outcomes, strict=True):
            if isinstance(outcome, Trouble):
                self._refused(slot, [job], outcome)
            else:
                self._queue.finished(job, outcome)

    def _refused(self, slot: _Slot, jobs: Sequence[Job], trouble: Trouble) -> None:
        """Evaluations met an error, which trying again would meet again, unless another sweep is at it, or it is one of several's."""
        if "OutOfMemoryError" in trouble.kinds:
            self._end(slot)  # the next evaluation finds the GPU's memory free and in one piece
        if len(jobs) > 1:
            self._queue.apart(jobs)
            return
        [job] = jobs
        if "EvaluatedElsewhere" in trouble.kinds:
            self._queue.postponed(job)
            time.sleep(POLL_S)
        elif "AdapterDamaged" in trouble.kinds:
            self._queue.damaged(job, trouble.told)
        elif "OutOfMemoryError" in trouble.kinds:
            helps = "fewer shots, a quantised model or a GPU with more of it would help"
            self._queue.failed(job, f"memory does not suffice for the model and one prompt: {helps} ({trouble.told})")
        else:
            self._queue.failed(job, trouble.told)

    def _end(self, slot: _Slot) -> None:
        if slot.actor is not None:
            ray.kill(slot.actor)
        slot.actor, slot.resident, slot.run_key = None, "", ""


def _death(death: RayError, job: Job) -> str:
    if isinstance(death, OutOfMemoryError):
        batch = job.evaluation.batch_size
        return f"the node ran out of memory: evaluate.batch_size below {batch}, fewer evaluation actors or more memory would help"
    return f"the evaluation actor died: {first_line(death)}"
