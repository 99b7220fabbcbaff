"""Reading JSON rows with file and line at hand for whoever has to mend them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from jmedlora.config.faults import Fault
from jmedlora.config.locate import bundled_file

MAX_FAULTS_PER_FILE = 20


class NotHereYet(Exception):
    """A named source that has not been fetched, generated or brought; the message says where it is looked for."""


def locate_source(path: str | None, bundled: str | None, named: Path | None) -> Path:
    """The one of the three ways of naming a source that is used, as a path."""
    if path is not None:
        return Path(path)
    if bundled is not None:
        return bundled_file(bundled)
    assert named is not None
    return named


def kind_of(path: Path) -> Literal["file", "folder", ""]:
    """What stands at `path`; empty for nothing, also where nothing could be (a name that is too long)."""
    try:
        return "folder" if path.is_dir() else "file" if path.is_file() else ""
    except OSError:
        return ""


def read_rows(path: Path, faults: list[Fault]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (`file:line`, row) of a JSON Lines file, or (`file[position]`, row) of a JSON list; blank lines are skipped.

    What is not a JSON object becomes a fault, at most 20 a file.
    """
    name = str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        faults.append(Fault(name, "", f"cannot be read: {error}", "a UTF-8 file of JSON rows"))
        return
    start = len(faults)
    if text.lstrip().startswith("["):
        try:
            items: list[tuple[str, Any]] = [(f"{name}[{i}]", item) for i, item in enumerate(json.loads(text))]
        except (ValueError, RecursionError) as error:
            line_number = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            faults.append(Fault(f"{name}{line_number}", "", _not_json(error), "a JSON list of objects, or an object a line"))
            return
        for where, item in items:
            if isinstance(item, dict):
                yield where, item
            elif not add_fault(faults, start, Fault(where, "", "not an object", "a JSON object")):
                return
        return
    for number, line in enumerate(text.split("\n"), start=1):
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


def _not_json(error: Exception) -> str:
    return f"not JSON: {error.msg if isinstance(error, json.JSONDecodeError) else error}"


def add_fault(faults: list[Fault], start: int, fault: Fault) -> bool:
    """Appends a row's fault; after 20 since `start`, says that there may be more and returns False."""
    faults.append(fault)
    if len(faults) - start >= MAX_FAULTS_PER_FILE:
        faults.append(Fault(fault.where.rsplit(":", 1)[0], "", f"stopped after {MAX_FAULTS_PER_FILE} faults; there may be more"))
        return False
    return True
