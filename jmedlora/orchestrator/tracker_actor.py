"""One actor per sweep takes what trials and evaluations tell, has it written to MLflow, and knows how far everything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import ray

from jmedlora.config.clock import now
from jmedlora.orchestrator.environment import ON_HEAD
from jmedlora.plan.layout import Storage
from jmedlora.plan.records import Record
from jmedlora.plan.specs import Plan
from jmedlora.tracking.sweep_record import Ending
from jmedlora.tracking.writer import TrackingWriter


@ray.remote(num_cpus=0, resources=ON_HEAD, max_restarts=5)
class TrackerActor:
    """Its methods return at once, whether MLflow answers or not. An actor that died starts again from what storage holds."""

    def __init__(self, plan: Plan, storage_root: str, tracking_uri: str):
        self._writer = TrackingWriter(tracking_uri, plan, Storage(Path(storage_root)))
        self._runs: dict[str, dict[str, Any]] = {}
        self._evaluating: dict[str, str] = {}
        self._evaluation_seconds: list[float] = []

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
        self._writer.train_steps(run_key, records)

    def run_ended(self, run_key: str, status: Literal["finished", "failed", "interrupted"], error: str | None) -> None:
        """Told once run.json says so, where the writer takes it from."""
        self._runs.setdefault(run_key, {})["status"] = status
        self._writer.run_ended(run_key)

    # -- from evaluation actors

    def evaluation_started(self, actor: str, what: str) -> None:
        self._evaluating[actor] = what

    def evaluation_ended(self, actor: str, metrics: Record | None) -> None:
        self._evaluating.pop(actor, None)
        if metrics is not None:
            if metrics["seconds"]:
                self._evaluation_seconds.append(metrics["seconds"])
            self._writer.evaluated(metrics)

    # -- for the driver

    def progress(self) -> dict[str, Any]:
        """Runs by key (status, step, epoch, loss, tokens per second), what is being evaluated, mean seconds of an evaluation,
        and under `tracking` what is wrong with MLflow (None: nothing).
        """
        seconds = self._evaluation_seconds
        return {
            "runs": self._runs,
            "evaluating": list(self._evaluating.values()),
            "evaluation_s": sum(seconds) / len(seconds) if seconds else None,
            "tracking": self._writer.trouble(),
        }

    @ray.method(max_task_retries=3)
    def finish(self, status: Ending, report: str | None, changes: list[Record] | None = None) -> list[str]:
        """`TrackingWriter.finish`: what MLflow did not get, in a line; may be called again."""
        return self._writer.finish(status, Path(report) if report else None, changes or [])
