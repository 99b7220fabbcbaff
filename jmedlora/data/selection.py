"""Which questions of a source are taken, and in which order their choices stand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
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
    that the source does not have, the filter that leaves nothing, and a sample larger than what is left, are faults of `where`.
    """
    found: list[Fault] = []
    _check_names(questions, filters, where, found)
    kept = questions
    for key, value_of in _LOOKED_AT.items():
        wanted = getattr(filters, key)
        if wanted is None:
            continue
        values = set(wanted) if isinstance(wanted, list) else {wanted}
        before, kept = kept, [question for question in kept if value_of(question) in values]
        if before and not kept and not found:
            found.append(_emptied(where, key, wanted, before))
    for key, ids in (("filters.exclude", frozenset(filters.exclude)), ("fewshot_items", apart)):
        before, kept = kept, [question for question in kept if question.problem_id not in ids]
        if before and not kept and not found:
            found.append(Fault(where, key, f"leaves none of {len(before)} questions", "fewer ids"))
    if filters.first is not None:
        kept = kept[: filters.first]
    if filters.sample is not None:
        n, seed = filters.sample.n, filters.sample.seed
        if n > len(kept) and not found:
            found.append(Fault(where, "filters.sample.n", f"{n} of {len(kept)} questions", f"at most {len(kept)}"))
        kept = _sample(kept, n, seed)
    faults += found
    return kept


_LOOKED_AT: dict[str, Callable[[Question], Any]] = {
    "years": lambda question: question.year,
    "sections": lambda question: question.facts.section,
    "categories": lambda question: question.facts.category,
    "text_only": lambda question: question.text_only,
    "choices": lambda question: len(question.choices),
    "answers": lambda question: len(question.gold),
    "items": lambda question: question.problem_id,
}
"""What a filter looks at in a question, in the order in which filters are applied."""
_MOST_VALUES = 12


def _emptied(where: str, key: str, wanted: Any, questions: list[Question]) -> Fault:
    """The filter that keeps none of these questions, with what they have."""
    here = sorted({value for question in questions if (value := _LOOKED_AT[key](question)) not in (None, "")})
    told = ("one of " if len(here) > 1 else "") + ", ".join(map(_written, here))
    if not 0 < len(here) <= _MOST_VALUES:
        told = "what keeps at least one"
    return Fault(where, f"filters.{key}", f"{_written(wanted):.60} keeps none of {len(questions)} questions", told)


def _written(value: Any) -> str:
    """As in a configuration: `true`, `[2018, 2019]`, `A`."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
