"""Runs that differ in their duration alone are trained once, and each has what it would have had alone, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from jmedlora.plan.layout import ADAPTER_WEIGHTS, STATE_TENSORS, Storage
from jmedlora.plan.records import read_run
from jmedlora.plan.specs import RunSpec
from jmedlora.training.loop import RunOutcome, train_trial
from tests.integration.training_runs import Killed, Watching, curve, digests
from tests.tiny import run_spec, trial_of

pytestmark = pytest.mark.usefixtures("training_here")


def by_epochs(data_file: Path, *epochs: float, **chosen: Any) -> list[RunSpec]:
    """Runs of so many epochs (of three steps) with a checkpoint after each."""
    return [run_spec(data_file, max_steps=None, epochs=each, checkpoint_every=3, **chosen) for each in epochs]


def train(folder: Path, *specs: RunSpec, pack: int = 1, kill_at: int | None = None) -> list[int]:
    """Trains with shared prefixes, or dies right after a step is first recorded; returns the steps that were recorded, of all runs."""

    def die(step: int) -> None:
        if step == kill_at:
            raise Killed

    watching = Watching(die)
    try:
        outcomes = train_trial(trial_of(*specs, pack=pack, share_prefixes=True), Storage(folder), folder, True, watching)
        assert kill_at is None and all(outcome == RunOutcome(outcome.run_key, "finished", None, outcome.skipped) for outcome in outcomes)
    except Killed:
        assert kill_at is not None
    return watching.taken


def assert_same(found: Path, expected: Path, specs: list[RunSpec]) -> None:
    for spec in specs:
        assert digests(found, spec) == digests(expected, spec)
        assert curve(found, spec) == curve(expected, spec)
        told = read_run(Storage(found), spec.run_key)
        assert told is not None and told["status"] == "finished"


@pytest.fixture(scope="module")
def alone(training_here: None, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one, two and four epochs, each by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for spec in by_epochs(data_file, 1, 2, 4):
        train(folder, spec)
    return folder


def test_three_durations_are_one_trajectory(data_file: Path, tmp_path: Path, alone: Path) -> None:
    specs = by_epochs(data_file, 4, 1, 2)
    assert len({spec.trajectory_key for spec in specs}) == 1
    assert sorted(set(train(tmp_path, *specs))) == list(range(1, 13))
    assert_same(tmp_path, alone, specs)
    for spec in specs:
        assert list(Storage(tmp_path).run(spec.run_key).states()) == [spec.total_steps], "each can be extended"


def test_a_schedule_with_a_horizon_shares_nothing(data_file: Path, tmp_path: Path) -> None:
    specs = by_epochs(data_file, 1, 2, schedule="cosine")
    assert len({spec.trajectory_key for spec in specs}) == 2
    assert train(tmp_path, *specs) == [1, 2, 3, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kill_at", [2, 3, 5, 8])
def test_a_killed_trajectory_goes_on(kill_at: int, data_file: Path, tmp_path: Path, alone: Path) -> None:
    specs = by_epochs(data_file, 1, 2, 4)
    train(tmp_path, *specs, kill_at=kill_at)
    taken = train(tmp_path, *specs)
    assert min(taken) == (kill_at - 1) // 3 * 3 + 1, "from the last checkpoint on, whichever run has its state"
    assert_same(tmp_path, alone, specs)


def test_a_longer_run_goes_on_from_a_shorter_one(data_file: Path, tmp_path: Path, alone: Path) -> None:
    short, middle, long = by_epochs(data_file, 1, 2, 4)
    train(tmp_path, short)
    assert train(tmp_path, short, middle) == [4, 5, 6]
    assert train(tmp_path, short, middle, long) == list(range(7, 13))
    assert_same(tmp_path, alone, [short, middle, long])
    told = read_run(Storage(tmp_path), long.run_key)
    assert told is not None
    assert told["notes"] == [f"its first 6 steps are those of run {middle.run_key}, which differs in its duration alone"]


def test_a_shorter_run_is_taken_from_a_longer_one(data_file: Path, tmp_path: Path, alone: Path) -> None:
    short, middle, long = by_epochs(data_file, 1, 2, 4)
    train(tmp_path, long)
    assert train(tmp_path, short, middle, long) == []
    assert_same(tmp_path, alone, [short, middle, long])


def test_checkpoints_that_another_run_lacks_are_trained(data_file: Path, tmp_path: Path) -> None:
    """The longer run was asked for a checkpoint at its end alone."""
    (long,) = by_epochs(data_file, 2)
    short = run_spec(data_file, max_steps=2)
    long = long.model_copy(update={"checkpoint_steps": [6]})
    train(tmp_path / "shared", long)
    assert train(tmp_path / "shared", short, long) == [1, 2]
    train(tmp_path / "alone", short)
    assert_same(tmp_path / "shared", tmp_path / "alone", [short])


def test_what_one_run_has_lost_is_copied_from_another(data_file: Path, tmp_path: Path, alone: Path) -> None:
    specs = by_epochs(data_file, 1, 2, 4)
    train(tmp_path, *specs, kill_at=11)
    folders = [Storage(tmp_path).run(spec.run_key) for spec in specs]
    shutil.rmtree(folders[1].checkpoint(3))
    file = folders[2].checkpoint(6) / ADAPTER_WEIGHTS
    file.write_bytes(file.read_bytes()[:-1] + b"\0\1")
    assert min(train(tmp_path, *specs)) == 10
    assert_same(tmp_path, alone, specs)


def test_a_damaged_state_is_passed_over_for_one_of_another_run(data_file: Path, tmp_path: Path, alone: Path) -> None:
    specs = by_epochs(data_file, 1, 2, 4)
    train(tmp_path, *specs, kill_at=11)
    long = Storage(tmp_path).run(specs[2].run_key)
    newest = long.state(9) / STATE_TENSORS
    newest.write_bytes(newest.read_bytes()[:-1])
    assert min(train(tmp_path, *specs)) == 7
    assert_same(tmp_path, alone, specs)
    told = read_run(Storage(tmp_path), specs[2].run_key)
    assert told is not None and any("state/step-000009 is passed over" in note for note in told["notes"])


def test_trajectories_are_packed(data_file: Path, tmp_path: Path) -> None:
    specs = [spec for rank in (2, 8) for spec in by_epochs(data_file, 1, 3, rank=rank)]
    train(tmp_path / "shared", *specs, pack=2)
    for rank in (0, 1):
        short, long = specs[2 * rank : 2 * rank + 2]
        assert curve(tmp_path / "shared", short) == curve(tmp_path / "shared", long)[:3]
        assert digests(tmp_path / "shared", short)[3] == digests(tmp_path / "shared", long)[3]
