"""Confidence intervals of scores that were stored without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jmedlora.evaluation.resampling import Interval, bootstrap_sums, intervals
from jmedlora.plan.specs import EvaluationSpec
from jmedlora.report.answers import AnswerBook, Answers
from jmedlora.report.collect import METRICS, Metric, Results, RunResult, Score

_DRAWN_AT_ONCE = 200  # systems, each with 10,000 resampled sums: 16 MB

_Key = tuple[str, str, int]


def with_intervals(results: Results, answers: AnswerBook) -> Results:
    """The results with an interval of every metric of each score; scores whose predictions are not stored stay without.

    The bounds are those of `bootstrap_interval` with its seed 0, as an evaluation stores them itself.
    """
    found: dict[_Key, dict[Metric, Interval]] = {}
    for evaluation in results.plan.evaluations:
        found |= _intervals_of(results, answers, evaluation)
    return Results(results.plan, [_completed(result, found) for result in results.runs])


def _completed(result: RunResult, found: dict[_Key, dict[Metric, Interval]]) -> RunResult:
    scores = [replace(score, intervals=found.get(_key(result, score), score.intervals)) for score in result.scores]
    return replace(result, scores=scores)


def _key(result: RunResult, score: Score) -> _Key:
    return result.run_key, score.evaluation.evaluation_key, score.step


def _intervals_of(results: Results, answers: AnswerBook, evaluation: EvaluationSpec) -> dict[_Key, dict[Metric, Interval]]:
    keys: list[_Key] = []
    systems: list[Answers] = []
    for result in results.runs:
        scores = result.scores_of(evaluation)
        for score in scores:
            if len(score.intervals) == len(METRICS):
                continue
            # the last step is compared later on; the others are asked for here alone
            read = answers.of if score is scores[-1] else answers.read
            own = read(result.run_key, score.step, evaluation)
            if own is not None:
                keys.append(_key(result, score))
                systems.append(own)
    found: dict[_Key, dict[Metric, Interval]] = {key: {} for key in keys}
    for metric in METRICS:
        for key, interval in zip(keys, mean_intervals(systems, metric), strict=True):
            found[key][metric] = interval
    return found


def mean_intervals(systems: Sequence[Answers], metric: Metric) -> list[Interval]:
    """An interval of each system's mean; those with equally many questions share their random numbers."""
    by_length: dict[int, list[int]] = {}
    for place, own in enumerate(systems):
        by_length.setdefault(len(own.problem_ids), []).append(place)
    found: dict[int, Interval] = {}
    for same in by_length.values():
        for chunk in (same[first : first + _DRAWN_AT_ONCE] for first in range(0, len(same), _DRAWN_AT_ONCE)):
            values = np.column_stack([systems[place].scores(metric) for place in chunk])
            found |= zip(chunk, intervals(values, bootstrap_sums(values, seed=0)), strict=True)
    return [found[place] for place in range(len(systems))]
