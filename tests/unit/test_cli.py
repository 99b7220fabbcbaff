"""The command line as a user meets it, each command in a process of its own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jmedlora.config.faults import BadInput
from jmedlora.orchestrator.address import cluster_address
from jmedlora.orchestrator.doctor import examine

HEAVY = ("torch", "ray", "transformers", "mlflow", "deepspeed")


def jmedlora(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-m", "jmedlora.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_plan_imports_no_heavy_library(tmp_path: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from jmedlora.cli import app\n"
        "result = CliRunner().invoke(app, ['plan', 'jmedlora', '--json']); assert result.exit_code == 0, result.output\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_plan_as_json(tmp_path: Path) -> None:
    done = jmedlora("plan", "quickstart", "grid.rank=[8,64]", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert [run["rank"] for run in plan["runs"]] == [8, 8, 64, 64, 16]
    assert all(len(run["run_key"]) == 12 and run["model_parameters"] == 134_515_008 for run in plan["runs"])
    assert {"trials", "totals"} <= plan.keys()
    assert list(tmp_path.iterdir()) == []


def test_the_plan_as_a_table(tmp_path: Path) -> None:
    done = jmedlora("plan", "jmedlora", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "llama2-70b-chat qlora r128 10ep" in done.stdout
    assert "not here yet: model medcalm" in done.stdout


@pytest.mark.parametrize("command", ["plan", "sweep", "submit", "status"])
def test_bad_input_ends_with_2_one_line_per_fault_and_nothing_written(tmp_path: Path, command: str) -> None:
    done = jmedlora(command, "quickstart", "grid.rank=[0]", "training.colour=1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("jmedlora: command line: ") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_refuses_to_start_without_its_sources(tmp_path: Path) -> None:
    done = jmedlora("sweep", "jmedlora", "offline=true", cwd=tmp_path)
    assert done.returncode == 2
    assert "model medcalm: not here yet" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_report_needs_a_sweep_that_was_started(tmp_path: Path) -> None:
    done = jmedlora("report", "quickstart", cwd=tmp_path)
    assert done.returncode == 2
    assert "quickstart has not been run" in done.stderr


def test_where_a_sweep_stands_before_it_started(tmp_path: Path) -> None:
    done = jmedlora("status", "smoke", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    state = json.loads(done.stdout)
    assert (len(state["runs"]["waiting"]), state["evaluations_done"], state["evaluations"]) == (2, 0, 8)
    assert list(tmp_path.iterdir()) == []


def test_doctor_tells_versions_and_methods(tmp_path: Path) -> None:
    done = jmedlora("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)
    assert findings["machine"]["cores"] >= 1
    assert findings["versions"]["torch"]
    assert findings["methods"]["qlora"]["ok"] is True
    vllm, version = findings["methods"]["evaluation by vllm (optional)"], findings["versions"]["vllm"]
    assert vllm["ok"] is bool(version and findings["machine"]["gpus"])
    assert ("pip install 'jmedlora[vllm]'" in vllm["missing"]) is (version is None)
    assert ("a GPU" in vllm["missing"]) is (not findings["machine"]["gpus"])


@pytest.mark.parametrize("command", ["report", "ui"])
def test_what_is_shown_from_storage_takes_no_other_settings(tmp_path: Path, command: str) -> None:
    done = jmedlora(command, "smoke", "grid.rank=[4]", "shots=[0]", "storage=here", cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert [line.split(": ")[2] for line in lines] == ["grid.rank=[4]", "shots=[0]"]
    assert all(line.endswith("allowed: storage=FOLDER alone") for line in lines)


def test_a_damaged_storage_is_told_by_file(tmp_path: Path) -> None:
    path = tmp_path / "results/sweeps/smoke/plan.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"sweep": "smo')
    done = jmedlora("report", "smoke", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith(f"jmedlora: {path}: damaged: ")


@pytest.mark.parametrize(
    ("uri", "ok"), [(None, True), ("sqlite:///x.db", True), ("mysql+pymysql://a@b/c", True), ("nonsense://x", False), ("mlruns", False)]
)
def test_doctor_knows_what_mlflow_can_write_to(monkeypatch: pytest.MonkeyPatch, uri: str | None, ok: bool) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if uri is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert examine()["methods"]["tracking"]["ok"] is ok


@pytest.mark.parametrize("address", ["foo", "http://127.0.0.1:8265", "127.0.0.1:99999", "127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1"])
def test_an_address_where_no_cluster_is(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(BadInput, match=rf"^command line: --address: {re.escape(address)}: "):
        cluster_address(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(BadInput, match=rf"^environment: RAY_ADDRESS: {re.escape(address)}: "):
        cluster_address(None)


def test_addresses_that_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        for address in (None, "auto", "local", f"127.0.0.1:{port}", f"ray://localhost:{port}"):
            assert cluster_address(address) == address
