"""Gestalt distance, bit for bit that of difflib, and the choices that are nearest by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cydifflib import SequenceMatcher
from rapidfuzz import process
from rapidfuzz.distance import Indel

from jmedlora.config.benchmark import DEFAULT_METRICS, MetricSettings

# The upper bound and the ratio are rounded differently: equal fractions may differ in their last digits.
_BOUND_SLACK = 1e-9

# difflib ignores frequent characters of a second text that is at least this long, where autojunk is on.
_AUTOJUNK_LENGTH = 200

# Fewer pairs are faster one by one than as a batch.
_FEW = 20


def gestalt_distance(response: str, choice: str, settings: MetricSettings = DEFAULT_METRICS) -> float:
    """Ratcliff/Obershelp similarity of the two texts as they stand, 0 to 1; bit for bit that of difflib."""
    if settings.order == "choice_response":
        return SequenceMatcher(None, choice, response, settings.autojunk).ratio()
    ratio = SequenceMatcher(None, response, choice, settings.autojunk).ratio()
    if settings.order == "mean":
        return (SequenceMatcher(None, choice, response, settings.autojunk).ratio() + ratio) / 2
    return ratio


def upper_bounds(responses: Sequence[str], choices: Sequence[str]) -> list[float]:
    """What the Gestalt distance of each pair cannot exceed, up to rounding.

    The insertion-deletion similarity is never below it, since matched blocks form a common subsequence.
    """
    if len(responses) < _FEW:
        return [Indel.normalized_similarity(response, choice) for response, choice in zip(responses, choices, strict=True)]
    found: list[float] = process.cpdist(responses, choices, scorer=Indel.normalized_similarity, dtype=np.float64).tolist()
    return found


class Reference:
    """A text that many responses are compared with: difflib's index of it is built once, on first use."""

    __slots__ = ("_matcher", "_settings", "text")

    def __init__(self, text: str, settings: MetricSettings):
        self.text = text
        self._settings = settings
        self._matcher: SequenceMatcher | None = None

    def distance(self, response: str, bound: float) -> float:
        """`gestalt_distance(response, self.text, settings)`, bit for bit, in less time; `bound` is its upper bound."""
        length = len(response) + len(self.text)
        if not self._settings.autojunk or length < _AUTOJUNK_LENGTH:
            common = round(bound * length / 2)  # length of the longest common subsequence: no more characters are matched
            is_inside = (common == len(self.text) and self.text in response) or (common == len(response) and response in self.text)
            # One text inside the other is one block; a single common character is matched wherever it stands.
            if is_inside or common < 2:
                return 2.0 * common / length if length else 1.0
        if self._settings.order == "choice_response":  # the index is one of the response
            return gestalt_distance(response, self.text, self._settings)
        if self._matcher is None:
            self._matcher = SequenceMatcher(None, "", self.text, self._settings.autojunk)
        self._matcher.set_seq1(response)
        ratio: float = self._matcher.ratio()
        if self._settings.order == "mean":
            return (SequenceMatcher(None, self.text, response, self._settings.autojunk).ratio() + ratio) / 2
        return ratio


@dataclass(frozen=True)
class Nearest:
    """Positions of the nearest choices in ascending order; `tied` where a choice left out is as near as one taken."""

    positions: tuple[int, ...]
    tied: bool


def nearest_references(
    response: str,
    choices: Sequence[Reference],
    count: int,
    settings: MetricSettings,
    bounds: Sequence[float],
    known: Mapping[int, float],
) -> Nearest:
    """The `count` choices with the highest Gestalt distance to the response.

    `bounds` are the choices' `upper_bounds`, `known` the distances that were computed before. Choices whose bound is
    below what is already reached are passed over, without changing the result.
    """
    sign = -1 if settings.ties == "last" else 1
    ranked = sorted((-distance, sign * position) for position, distance in known.items())
    for position in sorted(range(len(choices)), key=lambda i: -bounds[i]):
        if position in known:
            continue
        if len(ranked) >= count and bounds[position] + _BOUND_SLACK < -ranked[count - 1][0]:
            break
        ranked.append((-choices[position].distance(response, bounds[position]), sign * position))
        ranked.sort()
    taken = tuple(sorted(sign * position for _, position in ranked[:count]))
    return Nearest(taken, count < len(ranked) and ranked[count - 1][0] == ranked[count][0])


def nearest_choices(response: str, choices: Sequence[str], count: int, settings: MetricSettings = DEFAULT_METRICS) -> tuple[int, ...]:
    """Positions of the `count` choices with the highest Gestalt distance, in ascending order.

    Of equally near choices the earlier is taken, with `ties: last` the later.
    """
    references = [Reference(choice, settings) for choice in choices]
    bounds = upper_bounds([response] * len(choices), choices)
    return nearest_references(response, references, count, settings, bounds, {}).positions
