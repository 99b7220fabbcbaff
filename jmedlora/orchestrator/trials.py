"""One Ray Tune trial = one Ray Train worker group that trains a list of runs.

Ray Train and torch are imported where they are used: the driver of a sweep, which imports this, needs neither.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from jmedlora.config.clock import now
from jmedlora.config.parts import ResourcesConfig
from jmedlora.data.atomic import write_json
from jmedlora.orchestrator.environment import worker_environment
from jmedlora.orchestrator.errors import last_line, refusals
from jmedlora.orchestrator.evaluation_pool import EvaluationPool
from jmedlora.orchestrator.ledger import all_jobs, run_status
from jmedlora.plan.layout import Storage
from jmedlora.plan.records import Record, read_run
from jmedlora.plan.specs import Plan, TrialSpec

SEND_EVERY_S = 1.0
WAIT_FOR_PLACE_S = 7 * 24 * 3600
"""How long workers may wait until the cluster has room for them; Ray Train's own minute is shorter than a node takes to start."""


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
    attempt: str
    """Unlike for every start of the driver: Ray's own files of an earlier start are never read."""

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
            jobs, self.storage, Path(self.sources), self.offline, self.resources, self.tracker, self.names, actors, cpus, gpus
        )


def run_trial(config: dict[str, Any], context: SweepContext) -> None:
    """A Tune trial: trains on a worker group of its own and, where evaluation takes turns with training, scores the result.

    Raises what the worker group raises when its restarts are used up; runs that fail alone are told by their run.json.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(WAIT_FOR_PLACE_S)
    trial = next(trial for trial in context.plan.trials if trial.trial_id == config["trial_id"])
    resources = context.resources
    begun = next((run.run_key for run in trial.runs if run_status(run, context.storage) != "finished"), None)
    if begun is not None:
        context.tracker.run_starting.remote(begun)
    per_worker: dict[str, float] = {"CPU": trial.cpus_per_worker}
    if trial.gpus_per_worker:
        per_worker["GPU"] = trial.gpus_per_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "trial": trial,
            "storage": context.storage,
            "sources": Path(context.sources),
            "offline": context.offline,
            "tracker": context.tracker,
        },
        torch_config=TorchConfig(backend="nccl" if trial.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(num_workers=trial.workers, use_gpu=bool(trial.gpus_per_worker), resources_per_worker=per_worker),
        run_config=RunConfig(
            name=f"{trial.trial_id}-{context.attempt}",
            storage_path=str(context.storage.sweep(context.plan.sweep).ray),
            failure_config=FailureConfig(max_failures=resources.max_failures),
            callbacks=[TuneReportCallback()],
            worker_runtime_env={"env_vars": worker_environment(resources, trial.cpus_per_worker, context.offline)},
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        _record_failure(trial, context, error)
        raise
    if context.takes_turns:
        pool = context.pool({run.run_key for run in trial.runs}, trial.cpus_per_worker, trial.gpus_per_worker, actors=1)
        pool.serve(more_to_come=lambda: False)  # what fails here is tried again, and told, at the end of the sweep


def _record_failure(trial: TrialSpec, context: SweepContext, error: Exception) -> None:
    """Runs that the workers could not finish or mark themselves (killed, out of memory, no base model) are marked as failed."""
    for run in trial.runs:
        if run_status(run, context.storage) in ("waiting", "running"):
            told = last_line(error)
            known = read_run(context.storage, run.run_key) or {"run_key": run.run_key, "settings": run.settings.model_dump(mode="json")}
            write_json(context.storage.run(run.run_key).run_json, {**known, "status": "failed", "error": told, "finished": now()})
            ray.get(context.tracker.run_ended.remote(run.run_key, "failed", told))


def train_worker(config: dict[str, Any]) -> None:
    """One worker of the group; Ray Train has set up torch.distributed."""
    import torch
    from ray import train

    from jmedlora.training.loop import train_trial

    trial: TrialSpec = config["trial"]
    if not trial.gpus_per_worker:
        torch.set_num_threads(trial.cpus_per_worker)
    with refusals():
        outcomes = train_trial(trial, config["storage"], config["sources"], config["offline"], TrackerListener(config["tracker"]))
    train.report({"finished": sum(outcome.status == "finished" for outcome in outcomes), "runs": len(outcomes)})


class TrackerListener:
    """Passes on what the training loop tells, optimizer steps in bundles of about a second."""

    def __init__(self, tracker: ActorHandle):
        self._tracker = tracker
        self._bundle: list[Record] = []
        self._sent = now()

    def on_run_start(self, run_key: str, total_steps: int) -> None:
        self._tracker.run_started.remote(run_key, total_steps)

    def on_step(self, run_key: str, record: Record) -> None:
        self._bundle.append(record)
        if now() - self._sent >= SEND_EVERY_S:
            self._send(run_key)

    def on_checkpoint(self, run_key: str, step: int) -> None:
        self._send(run_key)

    def on_run_end(self, run_key: str, status: str, error: str | None) -> None:
        self._send(run_key)
        self._tracker.run_ended.remote(run_key, status, error)

    def _send(self, run_key: str) -> None:
        if self._bundle:
            self._tracker.train_steps.remote(run_key, self._bundle)
        self._bundle, self._sent = [], now()
