"""MLflow on a real sqlite database: what is written, and that writing it again adds nothing."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from jmedlora.config.benchmark import PromptConfig
from jmedlora.plan.layout import Storage
from jmedlora.plan.records import read_training
from jmedlora.plan.specs import Plan
from jmedlora.tracking.location import tracking_uri
from jmedlora.tracking.mlflow_tracker import MlflowTracker
from jmedlora.tracking.ui import sweep_address
from tests.made_up import (
    BEGINNING,
    base_spec,
    evaluation_spec,
    plan_of,
    run_spec,
    write_evaluation,
    write_sweep,
    write_training,
)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An empty MLflow database: making its schema takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


@pytest.fixture
def storage(tmp_path: Path, database: bytes, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(database)
    return Storage(tmp_path)


def small_plan() -> Plan:
    runs = [run_spec("aaaaaaaaaaaa", rank=4), run_spec("bbbbbbbbbbbb", rank=16, epochs=3), run_spec("cccccccccccc", rank=4, seed=1)]
    return plan_of([base_spec()], runs)


def tracker_of(plan: Plan, storage: Storage) -> MlflowTracker:
    tracker = MlflowTracker(tracking_uri(storage), plan, storage)
    tracker.start()
    return tracker


def runs_of(storage: Storage, sweep: str = "demo", view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    client = MlflowClient(tracking_uri=tracking_uri(storage))
    return list(client.search_runs([client.get_experiment_by_name(sweep).experiment_id], run_view_type=view))


def child_of(storage: Storage, run_key: str) -> Run:
    [child] = [run for run in runs_of(storage) if run.data.tags.get("jmedlora.run_key") == run_key]
    return child


def history(storage: Storage, run_key: str, metric: str) -> list[tuple[int, int, float]]:
    points = MlflowClient(tracking_uri=tracking_uri(storage)).get_metric_history(child_of(storage, run_key).info.run_id, metric)
    return sorted((point.step, point.timestamp, point.value) for point in points)


def rows(storage: Storage) -> dict[str, int]:
    """Rows of every table that a tracker writes to."""
    with sqlite3.connect(storage.mlflow_database) as connection:
        tables = ["experiments", "runs", "metrics", "params", "tags", "datasets", "inputs", "input_tags"]
        return {table: connection.execute(f"select count(*) from {table}").fetchone()[0] for table in tables}


def test_one_parent_and_a_child_per_run_and_base(storage: Storage) -> None:
    plan = small_plan()
    tracker_of(plan, storage)
    runs = runs_of(storage)
    [parent] = [run for run in runs if run.data.tags["jmedlora.role"] == "sweep"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 5
    assert {run.data.tags["jmedlora.run_key"] for run in children} == {"base00000032", "aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"}
    assert {run.info.run_name for run in children} == {
        "smollm2-135m base",
        "smollm2-135m lora r4 1ep seed0",
        "smollm2-135m lora r16 3ep seed0",
        "smollm2-135m lora r4 1ep seed1",
    }
    # the newest is listed first, so this is the order in which people see them: as in the plan
    by_start = sorted(children, key=lambda run: -run.info.start_time)
    assert [run.data.tags["jmedlora.run_key"] for run in by_start] == ["base00000032", "aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"]
    assert {run.info.status for run in children} == {"SCHEDULED"}


def test_every_child_has_the_same_parameters_and_datasets(storage: Storage) -> None:
    tracker_of(small_plan(), storage)
    children = [run for run in runs_of(storage) if run.data.tags["jmedlora.role"] != "sweep"]
    assert len({frozenset(run.data.params) for run in children}) == 1
    base, tuned = child_of(storage, "base00000032").data.params, child_of(storage, "bbbbbbbbbbbb").data.params
    contract = {"model", "method", "lora_rank", "lora_alpha", "lora_dropout", "epochs", "learning_rate", "seed", "zero_stage"}
    assert contract <= set(tuned)
    assert (base["method"], base["lora_rank"], base["lora_targets"]) == ("base", "0", "-")
    assert (tuned["method"], tuned["lora_rank"], tuned["lora_alpha"], tuned["epochs"], tuned["steps"]) == ("lora", "16", "32", "3", "21")
    assert tuned["learning_rate"] == "0.0005"
    inputs = child_of(storage, "bbbbbbbbbbbb").inputs.dataset_inputs
    assert {(item.dataset.name, item.tags[0].value) for item in inputs} == {("sample", "training"), ("sample", "evaluation")}


def test_scores_are_named_and_dated_as_stored(storage: Storage) -> None:
    other = PromptConfig(name="other", template="{{ instruction }}")
    plan = plan_of([base_spec()], [run_spec("aaaaaaaaaaaa")], [evaluation_spec(0), evaluation_spec(1), evaluation_spec(1, prompt=other)])
    tracker = tracker_of(plan, storage)
    before = write_evaluation(storage, "base00000032", 0, plan.evaluations[0], 0.1, BEGINNING)
    after = write_evaluation(storage, "aaaaaaaaaaaa", 7, plan.evaluations[0], 0.6, BEGINNING + 60)
    elsewhere = write_evaluation(storage, "aaaaaaaaaaaa", 7, plan.evaluations[2], 0.4, BEGINNING + 70)
    for metrics in (before, after, elsewhere):
        tracker.log_evaluation(metrics)
    for score in ("accuracy", "exact_match", "gestalt_score"):
        assert history(storage, "aaaaaaaaaaaa", f"sample/0shot/{score}") == [
            (0, int(BEGINNING * 1000), before[score]),
            (7, int(BEGINNING * 1000) + 60_000, after[score]),
        ]
        assert history(storage, "base00000032", f"sample/0shot/{score}") == [(0, int(BEGINNING * 1000), before[score])]
    assert history(storage, "aaaaaaaaaaaa", "sample/1shot/other/accuracy") == [(7, int(BEGINNING * 1000) + 70_000, elsewhere["accuracy"])]
    assert history(storage, "aaaaaaaaaaaa", "sample/1shot/accuracy") == []


def test_the_table_of_predictions_is_that_of_the_last_step(storage: Storage) -> None:
    plan = plan_of([base_spec()], [run_spec("aaaaaaaaaaaa", epochs=2)])
    write_sweep(storage, plan)
    tracker = tracker_of(plan, storage)
    early = json.loads((storage.run("aaaaaaaaaaaa").evaluation(plan.evaluations[0].folder, 7) / "metrics.json").read_text())
    tracker.log_evaluation(early)  # comes late, and must not take the place of step 14
    child = child_of(storage, "aaaaaaaaaaaa")
    tables = json.loads(child.data.tags["mlflow.loggedArtifacts"])
    assert [table["path"] for table in tables] == ["predictions/sample.0shot.alpaca-ja.json", "predictions/sample.1shot.alpaca-ja.json"]
    client = MlflowClient(tracking_uri=tracking_uri(storage))
    table = json.loads(Path(client.download_artifacts(child.info.run_id, tables[0]["path"])).read_text(encoding="utf-8"))
    assert table["columns"][:2] == ["problem_id", "response"]  # what MLflow's page groups by and lays side by side
    told = [dict(zip(table["columns"], row)) for row in table["data"]]
    assert len(told) == 40
    assert {row["step"] for row in told} == {14}
    assert told[0]["question"] == "肝臓で産生されて脂肪の消化を助けるのはどれか。"
    assert told[0]["gold"] == "d"


def test_writing_everything_again_adds_nothing(storage: Storage) -> None:
    plan = small_plan()
    live = tracker_of(plan, storage)
    write_sweep(storage, plan)
    for run in plan.runs:
        live.log_train(run.run_key, read_training(storage, run.run_key)[:5])
        live.log_train(run.run_key, read_training(storage, run.run_key)[3:])
    live.restore_from_storage()
    first = rows(storage)
    assert first["runs"] == 5
    # 3 scores x 2 shots at (base: 1, runs: base + checkpoints 2, 4, 2) points; 4 values per optimizer step
    assert first["metrics"] == 6 * (1 + 2 + 4 + 2) + 4 * (7 + 21 + 7)
    again = tracker_of(plan, storage)
    again.restore_from_storage()
    again.restore_from_storage()
    assert rows(storage) == first
    assert {run.info.status for run in runs_of(storage) if run.data.tags["jmedlora.role"] != "sweep"} == {"FINISHED"}
    finished = child_of(storage, "aaaaaaaaaaaa").info
    assert finished.end_time == round((BEGINNING + 100 + 2.2 * 7) * 1000)


def test_mlflow_can_be_rebuilt_from_storage(storage: Storage, database: bytes) -> None:
    plan = small_plan()
    write_sweep(storage, plan)
    tracker_of(plan, storage)
    children = [run.info for run in runs_of(storage) if run.data.tags["jmedlora.role"] != "sweep"]
    assert all(0 < child.end_time - child.start_time < 120_000 for child in children)  # milliseconds
    before = history(storage, "bbbbbbbbbbbb", "train/loss"), rows(storage)
    storage.mlflow_database.write_bytes(database)
    tracker_of(plan, storage)
    assert (history(storage, "bbbbbbbbbbbb", "train/loss"), rows(storage)) == before
    assert [step for step, _, _ in before[0]] == list(range(1, 22))


def test_more_steps_than_one_call_may_carry(storage: Storage) -> None:
    plan = plan_of([base_spec()], [run_spec("aaaaaaaaaaaa", epochs=100)])
    write_training(storage, plan.runs[0])
    tracker_of(plan, storage)
    assert [step for step, _, _ in history(storage, "aaaaaaaaaaaa", "train/grad_norm")] == list(range(1, 701))


def test_a_run_that_starts_over_leaves_one_clean_history(storage: Storage) -> None:
    plan = plan_of([base_spec()], [run_spec("aaaaaaaaaaaa")])
    tracker = tracker_of(plan, storage)
    write_training(storage, plan.runs[0], steps=5)
    tracker.log_train("aaaaaaaaaaaa", read_training(storage, "aaaaaaaaaaaa"))
    for path in (storage.run("aaaaaaaaaaaa").train_jsonl, storage.run("aaaaaaaaaaaa").run_json):
        path.unlink()
    storage.run("aaaaaaaaaaaa").path.rmdir()
    write_training(storage, plan.runs[0], started=BEGINNING + 1000, steps=3)
    records = read_training(storage, "aaaaaaaaaaaa")
    tracker.log_train("aaaaaaaaaaaa", records)
    assert history(storage, "aaaaaaaaaaaa", "train/loss") == [(r["step"], round(r["time"] * 1000), r["loss"]) for r in records]
    assert child_of(storage, "aaaaaaaaaaaa").info.status == "RUNNING"
    [gone] = runs_of(storage, view=ViewType.DELETED_ONLY)
    assert gone.data.tags["jmedlora.run_key"] == "aaaaaaaaaaaa"


def test_a_failed_run_is_marked_and_a_later_success_clears_it(storage: Storage) -> None:
    plan = small_plan()
    tracker = tracker_of(plan, storage)
    tracker.finish_run("aaaaaaaaaaaa", "failed", "loss is not finite at step 3")
    tracker.finish_run("bbbbbbbbbbbb", "finished", None)
    failed = child_of(storage, "aaaaaaaaaaaa")
    assert (failed.info.status, failed.data.tags["jmedlora.error"]) == ("FAILED", "loss is not finite at step 3")
    assert child_of(storage, "bbbbbbbbbbbb").info.status == "FINISHED"
    tracker.finish_run("aaaaaaaaaaaa", "finished", None)
    mended = child_of(storage, "aaaaaaaaaaaa")
    assert mended.info.status == "FINISHED"
    assert "jmedlora.error" not in mended.data.tags


def test_a_stored_failure_and_a_loss_that_is_not_a_number_are_restored(storage: Storage) -> None:
    plan = plan_of([base_spec()], [run_spec("aaaaaaaaaaaa")])
    write_training(storage, plan.runs[0], steps=3, error="loss is not finite at step 3")
    path = storage.run("aaaaaaaaaaaa").train_jsonl
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2] |= {"loss": float("nan"), "grad_norm": None}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    tracker_of(plan, storage).restore_from_storage()
    assert child_of(storage, "aaaaaaaaaaaa").info.status == "FAILED"
    assert [step for step, _, _ in history(storage, "aaaaaaaaaaaa", "train/loss")] == [1, 2, 3]
    assert [step for step, _, _ in history(storage, "aaaaaaaaaaaa", "train/grad_norm")] == [1, 2]


def test_other_workers_do_not_clash_with_an_earlier_start(storage: Storage) -> None:
    plan = plan_of([base_spec()], [run_spec("aaaaaaaaaaaa")])
    tracker_of(plan, storage)
    wider = plan.model_copy(update={"trials": [plan.trials[0].model_copy(update={"workers": 2})]})
    tracker_of(wider, storage)
    assert child_of(storage, "aaaaaaaaaaaa").data.params["workers"] == "2"
    write_sweep(storage, plan)  # trained with one worker after all
    tracker_of(wider, storage)
    assert child_of(storage, "aaaaaaaaaaaa").data.params["workers"] == "1"


def test_the_sweep_is_closed_and_opened_again_with_its_report(storage: Storage) -> None:
    plan = small_plan()
    tracker = tracker_of(plan, storage)
    sweep = storage.sweep("demo")
    sweep.report.mkdir(parents=True)
    (sweep.report / "index.html").write_text("<p>report</p>")
    sweep.plan_json.write_text("{}")
    tracker.log_report(sweep.report)
    tracker.finish_sweep("interrupted")
    [parent] = [run for run in runs_of(storage) if run.data.tags["jmedlora.role"] == "sweep"]
    assert parent.info.status == "KILLED"
    client = MlflowClient(tracking_uri=tracking_uri(storage))
    assert [item.path for item in client.list_artifacts(parent.info.run_id)] == ["plan.json", "report"]
    assert (storage.root / "mlartifacts/demo" / parent.info.run_id / "artifacts/report/index.html").is_file()
    tracker_of(plan, storage)
    assert client.get_run(parent.info.run_id).info.status == "RUNNING"


def test_the_sweeps_address_opens_a_view_that_exists(storage: Storage) -> None:
    tracker_of(small_plan(), storage)
    key = sweep_address(tracking_uri(storage), "demo", 5000).rpartition("viewStateShareKey=")[2]
    experiment = MlflowClient(tracking_uri=tracking_uri(storage)).get_experiment_by_name("demo")
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])
    shown = MlflowClient(tracking_uri=tracking_uri(storage)).search_runs([experiment.experiment_id], view["searchFilter"])
    assert {run.data.tags["jmedlora.role"] for run in shown} == {"base", "run"}


def test_where_mlflow_is(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep_address(tracking_uri(Storage(storage.root / "elsewhere")), "demo", 5000).endswith("#/experiments")
    assert not (storage.root / "elsewhere").exists()
    tracker_of(small_plan(), storage)
    experiment = MlflowClient(tracking_uri=tracking_uri(storage)).get_experiment_by_name("demo").experiment_id
    assert tracking_uri(storage) == f"sqlite:///{storage.root}/mlflow.db"
    assert sweep_address(tracking_uri(storage), "demo", 5001).startswith(f"http://127.0.0.1:5001/#/experiments/{experiment}/runs?")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert tracking_uri(storage) == "http://mlflow.example:5000"
