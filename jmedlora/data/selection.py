"""Which questions of a source are taken, and in which order their choices stand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from jmedlora.config.benchmark import Filters
from jmedlora.config.faults import Fault
from jmedlora.config.validate import unknown_name
from jmedlora.data.mixing import combine, key_from
from jmedlora.data.rows import Question


def select(
    questions: list[Question], filters: Filters, where: str, faults: list[Fault], apart: frozenset[str] = frozenset()
) -> list[Question]:
    """The questions that pass the filters, in the source's order.

    Questions whose ids are `apart` serve as examples; they are taken out before anything is counted off. What a filter names
    that the source does not have, and a sample larger than what is left, are faults of `where`.
    """
    _check_names(questions, filters, where, faults)
    items = None if filters.items is None else set(filters.items)
    exclude = apart | set(filters.exclude)
    kept = [
        question
        for question in questions
        if (filters.years is None or question.year in filters.years)
        and (filters.sections is None or question.facts.section in filters.sections)
        and (filters.categories is None or question.facts.category in filters.categories)
        and (filters.text_only is None or question.text_only == filters.text_only)
        and (filters.choices is None or len(question.choices) == filters.choices)
        and (filters.answers is None or len(question.gold) == filters.answers)
        and (items is None or question.problem_id in items)
        and question.problem_id not in exclude
    ]
    if filters.first is not None:
        kept = kept[: filters.first]
    if filters.sample is not None:
        n, seed = filters.sample.n, filters.sample.seed
        if n > len(kept):
            faults.append(Fault(where, "filters.sample.n", f"{n} of {len(kept)} questions", f"at most {len(kept)}"))
        kept = _sample(kept, n, seed)
    return kept


def shuffle_choices(question: Question, seed: int) -> Question:
    """The question with its choices in an order that depends on the seed and its id alone; all that points at choices follows."""
    size = len(question.choices)
    order = np.argsort(combine(key_from("shuffle", seed, question.problem_id), np.arange(size, dtype=np.uint64)), kind="stable")
    place = {int(old): new for new, old in enumerate(order)}

    def moved(positions: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted(place[position] for position in positions))

    def reordered(texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(texts[int(old)] for old in order) if len(texts) == size else texts

    facts = replace(question.facts, prohibited=moved(question.facts.prohibited), choices_en=reordered(question.facts.choices_en))
    return replace(
        question,
        choices=reordered(question.choices),
        gold=moved(question.gold),
        alternatives=tuple(map(moved, question.alternatives)),
        facts=facts,
    )


def _sample(questions: list[Question], n: int, seed: int) -> list[Question]:
    """The n questions with the smallest keyed values, in their order: one question more or less moves at most one other."""
    ranked = sorted(questions, key=lambda question: (int(key_from("sample", seed, question.problem_id)[0]), question.problem_id))
    taken = {question.problem_id for question in ranked[:n]}
    return [question for question in questions if question.problem_id in taken]


def _check_names(questions: list[Question], filters: Filters, where: str, faults: list[Fault]) -> None:
    ids = {question.problem_id for question in questions}
    for key in ("items", "exclude"):
        faults.extend(
            Fault(where, f"filters.{key}", f"no question {item}", "ids of questions that are here")
            for item in getattr(filters, key) or []
            if item not in ids
        )
    here: dict[str, set[Any]] = {
        "years": {question.year for question in questions} - {None},
        "sections": {question.facts.section for question in questions} - {""},
        "categories": {question.facts.category for question in questions} - {""},
    }
    for key, known in here.items():
        names = {str(name) for name in known}
        for name in getattr(filters, key) or []:
            if str(name) not in names:
                allowed = unknown_name(str(name), names) if names else f"no filter by {key}: nothing here tells them"
                faults.append(Fault(where, f"filters.{key}", f"{name} is not here", allowed))
