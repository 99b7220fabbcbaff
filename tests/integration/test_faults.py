"""Faults injected into whole sweeps for real; each has to end as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jmedlora.plan.layout import STATE_TENSORS, Storage
from jmedlora.plan.specs import RunSpec
from tests.faults import NAME, DisturbedSweep
from tests.integration.processes import run_jmedlora
from tests.outcomes import differences, outcome_of, unclean

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

GRACE_S = 20.0
"""Spot machines give from half a minute to two."""
Begin = Callable[..., DisturbedSweep]


@pytest.fixture
def begin(tmp_path: Path, sweep_cache: Path) -> Iterator[Begin]:
    """Starts the sweep, with overrides, in a folder of the test's own; whatever is left of it is ended after the test."""
    begun: list[DisturbedSweep] = []

    def start(*overrides: str) -> DisturbedSweep:
        begun.append(DisturbedSweep(tmp_path / "sweep", sweep_cache, *overrides))
        begun[0].start()
        return begun[0]

    yield start
    for sweep in begun:
        sweep.stop()


def told(sweep: DisturbedSweep, run: RunSpec) -> dict[str, Any]:
    """run.json"""
    content: dict[str, Any] = json.loads(sweep.storage.run(run.run_key).run_json.read_text(encoding="utf-8"))
    return content


def assert_as_undisturbed(sweep: DisturbedSweep, undisturbed: Path) -> None:
    """Adapters, tables, predictions, curves and MLflow are those of an undisturbed sweep, and nothing is left running or half written."""
    assert sweep.leftovers() == []
    found = differences(outcome_of(sweep.storage.root, NAME), outcome_of(undisturbed, NAME))
    assert found == [], "\n".join(found)
    assert unclean(sweep.storage.root) == []


def states_between(sweep: DisturbedSweep, run: RunSpec) -> list[int]:
    """Steps of states that are not written anyway, at a checkpoint."""
    return [step for step in sweep.storage.run(run.run_key).states() if step not in run.checkpoint_steps]


def test_processes_killed_one_after_another_while_the_driver_lives(begin: Begin, undisturbed: Path) -> None:
    """An evaluation actor in mid-decode, a training worker after notice, a trial driver, the tracker, a training worker without notice."""
    sweep = begin()
    sweep.hit_when_possible("evaluation actor")
    hit = sweep.hit_when_possible("training worker", signal.SIGTERM)
    assert sweep.plan is not None
    first, second = sweep.plan.trials[0].runs  # in the order in which they are trained
    step = sweep.wait_for(lambda: states_between(sweep, first), "the state that is written after notice", within_s=GRACE_S)[0]
    assert f"{first.run_key} step " in hit.work and step <= int(hit.work.split()[-1]) + 2
    sweep.wait_for(lambda: told(sweep, first)["resumed"], "training again")
    sweep.hit_when_possible("trial driver")
    sweep.wait_for(lambda: len(told(sweep, first)["resumed"]) == 2, "training again")
    sweep.hit_when_possible("tracker")
    sweep.wait_for(lambda: sweep.in_training() and sweep.in_training()[0] == second, "the second run")  # type: ignore[index]
    sweep.hit_when_possible("training worker")
    assert sweep.finish() == 0, sweep.output()
    assert "Traceback" not in sweep.output()
    assert told(sweep, first)["resumed"][0]["step"] == step, "what was saved after notice is what was gone on from"
    assert_as_undisturbed(sweep, undisturbed)


def test_a_killed_driver_takes_all_with_it_and_damaged_states_are_passed_over(begin: Begin, undisturbed: Path) -> None:
    sweep = begin()
    sweep.wait_for(lambda: sweep.in_training(from_step=210), "the second checkpoint")
    worker = sweep.find("training worker")
    assert worker is not None
    worker.suspend()  # Ray ends it some time after its driver, and it would train meanwhile, perhaps to its end
    assert sweep.in_training(from_step=210)
    assert sweep.hit("driver") is not None
    assert sweep.finish() == -signal.SIGKILL
    worker.kill()
    assert sweep.leftovers() == []
    assert sweep.plan is not None
    run = sweep.plan.trials[0].runs[0]
    folder = sweep.storage.run(run.run_key)
    assert sorted(folder.states()) == [100, 200]
    damaged = folder.state(200) / STATE_TENSORS
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert "Traceback" not in sweep.run_to_the_end()
    assert [each["step"] for each in told(sweep, run)["resumed"]] == [100]
    assert any("state/step-000200 is passed over" in note for note in told(sweep, run)["notes"])
    assert_as_undisturbed(sweep, undisturbed)


def test_a_sweep_is_held_interrupted_with_grace_and_at_once_and_goes_on(begin: Begin, undisturbed: Path) -> None:
    """Before it has begun; a second driver; Ctrl-C, SIGTERM as `ray job stop` sends it, Ctrl-C twice: the same command goes on."""
    sweep = begin()
    early: list[tuple[Callable[[], Any], signal.Signals]] = [
        (lambda: "sweep faults: " in sweep.output(), signal.SIGINT),  # Ray is about to start
        (lambda: sweep.find("raylet"), signal.SIGTERM),
    ]
    for moment, number in early:
        sweep.wait_for(moment, "the moment to stop")
        sweep.driver.send_signal(number)
        assert sweep.finish(within_s=120) == 130, sweep.output()
        assert "the same command goes on from here" in sweep.output() and "Traceback" not in sweep.output()
        sweep.start()
    sweep.wait_for(sweep.in_training, "a run in training")
    second = run_jmedlora("sweep", f"./{NAME}.yaml", cwd=sweep.folder)
    assert second.returncode == 3, second.stdout + second.stderr
    assert f"held by process {sweep.driver.pid} on " in second.stderr
    for number in (signal.SIGINT, signal.SIGTERM):
        sweep.wait_for(sweep.in_training, "a run in training")
        hit = sweep.hit("driver", number)
        assert hit is not None and sweep.plan is not None
        assert sweep.finish(within_s=300) == 130, sweep.output()
        output = sweep.output()
        assert "the same command goes on from here" in output and "Traceback" not in output, f"{hit}\n{output}"
        assert sweep.leftovers() == []
        for run in sweep.plan.runs:
            if steps := sweep.steps(run):
                assert max(sweep.storage.run(run.run_key).states()) == steps, "the state is that of the last step"
                assert sweep.status(run) in ("interrupted", "finished")
        sweep.start()
    sweep.wait_for(sweep.in_training, "a run in training")
    sweep.driver.send_signal(signal.SIGINT)
    time.sleep(0.2)
    sweep.driver.send_signal(signal.SIGINT)
    assert sweep.finish(within_s=300) == 130, sweep.output()
    assert "Traceback" not in sweep.output()
    assert sweep.leftovers() == []
    sweep.run_to_the_end()
    assert_as_undisturbed(sweep, undisturbed)


def test_a_worker_that_is_killed_again_and_again_is_told_and_the_others_go_on(begin: Begin, undisturbed: Path) -> None:
    """As the kernel ends a process that takes more memory than there is: without progress between, it is not tried for ever."""
    sweep = begin("resources={preset: local, max_failures: 1}")
    sweep.wait_for(lambda: sweep.plan, "the plan")
    assert sweep.plan is not None
    first, second = sweep.plan.trials[0].runs  # in the order in which they are trained
    killed: set[float] = set()  # starts of the run, by their times: each is killed once

    def begun() -> float | None:
        at = told(sweep, first)["started"] if sweep.in_training() and sweep.steps(first) < first.checkpoint_steps[0] else None
        return None if at in killed else at

    while sweep.status(first) != "failed":
        assert len(killed) <= 2
        sweep.wait_for(lambda: sweep.status(first) == "failed" or begun(), "the run in training, or failed")
        if (start := begun()) and sweep.hit("training worker"):
            killed.add(start)
    assert len(killed) == 2
    assert sweep.finish() == 1, sweep.output()
    assert "Traceback" not in sweep.output()
    assert first.run_key in sweep.output() or "r4" in sweep.output()
    assert told(sweep, first)["error"]
    assert sweep.status(second) == "finished"
    sweep.run_to_the_end()
    assert_as_undisturbed(sweep, undisturbed)


class SmallDisk:
    """A file system of a few megabytes, seen by processes that enter its name space, and through /proc."""

    def __init__(self, folder: Path, megabytes: int):
        folder.mkdir(parents=True)
        self.folder = folder
        mount = f'mount -t tmpfs -o size={megabytes}m tmpfs "{folder}" && echo mounted && exec sleep 3600'
        self._holder = subprocess.Popen(["unshare", "--map-root-user", "--mount", "sh", "-c", mount], stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None and self._holder.stdout.readline() == "mounted\n"

    @property
    def enter(self) -> list[str]:
        """A command that runs what follows it where the file system is seen."""
        inside = f"--wdns={self.folder.parent}"
        return ["nsenter", f"--target={self._holder.pid}", "--user", "--mount", "--preserve-credentials", inside]

    def seen(self, path: Path) -> Path:
        """The way from here to a path below the mount."""
        return Path(f"/proc/{self._holder.pid}/root{path}")

    def fill(self, leave_bytes: int) -> Path:
        """A file that takes all room but `leave_bytes`."""
        ballast = self.seen(self.folder) / "ballast"
        room = os.statvfs(ballast.parent)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_bsize - leave_bytes)
        return ballast

    def end(self) -> None:
        self._holder.kill()
        self._holder.wait()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no user name spaces on this machine")
    disk = SmallDisk(tmp_path / "sweep" / "results", megabytes=64)
    yield disk
    disk.end()


def test_a_disk_that_is_full_during_a_checkpoint_is_waited_for(
    small_disk: SmallDisk, tmp_path: Path, sweep_cache: Path, undisturbed: Path
) -> None:
    sweep = DisturbedSweep(tmp_path / "sweep", sweep_cache, prefix=small_disk.enter)
    sweep.storage = Storage(small_disk.seen(sweep.storage.root))
    try:
        sweep.start()
        run, step = sweep.wait_for(lambda: sweep.in_training(from_step=20), "a run in training")
        ballast = small_disk.fill(leave_bytes=64 * 1024)
        assert step < run.checkpoint_steps[0]
        sweep.wait_for(lambda: stands_still(lambda: sweep.steps(run)), "training waits")
        held_at = sweep.steps(run)
        assert not any(sweep.storage.run(run.run_key).is_committed(at) for at in run.checkpoint_steps if at > held_at)
        ballast.unlink()
        assert sweep.finish() == 0, sweep.output()
        assert "Traceback" not in sweep.output()
        assert any("the disk was full" in note for note in told(sweep, run)["notes"])
        assert_as_undisturbed(sweep, undisturbed)
    finally:
        sweep.stop()


def stands_still(value: Callable[[], int], for_s: float = 4.0) -> bool:
    before = value()
    time.sleep(for_s)
    return value() == before
