"""A sweep that asks in several ways, beside a model behind an address: from Ray to MLflow and the report."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.integration.api_servers import api_server
from tests.integration.processes import run_jmedlora

Made = tuple[Path, subprocess.CompletedProcess[str], int, list[str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The sweep, run once: its folder, what it printed, how often the address was asked, and its changes to `smoke`."""
    folder = tmp_path_factory.mktemp("ways")
    with api_server() as server:
        source = f"{{kind: api, base_url: '{server.url}', model: served, input_price: 2, output_price: 4}}"
        changes = [
            "extra=[]",
            "shots=[0]",
            "prompts=[alpaca-ja,exam-ja]",
            "evaluate.scoring=[generate,loglikelihood]",
            f"references=[{{name: served, source: {source}}}]",
        ]
        done = run_jmedlora("sweep", "smoke", *changes, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder, done, server.requests, changes


def read_table(folder: Path, name: str = "table") -> list[dict[str, str]]:
    with (folder / f"results/sweeps/smoke/report/{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def stored(folder: Path, name: str) -> dict[Path, Any]:
    return {path: path.read_bytes() for path in (folder / "results/runs").rglob(name)}


def test_every_system_is_asked_in_every_way_that_it_can_answer(made: Made) -> None:
    rows = read_table(made[0])
    found = {(row["model"], row["method"], row["prompt"], row["scoring"]) for row in rows}
    ways = {(prompt, scoring) for prompt in ("alpaca-ja", "exam-ja") for scoring in ("generate", "loglikelihood")}
    local = {("tiny-llama", method, *way) for method in ("base", "lora") for way in ways}
    assert found == local | {("served", "base", prompt, "generate") for prompt in ("alpaca-ja", "exam-ja")}
    assert len(rows) == len(found)
    for row in rows:
        for score in ("accuracy", "exact_match", "gestalt_score"):
            assert 0 <= float(row[f"{score}_low"]) <= float(row[score]) <= float(row[f"{score}_high"]) <= 1
        assert bool(row["accuracy_p_holm"]) == (row["method"] == "lora")


def test_the_address_is_asked_each_question_once_and_told_what_it_cost(made: Made) -> None:
    folder, _, requests, _ = made
    assert requests == 8 * 2
    costs = [json.loads(text) for text in stored(folder, "metrics.json").values() if b'"cost"' in text]
    assert len(costs) == 2
    for metrics in costs:
        assert metrics["cost"] == pytest.approx((2 * metrics["prompt_tokens"] + 4 * metrics["new_tokens"]) / 1e6)


def test_mlflow_tells_ways_prompts_bounds_and_changes_apart(made: Made) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{made[0]}/results/mlflow.db")
    experiment = client.get_experiment_by_name("smoke")
    assert experiment is not None
    runs = [run for run in client.search_runs([experiment.experiment_id]) if "jmedlora.run_key" in run.data.tags]
    assert {run.info.status for run in runs} == {"FINISHED"} and len(runs) == 3
    tuned = next(run for run in runs if run.data.params["method"] == "lora").data.metrics
    for prefix in ("sample/0shot", "sample/0shot/loglikelihood", "sample/0shot/exam-ja", "sample/0shot/exam-ja/loglikelihood"):
        for key in ("gestalt_score", "gestalt_score_low", "gestalt_score_high", "accuracy_change", "accuracy_p", "accuracy_p_holm"):
            assert f"{prefix}/{key}" in tuned
    served = next(run for run in runs if run.data.params["model"] == "served")
    assert served.data.params["precision"] == "api"
    assert not any("loglikelihood" in key for key in served.data.metrics)


def test_other_metric_settings_score_anew_what_is_stored_and_generate_nothing(made: Made) -> None:
    folder, _, _, changes = made
    texts = {
        path: [json.loads(line)["prediction"] for line in text.splitlines()] for path, text in stored(folder, "predictions.jsonl").items()
    }
    assert len(texts) == 10
    before = {row["run_key"] + row["evaluation_key"]: row for row in read_table(folder)}
    done = run_jmedlora("sweep", "smoke", *changes, "evaluate.metrics={order: choice_response, loglikelihood: per_byte}", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scored 10 stored evaluations anew" in done.stdout
    for path, text in stored(folder, "predictions.jsonl").items():
        assert [json.loads(line)["prediction"] for line in text.splitlines()] == texts[path]
    assert {json.loads(text)["metric_settings"]["order"] for text in stored(folder, "metrics.json").values()} == {"choice_response"}
    after = {row["run_key"] + row["evaluation_key"]: row for row in read_table(folder)}
    assert after.keys() == before.keys()
    assert any(after[key]["gestalt_score"] != before[key]["gestalt_score"] for key in after)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/results/mlflow.db")
    experiment = client.get_experiment_by_name("smoke")
    assert experiment is not None
    runs = [run for run in client.search_runs([experiment.experiment_id]) if "jmedlora.run_key" in run.data.tags]
    assert {run.data.params["metric_settings"] for run in runs} == {"order=choice_response,loglikelihood=per_byte"}
    for run in runs:
        shown = {
            row["prompt"]: row
            for row in after.values()
            if row["run_key"] == run.data.tags["jmedlora.run_key"] and row["scoring"] == "generate"
        }
        assert run.data.metrics["sample/0shot/gestalt_score"] == float(shown["alpaca-ja"]["gestalt_score"])


def test_a_sweep_refuses_to_train_on_the_questions_that_it_asks(tmp_path: Path) -> None:
    data = "data={name: leaked, path: questions.jsonl, format: questions}"
    rows = [
        {
            "problem_id": f"L{place}",
            "problem_text": f"{text}はどれか。",
            "choices": ["甲状腺", "副腎", "下垂体", "膵臓", "胸腺"],
            "answer": ["b"],
        }
        for place, text in enumerate(["コルチゾールを分泌する内分泌腺", "成長ホルモンを分泌する内分泌腺", "Tリンパ球が成熟するリンパ組織"])
    ]
    for name in ("questions.jsonl", "asked.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    changes = [data, "benchmarks=[{name: asked, path: asked.jsonl}]", "shots=[0]", "extra=[]"]
    for command in ("plan", "sweep"):
        refused = run_jmedlora(command, "smoke", *changes, cwd=tmp_path)
        assert refused.returncode == 2, refused.stdout
        assert len(refused.stderr.strip().splitlines()) == 1
        assert "3 questions" in refused.stderr and "L0, L1, L2" in refused.stderr and "leaks" in refused.stderr
    assert not (tmp_path / "results").exists()
    assert run_jmedlora("plan", "smoke", *changes, "leaks=allow", cwd=tmp_path).returncode == 0
