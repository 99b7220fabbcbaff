"""Runs that are asked to stop, held by another worker group, or short of disk or memory."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jmedlora.data import patience
from jmedlora.plan.layout import Storage
from jmedlora.plan.lease import is_held, run_lease
from jmedlora.plan.records import read_run
from jmedlora.training import loop, records, trajectory
from jmedlora.training.loop import train_trial
from tests.integration.processes import ROOT
from tests.integration.training_runs import Watching, curve, digests, train, train_until
from tests.tiny import run_spec, trial_of

pytestmark = pytest.mark.usefixtures("training_here")

HOLDER = """
import sys, time
from pathlib import Path
from jmedlora.plan.layout import RunFolder
from jmedlora.plan.lease import run_lease
with run_lease(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(600)
"""


def record(folder: Path, key: str) -> dict[str, Any]:
    told = read_run(Storage(folder), key)
    assert told is not None
    return told


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_stops_after_its_step_and_goes_on_from_there(stage: int, data_file: Path, tmp_path: Path) -> None:
    first = run_spec(data_file, zero_stage=stage, checkpoint_every=3, schedule="linear")
    second = run_spec(data_file, zero_stage=stage, seed=2)
    train(tmp_path / "whole", first, second)
    taken, outcomes = train_until(tmp_path / "stopped", first, second, stop_in=5)
    assert taken == [1, 2, 3, 4, 5]
    assert [(outcome.run_key, outcome.status) for outcome in outcomes] == [(first.run_key, "interrupted")]
    assert sorted(Storage(tmp_path / "stopped").run(first.run_key).states()) == [3, 5]
    assert record(tmp_path / "stopped", first.run_key)["status"] == "interrupted"
    assert not Storage(tmp_path / "stopped").run(second.run_key).run_json.exists()
    assert train(tmp_path / "stopped", first, second) == [6, 1, 2, 3, 4, 5, 6]
    for spec in (first, second):
        assert digests(tmp_path / "stopped", spec) == digests(tmp_path / "whole", spec)
        assert curve(tmp_path / "stopped", spec) == curve(tmp_path / "whole", spec)


def test_all_of_a_pack_stop_after_their_step_and_go_on_from_there(data_file: Path, tmp_path: Path) -> None:
    """Of four runs two have ended by then, one of which has made room for the last; those in training go on in one pack again."""
    specs = [run_spec(data_file, rank=rank, seed=rank, max_steps=steps) for rank, steps in ((2, 2), (4, 6), (8, 7), (1, 4))]

    def train_pack(folder: Path, stop_in: int | None = None) -> dict[str, str]:
        """Statuses; asked to stop while the second run takes its step `stop_in`."""

        def is_due() -> bool:
            return stop_in is not None and len(curve(folder, specs[1])) >= stop_in - 1

        outcomes = train_trial(trial_of(*specs, pack=3), Storage(folder), folder, True, Watching(), should_stop=is_due)
        return {outcome.run_key: outcome.status for outcome in outcomes}

    train_pack(tmp_path / "whole")
    stopped = train_pack(tmp_path / "stopped", stop_in=5)
    assert stopped == dict(zip([spec.run_key for spec in specs], ("finished", "interrupted", "interrupted", "interrupted"), strict=True))
    assert [list(Storage(tmp_path / "stopped").run(spec.run_key).states()) for spec in specs] == [[2], [5], [5], [3]]
    assert set(train_pack(tmp_path / "stopped").values()) == {"finished"}
    for spec in specs:
        assert digests(tmp_path / "stopped", spec) == digests(tmp_path / "whole", spec)
        assert curve(tmp_path / "stopped", spec) == curve(tmp_path / "whole", spec)


def test_a_run_asked_to_stop_in_its_last_step_is_finished(data_file: Path, tmp_path: Path) -> None:
    spec = run_spec(data_file)
    taken, outcomes = train_until(tmp_path, spec, run_spec(data_file, seed=2), stop_in=6)
    assert (len(taken), [outcome.status for outcome in outcomes]) == (6, ["finished"])


def test_nothing_is_begun_where_the_stop_came_first(data_file: Path, tmp_path: Path) -> None:
    spec = run_spec(data_file)
    assert train_until(tmp_path, spec, stop_in=1) == ([], [])
    assert not (tmp_path / "runs").exists()


def test_a_run_that_another_process_trains_is_left_to_it(data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, free = run_spec(data_file), run_spec(data_file, seed=2)
    folder = Storage(tmp_path).run(held.run_key)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder.path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert is_held(folder)
        monkeypatch.setattr(loop, "run_lease", lambda folder, gives_up, _: run_lease(folder, gives_up, wait_s=0.3))
        outcomes = train_trial(trial_of(held, free), Storage(tmp_path), tmp_path, True, Watching())
        assert [outcome.status for outcome in outcomes] == ["held", "finished"]
        assert outcomes[0].error is not None and f"trained by process {holder.pid} on " in outcomes[0].error
        assert not folder.run_json.exists()
    finally:
        holder.kill()
        holder.wait()
    assert not is_held(folder), "a killed process holds nothing"
    assert train(tmp_path, held) == [1, 2, 3, 4, 5, 6]
    assert not is_held(folder)


def test_a_lease_is_waited_for_and_what_was_finished_meanwhile_is_not_trained_again(data_file: Path, tmp_path: Path) -> None:
    spec = run_spec(data_file)
    train(tmp_path / "other", spec)
    folder = Storage(tmp_path / "mine").run(spec.run_key)
    watching = Watching()
    with run_lease(folder):
        waiting = threading.Thread(
            target=train_trial, args=(trial_of(spec), Storage(tmp_path / "mine"), tmp_path, True, watching), daemon=True
        )
        waiting.start()
        time.sleep(2.0)
        assert waiting.is_alive()
        for name in ("run.json", "train.jsonl", "checkpoints", "state"):
            (Storage(tmp_path / "other").run(spec.run_key).path / name).rename(folder.path / name)
    waiting.join(timeout=30)
    assert not waiting.is_alive() and watching.taken == []


def test_a_trial_that_breaks_off_holds_nothing(data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever handles the error may keep it, with all that it came from, for as long as it likes."""
    specs = [run_spec(data_file, rank=rank) for rank in (2, 4)]
    inner = loop.RunRecords

    def records_of(folder: Any, spec: Any, *rest: Any) -> Any:
        if spec.run_key == specs[1].run_key:
            raise OSError(errno.ENOSPC, "No space left on device")
        return inner(folder, spec, *rest)

    monkeypatch.setattr(loop, "RunRecords", records_of)
    with pytest.raises(OSError, match="No space left") as kept:
        train_trial(trial_of(*specs, pack=2), Storage(tmp_path), tmp_path, True, Watching())
    assert kept.traceback
    assert not any(is_held(Storage(tmp_path).run(spec.run_key)) for spec in specs)


def fail_at_first(count: int, write: Callable[..., Any], tried: list[int]) -> Callable[..., Any]:
    """`write`, which finds the disk full the first `count` times."""

    def attempt(*arguments: Any, **named: Any) -> Any:
        tried.append(1)
        if len(tried) <= count:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments, **named)

    return attempt


@pytest.mark.parametrize("what", ["save_adapter", "save_state"])
def test_a_full_disk_is_waited_for(what: str, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = run_spec(data_file)
    train(tmp_path / "whole", spec)
    monkeypatch.setattr(patience, "TRY_EVERY_S", 0.01)
    tried: list[int] = []
    monkeypatch.setattr(trajectory, what, fail_at_first(3, getattr(trajectory, what), tried))
    train(tmp_path / "full", spec)
    assert len(tried) == 4
    told = record(tmp_path / "full", spec.run_key)
    assert told["status"] == "finished"
    assert [note.split(":")[0] for note in told["notes"]] == ["checkpoint of step 6" if what == "save_adapter" else "state of step 6"]
    assert digests(tmp_path / "full", spec) == digests(tmp_path / "whole", spec)


def test_a_disk_that_stays_full_fails_the_run_and_spares_the_next(data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, next_one = run_spec(data_file), run_spec(data_file, seed=2)
    monkeypatch.setattr(patience, "WAIT_FOR_SPACE_S", 0.0)
    monkeypatch.setattr(trajectory, "save_adapter", fail_at_first(1, trajectory.save_adapter, []))
    outcomes = train_trial(trial_of(full, next_one), Storage(tmp_path), tmp_path, True, Watching())
    assert [outcome.status for outcome in outcomes] == ["failed", "finished"]
    assert "No space left on device" in record(tmp_path, full.run_key)["error"]


def test_a_disk_that_fills_up_under_a_pack(data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays full for the second checkpoint of one run: each goes on by itself from the first, that run too, once there is room."""
    specs = [run_spec(data_file, rank=rank, checkpoint_every=2) for rank in (2, 4, 8)]
    train(tmp_path / "whole", *specs)
    inner, tried = trajectory.save_adapter, set[Path]()
    full = Storage(tmp_path / "full").run(specs[1].run_key).checkpoint(4)

    def save(folder: Path, *rest: Any) -> None:
        if folder == full and full not in tried:
            tried.add(full)
            raise OSError(errno.ENOSPC, "No space left on device")
        inner(folder, *rest)

    monkeypatch.setattr(patience, "WAIT_FOR_SPACE_S", 0.0)
    monkeypatch.setattr(trajectory, "save_adapter", save)
    outcomes = train_trial(trial_of(*specs, pack=3), Storage(tmp_path / "full"), tmp_path, True, Watching())
    assert [outcome.status for outcome in outcomes] == ["finished"] * 3
    for spec, goes_on_from in zip(specs, (4, 2, 2), strict=True):
        found, expected = (curve(tmp_path / name, spec) for name in ("full", "whole"))
        assert [line[0] for line in found] == [1, 2, 3, 4, 5, 6]
        for line, wanted in zip(found, expected, strict=True):
            assert line == pytest.approx(wanted, abs=1e-5)
        told = record(tmp_path / "full", spec.run_key)
        assert [each["step"] for each in told["resumed"]] == [goes_on_from]
        assert "trained without others from here on: " in told["notes"][-1] and "No space left on device" in told["notes"][-1]


def test_other_errors_of_the_disk_are_not_waited_for(data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(trajectory, "save_adapter", broken)
    spec = run_spec(data_file)
    started = time.monotonic()
    outcomes = train_trial(trial_of(spec), Storage(tmp_path), tmp_path, True, Watching())
    assert outcomes[0].error is not None and "Input/output error" in outcomes[0].error
    assert time.monotonic() - started < patience.WAIT_FOR_SPACE_S


def test_a_record_that_half_fits_is_taken_back(tmp_path: Path) -> None:
    """The room ends in the middle of a line: here by a limit on the size of files, which Python ignores the signal of."""
    file = tmp_path / "train.jsonl"
    records._append(file, b"a whole line\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(OSError, match="No space left"):
            records._append(file, b"another line\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == b"a whole line\n"


def test_a_run_out_of_memory_is_told_with_what_would_fit(data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy, modest = run_spec(data_file), run_spec(data_file, seed=2)
    inner = loop.training_pack

    def out_of_memory(trajectories: Any, *rest: Any) -> Any:
        if any(each.lead.run_key == greedy.run_key for each in trajectories):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it")
        return inner(trajectories, *rest)

    monkeypatch.setattr(loop, "training_pack", out_of_memory)
    hints = {greedy.run_key: "micro_batch_size 1 (now 5)"}
    outcomes = train_trial(trial_of(greedy, modest), Storage(tmp_path), tmp_path, True, Watching(), hints=hints)
    assert [outcome.status for outcome in outcomes] == ["failed", "finished"]
    expected = "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.; what would fit: micro_batch_size 1 (now 5)"
    assert outcomes[0].error == record(tmp_path, greedy.run_key)["error"] == expected
