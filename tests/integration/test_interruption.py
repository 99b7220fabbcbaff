"""A sweep that is interrupted, held against a second driver, and continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.processes import ROOT, run_jmedlora


def train_lines(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.glob("results/runs/*/train.jsonl"))


@pytest.mark.slow
def test_a_sweep_is_held_interrupted_and_continued(tmp_path: Path) -> None:
    arguments = ["sweep", "smoke", "training.max_steps=400", "~grid.epochs", "extra=[]", "shots=[0]", "evaluate.every=200"]
    first = subprocess.Popen(
        [sys.executable, "-m", "jmedlora.cli", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while train_lines(tmp_path) < 5:
            assert first.poll() is None, first.communicate()[0]
            assert time.monotonic() < deadline, "training did not begin"
            time.sleep(0.5)
        second = run_jmedlora(*arguments, cwd=tmp_path)
        assert second.returncode == 3, second.stdout + second.stderr
        assert f"held by process {first.pid} on " in second.stderr
        children = psutil.Process(first.pid).children(recursive=True)
        first.send_signal(signal.SIGINT)
        output, _ = first.communicate(timeout=120)
        assert first.returncode == 130, output
        assert "the same command goes on from here" in output
        assert "Traceback" not in output
        _, alive = psutil.wait_procs(children, timeout=30)
        assert alive == []
    finally:
        first.kill()
    done = run_jmedlora(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "results/sweeps/smoke/plan.json").read_text())["runs"][0]
    state = json.loads((tmp_path / "results/runs" / run["run_key"] / "run.json").read_text())
    assert state["status"] == "finished"
    assert train_lines(tmp_path) == 400
