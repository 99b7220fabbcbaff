"""Sweeps that share runs share their work, at once or one after the other; a sweep that grows does only what is new."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.processes import ROOT, run_jmedlora

SMALL = ["extra=[]", "shots=[0]", "~grid.epochs", "training.max_steps=60"]


def snapshot(folder: Path) -> dict[str, float]:
    """When each file of every run was last written."""
    files = (path for path in (folder / "results/runs").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime for path in files if path.name not in ("lease.json", "run.json")}


def facts(folder: Path) -> dict[int, dict[str, object]]:
    """run.json of every trained run, by rank."""
    told = [json.loads(path.read_text()) for path in (folder / "results/runs").glob("*/run.json")]
    return {run["settings"]["rank"]: run for run in told}


@pytest.mark.slow
def test_two_sweeps_at_once_train_a_shared_run_once_and_growing_adds_only_what_is_new(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("defaults: [smoke, _self_]\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    sweeps = [
        subprocess.Popen(
            [sys.executable, "-m", "jmedlora.cli", "sweep", sweep, *SMALL, f"grid.rank={ranks}"],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for sweep, ranks in (("smoke", "[4]"), ("other.yaml", "[4,8]"))
    ]  # fmt: skip
    try:
        for process in sweeps:
            output, _ = process.communicate(timeout=400)
            assert process.returncode == 0, output
    finally:
        for process in sweeps:
            process.kill()
    trained = facts(tmp_path)
    assert sorted(trained) == [4, 8]
    for run in trained.values():
        lines = (tmp_path / "results/runs" / str(run["run_key"]) / "train.jsonl").read_text().splitlines()
        assert (run["status"], run["resumed"], run["notes"], len(lines)) == ("finished", [], [], 60)

    before, told = snapshot(tmp_path), facts(tmp_path)
    grown = run_jmedlora("sweep", "smoke", *SMALL, "grid.rank=[4,8,2]", "shots=[0,1]", cwd=tmp_path)
    assert grown.returncode == 0, grown.stdout + grown.stderr
    after = snapshot(tmp_path)
    assert {path: time for path, time in after.items() if path in before} == before, "what was there is left as it was"
    new = facts(tmp_path)
    assert {rank: new[rank] for rank in (4, 8)} == told
    added = {path.split("/", 3)[3] for path in after.keys() - before.keys() if path.split("/")[2] != new[2]["run_key"]}
    assert {path.split("/")[1].split(".")[1] for path in added} == {"1shot"}, "other runs and the base got their new evaluations alone"

    before = snapshot(tmp_path)
    prompts = run_jmedlora("sweep", "smoke", *SMALL, "grid.rank=[4,8,2]", "shots=[0,1]", "prompts=[alpaca-ja,exam-ja]", cwd=tmp_path)
    assert prompts.returncode == 0, prompts.stdout + prompts.stderr
    after = snapshot(tmp_path)
    assert {path: time for path, time in after.items() if path in before} == before
    assert {path.split("/")[4].split(".")[2] for path in after.keys() - before.keys()} == {"exam-ja"}
