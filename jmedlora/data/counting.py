"""What a set of questions is made of, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

from jmedlora.data.rows import Question


def count_questions(questions: list[Question]) -> dict[str, Any]:
    """Counts by kind: `answers` is how many are right (a numeric answer counts as one), `points` the sum.

    `years` has the same counts for the questions of each year, `categories` and `sections` how many questions each has.
    """
    counts = _counts(questions)
    years = sorted({question.year for question in questions if question.year is not None})
    return counts | {
        "sections": _tally(question.facts.section for question in questions if question.facts.section),
        "categories": _tally(question.facts.category for question in questions if question.facts.category),
        "years": {year: _counts([question for question in questions if question.year == year]) for year in years},
    }


def _counts(questions: list[Question]) -> dict[str, Any]:
    asked = [question for question in questions if question.text_only and len(question.choices) == 5]
    return {
        "questions": len(questions),
        "text_only": sum(question.text_only for question in questions),
        "text_only_five_choices": len(asked),
        "text_only_five_choices_one_answer": sum(len(question.gold) == 1 for question in asked),
        "choices": _tally(len(question.choices) for question in questions),
        "answers": _tally(len(question.gold) or 1 for question in questions),
        "either_answer": sum(bool(question.alternatives) for question in questions),
        "numeric": sum(not question.choices for question in questions),
        "blank_choices": sum(not all(question.choices) for question in questions),
        "prohibited": sum(bool(question.facts.prohibited) for question in questions),
        "translated": sum(bool(question.facts.question_en) for question in questions),
        "points": sum(question.facts.points for question in questions),
    }


def _tally(values: Iterable[Hashable]) -> dict[Any, int]:
    return dict(sorted(Counter(values).items()))
