"""Evaluation actors and the queue that feeds them, derived from storage: committed checkpoints x evaluations - finished."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from jmedlora.config.faults import first_line
from jmedlora.config.parts import ResourcesConfig
from jmedlora.evaluation.reuse import adopt_evaluation
from jmedlora.orchestrator.environment import ON_HEAD, worker_environment
from jmedlora.orchestrator.errors import refusals, told
from jmedlora.orchestrator.ledger import Job, is_done, is_ready
from jmedlora.plan.layout import Storage
from jmedlora.plan.records import Record
from jmedlora.plan.specs import BaseSpec, EvaluationSpec

if TYPE_CHECKING:
    from jmedlora.evaluation.making import AnyEvaluator

MAX_ATTEMPTS = 3
"""Times that an evaluation is begun again after its actor died."""
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
        """Scores one checkpoint (or the base at step 0), stores and tracks the result."""
        from jmedlora.evaluation.making import make_evaluator

        self._tracker.evaluation_started.remote(self._name, what)
        metrics: Record | None = None
        try:
            with refusals():
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
    is_api: bool = False
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
    failures: dict[tuple[str, int, str], str] = field(default_factory=dict)
    """What could not be evaluated, and why."""

    def __post_init__(self) -> None:
        self._slots = [_Slot(f"evaluation-{i}-{uuid.uuid4().hex[:6]}") for i in range(self.actors)]
        if any(_is_api(job) for job in self.jobs):
            self._slots.append(_Slot(f"evaluation-api-{uuid.uuid4().hex[:6]}", is_api=True))
        self._waiting = {_job_id(job): job for job in self.jobs if not is_done(job, self.storage)}
        self._attempts: dict[tuple[str, int, str], int] = {}
        self._computed: dict[tuple[str, str, str], tuple[str, int]] = {}
        for job in self.jobs:
            if job.step and is_done(job, self.storage) and is_ready(job, self.storage):
                self._computed[self._content(job)] = (job.run_key, job.step)

    def serve(self, more_to_come: Callable[[], bool]) -> None:
        """Works until nothing is ready and `more_to_come` says that no checkpoint will follow; then the actors end."""
        try:
            while True:
                last_round = not more_to_come()
                self._assign()
                running = [slot for slot in self._slots if slot.result is not None]
                if running:
                    ray.wait([slot.result for slot in running], timeout=POLL_S)
                    self._collect()
                elif last_round and not self._ready():
                    return
                else:
                    time.sleep(POLL_S)
        finally:
            for slot in self._slots:
                self._end(slot)

    # -- queue

    def _ready(self) -> list[Job]:
        busy = {_job_id(slot.job) for slot in self._slots if slot.job}
        return [job for key, job in self._waiting.items() if key not in busy and is_ready(job, self.storage)]

    def _assign(self) -> None:
        in_flight = {self._content(slot.job) for slot in self._slots if slot.job and slot.job.step}
        ready = []
        for job in self._ready():
            content = self._content(job) if job.step else None
            if content is not None and content in self._computed:
                metrics = adopt_evaluation(self.storage, job.evaluation, self._computed[content], (job.run_key, job.step))
                self.tracker.evaluation_ended.remote("", metrics)
                self._waiting.pop(_job_id(job))
            elif content is None or content not in in_flight:
                ready.append(job)
                if content is not None:
                    in_flight.add(content)
        for slot in self._slots:
            fitting = [job for job in ready if _is_api(job) == slot.is_api]
            if slot.job is None and fitting:
                job = min(fitting, key=lambda job: (job.base.run_key != slot.resident, job.run_key != slot.run_key))
                ready.remove(job)
                self._start(slot, job)

    def _content(self, job: Job) -> tuple[str, str, str]:
        """What an evaluation depends on: equal adapters on an equal base are scored once."""
        from jmedlora.models.adapters import adapter_digest

        folder = self.storage.run(job.run_key).checkpoint(job.step)
        return job.base.run_key, adapter_digest(folder), job.evaluation.evaluation_key

    # -- actors

    def _start(self, slot: _Slot, job: Job) -> None:
        if slot.actor is None:
            threads = 0 if slot.is_api else max(1, round(self.resources.evaluation.cpus))
            # keys of addresses are in the environment of the head, and nowhere else
            place = {"num_cpus": 0, "resources": ON_HEAD} if slot.is_api else {"num_cpus": self.cpus, "num_gpus": self.gpus}
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
            job, key = slot.job, _job_id(slot.job)
            slot.job = None
            try:
                ray.get(slot.result)
                self._waiting.pop(key)
                if job.step:
                    self._computed[self._content(job)] = (job.run_key, job.step)
            except RayTaskError as error:
                if is_ready(job, self.storage):  # else its run has started over, and the checkpoint will come again
                    self._fail(key, told(error.cause))
            except RayError as death:  # killed, out of memory, or its node is gone
                self._end(slot)
                self._attempts[key] = self._attempts.get(key, 0) + 1
                if self._attempts[key] >= MAX_ATTEMPTS:
                    self._fail(key, f"the evaluation actor died {MAX_ATTEMPTS} times: {first_line(death)}")
            slot.result = None

    def _fail(self, key: tuple[str, int, str], why: str) -> None:
        self._waiting.pop(key)
        self.failures[key] = why

    def _end(self, slot: _Slot) -> None:
        if slot.actor is not None:
            ray.kill(slot.actor)
        slot.actor, slot.resident, slot.run_key = None, "", ""


def _is_api(job: Job) -> bool:
    return job.base.precision == "api"


def _job_id(job: Job) -> tuple[str, int, str]:
    return job.run_key, job.step, job.evaluation.folder
