"""A made-up sweep that happens: storage grows as in a real one, a tracking writer is told, and what MLflow holds is read raw."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jmedlora.plan.layout import METRICS, Storage
from jmedlora.plan.records import finished_metrics
from jmedlora.plan.specs import Plan, RunSpec
from jmedlora.tracking.writer import TrackingWriter
from tests.made_up import write_sweep

BUNDLE = 3  # optimizer steps told at once


class Replay:
    """Storage of a finished sweep, moved into another storage event by event; each event is told to `writer` once it is stored."""

    def __init__(self, plan: Plan, scratch: Path, storage: Storage, writer: TrackingWriter):
        """scratch: an empty folder for the whole sweep; `writer` may be exchanged between two events."""
        self.plan, self.storage, self.writer = plan, storage, writer
        self._source = Storage(scratch)
        write_sweep(self._source, plan)

    def events(self) -> Iterator[None]:
        """The whole sweep, an event each time it is advanced."""
        for base in self.plan.bases:
            yield from self.evaluations(base.run_key, 0)
        for run in self.plan.runs:
            yield from self.training(run)

    def training(self, run: RunSpec) -> Iterator[None]:
        source, target = self._source.run(run.run_key), self.storage.run(run.run_key)
        ended = json.loads(source.run_json.read_text())
        lines = source.train_jsonl.read_text().splitlines(keepends=True)
        target.path.mkdir(parents=True, exist_ok=True)
        target.run_json.write_text(json.dumps(ended | {"status": "running", "finished": None}))
        for first in range(0, len(lines), BUNDLE):
            bundle = lines[first : first + BUNDLE]
            with target.train_jsonl.open("a") as file:
                file.writelines(bundle)
            self.writer.train_steps(run.run_key, [json.loads(line) for line in bundle])
            yield
            for step in run.checkpoint_steps:
                if first < step <= first + BUNDLE:
                    yield from self.evaluations(run.run_key, step)
        target.run_json.write_text(json.dumps(ended))
        self.writer.run_ended(run.run_key)
        yield

    def evaluations(self, run_key: str, step: int) -> Iterator[None]:
        for item in self.plan.evaluations:
            place = self.storage.run(run_key).evaluation(item.folder, step)
            shutil.copytree(self._source.run(run_key).evaluation(item.folder, step), place)
            self.writer.evaluated(json.loads((place / METRICS).read_text()))
            yield


def tracked(database: Path, sweep: str = "demo") -> dict[str, dict[str, Any]]:
    """All that MLflow holds of a sweep's living runs, by run key (`parent` for the parent), without the ids that it draws itself.

    Raises AssertionError where a run is there twice. Points are in the order in which they were written.
    """
    found: dict[str, dict[str, Any]] = {}
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as opened:

        def rows(query: str, *values: Any) -> list[tuple[Any, ...]]:
            return opened.execute(query, values).fetchall()

        runs = rows(
            "select r.run_uuid, r.name, r.status, r.start_time, r.end_time, r.artifact_uri from runs r "
            "join experiments e on r.experiment_id = e.experiment_id where e.name = ? and r.lifecycle_stage = 'active'",
            sweep,
        )
        keys = {run_id: _tags(opened, run_id).get("jmedlora.run_key", "parent") for run_id, *_ in runs}
        for run_id, name, status, start, end, artifacts in runs:
            tags = _tags(opened, run_id)
            if "mlflow.parentRunId" in tags:
                tags["mlflow.parentRunId"] = keys.get(tags["mlflow.parentRunId"], "unknown")
            assert keys[run_id] not in found, f"two runs of {keys[run_id]}"
            found[keys[run_id]] = {
                "name": name,
                "status": status,
                "start": start,
                "end": end,
                "tags": tags,
                "params": dict(rows("select key, value from params where run_uuid = ?", run_id)),
                "points": rows("select key, step, timestamp, value, is_nan from metrics where run_uuid = ? order by rowid", run_id),
                "latest": sorted(rows("select key, step, value from latest_metrics where run_uuid = ?", run_id)),
                "datasets": sorted(
                    rows(
                        "select d.name, d.digest, d.dataset_profile, t.value from inputs i join datasets d on d.dataset_uuid = i.source_id "
                        "left join input_tags t on t.input_uuid = i.input_uuid where i.destination_id = ?",
                        run_id,
                    )
                ),
                "artifacts": _files(artifacts),
            }
    return found


def run_ids(database: Path) -> dict[str, str]:
    """Id of every run, living or deleted, with its status and stage."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as opened:
        return {
            run_id: f"{stage} {status}" for run_id, stage, status in opened.execute("select run_uuid, lifecycle_stage, status from runs")
        }


def points_of(held: dict[str, Any], key: str) -> list[tuple[int, float]]:
    """Step and value of a metric's points, in the order in which they were written."""
    return [(step, value) for name, step, _, value, _ in held["points"] if name == key]


def disorder(found: dict[str, dict[str, Any]], plan: Plan, storage: Storage) -> list[str]:
    """What is not as storage has it: points missing, twice, or training out of order; runs that are open."""
    wrong = [f"{key} is {held['status']}" for key, held in found.items() if held["status"] in ("RUNNING", "SCHEDULED")]
    for run in plan.runs:
        lines = [json.loads(line) for line in storage.run(run.run_key).train_jsonl.read_text().splitlines()]
        for name in ("loss", "learning_rate", "grad_norm"):
            if points_of(found[run.run_key], f"train/{name}") != [(line["step"], line[name]) for line in lines]:
                wrong.append(f"{run.run_key}: train/{name}")
        base = next(base for base in plan.bases if base.run_key == run.base_key)
        scores = [(metrics["time"], step) for spec in (base, run) for step, _, metrics in finished_metrics(plan, storage, spec)]
        written = [(when / 1000, step) for key, step, when, _, _ in found[run.run_key]["points"] if key.endswith("/gestalt_score")]
        if sorted(written) != sorted((round(time, 3), step) for time, step in scores):
            wrong.append(f"{run.run_key}: scores")
    return wrong


def _tags(opened: sqlite3.Connection, run_id: str) -> dict[str, str]:
    return dict(opened.execute("select key, value from tags where run_uuid = ?", (run_id,)))


def _files(uri: str) -> dict[str, str]:
    folder = Path(uri.removeprefix("file://"))
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*")) if path.is_file()}


def wait_until(is_so: Callable[[], bool]) -> None:
    """Waits for a minute at most."""
    for _ in range(600):
        if is_so():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come to that")
