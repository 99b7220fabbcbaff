"""Who drives a sweep, and where it stands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jmedlora.orchestrator.ledger import HeldByAnother, all_jobs, driver_lock, is_done, is_ready, run_status, standing
from jmedlora.plan.layout import CHECKSUMS, METRICS, Storage
from jmedlora.plan.planner import open_sweep

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
