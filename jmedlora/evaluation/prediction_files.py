"""Files of predictions made elsewhere: lines {problem_id, prediction: "a,c"} (or ["a", "c"]) of one system."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from jmedlora.config.faults import BadInput, Fault
from jmedlora.data.files import Columns, add_fault, read_rows, shown
from jmedlora.data.rows import LETTERS, Question, is_unicode
from jmedlora.evaluation.letters import exact_value, parse_letters, parse_value

_COLUMNS = Columns((("problem_id",), ("prediction",)), "the columns problem_id, prediction")


@dataclass(frozen=True)
class Predictions:
    """What one system answered, by problem_id, over all files."""

    texts: dict[str, str]
    duplicate: list[str]
    """Ids with more than one line: the first line counts, as it would on paper."""


@dataclass(frozen=True)
class Answers:
    """Predictions as the exam takes them, by problem_id; what is in none of the two is wrong."""

    chosen: dict[str, tuple[int, ...]]
    values: dict[str, Decimal]
    blank: list[str]
    """Ids whose prediction is an empty text."""
    unreadable: list[str]
    """Ids whose prediction is neither letters of the question's choices nor, where there are none, a number."""


def read_prediction_files(paths: Sequence[Path]) -> Predictions:
    """Reads files of one system, which need not be complete; raises BadInput with a fault for every bad line, at most 20 a file."""
    texts: dict[str, str] = {}
    duplicate: dict[str, None] = {}
    faults: list[Fault] = []
    for path in paths:
        start, rows = len(faults), 0
        for where, row in read_rows(path, faults, _COLUMNS):
            rows += 1
            found = _faults_of(where, row)
            if found:
                if not all(add_fault(faults, start, fault) for fault in found):
                    break
                continue
            problem_id = row["problem_id"]
            if problem_id in texts:
                duplicate[problem_id] = None
            texts.setdefault(problem_id, _as_text(row["prediction"]))
        if not rows and len(faults) == start:
            faults.append(Fault(str(path), "", "no predictions", 'lines such as {"problem_id": "112A1", "prediction": "a,c"}'))
    if faults:
        raise BadInput(faults)
    return Predictions(texts, list(duplicate))


def _faults_of(where: str, row: Mapping[str, Any]) -> list[Fault]:
    faults = []
    told = 'a text such as a or a,c (empty for no answer), or a list of letters such as ["a"]'
    for key, allowed in (("problem_id", "a text that is not empty"), ("prediction", told)):
        value = row.get(key)
        if key == "prediction" and isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            value = _as_text(value)
        if key not in row:
            faults.append(Fault(where, key, "missing", allowed))
        elif not isinstance(value, str) or (key == "problem_id" and not value.strip()):
            faults.append(Fault(where, key, f"{shown(value)} is not allowed", allowed))
        elif not is_unicode(value):
            faults.append(Fault(where, key, f"{shown(value)} is not valid Unicode text"))
    return faults


def _as_text(prediction: str | list[str]) -> str:
    """A list's letters as they would stand in one text."""
    return prediction if isinstance(prediction, str) else ",".join(entry.strip() for entry in prediction)


def read_answers(predictions: Predictions, questions: Sequence[Question], parse: bool = False) -> Answers:
    """The predictions to these questions, read as letters or numbers.

    As published results are read: letters joined by commas and nothing else (`a,c`; full width and capitals are folded), or
    a number alone. So `a, c` with a blank names nothing, as in IgakuQA's own script, and is among the unreadable.
    With `parse`, answers are looked for in running text instead; see `letters.parse_letters` and `letters.parse_value`.
    """
    chosen: dict[str, tuple[int, ...]] = {}
    values: dict[str, Decimal] = {}
    blank, unreadable = [], []
    for question in questions:
        text = predictions.texts.get(question.problem_id)
        if text is None:
            continue
        if not text.strip():
            blank.append(question.problem_id)
        elif question.choices:
            positions = parse_letters(text, len(question.choices), len(question.gold)) if parse else _joined_letters(text, question)
            if positions:
                chosen[question.problem_id] = positions
            else:
                unreadable.append(question.problem_id)
        else:
            value = parse_value(text) if parse else exact_value(text)
            if value is not None:
                values[question.problem_id] = value
            else:
                unreadable.append(question.problem_id)
    return Answers(chosen, values, blank, unreadable)


def _joined_letters(text: str, question: Question) -> tuple[int, ...]:
    letters = unicodedata.normalize("NFKC", text).casefold().split(",")
    allowed = LETTERS[: len(question.choices)]
    if len(set(letters)) < len(letters) or not all(len(letter) == 1 and letter in allowed for letter in letters):
        return ()
    return tuple(sorted(allowed.index(letter) for letter in letters))
