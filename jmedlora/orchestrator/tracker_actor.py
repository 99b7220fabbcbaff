"""One actor per sweep takes what trials and evaluations tell, writes it to MLflow, and knows how far everything is."""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray

from jmedlora.config.clock import now
from jmedlora.orchestrator.environment import ON_HEAD
from jmedlora.plan.layout import Storage
from jmedlora.plan.records import Record
from jmedlora.plan.specs import Plan

if TYPE_CHECKING:
    from jmedlora.tracking.mlflow_tracker import MlflowTracker

log = logging.getLogger(__name__)


@ray.remote(num_cpus=0, resources=ON_HEAD, max_restarts=5)
class TrackerActor:
    """Its methods return at once; MLflow is written by a thread of its own, in the order of the calls.

    An actor that died starts again from what storage holds.
    What could not be written is kept as an error and written again from storage in `finish`.
    """

    def __init__(self, plan: Plan, storage_root: str, tracking_uri: str):
        self._plan = plan
        self._storage = Storage(Path(storage_root))
        self._uri = tracking_uri
        self._tracker: MlflowTracker | None = None
        self._queue: queue.Queue[Callable[[MlflowTracker], None] | None] = queue.Queue()
        self._errors: list[str] = []
        self._runs: dict[str, dict[str, Any]] = {}
        self._evaluating: dict[str, str] = {}
        self._evaluation_seconds: list[float] = []
        self._lines: list[str] = []
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    # -- from trials and their training workers

    def run_starting(self, run_key: str) -> None:
        self._runs[run_key] = {"status": "starting"}

    def run_started(self, run_key: str, total_steps: int) -> None:
        self._runs[run_key] = {"status": "running", "step": 0, "total_steps": total_steps}

    def train_steps(self, run_key: str, records: list[Record]) -> None:
        run = self._runs.setdefault(run_key, {"status": "running"})
        seconds, tokens = sum(r["seconds"] for r in records), sum(r["tokens"] for r in records)
        run.update({key: records[-1][key] for key in ("step", "epoch", "loss")}, tokens_per_s=tokens / max(seconds, 1e-9), heard=now())
        run["training_s"] = run.get("training_s", 0.0) + seconds
        self._queue.put(lambda tracker: tracker.log_train(run_key, records))

    def run_ended(self, run_key: str, status: Literal["finished", "failed"], error: str | None) -> None:
        self._runs.setdefault(run_key, {})["status"] = status
        self._queue.put(lambda tracker: tracker.finish_run(run_key, status, error))

    # -- from evaluation actors

    def evaluation_started(self, actor: str, what: str) -> None:
        self._evaluating[actor] = what

    def evaluation_ended(self, actor: str, metrics: Record | None) -> None:
        self._evaluating.pop(actor, None)
        if metrics is not None:
            if metrics["seconds"]:
                self._evaluation_seconds.append(metrics["seconds"])
            self._queue.put(lambda tracker: tracker.log_evaluation(metrics))

    # -- for the driver

    def progress(self) -> dict[str, Any]:
        """Runs by key (status, step, epoch, loss, tokens per second), what is being evaluated, mean seconds of an evaluation."""
        seconds = self._evaluation_seconds
        return {
            "runs": self._runs,
            "evaluating": list(self._evaluating.values()),
            "evaluation_s": sum(seconds) / len(seconds) if seconds else None,
        }

    def finish(
        self, status: Literal["finished", "failed", "interrupted"], report: str | None, changes: list[Record] | None = None
    ) -> list[str]:
        """Waits until all is written, writes again from storage what failed, adds the report and how runs differ from their bases.

        Returns what is still wrong.
        """

        def close(tracker: MlflowTracker) -> None:
            tracker.restore_from_storage()
            tracker.log_changes(changes or [])
            if report is not None:
                tracker.log_report(Path(report))
            tracker.finish_sweep(status)

        drained = threading.Event()
        self._queue.put(lambda _: drained.set())
        drained.wait()
        self._errors.clear()
        self._queue.put(close)
        self._queue.put(None)
        self._thread.join()
        return self._errors

    def _write(self) -> None:
        from jmedlora.tracking.mlflow_tracker import MlflowTracker  # takes seconds, which the driver need not wait for

        while (write := self._queue.get()) is not None:
            try:
                if self._tracker is None:
                    tracker = MlflowTracker(self._uri, self._plan, self._storage)
                    tracker.start()
                    tracker.restore_from_storage()
                    self._tracker = tracker
                write(self._tracker)
            except Exception as error:
                log.exception("MLflow could not be written")
                self._errors.append("".join(traceback.format_exception_only(error)).strip())
