"""The study's three metrics: accuracy by Gestalt distance (or by letters), exact match, Gestalt score."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Literal

from jmedlora.config.benchmark import DEFAULT_METRICS, MetricSettings
from jmedlora.data.rows import Question
from jmedlora.evaluation.gestalt import Reference, gestalt_distance, nearest_choices, nearest_references, upper_bounds
from jmedlora.evaluation.letters import names_exactly, parse_letters

__all__ = [
    "ResponseScore",
    "Scorer",
    "answer_is_complete",
    "first_line",
    "first_line_is_complete",
    "gestalt_distance",
    "marked_answer",
    "nearest_choices",
    "score_letters",
    "score_response",
    "score_responses",
    "summarise",
]

# Responses whose bounds are computed at once: enough to be fast, little to hold.
_AT_ONCE = 2_000


@dataclass(frozen=True)
class ResponseScore:
    """One scored response; `chosen` holds the positions of the choices that it was taken to name, in ascending order."""

    response: str
    chosen: tuple[int, ...]
    correct: bool
    exact_match: bool
    gestalt_score: float


# ---------------------------------------------------------------- what of a response is scored


def first_line(text: str) -> str:
    """The first line that is not blank, without surrounding white space; empty where there is none."""
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else ""


def first_line_is_complete(text: str) -> bool:
    """True once `first_line(text)` cannot change by adding to the end of `text`."""
    begun = text.lstrip()
    return begun.splitlines()[:1] != begun.splitlines(keepends=True)[:1]


def marked_answer(text: str, marker: str) -> str:
    """What follows the last `marker`, over line breaks; without the marker the last line that is not blank."""
    _, found, answer = text.rpartition(marker)
    if found:
        return answer
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def answer_is_complete(text: str, marker: str | None) -> bool:
    """True once a decoder can end: the line that is scored is there, and a line break after it.

    With a marker that is the line after it. Only a further marker could change what is scored then, and a response that
    ends here has none.
    """
    if marker is None:
        return first_line_is_complete(text)
    _, found, answer = text.rpartition(marker)
    return bool(found) and first_line_is_complete(answer)


def _scored_text(response: str, settings: MetricSettings, marker: str | None) -> str:
    answer = response if marker is None else marked_answer(response, marker)
    return _normalised(first_line(answer) if settings.first_line else answer, settings).strip()


def _normalised(text: str, settings: MetricSettings) -> str:
    return unicodedata.normalize("NFKC", text) if settings.nfkc else text


def _without_full_stops(text: str, settings: MetricSettings) -> str:
    return text.replace(".", "") if settings.remove_full_stops else text


# ---------------------------------------------------------------- scoring


def score_response(
    response: str, question: Question, settings: MetricSettings = DEFAULT_METRICS, *, marker: str | None = None
) -> ResponseScore:
    """Score a decoded response to a question that has choices, by the choices' texts.

    The question counts as correct when the choices nearest to the response, as many as there are right answers, are
    exactly the right ones (`multiple: top_1`: when the nearest one is among them). Every response is assigned choices, an
    empty one the first; with `ties: wrong` a question where a tie decides which are taken does not count as correct.
    White space around the response is never compared, and for the exact match that around the right answer is not either.
    Where an exam accepts several answers (`a or d`), each counts as correct and the nearest gives exact match and Gestalt
    score. With a `marker` only the marked answer is scored.
    """
    return Scorer([question], settings, marker=marker).score([response])[0]


def score_letters(
    response: str, question: Question, settings: MetricSettings = DEFAULT_METRICS, *, marker: str | None = None
) -> ResponseScore:
    """Score a decoded response to a question whose choices were shown with letters; see `letters.parse_letters`.

    Correct when the letters that the response names are exactly the right ones (`multiple: top_1`: when the first of them
    is a right one); a response that names none is wrong. Exact match asks for a line of nothing but the right letters, in
    any order. The Gestalt score compares the texts of the named choices with the right answer's; it is 0 where none was named.
    """
    return Scorer([question], settings, marker=marker, answer="letters").score([response])[0]


def score_responses(
    responses: Sequence[str],
    questions: Sequence[Question],
    settings: MetricSettings = DEFAULT_METRICS,
    marker: str | None = None,
    answer: Literal["text", "letters"] = "text",
) -> list[ResponseScore]:
    """A score per response, each to the question at its place: the same as one by one, in less time."""
    return Scorer(questions, settings, marker=marker, answer=answer).score(responses)


class Scorer:
    """Scores responses to the same questions again and again (runs, checkpoints, prompts), with what belongs to the questions kept.

    Raises ValueError for a question without choices.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        settings: MetricSettings = DEFAULT_METRICS,
        *,
        marker: str | None = None,
        answer: Literal["text", "letters"] = "text",
    ):
        self._settings, self._marker, self._answer = settings, marker, answer
        self._questions = [_Prepared(question, settings) for question in questions]

    def score(self, responses: Sequence[str]) -> list[ResponseScore]:
        """A score per response; raises ValueError where there are not as many responses as questions."""
        if len(responses) != len(self._questions):
            raise ValueError(f"{len(responses)} responses to {len(self._questions)} questions")
        texts = [_scored_text(response, self._settings, self._marker) for response in responses]
        if self._answer == "letters":
            return [question.score_letters(text) for question, text in zip(self._questions, texts)]
        texts = [_without_full_stops(text, self._settings).strip() for text in texts]
        scores: list[ResponseScore] = []
        for start in range(0, len(texts), _AT_ONCE):
            batch = list(zip(self._questions[start : start + _AT_ONCE], texts[start : start + _AT_ONCE]))
            left = [text for question, text in batch for _ in question.compared]
            bounds = upper_bounds(left, [text for question, _ in batch for text in question.compared])
            position = 0
            for question, text in batch:
                end = position + len(question.compared)
                scores.append(question.score_text(text, bounds[position:end]))
                position = end
        return scores


class _Prepared:
    """A question's texts, normalised and ready to be compared."""

    __slots__ = ("_accepted", "_answers", "_choices", "_exact", "_expected", "_gestalt_of_letters", "_references", "_settings", "compared")

    def __init__(self, question: Question, settings: MetricSettings):
        if not question.gold:
            raise ValueError(f"{question.problem_id} has no choices to be scored by")
        self._settings = settings
        self._expected = len(question.gold)
        self._choices = len(question.choices)
        self._accepted = (question.gold, *question.alternatives)
        self.compared = [_normalised(choice, settings) for choice in question.choices]
        """The choices, then those right answers that are not the text of one choice."""
        self._answers: list[int] = []
        """Their places among the compared texts: what is a choice and an answer is compared once."""
        self._exact: list[str] = []
        for gold in self._accepted:
            text = _without_full_stops(",".join([self.compared[i] for i in gold]), settings)
            self._exact.append(text.strip())
            if len(gold) == 1 and self.compared[gold[0]] == text:
                self._answers.append(gold[0])
            else:
                self._answers.append(len(self.compared))
                self.compared.append(text)
        self._references = [Reference(text, settings) for text in self.compared]
        self._gestalt_of_letters: dict[tuple[int, ...], float] = {}

    def score_text(self, scored: str, bounds: Sequence[float]) -> ResponseScore:
        """`bounds`: upper bounds of the distances to the compared texts."""
        known = {i: self._references[i].distance(scored, bounds[i]) for i in self._answers}
        gestalt = max(known.values())
        count = 1 if self._settings.multiple == "top_1" else self._expected
        computed = {i: distance for i, distance in known.items() if i < self._choices}
        nearest = nearest_references(scored, self._references[: self._choices], count, self._settings, bounds, computed)
        correct = self._is_correct(nearest.positions, nearest.positions)
        if nearest.tied and self._settings.ties == "wrong":
            correct = False
        return ResponseScore(scored, nearest.positions, correct, scored in self._exact, gestalt)

    def score_letters(self, scored: str) -> ResponseScore:
        named = parse_letters(scored, self._choices, self._expected)
        chosen = tuple(sorted(named))
        if chosen not in self._gestalt_of_letters:
            text = _without_full_stops(",".join(self.compared[i] for i in chosen), self._settings)
            answers = [self.compared[i] for i in self._answers]
            self._gestalt_of_letters[chosen] = max(gestalt_distance(text, answer, self._settings) for answer in answers) if chosen else 0.0
        return ResponseScore(
            response=scored,
            chosen=chosen,
            correct=bool(named) and self._is_correct(named[:1], chosen),
            exact_match=any(names_exactly(scored, gold) for gold in self._accepted),
            gestalt_score=self._gestalt_of_letters[chosen],
        )

    def _is_correct(self, first: tuple[int, ...], chosen: tuple[int, ...]) -> bool:
        if self._settings.multiple == "top_1":
            return any(first[0] in gold for gold in self._accepted)
        return chosen in self._accepted


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
