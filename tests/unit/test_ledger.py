"""Who drives a sweep, and where it stands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from jmedlora.config.compose import load_sweep
from jmedlora.config.faults import BadInput, Fault
from jmedlora.data.atomic import write_text
from jmedlora.orchestrator.driver import run_sweep
from jmedlora.orchestrator.errors import Refused, is_told_by, last_line, refusals, told
from jmedlora.orchestrator.ledger import HeldByAnother, all_jobs, driver_lock, is_done, is_ready, run_status, standing
from jmedlora.orchestrator.progress import ProgressDisplay
from jmedlora.plan.layout import CHECKSUMS, METRICS, Storage
from jmedlora.plan.naming import names_of
from jmedlora.plan.planner import make_plan, open_sweep
from jmedlora.plan.records import read_metrics, read_training

HOLD = """
import sys, time
from pathlib import Path
from jmedlora.orchestrator.ledger import driver_lock
from jmedlora.plan.layout import SweepFolder
with driver_lock(SweepFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_driver_is_told_who_holds_the_sweep_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    folder = Storage(tmp_path).sweep("x")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(HeldByAnother, match=f"process {holder.pid} on "), driver_lock(folder):
        pass
    holder.kill()
    holder.wait()
    with driver_lock(folder):
        pass
    with driver_lock(folder):
        pass


def test_a_sweep_stands_where_storage_says(tmp_path: Path) -> None:
    _, plan = open_sweep("smoke", ["shots=[0]"])
    storage = Storage(tmp_path)
    assert standing(plan, storage).runs["waiting"] == [run.run_key for run in plan.runs]
    first, second = plan.runs
    folder = storage.run(first.run_key)
    folder.path.mkdir(parents=True)
    folder.run_json.write_text(json.dumps({"status": "finished"}))
    assert run_status(first, storage) == "waiting"  # finished, but its checkpoint is gone
    checkpoint = folder.checkpoint(first.total_steps)
    checkpoint.mkdir(parents=True)
    (checkpoint / CHECKSUMS).write_text("{}")
    assert run_status(first, storage) == "finished"
    other = storage.run(second.run_key)
    other.path.mkdir(parents=True)
    other.run_json.write_text(json.dumps({"status": "failed", "error": "step 3: the loss is nan"}))
    jobs = all_jobs(plan)
    assert [is_ready(job, storage) for job in jobs] == [True, True, True, False]
    done = storage.run(first.run_key).evaluation(plan.evaluations[0].folder, first.total_steps)
    done.mkdir(parents=True)
    (done / METRICS).write_text("{}")
    assert [is_done(job, storage) for job in jobs] == [False, False, True, False]
    state = standing(plan, storage)
    assert (state.runs["finished"], state.runs["failed"]) == ([first.run_key], [second.run_key])
    assert state.errors == {second.run_key: "step 3: the loss is nan"}
    assert (state.evaluations_done, state.evaluations, state.is_complete) == (1, 4, False)


def test_an_interrupted_run_is_counted_as_such_and_is_not_complete(tmp_path: Path) -> None:
    _, plan = open_sweep("smoke", ["shots=[0]"])
    storage = Storage(tmp_path)
    for job in all_jobs(plan):
        write_text(storage.run(job.run_key).evaluation(job.evaluation.folder, job.step) / METRICS, "{}")
    for run, status in zip(plan.runs, ("finished", "interrupted"), strict=True):
        write_text(storage.run(run.run_key).checkpoint(run.total_steps) / CHECKSUMS, "{}")
        write_text(storage.run(run.run_key).run_json, json.dumps({"status": status}))
    state = standing(plan, storage)
    first, second = (run.run_key for run in plan.runs)
    assert state.runs == {"finished": [first], "running": [], "interrupted": [second], "waiting": [], "failed": []}
    assert (state.evaluations_done, state.evaluations) == (4, 4) and not state.is_complete
    write_text(storage.run(second).run_json, '{"status": "finished"}')
    assert standing(plan, storage).is_complete


def test_a_held_sweep_is_told_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_sweep("smoke", [f"storage={tmp_path}"])
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    with driver_lock(Storage(tmp_path).sweep("smoke")), pytest.raises(HeldByAnother):
        run_sweep(config, make_plan(config), None, Console(quiet=True))


def test_an_unusable_address_leaves_nothing_behind(tmp_path: Path) -> None:
    config = load_sweep("smoke", [f"storage={tmp_path}"])
    with pytest.raises(BadInput):
        run_sweep(config, make_plan(config), "foo", Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_told_by_path(tmp_path: Path) -> None:
    _, plan = open_sweep("smoke", ["shots=[0]"])
    storage, run, evaluation = Storage(tmp_path), plan.runs[0], plan.evaluations[0]
    folder = storage.run(run.run_key)
    scored = folder.evaluation(evaluation.folder, run.total_steps)
    scored.mkdir(parents=True)
    for text in ('{"n": 1', "[]", '{"n": 1}'):
        (scored / METRICS).write_text(text)
        with pytest.raises(BadInput, match=f"^{scored / METRICS}: damaged: .*delete it"):
            read_metrics(storage, run.run_key, run.total_steps, evaluation)
    folder.train_jsonl.write_text('{"step": 1}\n{"st\n{"step": 3}\n{"ste')
    with pytest.raises(BadInput, match=f"^{folder.train_jsonl}:2: damaged: "):
        read_training(storage, run.run_key)
    folder.run_json.write_text('{"status": "fin')
    with pytest.raises(BadInput, match=f"^{folder.run_json}: damaged: "):
        standing(plan, storage)


def test_errors_of_other_processes_in_one_line() -> None:
    with pytest.raises(Refused) as caught, refusals():
        raise BadInput([Fault("a", "b", "c", "d"), Fault("e", "", "f")])
    assert told(caught.value) == "a: b: c; allowed: d; e: f"
    assert told(OSError("no\n such  file")) == "OSError: no such file"
    over_ray = RuntimeError(f"Traceback ...\n  File\njmedlora.orchestrator.errors.Refused: {caught.value}\n")
    assert last_line(over_ray) == told(caught.value)
    assert last_line(RuntimeError("Traceback ...\njmedlora.models.source.SourceMissing: model x: no")) == "SourceMissing: model x: no"
    assert is_told_by("OSError: no such file", ["OSError: no such file"])
    assert not is_told_by("OSError: no such file", ["", "ValueError: loss"])


def test_progress_counts_earlier_runs_and_tells_what_starts(tmp_path: Path) -> None:
    _, plan = open_sweep("smoke", ["shots=[0]"])
    storage = Storage(tmp_path)
    first, second = plan.runs
    checkpoint = storage.run(first.run_key).checkpoint(first.total_steps)
    checkpoint.mkdir(parents=True)
    (checkpoint / CHECKSUMS).write_text("{}")
    storage.run(first.run_key).run_json.write_text(json.dumps({"status": "finished"}))
    names = names_of(plan)
    display = ProgressDisplay(Console(quiet=True), plan, storage, None, all_jobs(plan), names, 1, 1)
    state: dict[str, Any] = {"runs": {}, "evaluating": [], "evaluation_s": None, "tracking": None}
    assert "starting workers; runs 1/2 trained" in display.line(state)
    state["runs"][second.run_key] = {"status": "starting"}
    assert f"starting {names[second.run_key]}; runs 1/2" in display.line(state)
    state["runs"][second.run_key] = {"status": "running", "total_steps": 9}
    assert "starting" not in display.line(state)
