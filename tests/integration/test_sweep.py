"""Whole sweeps on a Ray of their own: Tune, Train, DeepSpeed, evaluation actors, MLflow and report, all real."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.integration.processes import run_jmedlora

KEYS = ("run_key", "model", "method", "lora_rank", "lora_alpha", "epochs", "step", "seed", "benchmark", "shots", "prompt", "n")
COLUMNS = [*KEYS, "accuracy", "exact_match", "gestalt_score"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The sweep `smoke`, run once; its working directory and what it printed."""
    folder = tmp_path_factory.mktemp("smoke")
    done = run_jmedlora("sweep", "smoke", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def table(folder: Path, sweep: str = "smoke") -> list[dict[str, str]]:
    with (folder / f"results/sweeps/{sweep}/report/table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_holds_every_base_and_run(smoke: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    rows = table(smoke[0])
    assert list(rows[0])[: len(COLUMNS)] == COLUMNS
    found = {(row["model"], row["method"], row["step"], row["shots"]) for row in rows}
    assert found == {
        (model, method, step, shots)
        for model, method, step in [
            ("tiny-llama", "base", "0"),
            ("tiny-llama", "lora", "7"),
            ("tiny-gpt-neox", "base", "0"),
            ("tiny-gpt-neox", "qlora", "4"),
        ]
        for shots in ("0", "1")
    }
    assert len(rows) == 8
    assert all(row["n"] == "8" and 0 <= float(row["gestalt_score"]) <= 1 for row in rows)


def test_the_terminal_shows_progress_table_report_and_the_way_to_mlflow(smoke: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = smoke
    assert re.search(r"\[\d+:\d\d\] .*runs \d/2 trained, evaluations \d/8 done, \d to come", done.stdout)
    assert "tiny-llama" in done.stdout
    assert f"report: {folder}/results/sweeps/smoke/report/index.html" in done.stdout
    assert " ui smoke" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_storage_is_laid_out_as_promised(smoke: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    results = smoke[0] / "results"
    plan = json.loads((results / "sweeps/smoke/plan.json").read_text())
    for run in plan["runs"]:
        folder = results / "runs" / run["run_key"]
        state = json.loads((folder / "run.json").read_text())
        assert state["status"] == "finished"
        assert len((folder / "train.jsonl").read_text().splitlines()) == run["total_steps"]
        checkpoint = folder / "checkpoints" / f"step-{run['total_steps']:06d}"
        assert {path.name for path in checkpoint.iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "checksums.json"}
        assert len(list(folder.glob("evaluations/sample.*shot.alpaca-ja.*/step-*/metrics.json"))) == 2
    for base in plan["bases"]:
        assert len(list((results / "runs" / base["run_key"]).glob("evaluations/*/step-000000/predictions.jsonl"))) == 2


def test_mlflow_holds_a_parent_and_children_that_compare(smoke: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{smoke[0]}/results/mlflow.db")
    experiment = client.get_experiment_by_name("smoke")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "jmedlora.run_key" in run.data.tags]
    parents = [run for run in runs if "jmedlora.run_key" not in run.data.tags]
    assert (len(parents), len(children)) == (1, 4)
    assert all(run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id for run in children)
    assert len({frozenset(run.data.params) for run in children}) == 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    for child in children:
        assert {
            f"sample/{shots}shot/{name}" for shots in (0, 1) for name in ("accuracy", "exact_match", "gestalt_score")
        } <= child.data.metrics.keys()
    tuned = [run for run in children if run.data.params["method"] != "base"]
    assert all("train/loss" in run.data.metrics and "train/tokens_per_s" in run.data.metrics for run in tuned)


def test_a_finished_sweep_does_nothing_again(smoke: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in (folder / "results").rglob("*") if path.is_file()}
    done = run_jmedlora("sweep", "smoke", cwd=folder)
    assert done.returncode == 0
    assert "complete already" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (folder / "results").rglob("*") if path.is_file()} == before


def test_status_and_report_speak_from_storage(smoke: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = smoke
    assert "2 finished" in run_jmedlora("status", "smoke", cwd=folder).stdout
    before = table(folder)
    done = run_jmedlora("report", "smoke", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert table(folder) == before


def test_workers_shard_and_a_failing_run_does_not_stop_the_others(tmp_path: Path) -> None:
    """Two workers a trial: ZeRO 2 and ZeRO 3 train; a run that diverges is recorded, the rest finishes, and the exit code is 1."""
    done = run_jmedlora(
        "sweep",
        "smoke",
        "grid={model: [tiny-llama], method: [lora], rank: [4], deepspeed: [zero2]}",
        "extra=[{model: tiny-gpt-neox, method: qlora, rank: 2, deepspeed: zero3, max_steps: 2}, "
        "{model: tiny-llama, method: lora, rank: 2, learning_rate: 1e30, max_grad_norm: null, max_steps: 3}]",
        "grid.max_steps=[2]",
        "shots=[0]",
        "resources.workers_per_trial=2",
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    plan = json.loads((tmp_path / "results/sweeps/smoke/plan.json").read_text())
    states = {}
    for run in plan["runs"]:
        state = json.loads((tmp_path / "results/runs" / run["run_key"] / "run.json").read_text())
        assert state["workers"] == 2
        states[run["settings"]["learning_rate"], state["zero_stage"]] = state["status"]
    assert states == {(5e-3, 2): "finished", (5e-3, 3): "finished", (1e30, 0): "failed"}
    assert "failed" in done.stdout
    assert {(row["method"], row["step"]) for row in table(tmp_path)} == {("base", "0"), ("lora", "2"), ("qlora", "2")}


def test_a_shorter_run_is_the_beginning_of_a_longer_one_and_is_scored_once(tmp_path: Path) -> None:
    done = run_jmedlora("sweep", "smoke", "extra=[]", "grid.epochs=[1,2]", "shots=[0]", "training.dropout=0.1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = tmp_path / "results"
    plan = json.loads((results / "sweeps/smoke/plan.json").read_text())
    short, long = (results / "runs" / run["run_key"] for run in plan["runs"])
    step = f"step-{plan['runs'][0]['total_steps']:06d}"
    assert (short / f"checkpoints/{step}/checksums.json").read_text() == (long / f"checkpoints/{step}/checksums.json").read_text()
    metrics = [json.loads(next(folder.glob(f"evaluations/*/{step}/metrics.json")).read_text()) for folder in (short, long)]
    assert [one["run_key"] for one in metrics] == [short.name, long.name]
    assert len([one for one in metrics if "computed_for" in one]) == 1
    assert metrics[0]["gestalt_score"] == metrics[1]["gestalt_score"]
