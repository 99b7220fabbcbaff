"""Pairs of systems compared on the questions that both answered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jmedlora.evaluation.statistics import Comparison, compare_score_pairs, compare_share_pairs
from jmedlora.report.answers import Answers, shared_questions
from jmedlora.report.collect import Metric

_COMPARED_AT_ONCE = 400  # pairs; each of their systems holds 30,000 resampled sums: at most 190 MB

Pair = tuple[Answers, Answers]


def compare_answers(pairs: Sequence[Pair], metric: Metric) -> list[Comparison | None]:
    """The second system of each pair against its first; None for a pair without a question in common.

    Pairs with the same questions share their random numbers, so that all pairs of some systems cost little more than one.
    """
    alike: dict[tuple[int, int, bool], list[int]] = {}
    for place, (first, second) in enumerate(pairs):
        shares = first.is_share(metric) and second.is_share(metric)
        alike.setdefault((id(first.problem_ids), id(second.problem_ids), shares), []).append(place)
    found: list[Comparison | None] = [None] * len(pairs)
    for (_, _, shares), places in alike.items():
        questions = shared_questions(*pairs[places[0]])
        if len(questions[0]) == 0:
            continue
        for chunk in (places[first : first + _COMPARED_AT_ONCE] for first in range(0, len(places), _COMPARED_AT_ONCE)):
            for place, comparison in zip(chunk, _compare([pairs[place] for place in chunk], questions, metric, shares), strict=True):
                found[place] = comparison
    return found


def _compare(pairs: list[Pair], questions: tuple[np.ndarray, np.ndarray], metric: Metric, shares: bool) -> list[Comparison]:
    """Pairs that share `questions`: positions in every first and in every second system."""
    columns: dict[tuple[int, int], int] = {}
    values: list[np.ndarray] = []

    def column(system: Answers, places: np.ndarray) -> int:
        key = id(system), id(places)
        if key not in columns:
            columns[key] = len(values)
            values.append(system.scores(metric)[places])
        return columns[key]

    indices = [(column(first, questions[0]), column(second, questions[1])) for first, second in pairs]
    return (compare_share_pairs if shares else compare_score_pairs)(np.column_stack(values), indices)
