"""One child run in MLflow, and how much of storage it is known to hold: what is there already costs no call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from jmedlora.plan.records import Record
from jmedlora.plan.specs import EvaluationSpec
from jmedlora.tracking.entities import milliseconds, score_points, table_path, training_points
from jmedlora.tracking.states import State

ERROR = "jmedlora.error"
_TABLES = "mlflow.loggedArtifacts"
_ERROR_LENGTH = 4000  # characters; MLflow cuts or refuses longer tags
_STEPS_PER_CALL, _SCORES_PER_CALL = 250, 80  # MLflow refuses more than 1000 points; a step has 4, an evaluation 11 at most


class Child:
    """Writes one MLflow run. What a call was refused, or got no answer to, counts as not written and is written again:
    points, tags and states are the same each time, and MLflow keeps them once.
    """

    def __init__(self, client: MlflowClient, run: Run, is_new: bool = False):
        self._client = client
        self.run_id: str = run.info.run_id
        # optimizer step -> time of its point in MLflow; None: not asked for yet
        self._steps: dict[int, int] | None = {} if is_new else None
        self._whole_history: int | None = None  # in place of the steps of a run that has ended
        self._scores: set[tuple[str, int, float]] = set()
        self._tables: dict[str, tuple[int, float]] = {}
        self.see(run)

    def see(self, run: Run) -> None:
        """Takes over what MLflow says of the run now."""
        self.tags = dict(run.data.tags)
        self.params = dict(run.data.params)
        self._state = (run.info.status, run.info.end_time)

    # ---------------------------------------------------------------- training

    def contradicts(self, records: Sequence[Record]) -> bool:
        """True where a step stands in MLflow with another time: its run has started over."""
        known = self._known_steps()
        return any(known.get(record["step"], when) != when for record in records for when in [milliseconds(record["time"])])

    def exceeds(self, records: Sequence[Record]) -> bool:
        """True where MLflow has steps beyond all that are stored: they were taken back."""
        return bool(self._known_steps().keys() - {record["step"] for record in records})

    def holds(self, records: Sequence[Record]) -> bool:
        """True for the whole history of a run that has ended, once it is written."""
        return self._whole_history is not None and self._whole_history == _fingerprint(records)

    def write_steps(self, records: Sequence[Record]) -> None:
        """Writes what is new among optimizer steps, in the order given, each with all its points or not at all."""
        known = self._known_steps()
        fresh = (record for record in records if record["step"] not in known)
        for part in _parts(fresh, _STEPS_PER_CALL):
            self.write_points([point for record in part for point in training_points(record)])
            known.update((record["step"], milliseconds(record["time"])) for record in part)

    def forget_steps(self, records: Sequence[Record]) -> None:
        """Told once a run has ended and all of `records` are written: a thousand histories need not be kept in memory."""
        self._steps, self._whole_history = None, _fingerprint(records)

    def _known_steps(self) -> dict[int, int]:
        if self._steps is None:
            history = self._client.get_metric_history(self.run_id, "train/learning_rate")
            self._steps = {point.step: point.timestamp for point in history}
        return self._steps

    def write_points(self, points: list[Metric]) -> None:
        """At most a thousand."""
        self._client.log_batch(self.run_id, metrics=points)

    # ---------------------------------------------------------------- evaluation

    def write_scores(self, scored: Iterable[tuple[int, EvaluationSpec, Record]], prefix: Callable[[EvaluationSpec], str]) -> None:
        """Writes the scores of evaluations that are not there yet. prefix: of the names of an evaluation's metrics."""
        by_key = {(item.evaluation_key, step, metrics["time"]): (step, item, metrics) for step, item, metrics in scored}
        for part in _parts(((key, one) for key, one in by_key.items() if key not in self._scores), _SCORES_PER_CALL):
            points = [point for _, (step, item, metrics) in part for point in score_points(prefix(item), metrics, step)]
            self.write_points(points)
            self._scores.update(key for key, _ in part)

    def write_table(self, evaluation: EvaluationSpec, step: int, time: float, text: Callable[[], str]) -> None:
        """Puts a table of predictions in the place of an earlier one. time: when the evaluation ended; text: makes the table."""
        path = table_path(evaluation)
        if self._tables.get(path) != (step, time):
            self._client.log_text(self.run_id, text(), path)
            self._tables[path] = (step, time)

    def list_tables(self, evaluations: Iterable[EvaluationSpec]) -> None:
        """Tells MLflow's page which tables there are."""
        if tables := [{"path": table_path(item), "type": "table"} for item in evaluations]:
            self.write_tags({_TABLES: json.dumps(tables)})

    # ---------------------------------------------------------------- parameters, tags, state

    def write_params(self, params: Mapping[str, str]) -> None:
        if self.params != params:
            self._client.log_batch(self.run_id, params=[Param(key, value) for key, value in params.items()])
            self.params = dict(params)

    def write_tags(self, tags: Mapping[str, str]) -> None:
        """Sets those that are not as they should be."""
        if changed := {key: value for key, value in tags.items() if self.tags.get(key) != value}:
            self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in changed.items()])
            self.tags |= changed

    def write_error(self, error: str | None) -> None:
        """Sets or takes away why a run has failed."""
        if error:
            self.write_tags({ERROR: error[:_ERROR_LENGTH]})
        elif ERROR in self.tags:
            self._client.delete_tag(self.run_id, ERROR)
            del self.tags[ERROR]

    def write_state(self, state: State) -> None:
        ended = milliseconds(state.ended) if state.ended is not None else None
        if self._state == (state.status, ended) or (ended is None and self._state[0] == state.status):
            return
        if state.status in ("SCHEDULED", "RUNNING"):
            self._client.update_run(self.run_id, status=state.status)
        else:
            self._client.set_terminated(self.run_id, status=state.status, end_time=ended)
        self._state = (state.status, ended)


def _fingerprint(records: Sequence[Record]) -> int:
    return hash(tuple((record["step"], record["time"]) for record in records))


def _parts(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
