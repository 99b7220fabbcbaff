"""Training sets: instruction rows from JSON files or from exam questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jmedlora.config.data import DataConfig
from jmedlora.config.digest import digest_rows
from jmedlora.config.faults import BadInput, Fault
from jmedlora.data.benchmarks import read_questions
from jmedlora.data.files import Columns, NotHereYet, add_fault, kind_of, place_of, read_rows
from jmedlora.data.rows import Instruction, is_unicode

_COLUMNS = Columns((("instruction",), ("output",)), "the columns instruction, output, and input where there is one")


@dataclass(frozen=True)
class InstructionSet:
    """Rows in the order of the file, and the digest of their content."""

    rows: list[Instruction]
    digest: str


def load_instructions(config: DataConfig, sources: Path) -> InstructionSet:
    """Reads and checks a training set.

    Raises BadInput with a fault per bad row, NotHereYet for a named source that is missing.
    """
    _refuse_question_filters(config)
    path = place_of(config, sources)
    if config.source and not kind_of(path):
        raise NotHereYet(f"data {config.name}: {path}")
    faults: list[Fault] = []
    if config.format == "questions":
        rows = [question.as_instruction() for question in read_questions(path, config.filters, faults)]
    else:
        rows = _read_instructions(path, faults)
        if config.filters.first is not None:
            rows = rows[: config.filters.first]
    if not rows and not faults:
        faults.append(Fault(str(path), "", "no rows", "at least one row"))
    if faults:
        raise BadInput(faults)
    return InstructionSet(rows, digest_rows(row.as_dict() for row in rows))


def _refuse_question_filters(config: DataConfig) -> None:
    if config.format == "questions":
        return
    given = [name for name, value in config.filters if name != "first" and value not in (None, [])]
    if given:
        allowed = "first, or format: questions for exam questions"
        raise BadInput(
            [Fault(f"data {config.name}", f"filters.{name}", "instruction rows have nothing to filter by", allowed) for name in given]
        )


def _read_instructions(path: Path, faults: list[Fault]) -> list[Instruction]:
    if kind_of(path) == "folder":
        faults.append(Fault(str(path), "", "is a folder", "a file of JSON rows (for a folder of exam questions: format: questions)"))
        return []
    rows: list[Instruction] = []
    start = len(faults)
    for where, row in read_rows(path, faults, _COLUMNS):
        found = _row_faults(where, row)
        if not found:
            rows.append(Instruction(row["instruction"].strip(), (row.get("input") or "").strip(), row["output"].strip()))
        elif any(not add_fault(faults, start, fault) for fault in found):
            break
    return rows


def _row_faults(where: str, row: dict[str, Any]) -> list[Fault]:
    found = []
    for key in ("instruction", "output"):
        if key not in row:
            found.append(Fault(where, key, "missing", "a text that is not empty"))
        elif not isinstance(row[key], str) or not row[key].strip():
            found.append(Fault(where, key, f"{row[key]!r:.60} is not allowed", "a text that is not empty"))
        elif not is_unicode(row[key]):
            found.append(Fault(where, key, f"{row[key]!r:.60} is not valid Unicode text"))
    if row.get("input") is not None and not isinstance(row["input"], str):
        found.append(Fault(where, "input", f"{row['input']!r:.60} is not allowed", "a text, or left out"))
    elif row.get("input") and not is_unicode(row["input"]):
        found.append(Fault(where, "input", f"{row['input']!r:.60} is not valid Unicode text"))
    return found
