"""Reading rows from files, with file and line at hand for whoever has to mend them."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jmedlora.config.benchmark import BenchmarkConfig
from jmedlora.config.data import DataConfig
from jmedlora.config.faults import Fault, first_line
from jmedlora.config.locate import bundled_file

MAX_FAULTS_PER_FILE = 20

_WORKBOOKS = (".xlsx", ".xls", ".xlsm", ".ods")
_SEPARATORS = (",", ";", "\t")
_KNOWN_COLUMNS = {
    *("problem_id", "problem_text", "choices", "choice_a", "choice_b", "text_only", "answer", "points", "section", "category"),
    *("instruction", "input", "output"),
    *("prediction",),
}
"""Columns that some reader of rows knows: enough of them to tell what stands between the cells of a header."""

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 60
_SHOWN.maxlist = 10


@dataclass(frozen=True)
class Columns:
    """What the header of a table must have."""

    needed: tuple[tuple[str, ...], ...]
    """Of each entry one name."""
    told: str
    """The same, for whoever has to mend the file."""


class NotHereYet(Exception):
    """A named source that has not been fetched, generated or brought; the message says where it is looked for."""


def place_of(part: BenchmarkConfig | DataConfig, sources: Path) -> Path:
    """The file or folder that a benchmark or training set is read from, whether or not it is there yet."""
    if part.path is not None:
        return Path(part.path)
    if part.bundled is not None:
        return bundled_file(part.bundled)
    assert part.source is not None
    return sources / ("benchmarks" if isinstance(part, BenchmarkConfig) else "data") / part.source.name


def kind_of(path: Path) -> Literal["file", "folder", ""]:
    """What stands at `path`; empty for nothing, also where nothing could be (a name that is too long)."""
    try:
        return "folder" if path.is_dir() else "file" if path.is_file() else ""
    except OSError:
        return ""


def is_table(path: Path) -> bool:
    """True for CSV, whose cells are all texts."""
    return path.suffix.lower() in (".csv", ".tsv")


def read_rows(path: Path, faults: list[Fault], columns: Columns | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields a file's rows with their places; which format it is, its ending says.

    `.csv` and `.tsv`: (`file:line`, row) with texts alone, the line being the one where the row begins; `.parquet`:
    (`file[position]`, row); else JSON Lines: (`file:line`, row), or a JSON list: (`file[position]`, row). Blank lines, and CSV
    rows of empty cells, are skipped. What is not a row becomes a fault, at most 20 a file.

    A table's header without the `columns` that it must have is one fault, not one a row.
    """
    if kind_of(path) == "folder":
        faults.append(Fault(str(path), "", "a folder", "the files in it"))
        return
    if path.suffix.lower() in _WORKBOOKS and kind_of(path):
        faults.append(Fault(str(path), "", "an Excel workbook: save it as `CSV UTF-8`"))
        return
    if path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path, faults)
        return
    text = _text_of(path, faults)
    if text is None:
        return
    if is_table(path):
        yield from _csv_rows(str(path), text, faults, columns)
    elif text.lstrip().startswith("["):
        yield from _listed_rows(str(path), text, faults)
    else:
        yield from _json_lines(str(path), text, faults)


def add_fault(faults: list[Fault], start: int, fault: Fault) -> bool:
    """Appends a row's fault; after 20 since `start`, says that there may be more and returns False."""
    faults.append(fault)
    if len(faults) - start >= MAX_FAULTS_PER_FILE:
        file = re.sub(r"(:\d+|\[\d+\])$", "", fault.where)
        faults.append(Fault(file, "", f"stopped after {MAX_FAULTS_PER_FILE} faults; there may be more"))
        return False
    return True


def shown(value: Any) -> str:
    """A value as told in a fault: short, whatever its size or depth."""
    return f"{_SHOWN.repr(value):.60}"


def _text_of(path: Path, faults: list[Fault]) -> str | None:
    """The file's text without a byte order mark, or None with a fault."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        faults.append(Fault(str(path), "", f"cannot be read: {_reason(error)}", "a UTF-8 file of rows"))
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        allowed = "a UTF-8 file (in Excel: save as `CSV UTF-8`)" if is_table(path) else "a UTF-8 file"
        faults.append(Fault(f"{path}:{line}", "", f"not UTF-8{_likely_encoding(content)}", allowed))
        return None


def _likely_encoding(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return ": it begins like UTF-16"
    try:
        content.decode("cp932")
    except UnicodeDecodeError:
        return ""
    return ": it reads as cp932 (Shift_JIS)"


def _json_lines(name: str, text: str, faults: list[Fault]) -> Iterator[tuple[str, dict[str, Any]]]:
    start = len(faults)
    for number, line in enumerate(text.split("\n"), start=1):  # a line of JSON may hold other separators, such as U+2028
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not add_fault(faults, start, Fault(where, "", _not_json(error), "a JSON object a line")):
                return
            continue
        if isinstance(item, dict):
            yield where, item
        elif not add_fault(faults, start, Fault(where, "", "not an object", "a JSON object a line")):
            return


def _listed_rows(name: str, text: str, faults: list[Fault]) -> Iterator[tuple[str, dict[str, Any]]]:
    start = len(faults)
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _is_first_line(text, error):
            yield from _json_lines(name, text, faults)
            return
        line_number = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        faults.append(Fault(f"{name}{line_number}", "", _not_json(error), "a JSON list of objects, or an object a line"))
        return
    for position, item in enumerate(items):
        where = f"{name}[{position}]"
        if isinstance(item, dict):
            yield where, item
        elif not add_fault(faults, start, Fault(where, "", "not an object", "a JSON object")):
            return


def _is_first_line(text: str, error: Exception) -> bool:
    """Whether the list that a file begins with is only its first line, so that the file is JSON Lines."""
    if not (isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"):
        return False
    head = text[: error.pos].lstrip()
    return "\n" in head and "\n" not in head.rstrip()


def _csv_rows(name: str, text: str, faults: list[Fault], columns: Columns | None) -> Iterator[tuple[str, dict[str, Any]]]:
    start = len(faults)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=_separator_of(text))
    header: list[str] | None = None
    before = 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            where, before = f"{name}:{before + 1}", reader.line_num
            told = Fault(where, "", f"not CSV: {error}", "CSV with quotes around cells that need them")
            if not add_fault(faults, start, told) or header is None:
                return
            continue
        where, before = f"{name}:{before + 1}", reader.line_num
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if twice := sorted({column for column in header if column and header.count(column) > 1}):
                faults.append(Fault(where, twice[0], "two columns of this name", "each column once"))
                return
            if columns and not all(any(name in header for name in names) for names in columns.needed):
                faults.append(Fault(where, "header", f"the columns {_cut(', '.join(header))}", columns.told))
                return
        elif len(cells) < len(header) or any(cell.strip() for cell in cells[len(header) :]):
            problem = f"{len(cells)} cells under {len(header)} columns"
            if not add_fault(faults, start, Fault(where, "", problem, "a cell for every column")):
                return
        else:
            yield where, {column: cell for column, cell in zip(header, cells) if column}


def _separator_of(text: str) -> str:
    """What parts the header into the most columns that are known; a comma where nothing does.

    A spreadsheet writes semicolons where commas stand in numbers. Guessing from all rows would take a question's text for columns.
    """
    found = re.search(r"[^\s,;\"][^\r\n]*", text)
    header = found.group() if found else ""
    return max(_SEPARATORS, key=lambda sign: sum(cell.strip(' "') in _KNOWN_COLUMNS for cell in header.split(sign)))


def _cut(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _parquet_rows(path: Path, faults: list[Fault]) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import ArrowException  # slow to import, and most files are not Parquet
    from pyarrow.parquet import read_table

    try:
        with path.open("rb") as file:
            rows = read_table(file).to_pylist()
    except (ArrowException, OSError, ValueError, TypeError) as error:
        faults.append(Fault(str(path), "", f"cannot be read: {_reason(error)}", "a Parquet file"))
        return
    for position, row in enumerate(rows):
        yield f"{path}[{position}]", row


def _reason(error: Exception) -> str:
    """Why a file cannot be read; the system's own message would name the path once more."""
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def _not_json(error: Exception) -> str:
    return f"not JSON: {error.msg if isinstance(error, json.JSONDecodeError) else error}"
