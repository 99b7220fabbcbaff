"""Training in this process, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jmedlora.plan.checksums import verify
from jmedlora.plan.layout import ADAPTER_WEIGHTS, CHECKSUMS, Storage
from jmedlora.plan.records import read_training
from jmedlora.plan.specs import RunSpec
from jmedlora.training.loop import RunOutcome, train_trial
from tests.integration.training_worker import Silent
from tests.tiny import trial_of


class Killed(BaseException):
    """What no handler of the loop stops."""


class Watching(Silent):
    """Notes the steps that are taken, and does something after each."""

    def __init__(self, after_step: Callable[[int], None] = lambda step: None):
        self.taken: list[int] = []
        self._after_step = after_step

    def on_step(self, run_key: str, record: dict[str, Any]) -> None:
        self.taken.append(record["step"])
        self._after_step(record["step"])


def train(folder: Path, *specs: RunSpec, kill_at: int | None = None) -> list[int]:
    """Trains, or dies right after a step is recorded; returns the steps that were taken."""

    def die(step: int) -> None:
        if step == kill_at:
            raise Killed

    watching = Watching(die)
    try:
        train_trial(trial_of(*specs), Storage(folder), folder, True, watching)
    except Killed:
        assert kill_at is not None
    return watching.taken


def train_until(folder: Path, *specs: RunSpec, stop_in: int) -> tuple[list[int], list[RunOutcome]]:
    """Trains, and is asked to stop while the given step is taken; the steps that were taken, and how the runs ended."""
    watching = Watching()
    outcomes = train_trial(
        trial_of(*specs), Storage(folder), folder, True, watching, should_stop=lambda: len(watching.taken) >= stop_in - 1
    )
    return watching.taken, outcomes


def digests(folder: Path, spec: RunSpec) -> dict[int, str]:
    """SHA-256 of every checkpoint's weights, by step."""
    found = {}
    for step in spec.checkpoint_steps:
        checkpoint = Storage(folder).run(spec.run_key).checkpoint(step)
        verify(checkpoint)
        found[step] = json.loads((checkpoint / CHECKSUMS).read_text())["files"][ADAPTER_WEIGHTS]["sha256"]
    return found


def curve(folder: Path, spec: RunSpec) -> list[tuple[int, float, float, float]]:
    """Step, loss, learning rate and gradient norm of every step."""
    return [(line["step"], line["loss"], line["learning_rate"], line["grad_norm"]) for line in read_training(Storage(folder), spec.run_key)]
