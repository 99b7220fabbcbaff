"""One Ray Tune trial = Ray Train worker groups, one after another if need be, that train a list of runs.

Ray Train and torch are imported where they are used: the driver of a sweep, which imports this, needs neither.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle

from jmedlora.config.clock import now
from jmedlora.config.faults import is_out_of_memory
from jmedlora.config.parts import ResourcesConfig
from jmedlora.data.atomic import write_json
from jmedlora.orchestrator.environment import worker_environment
from jmedlora.orchestrator.errors import is_refusal, last_line
from jmedlora.orchestrator.evaluation_pool import EvaluationPool
from jmedlora.orchestrator.ledger import all_jobs, run_status
from jmedlora.orchestrator.places import free_abandoned_places
from jmedlora.orchestrator.scheduling import Retries, progress_mark, trial_of_what_is_left
from jmedlora.orchestrator.stopping import StopMarker
from jmedlora.plan.layout import Storage
from jmedlora.plan.lease import is_held
from jmedlora.plan.records import read_run
from jmedlora.plan.specs import Plan, RunSpec, TrialSpec

POLL_S = 1.0
WAIT_FOR_PLACE_S = 7 * 24 * 3600
"""How long workers may wait until the cluster has room for them; Ray Train's own minute is shorter than a node takes to start."""
ABANDON_AFTER_S = 10.0
"""How long a worker group that has no run in its hands is waited for once the sweep is to stop."""


@dataclass(frozen=True)
class SweepContext:
    """What every trial of a sweep shares; travels to the trial drivers once."""

    plan: Plan
    storage_root: str
    sources: str
    offline: bool
    resources: ResourcesConfig
    tracker: ActorHandle
    names: dict[str, str]
    marker: StopMarker
    hints: dict[str, str]
    """By run key: what would need less memory."""

    @property
    def storage(self) -> Storage:
        return Storage(Path(self.storage_root))

    @property
    def takes_turns(self) -> bool:
        """True where evaluation uses the trials' own GPUs, between trials."""
        return self.resources.gpus_per_worker > 0 and self.resources.evaluation.gpus == 0

    def pool(self, run_keys: set[str], cpus: float, gpus: float, actors: int) -> EvaluationPool:
        """A pool over the evaluations of some runs and bases."""
        jobs = [job for job in all_jobs(self.plan) if job.run_key in run_keys]
        return EvaluationPool(
            jobs,
            self.storage,
            Path(self.sources),
            self.offline,
            self.resources,
            self.tracker,
            self.names,
            actors,
            cpus,
            gpus,
            self.plan.evaluated_together,
        )


def run_trial(config: dict[str, Any], context: SweepContext) -> None:
    """A Tune trial: trains its runs and, where evaluation takes turns with training, scores the result.

    Runs that fail are told by their run.json; what was stopped with grace, or held by another sweep, is left for a later start.
    """
    trial = next(trial for trial in context.plan.trials if trial.trial_id == config["trial_id"])
    _Trial(trial, context).train()
    tune.report({"trial_id": trial.trial_id})  # Tune complains of trials that tell nothing
    if context.takes_turns and not context.marker.is_set():
        pool = context.pool({run.run_key for run in trial.runs}, trial.cpus_per_worker, trial.gpus_per_worker, actors=1)
        # what fails here is tried again, and told, at the end of the sweep
        pool.serve(more_to_come=lambda: False, stopping=context.marker.is_set)


class _Trial:
    """Starts worker groups until every run is finished or has failed.

    Ray Train's own restarts are not used: it counts all deaths of a group, and one that trains for weeks on machines that
    are taken away would reach any limit. Here deaths count only where nothing was gained since the last one.
    """

    def __init__(self, trial: TrialSpec, context: SweepContext):
        self._trial, self._context, self._storage = trial, context, context.storage
        self._failed: set[str] = set()

    def train(self) -> None:
        retries = self._fresh_retries()
        while left := self._left():
            if not self._wait_until_free(left):
                return
            known = {run.run_key: self._started(run) for run in left}
            before = progress_mark(self._trial, self._storage)
            try:
                outcomes = self._start_group(left)
            except Exception as error:
                mark = progress_mark(self._trial, self._storage)
                is_hopeless = is_refusal(error) or (is_out_of_memory(error) and mark == before)
                if not is_hopeless and retries.allows(mark):
                    continue
                begun = [run for run in left if self._started(run) != known[run.run_key] and run_status(run, self._storage) != "finished"]
                if begun and self._trial.pack > 1:
                    self._trial = self._trial.model_copy(update={"pack": 1})  # one of them may be the cause, or that there are several
                else:
                    in_hand = [run for run in begun if run_status(run, self._storage) != "failed"]
                    for run in in_hand or begun or left:  # where no run was begun, none can be
                        self._record_failure(run, error)
                retries = self._fresh_retries()
            else:
                self._failed |= {run_key for run_key, status, _ in outcomes if status == "failed"}

    def _left(self) -> list[RunSpec]:
        if self._context.marker.is_set():
            return []
        return [run for run in self._trial.runs if run.run_key not in self._failed and run_status(run, self._storage) != "finished"]

    def _fresh_retries(self) -> Retries:
        return Retries(self._context.resources.max_failures, progress_mark(self._trial, self._storage))

    def _started(self, run: RunSpec) -> Any:
        """What changes when a worker takes a run into its hands."""
        known = read_run(self._storage, run.run_key)
        return known and (known.get("started"), known.get("resumed"))

    def _wait_until_free(self, runs: list[RunSpec]) -> bool:
        """Waits while another sweep trains one of the runs; False when the sweep is to stop meanwhile."""
        while any(is_held(self._storage.run(run.run_key)) for run in runs):
            if self._context.marker.is_set():
                return False
            time.sleep(POLL_S)
        return True

    def _start_group(self, runs: list[RunSpec]) -> list[tuple[str, str, str | None]]:
        """Trains with a worker group of its own; returns how each run ended, or raises what the group died of.

        When the sweep is to stop while the group waits for its place or loads the base model, it is not waited for.
        """
        free_abandoned_places()
        trainer = self._trainer(trial_of_what_is_left(self._trial, runs, self._failed))
        for run in runs[: self._trial.pack]:
            self._context.tracker.run_starting.remote(run.run_key)
        ended: list[Any] = []

        def fit() -> None:
            try:
                ended.append(trainer.fit())
            except Exception as error:
                ended.append(error)

        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        idle_since: float | None = None
        while thread.is_alive():
            thread.join(POLL_S)
            if not self._context.marker.is_set() or any(is_held(self._storage.run(run.run_key)) for run in runs):
                idle_since = None
            elif idle_since is None:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since >= ABANDON_AFTER_S:
                return []  # with this process, Ray ends the group
        if isinstance(ended[0], Exception):
            raise ended[0]
        return ended[0].metrics["outcomes"]

    def _trainer(self, trial: TrialSpec) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from jmedlora.orchestrator.workers import WorkerConfig, train_worker

        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(WAIT_FOR_PLACE_S)
        context = self._context
        per_worker: dict[str, float] = {"CPU": trial.cpus_per_worker}
        if trial.gpus_per_worker:
            per_worker["GPU"] = trial.gpus_per_worker
        return TorchTrainer(
            train_worker,
            train_loop_config={
                "trial": trial,
                "storage": context.storage,
                "sources": Path(context.sources),
                "offline": context.offline,
                "tracker": context.tracker,
                "marker": context.marker,
                "hints": context.hints,
            },
            torch_config=WorkerConfig(backend="nccl" if trial.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(num_workers=trial.workers, use_gpu=bool(trial.gpus_per_worker), resources_per_worker=per_worker),
            run_config=RunConfig(
                name=f"{trial.trial_id}-{uuid.uuid4().hex[:8]}",  # Ray Train would go on with files of its own under a name that it knows
                storage_path=str(context.storage.sweep(context.plan.sweep).ray),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                worker_runtime_env={"env_vars": worker_environment(context.resources, trial.cpus_per_worker, context.offline)},
            ),
        )

    def _record_failure(self, run: RunSpec, error: Exception) -> None:
        """Marks a run that the workers could not finish or mark themselves (killed, out of memory, no base model) as failed."""
        told = last_line(error)
        if hint := self._context.hints.get(run.run_key) if is_out_of_memory(error) else None:
            told = f"{told}; what would fit: {hint}"
        known = read_run(self._storage, run.run_key) or {"run_key": run.run_key, "settings": run.settings.model_dump(mode="json")}
        if known.get("status") != "failed":
            write_json(self._storage.run(run.run_key).run_json, {**known, "status": "failed", "error": told, "finished": now()})
            ray.get(self._context.tracker.run_ended.remote(run.run_key, "failed", told))
        self._failed.add(run.run_key)
