"""One row of a question set, in any of its shapes, as a question."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeGuard

from jmedlora.config.faults import Fault
from jmedlora.data.files import Columns, shown
from jmedlora.data.letters import alternatives_of, answer_entries, choices_in, half_width, letters_in
from jmedlora.data.rows import LETTERS, Question, QuestionFacts, is_unicode

FIRST_EXAM_YEAR = 1906
"""The exam's number plus this is its year: the 112th was held in 2018."""
MAX_POINTS = 1_000_000
NUMBERED = re.compile(r"(\d{3})([A-Z])\d+")
"""Ids of the national exam: its number, the section's letter, the question's number."""
QUESTION_COLUMNS = Columns(
    (("problem_id",), ("problem_text",), ("choice_a", "choices"), ("answer",)),
    f"the columns problem_id, problem_text, choice_a ... choice_{LETTERS[-1]} (or choices), answer",
)
_CHOICE_COLUMNS = [f"choice_{letter}" for letter in LETTERS]
_FLAGS = {"true": True, "1": True, "false": False, "0": False}
_JMEDBENCH_KEYS = {"problem_id": "sample_id", "problem_text": "question", "choices": "options", "answer": "answer_idx"}


# ---------------------------------------------------------------- shapes of rows


def from_cells(where: str, row: dict[str, str], faults: list[Fault]) -> dict[str, Any]:
    """A CSV row in the shape of a JSON row: empty cells are left out, choices and flags are read.

    Choices are a list in one cell (`choices`), or stand in columns `choice_a` to `choice_j`; both at once are a fault.
    """
    given: dict[str, Any] = {key: cell.strip() for key, cell in row.items() if cell.strip() and key not in _CHOICE_COLUMNS}
    columns = [row.get(key, "").strip() for key in _CHOICE_COLUMNS]
    while columns and not columns[-1]:
        columns.pop()
    if "choices" in given:
        found = choices_in(given["choices"])
        if found is None:
            allowed = f"columns choice_a ... choice_{LETTERS[-1]}, or texts parted by line breaks or by | alone"
            faults.append(Fault(where, "choices", _found(given, "choices"), allowed))
        given["choices"] = [] if found is None else found  # told already
        if columns:
            faults.append(Fault(where, "choice_a", "given together with choices", "choices, or columns choice_a to choice_j"))
    elif columns or "choices" in row or "choice_a" in row:
        given["choices"] = columns
    if "text_only" in given:
        given["text_only"] = _FLAGS.get(given["text_only"].lower(), given["text_only"])
    return given


def parse_jmedbench(where: str, row: dict[str, Any], faults: list[Fault], notes: list[str]) -> Question | None:
    """One row of a JMedBench question set (`sample_id`, `question`, `options`, `answer_idx`, `n_options`), as `parse_question` does."""
    found: list[Fault] = []
    own = {key: row[theirs] for key, theirs in _JMEDBENCH_KEYS.items() if theirs in row}
    number, options, place, size = (row.get(key) for key in ("sample_id", "options", "answer_idx", "n_options"))
    if _is_whole(number):
        own["problem_id"] = str(number)
    if isinstance(options, list):
        if not options:
            found.append(Fault(where, "options", "an empty list", f"2 to {len(LETTERS)} texts"))
        if size is not None and (not _is_whole(size) or size != len(options)):
            found.append(Fault(where, "n_options", f"{shown(size)} with {len(options)} options", "the number of options"))
    last = len(options) - 1 if isinstance(options, list) and options else None
    own["answer"] = ["a"]  # what is wrong with the position, or with the options, is told in this format's own terms
    if not _is_whole(place) or place < 0 or (last is not None and place > last):
        allowed = "a position from 0" if last is None else f"a position from 0 to {last}"
        found.append(Fault(where, "answer_idx", _found(row, "answer_idx"), allowed))
    elif place < len(LETTERS):
        own["answer"] = [LETTERS[place]]
    question = parse_question(where, {"points": 1, **own}, None, found, notes)
    faults += [replace(fault, key=_JMEDBENCH_KEYS.get(fault.key, fault.key)) for fault in found]
    return None if found else question


def parse_question(where: str, row: dict[str, Any], year: int | None, faults: list[Fault], notes: list[str]) -> Question | None:
    """One row with IgakuQA's keys as a question, or None with a fault for every key that is wrong.

    A question without choices has no gold positions but a value; of `a or d` both are right. A row that could only be read
    by mending it is told in `notes`. `year` is that of the folder; without it the id tells, where it is one of the exam's.
    """
    found: list[Fault] = []
    problem_id = _text(where, row, "problem_id", found)
    text = _text(where, row, "problem_text", found)
    choices = _choices(where, row, found)
    answer = row.get("answer")
    if isinstance(answer, str) and answer.strip():
        answer = answer_entries(answer, bool(choices))
    if not isinstance(answer, list) or not answer or not all(isinstance(entry, str) for entry in answer):
        found.append(Fault(where, "answer", _found(row, "answer"), 'a list of letters such as ["a"]'))
        answer = None
    elif not all(map(is_unicode, answer)):
        found.append(Fault(where, "answer", f"{shown(answer)} is not valid Unicode text"))
        answer = None
    if not isinstance(row.get("text_only", True), bool):
        found.append(Fault(where, "text_only", _found(row, "text_only"), "true or false"))
    points = _points(where, row, found)
    section, category = (_optional_text(where, row, key, found) for key in ("section", "category"))
    gold: list[tuple[int, ...]] = []
    value = ""
    if answer and choices:
        gold = _positions(where, answer, choices, found)
        if gold and (read := _mended(answer, gold)):
            notes.append(f"{where}: answer: {shown(answer)} is read as {read}")
    elif answer and choices == []:
        value = ",".join(map(half_width, answer))
        if not value.strip(", "):
            found.append(Fault(where, "answer", f"{shown(answer)} is empty", "the value that is asked for, such as a number"))
    faults += found
    if found:
        return None
    notes += [f"{where}: choices: {told}" for told in _odd_choices(choices or [])]
    numbered = NUMBERED.fullmatch(problem_id)
    return Question(
        problem_id,
        text,
        tuple(choices or ()),
        gold[0] if gold else (),
        year if year is not None or numbered is None else int(numbered[1]) + FIRST_EXAM_YEAR,
        row.get("text_only", True),
        tuple(gold[1:]),
        value,
        QuestionFacts(points, section or (numbered[2] if numbered else ""), category),
    )


# ---------------------------------------------------------------- keys


def prohibited_positions(where: str, entries: list[str], choices: int, faults: list[Fault]) -> tuple[int, ...]:
    """Positions of the letters in `kinki`, whose entries upstream are `c`, `ｃ`, ` e` and also `cde`."""
    letters = [letter for entry in entries for letter in letters_in(entry) if letter]
    wrong = [letter for letter in letters if len(letter) != 1 or letter not in LETTERS[:choices]]
    if wrong:
        faults.append(Fault(where, "kinki", f"{shown(entries)} is not among the {choices} choices", "letters of choices"))
        return ()
    return tuple(sorted({LETTERS.index(letter) for letter in letters}))


def _text(where: str, row: dict[str, Any], key: str, faults: list[Fault]) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        faults.append(Fault(where, key, _found(row, key), "a text that is not empty"))
        return ""
    if not is_unicode(value):
        faults.append(Fault(where, key, f"{shown(value)} is not valid Unicode text"))
    return value.strip()


def _optional_text(where: str, row: dict[str, Any], key: str, faults: list[Fault]) -> str:
    return "" if row.get(key) in (None, "") else _text(where, row, key, faults)


def _choices(where: str, row: dict[str, Any], faults: list[Fault]) -> list[str] | None:
    """The choices, trimmed; None where they are wrong. A choice may be blank: the exam has them in its pictures."""
    value = row.get("choices")
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value) or len(value) > len(LETTERS):
        faults.append(Fault(where, "choices", _found(row, "choices"), f"a list of at most {len(LETTERS)} texts"))
        return None
    if len(value) == 1:
        faults.append(Fault(where, "choices", "only one choice", f"2 to {len(LETTERS)} texts, or none"))
        return None
    if not all(map(is_unicode, value)):
        faults.append(Fault(where, "choices", f"{shown(value)} is not valid Unicode text"))
        return None
    return [choice.strip() for choice in value]


def _points(where: str, row: dict[str, Any], faults: list[Fault]) -> int:
    value = row.get("points")
    if value is None:
        return 1
    number: float | None = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and re.fullmatch(r"\d{1,7}(\.0*)?", half_width(value)):
        number = float(half_width(value))
    if number is None or not 0 <= number <= MAX_POINTS or number != int(number):  # NaN is in no range
        faults.append(Fault(where, "points", _found(row, "points"), "a whole number, such as 1 or 3"))
        return 1
    return int(number)


def _positions(where: str, answer: list[str], choices: list[str], faults: list[Fault]) -> list[tuple[int, ...]]:
    """Each set of right letters as positions in ascending order; empty where the answer is wrong."""
    letters = LETTERS[: len(choices)]
    gold = []
    for alternative in alternatives_of(answer):
        if not alternative:
            allowed = f"letters of {letters[0]} to {letters[-1]}"
            faults.append(Fault(where, "answer", f"{shown(answer)} names no choice", allowed))
            return []
        allowed = f"different letters of {letters[0]} to {letters[-1]}"
        if any(len(letter) != 1 or letter not in letters for letter in alternative):
            faults.append(Fault(where, "answer", f"{shown(answer)} is not among the {len(choices)} choices", allowed))
            return []
        if twice := [letter for letter in dict.fromkeys(alternative) if alternative.count(letter) > 1]:
            faults.append(Fault(where, "answer", f"{shown(answer)} has {twice[0]} twice", allowed))
            return []
        gold.append(tuple(sorted(letters.index(letter) for letter in alternative)))
    return gold


def _odd_choices(choices: list[str]) -> Iterator[str]:
    """What is allowed in choices, and seldom meant: the same text twice, a blank one before others."""
    last = max((i for i, choice in enumerate(choices) if choice), default=-1)
    if blank := [LETTERS[i] for i, choice in enumerate(choices[: last + 1]) if not choice]:
        yield f"{', '.join(blank)} {'is' if len(blank) == 1 else 'are'} blank"
    first: dict[str, int] = {}
    for i, choice in enumerate(choices):
        if choice and first.setdefault(choice, i) != i:
            yield f"{LETTERS[i]} is the same as {LETTERS[first[choice]]}"


def _mended(answer: list[str], gold: list[tuple[int, ...]]) -> str:
    """How an answer was read that is not a plain list of letters; empty where it is one."""
    if len(gold) > 1 or sorted(entry.strip() for entry in answer) == [LETTERS[i] for i in gold[0]]:
        return ""
    return ", ".join(LETTERS[i] for i in gold[0])


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _found(row: dict[str, Any], key: str) -> str:
    return f"{shown(row[key])} is not allowed" if key in row else "missing"
