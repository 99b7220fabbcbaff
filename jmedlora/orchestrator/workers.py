"""What runs inside the training workers of a trial; the processes that start them import it too, and have Ray Train and torch at hand."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from ray import train
from ray.actor import ActorHandle
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.context import get_train_context

from jmedlora.orchestrator.errors import refusals
from jmedlora.orchestrator.stopping import StopMarker
from jmedlora.plan.records import Record
from jmedlora.plan.specs import TrialSpec

SEND_EVERY_S = 1.0

_leaving = threading.Event()
"""Set once this worker's process was asked to go."""


@dataclass
class WorkerConfig(TorchConfig):
    """Workers with a torch process group, which take SIGTERM for a request to save and leave."""

    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(_TorchBackend):
    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(_leave_on_sigterm)  # in the main thread: the training function itself has one of its own


def _leave_on_sigterm() -> None:
    previous = signal.getsignal(signal.SIGTERM)

    def on_signal(number: int, frame: FrameType | None) -> None:
        _leaving.set()
        signal.signal(signal.SIGTERM, previous)  # asked again, the process ends as Ray has it

    signal.signal(signal.SIGTERM, on_signal)


def is_leaving() -> bool:
    """True once this worker got SIGTERM, or the node of any worker of its group is being taken away (as Ray tells it beforehand)."""
    return _leaving.is_set() or get_train_context().preemption_context.preemption_info is not None


def train_worker(config: dict[str, Any]) -> None:
    """One worker of the group; Ray Train has set up torch.distributed. Reports how each run ended: key, status, error."""
    from jmedlora.training.loop import train_trial  # takes seconds, which the processes that only start workers need not

    trial: TrialSpec = config["trial"]
    marker: StopMarker = config["marker"]
    if not trial.gpus_per_worker:
        torch.set_num_threads(trial.cpus_per_worker)
    with refusals():
        outcomes = train_trial(
            trial,
            config["storage"],
            config["sources"],
            config["offline"],
            TrackerListener(config["tracker"]),
            should_stop=lambda: is_leaving() or marker.is_set(),
            hints=config["hints"],
        )
    train.report({"outcomes": [[outcome.run_key, outcome.status, outcome.error] for outcome in outcomes]})


class TrackerListener:
    """Passes on what the training loop tells, optimizer steps in bundles of about a second."""

    def __init__(self, tracker: ActorHandle):
        self._tracker = tracker
        self._bundles: dict[str, list[Record]] = {}
        self._sent = time.monotonic()

    def on_run_start(self, run_key: str, total_steps: int) -> None:
        self._tracker.run_started.remote(run_key, total_steps)

    def on_step(self, run_key: str, record: Record) -> None:
        self._bundles.setdefault(run_key, []).append(record)
        if time.monotonic() - self._sent >= SEND_EVERY_S:
            for each in list(self._bundles):
                self._send(each)
            self._sent = time.monotonic()

    def on_checkpoint(self, run_key: str, step: int) -> None:
        self._send(run_key)

    def on_run_end(self, run_key: str, status: str, error: str | None) -> None:
        self._send(run_key)
        self._tracker.run_ended.remote(run_key, status, error)

    def _send(self, run_key: str) -> None:
        if bundle := self._bundles.pop(run_key, None):
            self._tracker.train_steps.remote(run_key, bundle)
