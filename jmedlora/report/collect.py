"""What storage holds of a sweep, as typed rows in a stable order."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from jmedlora.evaluation.resampling import Interval
from jmedlora.plan.layout import Storage
from jmedlora.plan.naming import epochs_of, names_of
from jmedlora.plan.records import finished_metrics, read_run, read_training
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, Plan, RunSpec

Metric = Literal["accuracy", "exact_match", "gestalt_score"]
METRICS: tuple[Metric, ...] = ("accuracy", "exact_match", "gestalt_score")
Status = Literal["waiting", "running", "finished", "failed"]
DoubtKind = Literal["no_resemblance", "empty_answers", "cut_answers"]
DOUBT_KINDS: tuple[DoubtKind, ...] = ("no_resemblance", "empty_answers", "cut_answers")


@dataclass(frozen=True)
class Score:
    """One evaluated checkpoint; scores are means over `n` questions, from 0 to 1."""

    step: int
    evaluation: EvaluationSpec
    n: int
    accuracy: float
    exact_match: float
    gestalt_score: float
    seconds: float
    time: float
    """When the evaluation ended, in seconds since the epoch."""
    intervals: dict[Metric, Interval] = field(default_factory=dict)
    """95 % intervals over the questions; empty where they are neither stored nor computed yet (`report.intervals`)."""
    doubtful: dict[DoubtKind, int] = field(default_factory=dict)
    """Answers that say little of what a system knows, by kind; without the kinds that were not counted."""

    def value(self, metric: Metric) -> float:
        return float(getattr(self, metric))


@dataclass(frozen=True)
class Training:
    """How a run's training went: its loss by optimizer step (None where it was not finite), seconds and tokens in all."""

    steps: list[int]
    losses: list[float | None]
    seconds: float
    """Its share of the time of a pack."""
    own_seconds: float
    """The same, where steps that several runs have in common count for each of them in part."""
    tokens: int


@dataclass(frozen=True)
class RunResult:
    """A run or a base, with what is known of it so far."""

    spec: RunSpec | BaseSpec
    name: str
    status: Status
    error: str | None
    started: float | None
    finished: float | None
    workers: int
    gpus: int
    """Over all workers."""
    training: Training
    scores: list[Score]

    @property
    def run_key(self) -> str:
        return self.spec.run_key

    @property
    def model(self) -> str:
        return self.spec.model.name

    @property
    def is_base(self) -> bool:
        return isinstance(self.spec, BaseSpec)

    @property
    def method(self) -> str:
        return self.spec.method.name if isinstance(self.spec, RunSpec) else "base"

    @property
    def rank(self) -> int:
        return self.spec.settings.rank if isinstance(self.spec, RunSpec) else 0

    @property
    def epochs(self) -> float:
        return epochs_of(self.spec) if isinstance(self.spec, RunSpec) else 0

    @property
    def seed(self) -> int:
        return self.spec.settings.seed if isinstance(self.spec, RunSpec) else 0

    @property
    def last_step(self) -> int:
        """The step after which the run is complete."""
        return self.spec.total_steps if isinstance(self.spec, RunSpec) else 0

    @property
    def order(self) -> tuple[str, bool, str, int, float, int, str, str]:
        """Model, method with the base first, rank, epochs, seed; then what tells apart runs that share all of these."""
        return self.model, not self.is_base, self.method, self.rank, self.epochs, self.seed, self.spec.precision, self.run_key

    def scores_of(self, evaluation: EvaluationSpec) -> list[Score]:
        """The scores of one way of evaluating, by step."""
        return [score for score in self.scores if score.evaluation.evaluation_key == evaluation.evaluation_key]


@dataclass(frozen=True)
class Results:
    """A whole sweep."""

    plan: Plan
    runs: list[RunResult]
    """Bases and runs by `RunResult.order`."""

    @cached_property
    def by_key(self) -> dict[str, RunResult]:
        return {result.run_key: result for result in self.runs}

    @property
    def bases(self) -> list[RunResult]:
        return [result for result in self.runs if result.is_base]

    @property
    def references(self) -> list[RunResult]:
        """Models that are evaluated as they are: bases that no run of the sweep starts from."""
        started_from = {result.spec.base_key for result in self.runs if isinstance(result.spec, RunSpec)}
        return [result for result in self.bases if result.run_key not in started_from]

    @property
    def tuned(self) -> list[RunResult]:
        return [result for result in self.runs if not result.is_base]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(result.model for result in self.runs))

    def base_of(self, result: RunResult) -> RunResult | None:
        """The base in the run's own precision; None for a base itself."""
        return self.by_key[result.spec.base_key] if isinstance(result.spec, RunSpec) else None


def evaluation_order(evaluation: EvaluationSpec) -> tuple[str, str, str, int, str]:
    """Benchmark, prompt, way of scoring, shots: an order that is not the plan's."""
    return evaluation.benchmark.name, evaluation.prompt.name, evaluation.scoring, evaluation.shots, evaluation.evaluation_key


def collect_results(plan: Plan, storage: Storage) -> Results:
    """Reads what there is; runs that have not begun are there with the status `waiting` and no scores."""
    names = names_of(plan)
    machines = {run.run_key: (trial.workers, trial.gpus_per_worker) for trial in plan.trials for run in trial.runs}
    specs: list[RunSpec | BaseSpec] = [*plan.bases, *plan.runs]
    results = [_collect_run(plan, storage, spec, names[spec.run_key], machines.get(spec.run_key, (1, 0))) for spec in specs]
    return Results(plan, sorted(results, key=lambda result: result.order))


def _collect_run(plan: Plan, storage: Storage, spec: RunSpec | BaseSpec, name: str, machine: tuple[int, int]) -> RunResult:
    stored = read_run(storage, spec.run_key) or {}
    scores = [
        Score(
            step=step,
            evaluation=evaluation,
            n=metrics["n"],
            accuracy=metrics["accuracy"],
            exact_match=metrics["exact_match"],
            gestalt_score=metrics["gestalt_score"],
            seconds=metrics["seconds"],
            time=metrics["time"],
            intervals=_intervals(metrics),
            doubtful={kind: metrics[kind] for kind in DOUBT_KINDS if metrics.get(kind) is not None},
        )
        for step, evaluation, metrics in finished_metrics(plan, storage, spec)
    ]
    workers = stored.get("workers") or machine[0]
    return RunResult(
        spec=spec,
        name=name,
        status=stored.get("status", "waiting") if isinstance(spec, RunSpec) else _base_status(len(scores), len(plan.asked_of(spec))),
        error=stored.get("error"),
        started=stored.get("started"),
        finished=stored.get("finished"),
        workers=workers,
        gpus=workers * machine[1],
        training=_collect_training(storage, spec),
        scores=scores,
    )


def _intervals(metrics: dict[str, Any]) -> dict[Metric, Interval]:
    """What was computed together with the scores."""
    bounds = {metric: (metrics.get(f"{metric}_low"), metrics.get(f"{metric}_high")) for metric in METRICS}
    return {metric: Interval(low, high) for metric, (low, high) in bounds.items() if low is not None and high is not None}


def _base_status(done: int, wanted: int) -> Status:
    return "finished" if done == wanted else "running" if done else "waiting"


def _collect_training(storage: Storage, spec: RunSpec | BaseSpec) -> Training:
    records = read_training(storage, spec.run_key) if isinstance(spec, RunSpec) else []
    return Training(
        steps=[record["step"] for record in records],
        losses=[_finite(record.get("loss")) for record in records],
        seconds=sum(record.get("seconds") or 0.0 for record in records),
        own_seconds=sum((record.get("seconds") or 0.0) / record.get("shared_by", 1) for record in records),
        tokens=sum(record.get("tokens") or 0 for record in records),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and value - value == 0 else None
