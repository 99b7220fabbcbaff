"""What the way of measuring does to a result: ways of having answers, prompts, and the three metrics set beside each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from jmedlora.config.benchmark import ScoringWay
from jmedlora.evaluation.statistics import ALPHA
from jmedlora.plan.specs import EvaluationSpec
from jmedlora.report.claims import studied_evaluations
from jmedlora.report.collect import METRICS, Metric, Results, RunResult
from jmedlora.report.comparison import METRIC_NAMES
from jmedlora.report.contrasts import final_point
from jmedlora.report.evidence import Board, Point, Reading
from jmedlora.report.ranks import FEWEST_SYSTEMS, RankAgreement, compare_ranks
from jmedlora.report.significance import Statistics

_DIGITS = 9  # of a correlation: below that machines differ
_OTHERS: tuple[Metric, ...] = ("accuracy", "exact_match")
"""What the Gestalt score is set beside."""


@dataclass(frozen=True)
class Agreement:
    """Two ways of measuring, and how far they rank the systems alike."""

    kind: Literal["way", "prompt", "metric"]
    benchmark: str
    shots: int
    metric: str
    """The metric that both ways give; for kind `metric` that of the first way."""
    first: str
    second: str
    ranks: RankAgreement
    scoring: ScoringWay | None
    """That of both sides; None where several are compared or put together."""


@dataclass(frozen=True)
class PromptRange:
    """How much scores depend on the prompt; a system's range is its score with the best prompt minus that with the worst."""

    benchmark: str
    shots: int
    scoring: ScoringWay
    metric: Metric
    prompts: int
    """The most that a system was asked in."""
    systems: int
    median: float
    largest: float
    largest_of: str
    """The system with the largest range."""


@dataclass(frozen=True)
class Correlation:
    """Gestalt score and another metric, question by question: Pearson's r within each system."""

    benchmark: str
    shots: int
    metric: Metric
    systems: int
    """Each counted once per prompt, without those whose answers are all alike by either metric."""
    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class MetricPower:
    """What a metric finds of the runs' differences from their bases; all metrics on the same questions."""

    benchmark: str
    shots: int
    metric: Metric
    comparisons: int
    n: int
    """Questions of the smallest comparison."""
    significant: float
    """Share of comparisons with p < 0.05 after Holm's correction."""
    questions_needed: float | None
    """Median over comparisons of the questions for 80 % power; None where half of them show no difference at all."""


@dataclass(frozen=True)
class Measuring:
    """What a sweep says of the measuring itself."""

    ways: list[Agreement]
    prompts: list[Agreement]
    metrics: list[Agreement]
    ranges: list[PromptRange]
    correlations: list[Correlation]
    power: list[MetricPower]
    missing: list[str]
    """What could not be said, and why, a line each."""

    @property
    def has_findings(self) -> bool:
        """False where there is nothing but what is missing."""
        return any((self.ways, self.prompts, self.metrics, self.ranges, self.correlations, self.power))


def measure(results: Results, statistics: Statistics) -> Measuring:
    """Everything from stored predictions; systems are bases, references and runs at the last step that is evaluated."""
    board = Board(statistics.answers)
    evaluations = results.plan.evaluations
    studied = studied_evaluations(evaluations)
    missing: list[str] = []
    return Measuring(
        ways=_agreements("way", results, board, _grouped(evaluations, _place, way_of), missing),
        prompts=_agreements("prompt", results, board, _grouped(evaluations, _place_and_way, _prompt), missing),
        metrics=_metric_agreements(results, board, studied, missing),
        ranges=_ranges(results, statistics),
        correlations=_correlations(results, board, studied),
        power=_power(studied, statistics),
        missing=list(dict.fromkeys(missing)),
    )


def measuring_json(measuring: Measuring) -> str:
    """measuring.json: the whole structure, every number unrounded."""
    return json.dumps(asdict(measuring), ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def way_of(evaluation: EvaluationSpec) -> str:
    """How answers are had: written out as text, as letters, or weighed by log-likelihood."""
    if evaluation.scoring == "loglikelihood":
        return "log-likelihood of letters" if evaluation.prompt.answer == "letters" else "log-likelihood"
    return "letters" if evaluation.prompt.answer == "letters" else "generation"


# ---------------------------------------------------------------- groups of evaluations


class _Group(NamedTuple):
    """Evaluations that may be set beside each other."""

    benchmark: str
    shots: int
    way: str = ""
    """Empty where ways are what is compared."""


_Groups = dict[_Group, dict[str, list[EvaluationSpec]]]


def _place(evaluation: EvaluationSpec) -> _Group:
    return _Group(evaluation.benchmark.name, evaluation.shots)


def _place_and_way(evaluation: EvaluationSpec) -> _Group:
    return _Group(evaluation.benchmark.name, evaluation.shots, way_of(evaluation))


def _prompt(evaluation: EvaluationSpec) -> str:
    return evaluation.prompt.name


def _grouped(
    evaluations: Sequence[EvaluationSpec], outer: Callable[[EvaluationSpec], _Group], inner: Callable[[EvaluationSpec], str]
) -> _Groups:
    groups: _Groups = {}
    for item in evaluations:
        groups.setdefault(outer(item), {}).setdefault(inner(item), []).append(item)
    return groups


def _by_place(evaluations: Sequence[EvaluationSpec]) -> dict[_Group, list[EvaluationSpec]]:
    """All prompts of a benchmark and number of shots together."""
    return {group: sides[""] for group, sides in _grouped(evaluations, _place, lambda _: "").items()}


def _scores(
    results: Results, board: Board, sides: Sequence[Sequence[EvaluationSpec]], metrics: Sequence[Metric]
) -> tuple[list[str], list[np.ndarray]]:
    """Names of the systems that have every evaluation of every side, and for each side their scores, (questions, systems)."""
    chosen = [(result, points) for result in results.runs if (points := _points(result, board, sides)) is not None]
    columns: list[list[np.ndarray]] = [[] for _ in sides]
    for _, points in chosen:
        for side, own, metric in zip(columns, points, metrics, strict=True):
            readings: list[Reading] = [((1, point, evaluation),) for point, evaluation in own]
            side.append(board.mean(readings, metric))
    if not chosen:
        return [], []
    length = min(len(column) for side in columns for column in side)  # places that a shorter one lacks it has not answered
    matrices = [np.column_stack([column[:length] for column in side]) for side in columns]
    answered = ~np.isnan(np.hstack(matrices)).any(axis=1)
    return [result.name for result, _ in chosen], [matrix[answered] for matrix in matrices]


def _points(result: RunResult, board: Board, sides: Sequence[Sequence[EvaluationSpec]]) -> list[list[tuple[Point, EvaluationSpec]]] | None:
    """The system at one and the same step for all evaluations, by side; None where one of them is missing."""
    found = [[(final_point(result, item), item) for item in side] for side in sides]
    points = [[(point, item) for point, item in side if point is not None and board.has(point, item)] for side in found]
    steps = {point.step for side in points for point, _ in side}
    return points if [len(side) for side in points] == [len(side) for side in sides] and len(steps) == 1 else None


# ---------------------------------------------------------------- ranks


def _agreements(kind: Literal["way", "prompt"], results: Results, board: Board, groups: _Groups, missing: list[str]) -> list[Agreement]:
    found = []
    for group, sides in groups.items():
        for first, second in combinations(sides, 2):
            metrics: tuple[Metric, ...] = ("accuracy",) if kind == "way" else ("accuracy", "gestalt_score")
            for metric in metrics:
                asked = f", {group.way}" if group.way else ""
                where = f"{group.benchmark}, {group.shots}-shot{asked}: {first} against {second}"
                ranks = _ranks(results, board, [sides[first], sides[second]], (metric, metric), where, missing)
                if ranks:
                    scoring = _scoring([*sides[first], *sides[second]])
                    found.append(Agreement(kind, group.benchmark, group.shots, METRIC_NAMES[metric], first, second, ranks, scoring))
    return found


def _metric_agreements(results: Results, board: Board, evaluations: Sequence[EvaluationSpec], missing: list[str]) -> list[Agreement]:
    found = []
    for group, asked in _by_place(evaluations).items():
        for metric in _OTHERS:
            names = METRIC_NAMES[metric], METRIC_NAMES["gestalt_score"]
            where = f"{group.benchmark}, {group.shots}-shot: {names[0]} against {names[1]}"
            ranks = _ranks(results, board, [asked, asked], (metric, "gestalt_score"), where, missing)
            if ranks:
                found.append(Agreement("metric", group.benchmark, group.shots, names[0], *names, ranks, _scoring(asked)))
    return found


def _scoring(evaluations: Sequence[EvaluationSpec]) -> ScoringWay | None:
    """The one way of scoring that all of them share."""
    ways = {item.scoring for item in evaluations}
    return ways.pop() if len(ways) == 1 else None


def _ranks(
    results: Results, board: Board, sides: list[list[EvaluationSpec]], metrics: tuple[Metric, Metric], where: str, missing: list[str]
) -> RankAgreement | None:
    names, scores = _scores(results, board, sides, metrics)
    if len(names) < FEWEST_SYSTEMS or not len(scores[0]):
        missing.append(f"{where}: {len(names)} systems with answers to both; {FEWEST_SYSTEMS} are needed")
        return None
    first, second = scores
    return compare_ranks(names, first, second)


# ---------------------------------------------------------------- prompts and metrics


def _ranges(results: Results, statistics: Statistics) -> list[PromptRange]:
    found = []
    for benchmark, shots, scoring in dict.fromkeys((item.benchmark, item.shots, item.scoring) for item in statistics.prompts):
        own = [item for item in statistics.prompts if (item.benchmark, item.shots, item.scoring) == (benchmark, shots, scoring)]
        for metric in METRICS:
            ranges = [item.spreads[metric].range for item in own]
            most = max(range(len(own)), key=ranges.__getitem__)
            found.append(
                PromptRange(
                    benchmark=benchmark,
                    shots=shots,
                    scoring=scoring,
                    metric=metric,
                    prompts=max(len(item.prompts) for item in own),
                    systems=len(own),
                    median=float(np.median(ranges)),
                    largest=ranges[most],
                    largest_of=results.by_key[own[most].run_key].name,
                )
            )
    return found


def _correlations(results: Results, board: Board, evaluations: Sequence[EvaluationSpec]) -> list[Correlation]:
    found = []
    for group, asked in _by_place(evaluations).items():
        for metric in _OTHERS:
            values = []
            for item in asked:
                _, scores = _scores(results, board, [[item], [item]], (metric, "gestalt_score"))
                pairs = zip(scores[0].T, scores[1].T, strict=True) if scores else ()
                values += [
                    round(float(np.corrcoef(one, other)[0, 1]), _DIGITS)
                    for one, other in pairs
                    if len(one) and np.ptp(one) > 0 and np.ptp(other) > 0
                ]
            if values:
                middle = float(np.median(values))
                found.append(Correlation(group.benchmark, group.shots, metric, len(values), middle, min(values), max(values)))
    return found


def _power(evaluations: Sequence[EvaluationSpec], statistics: Statistics) -> list[MetricPower]:
    keys = {item.evaluation_key for item in evaluations}
    found = []
    for group in _by_place(evaluations):
        for metric in METRICS:
            rows = [
                row
                for row in statistics.against_base
                if row.evaluation_key in keys and (row.benchmark, row.shots, row.metric) == (group.benchmark, group.shots, metric)
            ]
            if rows:
                needed = float(np.median([row.questions_needed or np.inf for row in rows]))
                found.append(
                    MetricPower(
                        group.benchmark,
                        group.shots,
                        metric,
                        len(rows),
                        min(row.n for row in rows),
                        sum(row.p_holm < ALPHA for row in rows) / len(rows),
                        needed if np.isfinite(needed) else None,
                    )
                )
    return found
