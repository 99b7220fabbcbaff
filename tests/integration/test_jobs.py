"""Sweeps as Ray jobs on a head of the test's own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.processes import ROOT, run_jmedlora

SMALL = ["extra=[]", "shots=[0]", "training.max_steps=2", "~grid.epochs"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray head that ends with the tests: blocked in a process group of its own, so that nothing else is stopped with it."""
    dashboard, gcs, clients, agent = (free_port() for _ in range(4))
    # jobs run what `python` is for the head, as in an activated environment
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={gcs}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={clients}", f"--dashboard-agent-listen-port={agent}"]
    log = (tmp_path_factory.mktemp("head") / "head.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        for _ in range(120):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            time.sleep(0.5)
        else:
            pytest.fail(f"the head did not come up: {Path(log.name).read_text()}")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


@pytest.mark.slow
def test_a_submitted_sweep_streams_its_log_and_leaves_its_report(head: str, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "mine.yaml").write_text("defaults: [smoke, _self_]\ndata: own\n")
    (tmp_path / "study" / "data").mkdir()
    rows = ROOT / "jmedlora/data/sample/instructions.jsonl"
    (tmp_path / "study" / "data" / "own.yaml").write_text(f"path: {rows}\n")
    results = tmp_path / "results"
    done = run_jmedlora(
        "submit", str(tmp_path / "study/mine.yaml"), f"storage={results}", *SMALL, "--address", head, cwd=tmp_path, RAY_AUTH_MODE="disabled"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny-llama" in done.stdout
    assert (results / "sweeps/mine/report/index.html").is_file()
    state = json.loads(
        run_jmedlora("status", str(tmp_path / "study/mine.yaml"), f"storage={results}", *SMALL, "--json", cwd=tmp_path).stdout
    )
    assert len(state["runs"]["finished"]) == 1


@pytest.mark.slow
def test_rays_own_command_runs_the_entry_script_and_bad_input_fails_the_job(head: str, tmp_path: Path) -> None:
    ray = str(Path(sys.executable).parent / "ray")
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}

    def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [ray, "job", "submit", "--address", head, "--working-dir", ".", "--", "python", "jobs/sweep.py", "smoke", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)

    refused = submit("storage=results")
    assert refused.returncode != 0
    assert "would lie in Ray's temporary copy" in refused.stdout + refused.stderr
    done = submit(f"storage={tmp_path}", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "sweeps/smoke/report/table.csv").is_file()


@pytest.mark.slow
def test_a_stopped_job_finishes_its_step_and_saves(head: str, tmp_path: Path) -> None:
    long = ["extra=[]", "shots=[0]", "~grid.epochs", "training.max_steps=5000"]
    submitted = run_jmedlora(
        "submit", "smoke", f"storage={tmp_path}", *long, "--address", head, "--no-wait", cwd=tmp_path, RAY_AUTH_MODE="disabled"
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = submitted.stdout.split()[1].rstrip(":")
    deadline = time.monotonic() + 200
    while not (lines := [path for path in tmp_path.glob("runs/*/train.jsonl") if path.read_text().count("\n") >= 5]):
        assert time.monotonic() < deadline, "training did not begin"
        time.sleep(0.5)
    ray = str(Path(sys.executable).parent / "ray")
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    stopped = subprocess.run([ray, "job", "stop", job, "--address", head], env=environment, capture_output=True, text=True, timeout=200)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    run = lines[0].parent
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    steps = lines[0].read_text().count("\n")
    assert (run / "state" / f"step-{steps:06d}").is_dir()


def test_submitting_needs_an_absolute_storage_and_an_address_that_answers(tmp_path: Path) -> None:
    done = run_jmedlora("submit", "smoke", "storage=results", cwd=tmp_path)
    assert (done.returncode, "storage: 'results' is relative" in done.stderr) == (2, True)
    done = run_jmedlora("submit", "smoke", f"storage={tmp_path}", "--address", f"http://127.0.0.1:{free_port()}", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "does not answer as a Ray dashboard" in done.stderr
