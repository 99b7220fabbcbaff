"""A clock that is set back or forward while a run trains: steps, curve and MLflow stay in order."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jmedlora.config import clock
from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import Plan
from jmedlora.tracking.location import tracking_uri
from jmedlora.tracking.writer import TrackingWriter
from jmedlora.training.loop import train_trial
from tests.integration.training_runs import Killed, curve, digests, train
from tests.made_up import base_spec, plan_of
from tests.outcomes import tracked_in
from tests.tiny import run_spec, trial_of

pytestmark = pytest.mark.usefixtures("training_here")
HOUR_S = 3600.0


class Telling:
    """Tells the tracker as training workers do, and moves the clock, or dies, after given steps."""

    def __init__(self, writer: TrackingWriter, moves: dict[int, float], shifts: list[float], dies_at: int | None = None):
        self._writer, self._moves, self._shifts, self._dies_at = writer, moves, shifts, dies_at

    def on_run_start(self, run_key: str, total_steps: int) -> None: ...

    def on_step(self, run_key: str, record: dict[str, Any]) -> None:
        self._writer.train_steps(run_key, [record])
        self._shifts.append(self._moves.get(record["step"], 0.0))
        if record["step"] == self._dies_at:
            raise Killed

    def on_checkpoint(self, run_key: str, step: int) -> None: ...

    def on_run_end(self, run_key: str, status: str, error: str | None) -> None:
        self._writer.run_ended(run_key)


@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_the_clock_is_moved_while_a_run_trains_and_before_it_goes_on(
    direction: float, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = run_spec(data_file, checkpoint_every=2, schedule="cosine", max_steps=7)
    plan: Plan = plan_of([base_spec(spec.base_key)], [spec], [])
    train(tmp_path / "whole", spec)
    storage = Storage(tmp_path / "moved")
    shifts: list[float] = []
    monkeypatch.setattr(clock, "time", SimpleNamespace(time=lambda: time.time() + sum(shifts)))
    first = Telling(TrackingWriter(tracking_uri(storage), plan, storage), {3: direction * HOUR_S}, shifts, dies_at=5)
    with pytest.raises(Killed):
        train_trial(trial_of(spec), storage, tmp_path, True, first)
    shifts.append(direction * HOUR_S)
    writer = TrackingWriter(tracking_uri(storage), plan, storage)
    train_trial(trial_of(spec), storage, tmp_path, True, Telling(writer, {6: -2 * direction * HOUR_S}, shifts))
    assert writer.finish("finished") == []

    lines = [json.loads(line) for line in storage.run(spec.run_key).train_jsonl.read_text(encoding="utf-8").splitlines()]
    times = [line["time"] for line in lines]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert abs(times[3] - times[2] - direction * HOUR_S) < HOUR_S / 2, "the clock was moved"
    assert curve(tmp_path / "moved", spec) == curve(tmp_path / "whole", spec)
    assert digests(tmp_path / "moved", spec) == digests(tmp_path / "whole", spec)
    points = tracked_in(storage.mlflow_database, plan.sweep)[spec.run_key]["points"]
    assert [points[f"train/loss {step}"] for step in range(1, 8)] == [line["loss"] for line in lines]
