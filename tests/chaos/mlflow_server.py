"""An MLflow server that lives in this process, keeps what MLflow keeps, and can be away; or a real one, with such a line to it."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow.entities import Experiment, Metric, Param, Run, RunData, RunInfo, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.entities.paged_list import PagedList

from tests.chaos.world import World

CALL_S = 0.02


class Line:
    """What stands in for MlflowClient: every call goes to `target`, takes its time, and can meet a server that is away."""

    def __init__(self, world: World, target: Any):
        self._world, self._target = world, target

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self._world.operation("call of MLflow")
            self._world.sleep(CALL_S)
            if self._world.mlflow_away_for:
                self._world.mlflow_away_for -= 1
                if self._world.rng.random() < 0.3:  # it did what it was asked, and the answer was lost
                    getattr(self._target, name)(*arguments, **named)
                raise ConnectionError("MLflow is away")
            return getattr(self._target, name)(*arguments, **named)

        return call


class MemoryServer:
    """The calls of MlflowClient that the tracker uses, with MLflow's rules: identical points are kept once, parameters never change."""

    def __init__(self) -> None:
        self._experiments: dict[str, Experiment] = {}
        self._runs: dict[str, SimpleNamespace] = {}
        self._ids = map(str, itertools.count(1))

    def get_experiment_by_name(self, name: str) -> Experiment | None:
        return next((each for each in self._experiments.values() if each.name == name), None)

    def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
        if self.get_experiment_by_name(name) is not None:
            raise MlflowException(f"experiment {name} is there already")
        key = next(self._ids)
        self._experiments[key] = Experiment(key, name, artifact_location, "active")
        return key

    def set_experiment_tag(self, experiment_id: str, key: str, value: str) -> None:
        assert experiment_id in self._experiments

    def create_run(self, experiment_id: str, start_time: int, tags: dict[str, str], run_name: str) -> Run:
        key = f"run-{next(self._ids)}"
        self._runs[key] = SimpleNamespace(
            experiment=experiment_id, name=run_name, start=start_time, end=None, status="RUNNING", is_deleted=False
        )
        vars(self._runs[key]).update(tags=dict(tags), params={}, points={}, artifacts=set())
        return self.get_run(key)

    def get_run(self, run_id: str) -> Run:
        run = self._runs[run_id]
        info = RunInfo(
            run_id=run_id,
            experiment_id=run.experiment,
            user_id="",
            status=run.status,
            start_time=run.start,
            end_time=run.end,
            lifecycle_stage="deleted" if run.is_deleted else "active",
            run_name=run.name,
        )
        last = {point.key: point for point in sorted(run.points, key=lambda point: (point.step, point.timestamp))}
        params = [Param(key, value) for key, value in run.params.items()]
        return Run(info, RunData(list(last.values()), params, [RunTag(key, value) for key, value in run.tags.items()]))

    def search_runs(self, experiments: list[str], max_results: int = 1000, page_token: str | None = None) -> PagedList[Run]:
        own = [key for key, run in self._runs.items() if run.experiment in experiments and not run.is_deleted]
        return PagedList([self.get_run(key) for key in own], None)

    def _writable(self, run_id: str) -> SimpleNamespace:
        if self._runs[run_id].is_deleted:
            raise MlflowException(f"{run_id} is deleted")
        return self._runs[run_id]

    def log_batch(
        self, run_id: str, metrics: list[Metric] | None = None, params: list[Param] | None = None, tags: list[RunTag] | None = None
    ) -> None:
        run = self._writable(run_id)
        if changed := [param.key for param in params or [] if run.params.get(param.key, param.value) != param.value]:
            raise MlflowException(f"parameters cannot be changed: {changed}")
        run.params |= {param.key: param.value for param in params or []}
        run.tags |= {tag.key: tag.value for tag in tags or []}
        for point in metrics or []:
            run.points[SimplePoint(point.key, point.value, point.timestamp, point.step)] = None

    def get_metric_history(self, run_id: str, key: str) -> list[SimplePoint]:
        return [point for point in self._runs[run_id].points if point.key == key]

    def update_run(self, run_id: str, status: str | None = None, name: str | None = None) -> None:
        self._writable(run_id).status = status

    def set_terminated(self, run_id: str, status: str | None = None, end_time: int | None = None) -> None:
        run = self._writable(run_id)
        run.status, run.end = status, end_time

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self._writable(run_id).tags[key] = value

    def delete_tag(self, run_id: str, key: str) -> None:
        del self._writable(run_id).tags[key]

    def delete_run(self, run_id: str) -> None:
        self._runs[run_id].is_deleted = True

    def log_inputs(self, run_id: str, datasets: Any) -> None:
        self._writable(run_id)

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self._writable(run_id).artifacts.add(artifact_file)

    def log_artifacts(self, run_id: str, local_dir: str, artifact_path: str) -> None:
        self._writable(run_id).artifacts |= {f"{artifact_path}/{path.name}" for path in Path(local_dir).iterdir()}

    def log_artifact(self, run_id: str, local_path: str) -> None:
        self._writable(run_id).artifacts.add(Path(local_path).name)


class SimplePoint(Metric):
    """A point that equals another with the same content."""

    def _content(self) -> tuple[str, float, int, int]:
        return self.key, self.value, self.timestamp, self.step

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimplePoint) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())
