"""MLflow on a real sqlite database: what is written, and that writing it again adds nothing."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from jmedlora.config.benchmark import ExamRules, PromptConfig
from jmedlora.data.atomic import write_text
from jmedlora.plan.layout import Storage
from jmedlora.plan.records import Record, read_training
from jmedlora.plan.specs import Plan
from jmedlora.tracking.backlog import Backlog, Update
from jmedlora.tracking.location import tracking_uri
from jmedlora.tracking.mlflow_tracker import MlflowTracker
from jmedlora.tracking.rebuilding import rebuild
from jmedlora.tracking.sweep_record import read_record
from jmedlora.tracking.ui import sweep_address
from jmedlora.tracking.writer import TrackingWriter
from tests.integration.processes import ROOT
from tests.made_up import (
    BEGINNING,
    BENCHMARK,
    base_spec,
    evaluation_spec,
    plan_of,
    run_spec,
    write_evaluation,
    write_sweep,
    write_training,
)
from tests.replay import Replay, disorder, points_of, run_ids, tracked, wait_until


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An empty MLflow database: making its schema takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


@pytest.fixture
def storage(tmp_path: Path, database: bytes, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("jmedlora.tracking.sweep_record.now", lambda: BEGINNING - 60)  # before anything that is made up
    (tmp_path / "mlflow.db").write_bytes(database)
    return Storage(tmp_path)


KILLED_WHILE_MAKING = """
import os, signal, sys, threading, time, pathlib
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from jmedlora.tracking.database import make_database
folder = pathlib.Path(sys.argv[1])
def watch():
    places = [folder / "mlflow.db", folder / ".mlflow.db.new"]
    while sum(path.stat().st_size for path in places if path.exists()) < 100_000:  # a tenth of what it comes to
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
make_database(f"sqlite:///{folder}/mlflow.db")
"""


def test_a_database_whose_making_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_MAKING, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob(".*.new")] == [".mlflow.db.new"]
    storage = Storage(tmp_path)
    tracker_of(small_plan(), storage)
    assert len(runs_of(storage)) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}


def small_plan() -> Plan:
    runs = [run_spec("aaaaaaaaaaaa", rank=4), run_spec("bbbbbbbbbbbb", rank=16, epochs=3), run_spec("cccccccccccc", rank=4, seed=1)]
    return plan_of([base_spec()], runs)


def tracker_of(plan: Plan, storage: Storage) -> MlflowTracker:
    tracker = MlflowTracker(tracking_uri(storage), plan, storage)
    tracker.start()
    tracker.restore_from_storage()
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
    again.start()
    again.restore_from_storage()
    assert rows(storage) == first
    assert {run.info.status for run in runs_of(storage) if run.data.tags["jmedlora.role"] != "sweep"} == {"FINISHED"}
    finished = child_of(storage, "aaaaaaaaaaaa").info
    assert finished.end_time == round((BEGINNING + 100 + 2.2 * 7) * 1000)


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
    write_training(storage, plan.runs[0], steps=3, error="loss is not finite at step 3")
    tracker.sync("aaaaaaaaaaaa")
    failed = child_of(storage, "aaaaaaaaaaaa")
    assert (failed.info.status, failed.data.tags["jmedlora.error"]) == ("FAILED", "loss is not finite at step 3")
    shutil.rmtree(storage.run("aaaaaaaaaaaa").path)
    write_training(storage, plan.runs[0])
    tracker.sync("aaaaaaaaaaaa")
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
    tracker_of(plan, storage)
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
    tracker.finish_sweep("interrupted", BEGINNING)
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


# ---------------------------------------------------------------- written live, while MLflow comes and goes


def writer_of(plan: Plan, storage: Storage) -> TrackingWriter:
    return TrackingWriter(tracking_uri(storage), plan, storage)


def is_whole(plan: Plan, storage: Storage) -> bool:
    """Whether MLflow holds all of storage, but for the sweep's end."""
    try:
        held = tracked(storage.mlflow_database)
    except AssertionError:  # something is there twice
        return False
    children = {key: run for key, run in held.items() if key != "parent"}
    return len(children) == len(plan.bases) + len(plan.runs) and disorder(children, plan, storage) == []


def write_some_report(storage: Storage, plan: Plan) -> tuple[Path, list[Record]]:
    """A report's folder, and changes as a report tells them."""
    folder = storage.sweep(plan.sweep).report
    write_text(folder / "index.html", "<p>report</p>")
    write_text(storage.sweep(plan.sweep).plan_json, "{}")
    change = {"metric": "accuracy", "difference": 0.25, "p": 0.01, "p_holm": 0.02, "evaluation_key": plan.evaluations[0].evaluation_key}
    return folder, [change | {"run_key": run.run_key, "step": run.total_steps} for run in plan.runs]


def test_rebuilt_from_storage_it_is_what_was_written_live(storage: Storage, database: bytes, tmp_path: Path) -> None:
    plan = small_plan()
    writer = writer_of(plan, storage)
    wait_until(lambda: "parent" in tracked(storage.mlflow_database))
    for _ in Replay(plan, tmp_path / "scratch", storage, writer).events():
        time.sleep(0.01)
    folder, changes = write_some_report(storage, plan)
    assert writer.finish("finished", folder, changes) == []
    live = tracked(storage.mlflow_database)
    assert disorder(live, plan, storage) == []
    assert (live["parent"]["status"], live["parent"]["start"]) == ("FINISHED", (BEGINNING - 60) * 1000)
    assert live["parent"]["artifacts"].keys() == {"plan.json", "report/index.html"}
    assert points_of(live["bbbbbbbbbbbb"], "sample/0shot/accuracy_p_holm") == [(21, 0.02)]

    storage.mlflow_database.write_bytes(database)
    shutil.rmtree(storage.root / "mlartifacts")
    assert rebuild(tracking_uri(storage), plan, storage, folder, changes) == 4
    again = tracked(storage.mlflow_database)
    for held in (*live.values(), *again.values()):
        held["points"].sort(key=str)  # which run was written when is another matter
    assert again == live

    ids, held = run_ids(storage.mlflow_database), rows(storage)
    rebuild(tracking_uri(storage), plan, storage, folder, changes)
    assert (run_ids(storage.mlflow_database), rows(storage)) == (ids, held)


class UnreliableClient(MlflowClient):
    """Of its calls, some raise before they are made and some after: MLflow has taken those, and nobody was told."""

    luck = random.Random()
    calls = (
        *("create_experiment", "set_experiment_tag", "search_runs", "create_run", "update_run", "set_terminated", "delete_run"),
        *("log_batch", "log_inputs", "log_text", "log_artifacts", "log_artifact", "set_tag", "get_metric_history"),
    )
    failed: ClassVar[Counter[str]] = Counter()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in UnreliableClient.calls:
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            fate = UnreliableClient.luck.random()
            if fate < 0.08:
                UnreliableClient.failed[name] += 1
                raise ConnectionError("before")
            result = found(*arguments, **named)
            if fate > 0.92:
                UnreliableClient.failed[f"{name}, taken"] += 1
                raise ConnectionError("after")
            return result

        return call


@pytest.mark.parametrize("seed", [1, 2])
def test_calls_that_fail_anywhere_leave_no_trace(
    storage: Storage, database: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("jmedlora.tracking.mlflow_tracker.MlflowClient", UnreliableClient)
    monkeypatch.setattr("jmedlora.tracking.writer.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("jmedlora.tracking.writer.LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr("jmedlora.tracking.writer.CLOSING_PAUSE_S", 0.1)
    monkeypatch.setattr("jmedlora.tracking.writer.CLOSING_ROUNDS", 200)
    monkeypatch.setattr(UnreliableClient, "luck", random.Random(seed))
    monkeypatch.setattr(UnreliableClient, "failed", Counter())
    plan = small_plan()
    writer = writer_of(plan, storage)
    for _ in Replay(plan, tmp_path / "scratch", storage, writer).events():
        time.sleep(0.03)
    wait_until(lambda: is_whole(plan, storage))  # long before the end is asked for
    folder, changes = write_some_report(storage, plan)
    assert writer.finish("finished", folder, changes) == []
    assert UnreliableClient.failed.total() > 0
    disturbed = tracked(storage.mlflow_database)
    assert disorder(disturbed, plan, storage) == []
    monkeypatch.undo()
    storage.mlflow_database.write_bytes(database)
    rebuild(tracking_uri(storage), plan, storage, folder, changes)
    undisturbed = tracked(storage.mlflow_database)
    for held in (*disturbed.values(), *undisturbed.values()):
        held["points"].sort(key=str)
    assert disturbed == undisturbed


def test_nobody_waits_for_an_mlflow_that_is_away_and_memory_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jmedlora.tracking.writer.PATIENCE_S", {"finished": 0.5})
    monkeypatch.setattr("jmedlora.tracking.backlog.MOST_UPDATES", 10)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    plan, storage = small_plan(), Storage(tmp_path)
    with socket.socket() as unanswered:  # bound, but nobody listens
        unanswered.bind(("127.0.0.1", 0))
        writer = TrackingWriter(f"http://user:secret@127.0.0.1:{unanswered.getsockname()[1]}", plan, storage)
        for step in range(2000):
            writer.train_steps("aaaaaaaaaaaa", [{"step": step, "time": BEGINNING}])
            assert len(writer._backlog.updates) <= 10
        wait_until(lambda: writer.trouble() is not None)
        assert re.fullmatch(r"MLflow unreachable since \d\d:\d\d:\d\d, 2000 updates waiting", writer.trouble() or "")
        assert set(writer._backlog.behind) == {"base00000032", "aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"}
        [problem] = writer.finish("finished")
    assert "not everything was written" in problem
    assert "`jmedlora report demo --rebuild-mlflow`" in problem
    assert "secret" not in problem
    assert "\n" not in problem


def test_a_run_that_cannot_be_written_holds_up_no_other(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jmedlora.tracking.writer.FIRST_PAUSE_S", 0.01)
    plan = small_plan()
    write_sweep(storage, plan)
    damaged = storage.run("aaaaaaaaaaaa").evaluation(plan.evaluations[0].folder, 7) / "predictions.jsonl"
    text = damaged.read_text(encoding="utf-8")
    damaged.write_text("{\n")
    folder, changes = write_some_report(storage, plan)
    [problem] = writer_of(plan, storage).finish("finished", folder, changes)
    assert "aaaaaaaaaaaa" in problem
    assert str(damaged) in problem
    held = tracked(storage.mlflow_database)
    assert {key: run["status"] for key, run in held.items() if run["status"] != "FINISHED"} == {"aaaaaaaaaaaa": "SCHEDULED"}
    damaged.write_text(text, encoding="utf-8")
    rebuild(tracking_uri(storage), plan, storage, folder, changes)
    assert disorder(tracked(storage.mlflow_database), plan, storage) == []


def test_what_is_interrupted_is_killed_and_goes_on(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run is in its middle, one base evaluation of two is done, the other runs wait."""
    plan = small_plan()
    writer = writer_of(plan, storage)
    replay = Replay(plan, tmp_path / "scratch", storage, writer)
    bases, training = replay.evaluations("base00000032", 0), replay.training(plan.runs[0])
    next(bases)
    next(training)
    assert writer.finish("interrupted") == []
    held = tracked(storage.mlflow_database)
    statuses = {key: run["status"] for key, run in held.items()}
    assert statuses == {
        **dict.fromkeys(("parent", "base00000032", "aaaaaaaaaaaa"), "KILLED"),
        **dict.fromkeys(("bbbbbbbbbbbb", "cccccccccccc"), "SCHEDULED"),
    }
    assert held["aaaaaaaaaaaa"]["end"] == round((BEGINNING + 100 + 2.2 * 3) * 1000)
    monkeypatch.setattr("jmedlora.tracking.sweep_record.now", lambda: BEGINNING + 1000)
    replay.writer = again = writer_of(plan, storage)
    next(training)
    wait_until(lambda: child_of(storage, "aaaaaaaaaaaa").info.status == "RUNNING")
    for events in (bases, training, *map(replay.training, plan.runs[1:])):
        for _ in events:
            pass
    assert again.finish("finished") == []
    assert disorder(tracked(storage.mlflow_database), plan, storage) == []
    record = read_record(plan, storage)
    assert (record.started, record.status, record.finished) == (BEGINNING - 60, "finished", BEGINNING + 1000)


def test_other_exam_rules_are_written_anew_and_a_further_benchmark_is_added(storage: Storage) -> None:
    def planned(*rules: ExamRules) -> Plan:
        exams = [BENCHMARK.model_copy(update={"name": f"exam{index}", "exam": rule}) for index, rule in enumerate(rules)]
        return plan_of([base_spec()], [run_spec("aaaaaaaaaaaa")], [evaluation_spec(0, exam) for exam in exams])

    def score(plan: Plan, points: float) -> None:
        for item in plan.evaluations:
            place = storage.run("aaaaaaaaaaaa").evaluation(item.folder, 7)
            shutil.rmtree(place, ignore_errors=True)
            metrics = write_evaluation(storage, "aaaaaaaaaaaa", 7, item, 0.5)
            exam = {"exam": {"points": points, "points_total": 500, "prohibited": 0}}
            (place / "metrics.json").write_text(json.dumps(metrics | exam))

    strict, lenient = ExamRules(max_prohibited=1), ExamRules(max_prohibited=3)
    score(planned(strict), 300)
    tracker_of(planned(strict), storage)
    first = child_of(storage, "aaaaaaaaaaaa").info.run_id
    score(planned(lenient), 310)
    tracker_of(planned(lenient), storage)
    assert [value for _, _, value in history(storage, "aaaaaaaaaaaa", "exam0/0shot/exam_points")] == [310]
    second = child_of(storage, "aaaaaaaaaaaa").info.run_id
    assert second != first
    tracker_of(planned(lenient, strict), storage)
    tracker_of(planned(lenient), storage)
    assert child_of(storage, "aaaaaaaaaaaa").info.run_id == second
    tracker_of(planned(lenient, lenient), storage)  # it was there with other rules once
    assert child_of(storage, "aaaaaaaaaaaa").info.run_id != second


def test_an_experiment_in_the_bin_and_runs_that_are_there_twice_are_mended(storage: Storage) -> None:
    plan = small_plan()
    write_sweep(storage, plan)
    tracker_of(plan, storage)
    client = MlflowClient(tracking_uri=tracking_uri(storage))
    undisturbed = tracked(storage.mlflow_database)
    experiment = client.get_experiment_by_name("demo").experiment_id
    for tags in (child_of(storage, "aaaaaaaaaaaa").data.tags, {"jmedlora.role": "sweep"}):
        client.create_run(experiment, tags=tags)  # as a call that was made twice leaves it
    client.delete_run(child_of(storage, "bbbbbbbbbbbb").info.run_id)
    tracker = tracker_of(plan, storage)
    assert tracked(storage.mlflow_database) == undisturbed
    tracker.start()
    client.delete_experiment(experiment)
    tracker_of(plan, storage)
    # what was deleted before the experiment was comes back with it
    assert len(runs_of(storage)) == 5
    held = tracked(storage.mlflow_database)
    assert disorder({key: run for key, run in held.items() if key != "parent"}, plan, storage) == []


def test_a_backlog_keeps_the_order_of_each_run_and_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jmedlora.tracking.backlog.MOST_UPDATES", 3)
    backlog = Backlog(["base", "run", "other"])
    for run_key in ("base", "run", "other"):
        backlog.caught_up(run_key, 0)

    def update(*concerns: str) -> Update:
        return Update(concerns, lambda _: None)

    first, second, third, fourth = update("run"), update("other"), update("run"), update("base", "run", "other")
    for told in (first, second, third):
        backlog.put(told)
    assert backlog.updates.popleft() is first
    backlog.set_back([first])  # what comes after it must not be written before it
    assert (list(backlog.updates), backlog.behind) == ([second], {"run": 2})
    backlog.put(third)
    assert (list(backlog.updates), backlog.behind) == ([second], {"run": 3})
    missed = backlog.behind["run"]
    backlog.set_back([third])  # while the run is being written
    backlog.caught_up("run", missed)
    assert backlog.behind == {"run": 1}
    for _ in range(2):
        backlog.put(second)
    assert len(backlog.updates) == 3
    backlog.put(second)  # there is no room
    assert (len(backlog.updates), backlog.behind) == (0, {"run": 1, "other": 4})
    backlog.put(fourth)
    assert (len(backlog.updates), backlog.waiting) == (1, 6)
    backlog.empty_queue()
    assert backlog.behind == {"run": 2, "other": 5, "base": 1}
