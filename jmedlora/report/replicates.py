"""Runs that differ in nothing but the seed, as replicates of one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from jmedlora.config.benchmark import ScoringWay
from jmedlora.config.digest import canonical_json
from jmedlora.evaluation.resampling import Interval
from jmedlora.evaluation.statistics import Comparison, averaged, holm
from jmedlora.plan.specs import EvaluationSpec, RunSpec
from jmedlora.report.answers import AnswerBook, Answers, pooled
from jmedlora.report.collect import METRICS, Metric, Results, RunResult
from jmedlora.report.intervals import mean_intervals
from jmedlora.report.pairs import compare_answers


@dataclass(frozen=True)
class ReplicateRow:
    """One metric of a group of runs, each of them at its last evaluated step, and the mean of the group against its base.

    `sd` tells how much the seed of the training changes; the intervals tell how much the choice of questions does, with all
    answers to a question kept together. What belongs to the base is None where the base is not evaluated.
    """

    run_keys: tuple[str, ...]
    """By seed."""
    seeds: tuple[int, ...]
    base_key: str
    benchmark: str
    shots: int
    prompt: str
    scoring: ScoringWay
    metric: Metric
    step: int
    n: int
    """Questions that all of them answered."""
    mean: float
    """Over seeds and questions."""
    sd: float
    """Of the seeds' scores, each over its own questions."""
    low: float
    high: float
    """95 % bounds of the mean."""
    against_base: Comparison | None
    p_holm: float | None
    """Holm's family: all groups and evaluations of one metric."""
    evaluation_key: str


@dataclass(frozen=True)
class _Group:
    """Runs that are alike, with their answers to one evaluation after the same number of steps."""

    runs: list[RunResult]
    step: int
    answers: Answers
    scores: dict[Metric, list[float]]
    base_key: str
    base: Answers | None


def compare_replicates(results: Results, answers: AnswerBook, evaluations: Sequence[EvaluationSpec]) -> list[ReplicateRow]:
    """A row per group, evaluation and metric; none where no two runs are alike."""
    alike = _alike(results)
    if not alike:
        return []
    rows: list[ReplicateRow] = []
    for evaluation in evaluations:
        groups = [group for runs in alike if (group := _group(results, answers, evaluation, runs)) is not None]
        for metric in METRICS:
            rows += _rows(groups, evaluation, metric)
    return _corrected(rows)


def _alike(results: Results) -> list[list[RunResult]]:
    """Runs with equal settings but for the seed, by seed."""
    groups: dict[str, list[RunResult]] = {}
    for result in results.tuned:
        if isinstance(result.spec, RunSpec):
            told = result.spec.model_dump(mode="json", exclude={"run_key": True, "trajectory_key": True, "settings": {"seed"}})
            groups.setdefault(canonical_json(told), []).append(result)
    return [sorted(runs, key=lambda result: (result.seed, result.run_key)) for runs in groups.values() if len(runs) > 1]


def _group(results: Results, answers: AnswerBook, evaluation: EvaluationSpec, runs: list[RunResult]) -> _Group | None:
    """The runs that are furthest; None where fewer than two are."""
    last = {result.run_key: scores[-1] for result in runs if (scores := result.scores_of(evaluation))}
    step = max((score.step for score in last.values()), default=0)
    members = [
        (result, own)
        for result in runs
        if result.run_key in last
        and last[result.run_key].step == step
        and (own := answers.of(result.run_key, step, evaluation)) is not None
    ]
    if len(members) < 2:
        return None
    base = results.base_of(members[0][0])
    before = base.scores_of(evaluation) if base else []
    together = pooled([own for _, own in members])
    if base is None or not together.problem_ids:
        return None
    return _Group(
        runs=[result for result, _ in members],
        step=step,
        answers=together,
        scores={metric: [last[result.run_key].value(metric) for result, _ in members] for metric in METRICS},
        base_key=base.run_key,
        base=answers.of(base.run_key, before[-1].step, evaluation) if before else None,
    )


def _rows(groups: list[_Group], evaluation: EvaluationSpec, metric: Metric) -> list[ReplicateRow]:
    bounds = mean_intervals([group.answers for group in groups], metric)
    with_base = [(place, (group.base, group.answers)) for place, group in enumerate(groups) if group.base is not None]
    compared = dict(zip((place for place, _ in with_base), compare_answers([pair for _, pair in with_base], metric), strict=True))
    return [_row(group, evaluation, metric, bounds[place], compared.get(place)) for place, group in enumerate(groups)]


def _row(group: _Group, evaluation: EvaluationSpec, metric: Metric, bounds: Interval, found: Comparison | None) -> ReplicateRow:
    return ReplicateRow(
        run_keys=tuple(result.run_key for result in group.runs),
        seeds=tuple(result.seed for result in group.runs),
        base_key=group.base_key,
        benchmark=evaluation.benchmark.name,
        shots=evaluation.shots,
        prompt=evaluation.prompt.name,
        scoring=evaluation.scoring,
        metric=metric,
        step=group.step,
        n=len(group.answers.problem_ids),
        mean=fmean(group.answers.scores(metric)),
        sd=stdev(group.scores[metric]),
        low=bounds.low,
        high=bounds.high,
        against_base=averaged(found, len(group.runs)) if found else None,
        p_holm=None,
        evaluation_key=evaluation.evaluation_key,
    )


def _corrected(rows: list[ReplicateRow]) -> list[ReplicateRow]:
    corrected = list(rows)
    for metric in METRICS:
        places = [place for place, row in enumerate(rows) if row.metric == metric and row.against_base is not None]
        p_values = [row.against_base.p for place in places if (row := rows[place]).against_base is not None]
        for place, p in zip(places, holm(p_values), strict=True):
            corrected[place] = replace(rows[place], p_holm=p)
    return corrected
