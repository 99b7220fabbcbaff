"""The study's three metrics: accuracy by Gestalt distance, exact match, Gestalt score."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

from cydifflib import SequenceMatcher
from rapidfuzz.distance import Indel

from jmedlora.config.benchmark import DEFAULT_METRICS, MetricSettings
from jmedlora.data.rows import Question

# The upper bound and the ratio are rounded differently: equal fractions may differ in their last digits.
_BOUND_SLACK = 1e-9


@dataclass(frozen=True)
class ResponseScore:
    """One scored response; `chosen` holds the positions of the choices that it was taken to name, in ascending order."""

    response: str
    chosen: tuple[int, ...]
    correct: bool
    exact_match: bool
    gestalt_score: float


def gestalt_distance(response: str, choice: str, settings: MetricSettings = DEFAULT_METRICS) -> float:
    """Ratcliff/Obershelp similarity of the two texts as they stand, 0 to 1; bit for bit that of difflib."""
    if settings.order == "choice_response":
        return SequenceMatcher(None, choice, response, settings.autojunk).ratio()
    ratio = SequenceMatcher(None, response, choice, settings.autojunk).ratio()
    if settings.order == "mean":
        return (SequenceMatcher(None, choice, response, settings.autojunk).ratio() + ratio) / 2
    return ratio


def first_line(text: str) -> str:
    """The first line that is not blank, without surrounding white space; empty where there is none."""
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else ""


def first_line_is_complete(text: str) -> bool:
    """True once `first_line(text)` cannot change by adding to the end of `text`."""
    begun = text.lstrip()
    return begun.splitlines()[:1] != begun.splitlines(keepends=True)[:1]


def nearest_choices(response: str, choices: Sequence[str], count: int, settings: MetricSettings = DEFAULT_METRICS) -> tuple[int, ...]:
    """Positions of the `count` choices with the highest Gestalt distance, in ascending order; a tie goes to the earlier choice.

    The insertion-deletion similarity is never below the Gestalt distance, since matched blocks form a common
    subsequence: choices whose bound is below what is already reached are passed over, without changing the result.
    """
    bounds = [Indel.normalized_similarity(response, choice) for choice in choices]
    ranked: list[tuple[float, int]] = []
    for position in sorted(range(len(choices)), key=lambda i: (-bounds[i], i)):
        if len(ranked) >= count and bounds[position] + _BOUND_SLACK < -ranked[count - 1][0]:
            break
        ranked.append((-gestalt_distance(response, choices[position], settings), position))
        ranked.sort()
    return tuple(sorted(position for _, position in ranked[:count]))


def score_response(response: str, question: Question, settings: MetricSettings = DEFAULT_METRICS) -> ResponseScore:
    """Score a decoded response to a question that has choices.

    The question counts as correct when the choices nearest to the response, as many as there are right answers, are
    exactly the right ones; every response is assigned choices, an empty one the first. White space around the response
    is never compared, and for the exact match that around the right answer is not either. Where an exam accepts several
    answers (`a or d`), each counts as correct and the nearest gives exact match and Gestalt score.
    """
    scored = _without_full_stops(_normalised(first_line(response) if settings.first_line else response, settings), settings).strip()
    choices = [_normalised(choice, settings) for choice in question.choices]
    accepted = (question.gold, *question.alternatives)
    answers = [_without_full_stops(",".join(choices[i] for i in gold), settings) for gold in accepted]
    chosen = nearest_choices(scored, choices, len(question.gold), settings)
    return ResponseScore(
        response=scored,
        chosen=chosen,
        correct=chosen in accepted,
        exact_match=any(scored == answer.strip() for answer in answers),
        gestalt_score=max(gestalt_distance(scored, answer, settings) for answer in answers),
    )


def _normalised(text: str, settings: MetricSettings) -> str:
    return unicodedata.normalize("NFKC", text) if settings.nfkc else text


def _without_full_stops(text: str, settings: MetricSettings) -> str:
    return text.replace(".", "") if settings.remove_full_stops else text


def summarise(scores: Sequence[ResponseScore]) -> dict[str, int | float]:
    """Means over all questions: `n`, and `accuracy`, `exact_match`, `gestalt_score` from 0 to 1."""
    if not scores:
        raise ValueError("no scores to summarise")
    n = len(scores)
    return {
        "n": n,
        "accuracy": sum(score.correct for score in scores) / n,
        "exact_match": sum(score.exact_match for score in scores) / n,
        "gestalt_score": fsum(score.gestalt_score for score in scores) / n,
    }
