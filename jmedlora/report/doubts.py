"""Answers that say little of what a system knows: so many that its scores should be read with care."""

from __future__ import annotations

from dataclasses import dataclass

from jmedlora.plan.specs import EvaluationSpec
from jmedlora.report.collect import DoubtKind, Score

SIGNS: dict[DoubtKind, str] = {"no_resemblance": "†", "empty_answers": "‡", "cut_answers": "§"}
WARNED_SHARE = 0.1
"""Of all answers; fewer change no score by much."""
_TIES = {"first": "they count for the first one", "last": "they count for the last one", "wrong": "they count as wrong"}


@dataclass(frozen=True)
class Doubt:
    """Answers of one kind, at least `WARNED_SHARE` of the `n` that a score is made of."""

    kind: DoubtKind
    count: int
    n: int
    meaning: str
    """What follows the words `n of N answers`."""

    @property
    def sign(self) -> str:
        return SIGNS[self.kind]

    @property
    def text(self) -> str:
        """Such as `12 of 40 answers resemble no choice; they count for the first one`."""
        return f"{self.count} of {self.n} answers {self.meaning}"


def doubts_of(score: Score) -> list[Doubt]:
    """What a reader of this score should be warned of; nothing where the counts are not stored."""
    many = [(kind, count) for kind in SIGNS if (count := score.doubtful.get(kind, 0)) and count >= WARNED_SHARE * score.n]
    return [Doubt(kind, count, score.n, _meaning(kind, score.evaluation)) for kind, count in many]


def _meaning(kind: DoubtKind, evaluation: EvaluationSpec) -> str:
    if kind == "empty_answers":
        return "are empty"
    if kind == "cut_answers":
        return f"were cut off after {evaluation.max_new_tokens} tokens"
    if evaluation.prompt.answer == "letters":
        return "name no choice; they count as wrong"
    return f"resemble no choice; {_TIES[evaluation.metrics.ties]}"
