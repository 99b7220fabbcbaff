"""What IgakuQA keeps beside a section of the exam: `_metadata` (category, prohibited choices, human accuracy) and `_translate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jmedlora.config.faults import Fault
from jmedlora.data.files import add_fault, kind_of, read_rows, shown
from jmedlora.data.letters import half_width
from jmedlora.data.questions import prohibited_positions
from jmedlora.data.rows import LETTERS, Question, QuestionFacts, is_unicode

SUFFIXES = ("_metadata", "_translate")

_Reader = Callable[[str, dict[str, Any], Question, list[Fault], list[str]], QuestionFacts]


def with_facts(file: Path, questions: list[Question], faults: list[Fault], notes: list[str]) -> list[Question]:
    """The questions of one file with the facts that stand beside it; a side file that is not there leaves them as they are.

    A damaged row is a fault with its file and line. A row about a question that the file does not have is left aside, and told in
    `notes`: people cut sections short.
    """
    by_id = {question.problem_id: question for question in questions}
    for suffix, reader in zip(SUFFIXES, (_metadata, _translation)):
        side = file.with_name(f"{file.stem}{suffix}.jsonl")
        if kind_of(side) == "file":
            _add(side, reader, by_id, faults, notes)
    return list(by_id.values())


def _add(side: Path, reader: _Reader, by_id: dict[str, Question], faults: list[Fault], notes: list[str]) -> None:
    start = len(faults)
    seen: dict[str, str] = {}
    for where, row in read_rows(side, faults):
        found: list[Fault] = []
        problem_id = row.get("problem_id")
        if not isinstance(problem_id, str):
            found.append(Fault(where, "problem_id", shown(problem_id) + " is not allowed", "the id of a question"))
        elif problem_id in seen:
            found.append(Fault(where, "problem_id", f"{shown(problem_id)} stands at {seen[problem_id]} already", "each id once"))
        elif problem_id not in by_id:
            notes.append(f"{where}: {shown(problem_id)} is not among the questions; left aside")
        else:
            question = by_id[problem_id]
            facts = reader(where, row, question, found, notes)
            by_id[problem_id] = replace(question, facts=facts)
        if isinstance(problem_id, str):
            seen.setdefault(problem_id, where)
        if any(not add_fault(faults, start, fault) for fault in found):
            return


def _metadata(where: str, row: dict[str, Any], question: Question, faults: list[Fault], notes: list[str]) -> QuestionFacts:
    category = row.get("category", "")
    if not isinstance(category, str) or not is_unicode(category):
        faults.append(Fault(where, "category", f"{shown(category)} is not allowed", "a text"))
        category = ""
    kinki = row.get("kinki", [])
    prohibited: tuple[int, ...] = ()
    if not isinstance(kinki, list) or not all(isinstance(entry, str) for entry in kinki):
        faults.append(Fault(where, "kinki", f"{shown(kinki)} is not allowed", "a list of letters"))
    elif kinki:
        prohibited = prohibited_positions(where, kinki, len(question.choices), faults)
        if any(len(entry.strip()) != 1 or not entry.strip().isascii() for entry in kinki):
            notes.append(f"{where}: kinki: {shown(kinki)} is read as {', '.join(LETTERS[i] for i in prohibited)}")
    accuracy = _share(where, row.get("human_accuracy", ""), faults)
    return replace(question.facts, category=category.strip() or question.facts.category, prohibited=prohibited, human_accuracy=accuracy)


def _share(where: str, value: Any, faults: list[Fault]) -> float | None:
    """A percentage as a share; upstream it is a text, and empty where it is not known."""
    if value is None or value == "":
        return None
    try:
        number = float(half_width(value).removesuffix("%")) if isinstance(value, str) else value
        if isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= 100:
            return number / 100
    except ValueError:
        pass
    faults.append(Fault(where, "human_accuracy", f"{shown(value)} is not allowed", "a percentage, or an empty text"))
    return None


def _translation(where: str, row: dict[str, Any], question: Question, faults: list[Fault], notes: list[str]) -> QuestionFacts:
    text, choices = row.get("problem_text_en"), row.get("choices_en")
    if not isinstance(text, str) or not is_unicode(text):
        faults.append(Fault(where, "problem_text_en", f"{shown(text)} is not allowed", "a text"))
    if not isinstance(choices, list) or not all(isinstance(choice, str) and is_unicode(choice) for choice in choices):
        faults.append(Fault(where, "choices_en", f"{shown(choices)} is not allowed", "a list of texts"))
    if faults:
        return question.facts
    assert isinstance(text, str)
    assert isinstance(choices, list)
    if not text.strip() or len(choices) != len(question.choices):
        notes.append(f"{where}: a translation with {len(choices)} choices of {len(question.choices)}; left aside")
        return question.facts
    return replace(question.facts, question_en=text.strip(), choices_en=tuple(choice.strip() for choice in choices))
