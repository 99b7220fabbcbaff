"""`jmedlora report SWEEP --rebuild-mlflow`, on a made-up sweep that has run to its end."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from jmedlora.cli import app
from jmedlora.data.atomic import write_text
from jmedlora.orchestrator.ledger import driver_lock
from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import Plan
from tests.integration.processes import run_jmedlora
from tests.made_up import base_spec, plan_of, run_spec, write_sweep
from tests.replay import disorder, points_of, run_ids, tracked


@pytest.fixture
def swept(tmp_path: Path) -> tuple[Plan, Storage]:
    """A sweep by the name of a shipped one: the command asks its file for nothing but the name."""
    plan = plan_of([base_spec()], [run_spec("aaaaaaaaaaaa", rank=4), run_spec("bbbbbbbbbbbb", epochs=3)], sweep="smoke")
    storage = Storage(tmp_path)
    write_sweep(storage, plan)
    write_text(storage.sweep("smoke").plan_json, plan.model_dump_json())
    return plan, storage


def rebuild(storage: Storage) -> Result:
    return CliRunner().invoke(app, ["report", "smoke", "--rebuild-mlflow", f"storage={storage.root}"])


def test_mlflow_is_made_from_storage_and_the_second_time_stays_as_it_is(swept: tuple[Plan, Storage]) -> None:
    plan, storage = swept
    done = rebuild(storage)
    assert done.exit_code == 0, done.output
    assert "MLflow: 3 runs and bases of smoke" in done.output
    held = tracked(storage.mlflow_database, "smoke"), run_ids(storage.mlflow_database)
    assert disorder(held[0], plan, storage) == []
    assert held[0]["parent"]["status"] == "FINISHED"
    assert "report/index.html" in held[0]["parent"]["artifacts"]
    [(step, _)] = points_of(held[0]["bbbbbbbbbbbb"], "sample/0shot/accuracy_p_holm")
    assert step == 21
    assert rebuild(storage).exit_code == 0
    assert (tracked(storage.mlflow_database, "smoke"), run_ids(storage.mlflow_database)) == held


def test_a_living_driver_is_not_disturbed(swept: tuple[Plan, Storage]) -> None:
    _, storage = swept
    with driver_lock(storage.sweep("smoke")):
        done = rebuild(storage)
    assert done.exit_code == 3
    assert done.stderr.startswith("jmedlora: sweep smoke is held by process ")
    assert not storage.mlflow_database.exists()
    assert not storage.sweep("smoke").report.exists()


def test_an_mlflow_that_is_away_is_told_in_a_line(swept: tuple[Plan, Storage], tmp_path: Path) -> None:
    unanswered = "http://me:secret@127.0.0.1:9"  # the discard port: nobody listens
    done = run_jmedlora("report", "smoke", "--rebuild-mlflow", f"storage={tmp_path}", cwd=tmp_path, MLFLOW_TRACKING_URI=unanswered)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("jmedlora: MLflow could not be written: ")
    assert "secret" not in line
