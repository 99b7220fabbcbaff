"""MLflow as a projection of storage: one parent run per sweep, one child per run and base, one writer.

Points carry the times stored with them, and MLflow keeps identical points once: writing anything again adds nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from jmedlora.config.clock import now
from jmedlora.plan.layout import Storage
from jmedlora.plan.naming import names_of
from jmedlora.plan.records import Record, finished_metrics, read_metrics, read_predictions, read_run, read_training, steps_of
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, Plan, RunSpec
from jmedlora.tracking.entities import (
    base_params,
    change_points,
    dataset_inputs,
    metric_prefix,
    metrics_named,
    milliseconds,
    predictions_table,
    run_params,
    score_points,
    training_points,
)
from jmedlora.tracking.experiment import ROLE, SWEEP_ROLE, create_parent, find_or_create_experiment, runs_of_experiment
from jmedlora.tracking.location import artifact_location

RUN_KEY = "jmedlora.run_key"
ERROR = "jmedlora.error"
PARENT = "mlflow.parentRunId"

_POINTS_PER_CALL = 1000  # MLflow refuses more
_ERROR_LENGTH = 4000  # characters; MLflow cuts or refuses longer tags
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}

# the schema steps of a new database, a line each
logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)


class MlflowTracker:
    """Writes one sweep to MLflow; call `start` first, and `restore_from_storage` after it where storage may hold more.

    A child whose history contradicts storage (its run started over, or was trained with other workers) is deleted and
    written anew: MLflow can neither take points back nor change a parameter.
    """

    def __init__(self, tracking_uri: str, plan: Plan, storage: Storage):
        self._client = MlflowClient(tracking_uri=tracking_uri)
        self._artifacts = artifact_location(tracking_uri, storage, plan.sweep)
        self._plan = plan
        self._storage = storage
        bases: dict[str, RunSpec | BaseSpec] = {base.run_key: base for base in plan.bases}
        self._specs = bases | {run.run_key: run for run in plan.runs}
        self._names = names_of(plan)
        self._workers = {run.run_key: trial.workers for trial in plan.trials for run in trial.runs}
        self._evaluations = {item.evaluation_key: item for item in plan.evaluations}
        self._metrics = metrics_named(plan)
        self._experiment = ""
        self._parent = ""
        self._started = 0.0
        self._children: dict[str, str] = {}
        self._status: dict[str, str] = {}
        self._steps: dict[str, dict[int, int]] = {}  # per run: optimizer step -> timestamp of its point in MLflow

    # ---------------------------------------------------------------- the sweep

    def start(self) -> None:
        """Finds or creates the experiment, the parent and every child; children created here get what storage holds."""
        self._experiment = find_or_create_experiment(self._client, self._plan, self._artifacts)
        found = runs_of_experiment(self._client, self._experiment)
        parent = next((run for run in found if run.data.tags.get(ROLE) == SWEEP_ROLE), None)
        self._parent = parent.info.run_id if parent else create_parent(self._client, self._experiment, self._plan)
        self._started = parent.info.start_time / 1000 if parent else now()
        self._client.update_run(self._parent, status="RUNNING")
        children = {run.data.tags[RUN_KEY]: run for run in found if RUN_KEY in run.data.tags}
        for run_key in self._specs:
            child = children.get(run_key)
            if child is None or self._contradicts(run_key, child):
                self._replace(run_key, child.info.run_id if child else None)
            else:
                self._children[run_key], self._status[run_key] = child.info.run_id, child.info.status

    def finish_sweep(self, status: Literal["finished", "failed", "interrupted"]) -> None:
        """Closes the parent run."""
        self._client.set_terminated(self._parent, status=_STATUS[status], end_time=milliseconds(now()))

    def log_report(self, folder: Path) -> None:
        """Puts the report, and the sweep and plan it belongs to, beside the parent run."""
        self._client.log_artifacts(self._parent, str(folder), "report")
        sweep = self._storage.sweep(self._plan.sweep)
        for path in (sweep.sweep_yaml, sweep.plan_json):
            if path.is_file():
                self._client.log_artifact(self._parent, str(path))

    def log_changes(self, changes: Sequence[Record]) -> None:
        """Logs how runs differ from their bases (`run_key, evaluation_key, step, metric, difference, p, p_holm`).

        They follow from all evaluations of the sweep together, and are dated with the last of them: when the sweep grows,
        Holm's correction changes, and the later value is the one that MLflow shows.
        """
        stored = [metrics for spec in self._specs.values() for _, _, metrics in finished_metrics(self._plan, self._storage, spec)]
        timestamp = milliseconds(max((metrics["time"] for metrics in stored), default=self._started))
        by_run: dict[str, list[Metric]] = {}
        for change in changes:
            prefix = metric_prefix(self._plan, self._evaluations[change["evaluation_key"]])
            by_run.setdefault(change["run_key"], []).extend(change_points(prefix, change, timestamp))
        for run_key, points in by_run.items():
            self._log_points(run_key, points)

    def restore_from_storage(self) -> None:
        """Writes everything that storage holds for this plan; what MLflow has already is left as it is."""
        for run_key in self._specs:
            self._project(run_key)

    # ---------------------------------------------------------------- one run

    def log_train(self, run_key: str, records: Sequence[Record]) -> None:
        """Logs optimizer steps (lines of train.jsonl)."""
        if not records:
            return
        if self._started_over(run_key, records):
            self._replace(run_key, self._children[run_key])
        self._set_status(run_key, "RUNNING")
        self._log_steps(run_key, records)

    def log_evaluation(self, metrics: Record) -> None:
        """Logs one evaluation (a metrics.json that is in storage); a base's scores also open each of its runs at step 0."""
        run_key, step = metrics["run_key"], metrics["step"]
        evaluation = self._evaluations[metrics["evaluation_key"]]
        followers = [run.run_key for run in self._plan.runs if run.base_key == run_key]
        for key in (run_key, *followers):
            self._log_points(key, self._points(step, evaluation, metrics))
        self._log_predictions(run_key, step, evaluation)
        if isinstance(self._specs[run_key], BaseSpec):
            self._finish_base(run_key)

    def finish_run(self, run_key: str, status: Literal["finished", "failed"], error: str | None) -> None:
        """Closes a run, dated as in its run.json; a failed one carries its error as a tag."""
        record = read_run(self._storage, run_key) or {}
        child = self._children[run_key]
        if error:
            self._client.set_tag(child, ERROR, error[:_ERROR_LENGTH])
        elif ERROR in self._client.get_run(child).data.tags:
            self._client.delete_tag(child, ERROR)
        if versions := record.get("versions"):
            self._client.set_tag(child, "jmedlora.versions", json.dumps(versions, sort_keys=True))
        self._terminate(run_key, _STATUS[status], record.get("finished") or now())

    # ---------------------------------------------------------------- finding and creating

    def _params(self, run_key: str) -> dict[str, str]:
        spec = self._specs[run_key]
        if isinstance(spec, BaseSpec):
            return base_params(spec, self._metrics)
        # a run trained for an earlier sweep keeps what it was trained with
        trained = read_run(self._storage, run_key) or {}
        workers = trained.get("workers") or self._workers.get(run_key, 1)
        return run_params(spec, workers, trained.get("zero_stage", spec.deepspeed.zero_stage), self._metrics)

    def _contradicts(self, run_key: str, child: Run) -> bool:
        """True where a parameter has changed; parameters that are missing (a start cut short) count as well."""
        return child.data.params != self._params(run_key)

    def _replace(self, run_key: str, child: str | None) -> None:
        """Creates the child of a run, in place of another one where given, and writes what storage holds of it."""
        if child is not None:
            self._client.delete_run(child)
        spec = self._specs[run_key]
        tags = {
            RUN_KEY: run_key,
            ROLE: "base" if isinstance(spec, BaseSpec) else "run",
            PARENT: self._parent,
            "mlflow.source.name": "jmedlora",
        }
        # MLflow lists the newest first: the earlier in the plan, the later the child seems to have started
        rank = len(self._specs) - list(self._specs).index(run_key)
        start = milliseconds(self._begun(spec)) + rank
        child = self._client.create_run(self._experiment, start_time=start, tags=tags, run_name=self._names[run_key]).info.run_id
        self._children[run_key], self._status[run_key], self._steps[run_key] = child, "RUNNING", {}
        self._client.log_batch(child, params=[Param(key, value) for key, value in self._params(run_key).items()])
        if inputs := dataset_inputs(self._plan, spec):
            self._client.log_inputs(child, inputs)
        self._set_status(run_key, "SCHEDULED")
        self._project(run_key)

    def _begun(self, spec: RunSpec | BaseSpec) -> float:
        """When a run (or the first evaluation of a base) began, in seconds; for one still to come, when the sweep did."""
        if isinstance(spec, RunSpec):
            return (read_run(self._storage, spec.run_key) or {}).get("started") or self._started
        stored = [metrics for _, _, metrics in finished_metrics(self._plan, self._storage, spec)]
        return min((metrics["time"] - metrics["seconds"] for metrics in stored), default=self._started)

    # ---------------------------------------------------------------- storage -> MLflow

    def _project(self, run_key: str) -> None:
        spec = self._specs[run_key]
        records = read_training(self._storage, run_key)
        if self._started_over(run_key, records) or self._steps_of(run_key).keys() - {record["step"] for record in records}:
            self._replace(run_key, self._children[run_key])  # projects the new child
            return
        self._log_steps(run_key, records)
        finished = list(finished_metrics(self._plan, self._storage, spec))
        base = self._specs[spec.base_key] if isinstance(spec, RunSpec) else None
        opening = finished_metrics(self._plan, self._storage, base) if base else ()
        self._log_points(run_key, [point for part in (opening, finished) for scored in part for point in self._points(*scored)])
        for step, evaluation, _ in finished:
            self._log_predictions(run_key, step, evaluation)
        if isinstance(spec, BaseSpec):
            self._finish_base(run_key)
            return
        stored = read_run(self._storage, run_key)
        if stored is None:
            return
        if stored["status"] == "running":
            self._set_status(run_key, "RUNNING")
        else:
            self.finish_run(run_key, stored["status"], stored.get("error"))

    def _points(self, step: int, evaluation: EvaluationSpec, metrics: Record) -> list[Metric]:
        return score_points(metric_prefix(self._plan, evaluation), metrics, step)

    def _log_points(self, run_key: str, points: list[Metric]) -> None:
        for first in range(0, len(points), _POINTS_PER_CALL):
            self._client.log_batch(self._children[run_key], metrics=points[first : first + _POINTS_PER_CALL])

    def _log_steps(self, run_key: str, records: Sequence[Record]) -> None:
        known = self._steps_of(run_key)
        fresh = [record for record in records if record["step"] not in known]
        self._log_points(run_key, [point for record in fresh for point in training_points(record)])
        known.update((record["step"], milliseconds(record["time"])) for record in fresh)

    def _steps_of(self, run_key: str) -> dict[int, int]:
        if run_key not in self._steps:
            history = self._client.get_metric_history(self._children[run_key], "train/learning_rate")
            self._steps[run_key] = {point.step: point.timestamp for point in history}
        return self._steps[run_key]

    def _started_over(self, run_key: str, records: Sequence[Record]) -> bool:
        known = self._steps_of(run_key)
        return any(known.get(record["step"], when) != when for record in records for when in [milliseconds(record["time"])])

    def _log_predictions(self, run_key: str, step: int, evaluation: EvaluationSpec) -> None:
        """Keeps the table of the last step evaluated so far, under one name for all runs, so that runs can be laid side by side."""
        folder = self._storage.run(run_key)
        spec = self._specs[run_key]
        if step != max((done for done in steps_of(spec) if folder.is_evaluated(evaluation.folder, done)), default=step):
            return
        child = self._children[run_key]
        table = predictions_table(read_predictions(self._storage, run_key, step, evaluation), step)
        self._client.log_text(child, table, _table_path(evaluation))
        done = [item for item in self._plan.evaluations if any(folder.is_evaluated(item.folder, at) for at in steps_of(spec))]
        tables = [{"path": _table_path(item), "type": "table"} for item in done]
        self._client.log_batch(child, tags=[RunTag("mlflow.loggedArtifacts", json.dumps(tables))])

    # ---------------------------------------------------------------- status

    def _finish_base(self, run_key: str) -> None:
        """A base is done with the last of its evaluations: nothing else reports its end."""
        stored = [read_metrics(self._storage, run_key, 0, item) for item in self._plan.asked_of(self._specs[run_key])]
        times = [metrics["time"] for metrics in stored if metrics is not None]
        if times and len(times) == len(stored):
            self._terminate(run_key, "FINISHED", max(times))
        elif times:
            self._set_status(run_key, "RUNNING")

    def _set_status(self, run_key: str, status: str) -> None:
        if self._status[run_key] != status:
            self._client.update_run(self._children[run_key], status=status)
            self._status[run_key] = status

    def _terminate(self, run_key: str, status: str, seconds: float) -> None:
        self._client.set_terminated(self._children[run_key], status=status, end_time=milliseconds(seconds))
        self._status[run_key] = status


def _table_path(evaluation: EvaluationSpec) -> str:
    way = "" if evaluation.scoring == "generate" else f".{evaluation.scoring}"
    return f"predictions/{evaluation.benchmark.name}.{evaluation.shots}shot.{evaluation.prompt.name}{way}.json"
