"""MLflow as a projection of storage: one parent run per sweep, one child per run and base, one writer.

Points carry the times stored with them, and MLflow keeps identical points once: writing anything again adds nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from jmedlora.plan.layout import Storage
from jmedlora.plan.records import Record, read_training
from jmedlora.plan.specs import BaseSpec, Plan
from jmedlora.tracking.child import Child
from jmedlora.tracking.database import make_database
from jmedlora.tracking.entities import change_points, milliseconds
from jmedlora.tracking.expected import Expected, Scored
from jmedlora.tracking.experiment import (
    REPLACED,
    RUN_KEY,
    discard,
    find_or_create_experiment,
    find_or_create_parent,
    mark_experiment,
    runs_of_experiment,
)
from jmedlora.tracking.location import artifact_location
from jmedlora.tracking.states import STATUS, MlflowStatus, State, shown_by
from jmedlora.tracking.sweep_record import Ending, last_evaluated, read_record

_POINTS_PER_CALL = 1000  # MLflow refuses more

# the schema steps of a new database, a line each
logging.getLogger("alembic").setLevel(logging.WARNING)
# every attempt, and the stack of every failure of a database: who calls is told by an exception
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


class MlflowTracker:
    """Writes one sweep to MLflow; call `start` first, then `restore_from_storage`. After a call has failed, the same again mends it.

    A child whose history contradicts storage (its run started over, was trained with other workers, or scored by other
    rules) is deleted and written anew: MLflow can neither take points back nor change a parameter.
    """

    def __init__(self, tracking_uri: str, plan: Plan, storage: Storage, heard: Callable[[], None] = lambda: None):
        """heard: called whenever something is written, so that it is known that MLflow answers."""
        make_database(tracking_uri)
        self._client = MlflowClient(tracking_uri=tracking_uri)
        self._artifacts = artifact_location(tracking_uri, storage, plan.sweep)
        self._plan = plan
        self._storage = storage
        self._expected = Expected(plan, storage)
        self._heard = heard
        self._experiment = ""
        self._parent = ""
        self._started = 0.0
        self._children: dict[str, Child] = {}
        self._strays: list[Run] = []
        self._ending: MlflowStatus | None = None

    # ---------------------------------------------------------------- the sweep

    def start(self, ending: Ending | None = None) -> list[str]:
        """Finds or creates the experiment, the parent and every child; returns the run keys of children created, which are empty yet.

        What is there twice, because MLflow took a call that it did not answer, is deleted.
        ending: how the sweep has ended; None: it goes on, and its parent is marked as running.
        """
        self._experiment = find_or_create_experiment(self._client, self._plan, self._artifacts)
        self._started = read_record(self._plan, self._storage).started
        found = self._without_replaced(runs_of_experiment(self._client, self._experiment))
        self._parent = find_or_create_parent(self._client, self._experiment, self._plan, self._started, found, self._parent)
        self._ending = None if ending is None else STATUS[ending]
        if ending is None:
            self._client.update_run(self._parent, status="RUNNING")
        children: dict[str, list[Run]] = {}
        for run in found:
            children.setdefault(run.data.tags.get(RUN_KEY, ""), []).append(run)
        self._strays = [run for key, runs in children.items() if key and key not in self._expected.specs for run in runs]
        created = []
        for run_key in self._expected.specs:
            if not self._take(run_key, children.get(run_key, [])):
                self._create(run_key)
                created.append(run_key)
            self._heard()
        return created

    def probe(self) -> None:
        """Writes something that changes nothing; raises where MLflow does not take it."""
        mark_experiment(self._client, self._experiment)

    def restore_from_storage(self) -> None:
        """Writes everything that storage holds for this plan; what MLflow has already is left as it is."""
        for run_key in self._expected.specs:
            self.sync(run_key)
            self._heard()

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
        timestamp = milliseconds(last_evaluated(self._plan, self._storage) or self._started)
        by_run: dict[str, list[Metric]] = {}
        for change in changes:
            prefix = self._expected.prefix(self._expected.evaluations[change["evaluation_key"]])
            by_run.setdefault(change["run_key"], []).extend(change_points(prefix, change, timestamp))
        for run_key, points in by_run.items():
            for first in range(0, len(points), _POINTS_PER_CALL):
                self._children[run_key].write_points(points[first : first + _POINTS_PER_CALL])
            self._heard()

    def finish_sweep(self, ending: Ending, ended: float | None) -> None:
        """Closes the parent run; children that `restore_from_storage` or `sync` writes from now on are over.

        ended: seconds since the epoch.
        """
        self._ending = STATUS[ending]
        for run in self._strays:
            if run.info.status == "RUNNING":
                self._client.set_terminated(run.info.run_id, status="KILLED")
        self._client.set_terminated(self._parent, status=self._ending, end_time=None if ended is None else milliseconds(ended))

    # ---------------------------------------------------------------- one run

    def log_train(self, run_key: str, records: Sequence[Record]) -> None:
        """Logs optimizer steps (lines of train.jsonl)."""
        child = self._children[run_key]
        if child.contradicts(records):
            self._replace(run_key)
        else:
            child.write_state(State("RUNNING"))
            child.write_steps(records)

    def log_evaluation(self, metrics: Record) -> None:
        """Logs one evaluation (a metrics.json that is in storage); a base's scores also open each of its runs at step 0."""
        run_key = metrics["run_key"]
        scored = [(metrics["step"], self._expected.evaluations[metrics["evaluation_key"]], metrics)]
        for key in shown_by(self._plan, run_key):
            self._children[key].write_scores(scored, self._expected.prefix)
            self._heard()
        self._write_tables(run_key, scored)
        if isinstance(self._expected.specs[run_key], BaseSpec):
            self._children[run_key].write_state(self._expected.state(run_key, self._ending))

    def sync(self, run_key: str) -> None:
        """Writes what storage holds of one run; what MLflow has already is left as it is."""
        child = self._children[run_key]
        records = read_training(self._storage, run_key)
        if not child.holds(records):
            if child.contradicts(records) or child.exceeds(records):
                self._replace(run_key)
                return
            child.write_steps(records)
        scored = self._expected.scored(run_key)
        child.write_scores([*self._expected.opening(run_key), *scored], self._expected.prefix)
        self._write_tables(run_key, scored)
        error, tags = self._expected.facts(run_key)
        child.write_tags(tags)
        child.write_error(error)
        state = self._expected.state(run_key, self._ending)
        child.write_state(state)
        if state.ended is not None:
            child.forget_steps(records)

    def _write_tables(self, run_key: str, scored: Sequence[Scored]) -> None:
        """Keeps the table of the last step evaluated so far, under one name for all runs, so that runs can be laid side by side."""
        child, last = self._children[run_key], self._expected.last_steps(run_key)
        for step, item, metrics in scored:
            if last.get(item.evaluation_key, step) == step:
                child.write_table(item, step, metrics["time"], partial(self._expected.table, run_key, step, item))
        child.list_tables([item for item in self._plan.evaluations if item.evaluation_key in last])

    # ---------------------------------------------------------------- finding and creating

    def _without_replaced(self, found: list[Run]) -> list[Run]:
        """Without children that were replaced, which come back when a deleted experiment is restored."""
        for run in found:
            if REPLACED in run.data.tags:
                self._client.delete_run(run.info.run_id)
        return [run for run in found if REPLACED not in run.data.tags]

    def _take(self, run_key: str, found: list[Run]) -> bool:
        """Makes one of the runs found the child of `run_key` and deletes the others; False where none of them can be."""
        held = self._children.get(run_key)
        fitting = [run for run in found if self._expected.allows(run_key, run.data.params, run.data.tags)]
        kept = max(sorted(fitting, key=lambda run: run.info.run_id), key=lambda run: _worth(run, held), default=None)
        for run in found:
            if run is not kept:
                discard(self._client, run.info.run_id)
        if kept is None:
            return False
        if held is not None and held.run_id == kept.info.run_id:
            held.see(kept)
        else:
            self._children[run_key] = Child(self._client, kept)
        self._describe(run_key)
        return True

    def _replace(self, run_key: str) -> None:
        """Writes a run anew, in another child."""
        discard(self._client, self._children[run_key].run_id)
        self._create(run_key)
        self.sync(run_key)

    def _create(self, run_key: str) -> None:
        start = self._expected.start_time(run_key, self._started)
        tags = self._expected.tags(run_key, self._parent, {})
        run = self._client.create_run(self._experiment, start_time=start, tags=tags, run_name=self._expected.names[run_key])
        self._children[run_key] = Child(self._client, run, is_new=True)
        self._describe(run_key)
        self._children[run_key].write_state(State("SCHEDULED"))

    def _describe(self, run_key: str) -> None:
        """Parameters come last: a child that has them has everything that belongs to its creation."""
        child = self._children[run_key]
        child.write_tags(self._expected.tags(run_key, self._parent, child.tags))
        params = self._expected.params(run_key)
        if child.params != params:
            if datasets := self._expected.datasets(run_key):
                self._client.log_inputs(child.run_id, datasets)
            child.write_params(params)


def _worth(run: Run, held: Child | None) -> tuple[bool, int, int]:
    """Of several children of one run, the one that is written to is kept, or the one that holds most."""
    return held is not None and run.info.run_id == held.run_id, len(run.data.params), len(run.data.metrics)
