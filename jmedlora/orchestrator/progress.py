"""What the terminal shows while a sweep runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jmedlora.orchestrator.ledger import Job, is_done, run_status
from jmedlora.plan.costs import TRIAL_START_S
from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import Plan

REFRESH_S = 1.0
LINE_EVERY_S = 10.0


class ProgressDisplay:
    """A live table in a terminal; elsewhere a line every ten seconds. Runs in a thread of its own."""

    def __init__(
        self,
        console: Console,
        plan: Plan,
        storage: Storage,
        tracker: ActorHandle,
        jobs: list[Job],
        names: dict[str, str],
        lanes: int,
        actors: int,
    ):
        self._console = console
        self._plan, self._storage, self._tracker, self._names = plan, storage, tracker, names
        self._undone = [job for job in jobs if not is_done(job, storage)]
        self._total = len(jobs)
        self._trained = {run.run_key for run in plan.runs if run_status(run, storage) == "finished"}
        self._lanes, self._actors = max(1, lanes), max(1, actors)
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> ProgressDisplay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _show(self) -> None:
        if self._console.is_terminal:
            with Live(console=self._console, refresh_per_second=4, transient=True) as live:
                self._each(REFRESH_S, lambda state: live.update(self._panel(state)))
        else:
            self._each(LINE_EVERY_S, lambda state: self._console.print(self.line(state), highlight=False, soft_wrap=True))

    def _each(self, every_s: float, show: Callable[[dict[str, Any]], None]) -> None:
        while not self._stop.wait(every_s):
            try:
                state = ray.get(self._tracker.progress.remote(), timeout=30)
            except ray.exceptions.RayError as error:
                self._console.print(f"progress is not known: {type(error).__name__}")
                continue
            self._trained |= {key for key, run in state["runs"].items() if run.get("status") == "finished"}
            self._undone = [job for job in self._undone if not is_done(job, self._storage)]
            show(state)

    # -- texts

    def _panel(self, state: dict[str, Any]) -> Group:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("training", "epoch", "step", "loss", "tokens/s"):
            table.add_column(column, justify="left" if column == "training" else "right", no_wrap=True)
        for key, run in self._running(state):
            table.add_row(self._names.get(key, key), *self._cells(run))
        evaluating = [Text(f"evaluating  {what}", style="cyan") for what in state["evaluating"]]
        starting = [Text(text, style="dim") for text in self._starting(state)]
        trouble = [Text(state["tracking"], style="red")] if state["tracking"] else []
        return Group(table, *starting, *evaluating, *trouble, Text(self._totals(state), style="bold"))

    def line(self, state: dict[str, Any]) -> str:
        """What is going on, from what the tracker's `progress` tells."""
        parts = []
        for key, run in self._running(state):
            epoch, step, loss, speed = self._cells(run)
            parts.append(f"{self._names.get(key, key)}: epoch {epoch}, step {step}, loss {loss}, {speed} tokens/s")
        parts += self._starting(state) + [f"evaluating {what}" for what in state["evaluating"]]
        parts += [state["tracking"]] if state["tracking"] else []
        return f"[{_duration(time.monotonic() - self._started)}] " + "; ".join([*parts, self._totals(state)])

    def _running(self, state: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        return [(key, run) for key, run in state["runs"].items() if run.get("status") == "running"]

    def _starting(self, state: dict[str, Any]) -> list[str]:
        """Runs whose workers are not there yet; before the first of them is known, that workers are being started at all."""
        names = [self._names.get(key, key) for key, run in state["runs"].items() if run.get("status") == "starting"]
        if names:
            return [f"starting {', '.join(names)}"]
        is_idle = not self._running(state) and not state["evaluating"]
        return ["starting workers"] if is_idle and (self._undone or len(self._trained) < len(self._plan.runs)) else []

    def _cells(self, run: dict[str, Any]) -> tuple[str, str, str, str]:
        if "loss" not in run:
            return "-", f"0/{run.get('total_steps', '?')}", "-", "-"
        return f"{run['epoch']:.1f}", f"{run['step']}/{run.get('total_steps', '?')}", f"{run['loss']:.3f}", f"{run['tokens_per_s']:.0f}"

    def _totals(self, state: dict[str, Any]) -> str:
        done = self._total - len(self._undone)
        left = self._seconds_left(state)
        queued = len(self._undone) - len(state["evaluating"])
        text = f"runs {len(self._trained)}/{len(self._plan.runs)} trained, evaluations {done}/{self._total} done, {max(0, queued)} to come"
        return text + (f", about {_duration(left)} left" if left is not None else "")

    def _seconds_left(self, state: dict[str, Any]) -> float | None:
        """From what a step and an evaluation took so far: training and evaluation go on side by side."""
        runs = state["runs"]
        steps = sum(run.get("step", 0) for run in runs.values())
        if not steps:
            return None
        per_step = sum(run.get("training_s", 0.0) for run in runs.values()) / steps
        over = self._trained | {key for key, run in runs.items() if run.get("status") == "failed"}
        to_train = {run.run_key: run.total_steps for run in self._plan.runs if run.run_key not in over}
        remaining = sum(max(0, total - runs.get(key, {}).get("step", 0)) for key, total in to_train.items())
        waiting = sum(key not in runs for key in to_train)
        training = (remaining * per_step + waiting * TRIAL_START_S) / self._lanes
        evaluation = len(self._undone) * (state["evaluation_s"] or 0.0) / self._actors
        return max(training, evaluation)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
