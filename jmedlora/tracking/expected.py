"""What MLflow should hold of a sweep, from its plan and storage alone."""

from __future__ import annotations

import json
from collections.abc import Mapping

from mlflow.entities import DatasetInput

from jmedlora.plan.layout import Storage
from jmedlora.plan.naming import names_of
from jmedlora.plan.records import Record, finished_metrics, read_predictions, read_run, steps_of
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, Plan, RunSpec
from jmedlora.tracking.entities import (
    base_params,
    dataset_inputs,
    metric_prefix,
    metrics_named,
    milliseconds,
    predictions_table,
    run_params,
    scored_with,
)
from jmedlora.tracking.experiment import PARENT, ROLE, RUN_KEY
from jmedlora.tracking.states import MlflowStatus, State, last_heard, state_of_base, state_of_run
from jmedlora.tracking.sweep_record import began

Scored = tuple[int, EvaluationSpec, Record]
"""Step, evaluation and metrics.json of a finished evaluation."""


class Expected:
    """Asked anew each time: storage goes on while a sweep runs."""

    def __init__(self, plan: Plan, storage: Storage):
        self.plan, self.storage = plan, storage
        bases: dict[str, RunSpec | BaseSpec] = {base.run_key: base for base in plan.bases}
        self.specs = bases | {run.run_key: run for run in plan.runs}
        self.names = names_of(plan)
        self.evaluations = {item.evaluation_key: item for item in plan.evaluations}
        self._workers = {run.run_key: trial.workers for trial in plan.trials for run in trial.runs}
        self._metrics = metrics_named(plan)
        self._scored_with = scored_with(plan)
        # MLflow lists the newest first: the earlier in the plan, the later a child seems to have started
        self._rank = {run_key: len(self.specs) - place for place, run_key in enumerate(self.specs)}

    # ---------------------------------------------------------------- what a child is created with

    def params(self, run_key: str) -> dict[str, str]:
        spec = self.specs[run_key]
        if isinstance(spec, BaseSpec):
            return base_params(spec, self._metrics)
        # a run trained for an earlier sweep keeps what it was trained with
        trained = read_run(self.storage, run_key) or {}
        workers = trained.get("workers") or self._workers.get(run_key, 1)
        return run_params(spec, workers, trained.get("zero_stage", spec.deepspeed.zero_stage), self._metrics)

    def tags(self, run_key: str, parent: str, found: Mapping[str, str]) -> dict[str, str]:
        """found: the tags that a child has; ways of evaluating that a sweep has given up keep their points, and so their rules."""
        role = "base" if isinstance(self.specs[run_key], BaseSpec) else "run"
        rules = {key: _as_tag(_read_tag(found, key) | ways) for key, ways in self._scored_with.items()}
        return {RUN_KEY: run_key, ROLE: role, PARENT: parent, "mlflow.source.name": "jmedlora", **rules}

    def start_time(self, run_key: str, sweep_started: float) -> int:
        """In milliseconds: when the sweep started, unless a run was begun before, for another sweep."""
        own = began(self.plan, self.storage, self.specs[run_key])
        return milliseconds(sweep_started if own is None else min(own, sweep_started)) + self._rank[run_key]

    def datasets(self, run_key: str) -> list[DatasetInput]:
        return dataset_inputs(self.plan, self.specs[run_key])

    def allows(self, run_key: str, params: Mapping[str, str], tags: Mapping[str, str]) -> bool:
        """False where a child's parameter has another value, or its scores were made by other rules; what is missing can be added."""
        expected = self.params(run_key)
        return all(expected.get(key) == value for key, value in params.items()) and all(
            ways.get(way, rules) == rules for key, ways in self._scored_with.items() for way, rules in _read_tag(tags, key).items()
        )

    # ---------------------------------------------------------------- what it comes to hold

    def prefix(self, evaluation: EvaluationSpec) -> str:
        return metric_prefix(self.plan, evaluation)

    def scored(self, run_key: str) -> list[Scored]:
        """A run's or base's own evaluations that are finished, by step."""
        return list(finished_metrics(self.plan, self.storage, self.specs[run_key]))

    def opening(self, run_key: str) -> list[Scored]:
        """The scores of a run's base, which it opens with at step 0."""
        spec = self.specs[run_key]
        return self.scored(spec.base_key) if isinstance(spec, RunSpec) else []

    def last_steps(self, run_key: str) -> dict[str, int]:
        """The last step evaluated so far, by evaluation key; without evaluations of which none is finished."""
        folder, steps = self.storage.run(run_key), steps_of(self.specs[run_key])
        done = {item.evaluation_key: [step for step in steps if folder.is_evaluated(item.folder, step)] for item in self.plan.evaluations}
        return {key: max(found) for key, found in done.items() if found}

    def table(self, run_key: str, step: int, evaluation: EvaluationSpec) -> str:
        return predictions_table(read_predictions(self.storage, run_key, step, evaluation), step)

    def state(self, run_key: str, ending: MlflowStatus | None) -> State:
        """ending: how the sweep ended, None while it goes on."""
        spec = self.specs[run_key]
        if isinstance(spec, BaseSpec):
            state = state_of_base(self.plan, self.storage, spec)
        else:
            state = state_of_run(read_run(self.storage, run_key))
        if ending is None or state.status != "RUNNING":
            return state
        return state.once_over(ending, last_heard(self.plan, self.storage, spec))

    def facts(self, run_key: str) -> tuple[str | None, dict[str, str]]:
        """Why a run has failed, and the tags that it gets once it is over."""
        stored = read_run(self.storage, run_key) or {}
        versions = stored.get("versions") if stored.get("finished") else None
        return stored.get("error"), {"jmedlora.versions": json.dumps(versions, sort_keys=True)} if versions else {}


def _read_tag(tags: Mapping[str, str], key: str) -> dict[str, str]:
    ways: dict[str, str] = json.loads(tags.get(key, "{}"))
    return ways


def _as_tag(ways: Mapping[str, str]) -> str:
    return json.dumps(ways, sort_keys=True)
