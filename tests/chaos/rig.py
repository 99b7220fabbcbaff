"""A simulated cluster: what the program asks of Ray, answered by the processes of a world.

The driver, the trials, the evaluation pool and the actors are the program's own classes; what stands in for Ray is below.
"""

from __future__ import annotations

import random
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError

from jmedlora.config import clock
from jmedlora.data import patience
from jmedlora.evaluation import evaluator, journal, making
from jmedlora.orchestrator import driver, evaluation_pool, stopping, trials
from jmedlora.orchestrator.errors import last_line
from jmedlora.orchestrator.evaluation_queue import EvaluationQueue
from jmedlora.orchestrator.ledger import Job, run_status
from jmedlora.orchestrator.scheduling import trial_of_what_is_left
from jmedlora.orchestrator.tracker_actor import TrackerActor
from jmedlora.orchestrator.trials import SweepContext, run_trial
from jmedlora.plan import lease
from jmedlora.plan.layout import RunFolder, Storage
from jmedlora.plan.records import Record
from jmedlora.plan.specs import RunSpec, TrialSpec
from jmedlora.report import writer as report_writer
from jmedlora.tracking import mlflow_tracker, writer
from jmedlora.training import loop
from jmedlora.training.loop import train_trial
from tests.chaos.mlflow_server import Line
from tests.chaos.work import Work
from tests.chaos.world import FOREVER_S, Process, World

RETRIES = 3
"""Times that a result is asked for whose actor died; the driver asks for that of the tracker alone."""


class Ref:
    """A result that is to come."""

    def __init__(self, actor: Actor, name: str, arguments: tuple[Any, ...]):
        self.again = lambda: actor.call(name, arguments)
        """Asks once more, for which an actor that died is started anew."""
        self._process = actor.process
        self._outcome: tuple[Any, Exception | None] | None = None
        self.waiting: list[Process] = []

    def settle(self, value: Any, error: Exception | None) -> None:
        self._outcome = (value, error)
        for process in self.waiting:
            process.wakes_at = 0.0

    @property
    def is_done(self) -> bool:
        return self._outcome is not None or self.is_lost

    @property
    def is_lost(self) -> bool:
        """True where nobody is left to give the result."""
        return self._outcome is None and (self._process.is_dead or self._process.is_over)

    def get(self) -> Any:
        if self._outcome is None:
            raise ActorDiedError()
        value, error = self._outcome
        if error is not None:
            raise RayTaskError("call", str(error), error).as_instanceof_cause()
        return value


class Actor:
    """A simulated actor; any attribute is a method of it, to be called by `.remote(...)`, one call after another."""

    def __init__(self, world: World, kind: str, make: Callable[[], Any], restarts: int = 0):
        self._world, self._kind, self._make, self._restarts = world, kind, make, restarts
        self._parent = world.current
        self._start()

    def _start(self) -> None:
        self._calls: deque[tuple[Ref, str, tuple[Any, ...]]] = deque()
        self.process = self._world.start(self._kind, self._serve, self._parent)

    def _serve(self) -> None:
        calls = self._calls  # what an earlier life was asked is lost
        instance = self._make()
        while True:
            while not calls:
                self._world.sleep(FOREVER_S)
            ref, name, arguments = calls.popleft()
            try:
                ref.settle(getattr(instance, name)(*arguments), None)
            except Exception as error:
                ref.settle(None, error)

    @property
    def is_idle(self) -> bool:
        return not self._calls and self.process.wakes_at == FOREVER_S

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *arguments: self.call(name, arguments))

    def call(self, name: str, arguments: tuple[Any, ...]) -> Ref:
        self._world.operation("call")
        if (self.process.is_dead or self.process.is_over) and self._restarts:
            self._restarts -= 1
            self._start()
        ref = Ref(self, name, arguments)
        self._calls.append((ref, name, arguments))
        self.process.wakes_at = 0.0
        return ref


class SimulatedRay:
    """The functions of the module `ray` that the program calls."""

    def __init__(self, world: World):
        self._world = world

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def nodes() -> list[dict[str, Any]]:
        return [{"Alive": True}]

    @staticmethod
    def cluster_resources() -> dict[str, float]:
        return {"CPU": 4.0}

    def wait(self, refs: Sequence[Ref], timeout: float) -> tuple[list[Ref], list[Ref]]:
        process = self._world.current
        assert process is not None
        if timeout and not any(ref.is_done for ref in refs):
            for ref in refs:
                ref.waiting.append(process)
            self._world.sleep(timeout)
            for ref in refs:
                ref.waiting.remove(process)
        return [ref for ref in refs if ref.is_done], [ref for ref in refs if not ref.is_done]

    def get(self, ref: Ref, timeout: float = FOREVER_S) -> Any:
        deadline = self._world.seconds + timeout
        for _ in range(RETRIES):
            while not ref.is_done and self._world.seconds < deadline:
                self.wait([ref], 5.0)
            if not ref.is_lost:
                break
            ref = ref.again()
        if not ref.is_done:
            raise GetTimeoutError
        return ref.get()

    @staticmethod
    def kill(actor: Actor) -> None:
        actor.process.kill()


class Cluster:
    """What a driver finds in the world: Ray, trials, workers, evaluation actors."""

    def __init__(self, world: World, work: Work, mlflow: Any):
        self.world, self.work = world, work
        self.ray = SimulatedRay(world)
        self._mlflow = mlflow
        self._poll_s = work.step_s / 2
        self.leaving: set[Process] = set()
        """Workers that were asked to go."""
        self.stoppable: dict[Process, Callable[[], None]] = {}
        """How to ask a driver to stop."""
        self._in_hand: dict[Process, dict[str, RunFolder]] = {}
        self._actors: list[Actor] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within, the program's modules use this cluster, its clock, and work that costs nothing."""
        world, work, ids = self.world, self.work, random.Random(0)
        threads = SimulatedThreading(world, self._poll_s)
        real_closing = writer._Closing

        def closing(*arguments: Any) -> Any:
            made = real_closing(*arguments)
            made.is_done = threads.Event()
            return made

        actors = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._evaluation_actor))
        replaced: list[tuple[Any, dict[str, Any]]] = [
            (uuid, {"uuid4": lambda: uuid.UUID(int=ids.getrandbits(128), version=4)}),
            (clock, {"time": world}),
            (driver, {"ray": self.ray, "threading": threads, "ProgressDisplay": lambda *_: nullcontext()}),
            (driver, {"joined_ray": lambda *_: nullcontext(), "check_cluster": lambda *_: None}),
            (driver, {"graceful": self._graceful, "TrackerActor": SimpleNamespace(remote=self._tracker)}),
            (driver._Driver, {"_train": _train(self)}),
            (trials, {"ray": self.ray, "time": world, "POLL_S": self._poll_s, "tune": SimpleNamespace(report=lambda _: None)}),
            (trials._Trial, {"_start_group": _start_group(self)}),
            (evaluation_pool, {"ray": self.ray, "time": world, "POLL_S": self._poll_s, "EvaluationActor": actors}),
            (writer, {"threading": threads, "time": world, "_Closing": closing}),
            (mlflow_tracker, {"MlflowClient": lambda tracking_uri: Line(world, self._mlflow), "make_database": lambda uri: None}),
            (report_writer, dict.fromkeys(("page_html", "claims_json", "measuring_json"), lambda *_: "")),  # which no table needs
            (report_writer, dict.fromkeys(("judge_claims", "measure"), lambda *_: SimpleNamespace(answers=None))),
            (EvaluationQueue, {"_is_whole": self._is_whole(EvaluationQueue._is_whole)}),
            (making, {"make_evaluator": work.make_evaluator}),
            (stopping, {"time": world}),
            (evaluator, {"time": world}),
            (journal, {"time": world}),
            (lease, {"time": world, "_POLL_S": self._poll_s}),
            (patience, {"time": world}),
            (loop, {"time": world, "this_worker": work.this_worker, "target_modules": work.target_modules}),
            (loop, {"dist": SimpleNamespace(broadcast_object_list=lambda *_, **__: None)}),
            (loop, {"training_pack": work.training_pack, "TrainingSet": work.TrainingSet}),
            (loop._Trial, {"_load": work.load_base}),
        ]
        with ExitStack() as stack, world.hooks():
            for module, names in replaced:
                stack.enter_context(patch.multiple(module, **names))
            yield

    # -- what stands in for parts of the program that are Ray's

    @contextmanager
    def _graceful(self, ask: Callable[[], None]) -> Iterator[None]:
        process = self.world.current
        assert process is not None
        self.stoppable[process] = ask
        yield
        self.stoppable.pop(process, None)

    def _tracker(self, *arguments: Any) -> Actor:
        return self._actor("tracker", lambda: _TRACKER(*arguments), restarts=5)

    def _evaluation_actor(self, name: str, root: str, sources: str, offline: bool, threads: int, *rest: Any) -> Actor:
        return self._actor("evaluation actor", lambda: _EVALUATION_ACTOR(name, root, sources, offline, 0, *rest))

    def _actor(self, kind: str, make: Callable[[], Any], restarts: int = 0) -> Actor:
        self._actors.append(Actor(self.world, kind, make, restarts))
        return self._actors[-1]

    def _is_whole(self, real: Callable[..., bool]) -> Callable[..., bool]:
        """Notes that a checkpoint was read before a result is copied to it."""

        def is_whole(queue: EvaluationQueue, job: Job) -> bool:
            self.work.opened.add(queue._storage.run(job.run_key).checkpoint(job.step))
            return real(queue, job)

        return is_whole

    def listener(self, context: SweepContext) -> _Listener:
        """For a worker."""
        assert self.world.current is not None
        return _Listener(context.tracker, context.storage, self._in_hand.setdefault(self.world.current, {}))

    # -- what faults ask

    def is_busy(self, process: Process) -> bool:
        """False for an actor that waits for something to do."""
        return not any(actor.process is process and actor.is_idle for actor in self._actors)

    def folders_in_hand(self, process: Process) -> list[RunFolder]:
        """The runs that a worker trains now."""
        return list(self._in_hand.get(process, {}).values())


class SimulatedThreading:
    """What stands in for the module `threading`: a thread is a process that goes with the one that started it."""

    def __init__(self, world: World, poll_s: float):
        self._world, self._poll_s = world, poll_s

    def Thread(self, target: Callable[..., Any], args: tuple[Any, ...] = (), name: str = "pool", daemon: bool = True) -> SimpleNamespace:
        started: list[Process] = []

        def join() -> None:
            while not started[0].is_over:
                self._world.sleep(self._poll_s)

        parent = self._world.current
        return SimpleNamespace(start=lambda: started.append(self._world.start(name, lambda: target(*args), parent)), join=join)

    def Event(self) -> SimpleNamespace:
        is_set: list[bool] = []

        def wait(seconds: float) -> bool:
            if not is_set:
                self._world.sleep(max(seconds, self._poll_s))
            return bool(is_set)

        return SimpleNamespace(set=lambda: is_set.append(True), is_set=lambda: bool(is_set), wait=wait)

    def Condition(self) -> _Condition:
        return _Condition(self._world)


class _Condition:
    """Nobody else goes on before the holder waits, so that there is nothing to lock."""

    def __init__(self, world: World):
        self._world = world
        self._waiting: list[Process] = []

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait(self, seconds: float | None) -> None:
        process = self._world.current
        assert process is not None
        self._waiting.append(process)
        self._world.sleep(FOREVER_S if seconds is None else seconds)
        self._waiting.remove(process)

    def notify(self) -> None:
        for process in self._waiting:
            process.wakes_at = 0.0


_TRACKER = TrackerActor.__ray_metadata__.modified_class  # type: ignore[attr-defined]
_EVALUATION_ACTOR = evaluation_pool.EvaluationActor.__ray_metadata__.modified_class  # type: ignore[attr-defined]


def _train(cluster: Cluster) -> Callable[..., list[str]]:
    """In place of Tune: as many trials at once as there are lanes; a trial whose driver dies is begun again."""
    world = cluster.world

    def train(self: Any, waiting: list[TrialSpec], lanes: int) -> list[str]:
        waiting, problems = list(waiting), []
        lives: dict[Process, tuple[TrialSpec, int]] = {}
        parent = world.current

        def start(trial: TrialSpec, deaths: int) -> None:
            process = world.start("trial", lambda: run_trial({"trial_id": trial.trial_id}, self.context), parent)
            lives[process] = (trial, deaths)

        while lives or waiting:
            while waiting and len(lives) < lanes and not self.marker.is_set():
                start(waiting.pop(0), 0)
            if not lives:
                break
            world.sleep(cluster.work.step_s)
            for process in [process for process in lives if process.is_over]:
                trial, deaths = lives.pop(process)
                if (process.is_dead or process.error) and deaths < driver.TRIAL_DRIVER_DEATHS:
                    start(trial, deaths + 1)
                elif (process.is_dead or process.error) and not any(run_status(run, self.storage) == "failed" for run in trial.runs):
                    problems.append(f"trial of {trial.trial_id}: {last_line(process.error)}")
        return problems

    return train


def _start_group(cluster: Cluster) -> Callable[..., list[tuple[str, str, str | None]]]:
    """In place of Ray Train: a worker group of one process."""
    world = cluster.world

    def start_group(self: Any, runs: list[RunSpec]) -> list[tuple[str, str, str | None]]:
        context: SweepContext = self._context
        trial = trial_of_what_is_left(self._trial, runs, self._failed)
        for run in runs[: trial.pack]:
            context.tracker.run_starting.remote(run.run_key)
        started: list[Process] = []

        def should_stop() -> bool:
            return context.marker.is_set() or started[0] in cluster.leaving

        def work() -> list[tuple[str, str, str | None]]:
            outcomes = train_trial(trial, context.storage, world.root, True, cluster.listener(context), should_stop=should_stop, hints={})
            return [(outcome.run_key, outcome.status, outcome.error) for outcome in outcomes]

        started.append(world.start("worker", work, world.current))
        while not started[0].is_over:
            world.sleep(cluster.work.step_s / 2)
        if started[0].error is not None:
            raise started[0].error
        if started[0].is_dead:
            raise RuntimeError("the worker died")
        return started[0].value

    return start_group


class _Listener:
    """Passes on what the training loop tells, and notes the runs that a worker has in its hands."""

    def __init__(self, tracker: Any, storage: Storage, in_hand: dict[str, RunFolder]):
        self._tracker, self._storage, self._in_hand = tracker, storage, in_hand

    def on_run_start(self, run_key: str, total_steps: int) -> None:
        self._in_hand[run_key] = self._storage.run(run_key)
        self._tracker.run_started.remote(run_key, total_steps)

    def on_step(self, run_key: str, record: Record) -> None:
        self._tracker.train_steps.remote(run_key, [record])

    def on_checkpoint(self, run_key: str, step: int) -> None:
        """The pool finds it in storage."""

    def on_run_end(self, run_key: str, status: str, error: str | None) -> None:
        self._in_hand.pop(run_key, None)
        self._tracker.run_ended.remote(run_key, status, error)
