"""Letters of choices, as people write them: `a`, `a,c`, `ac`, `Ａ`, `["a", "c"]`, `a or d`."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from jmedlora.data.rows import LETTERS

_SEPARATORS = re.compile(r"[\s,、・;/]+")
_EITHER = re.compile(r"\s+or\s+")


def half_width(text: str) -> str:
    """A letter or number in half width and lower case, without blanks around it."""
    return unicodedata.normalize("NFKC", text).strip().lower()


def letters_in(text: str) -> list[str]:
    """The letters of `a,c`, `a c` or `ac`; what is not a letter of a choice is returned as it is, for the caller to refuse."""
    found: list[str] = []
    for part in _SEPARATORS.split(half_width(text)):
        found += list(part) if all(letter in LETTERS for letter in part) else [part]
    return found


def alternatives_of(entries: Sequence[str]) -> list[list[str]]:
    """The sets of letters that count as right: of `["a or d"]` there are two; anything else is one set.

    Entries that are nothing but separators are dropped: JJSIMQA has a row with a comma among its letters.
    """
    if len(entries) == 1 and len(parts := _EITHER.split(half_width(entries[0]))) > 1:
        return [letters_in(part) for part in parts]
    return [[letter for letter in map(half_width, entries) if _SEPARATORS.sub("", letter)]]


def answer_entries(cell: str, has_choices: bool) -> Any:
    """The entries of an answer that is one text: `a`, `a,c`, `ac`, a list, or the number of a question without choices."""
    if (listed := listed_texts(cell)) is not None:
        return listed
    return [cell.strip()] if not has_choices or _EITHER.search(half_width(cell)) else letters_in(cell)


def choices_in(cell: str) -> Any | None:
    """The choices that stand in one cell: a list, or texts parted by line breaks or by `|`; None where it is none of these.

    Commas part nothing outside brackets, and a cell with line breaks and bars can be read in two ways.
    """
    if (listed := listed_texts(cell)) is not None:
        return listed
    found = [parts for sign in (r"\r\n|\r|\n", r"[|｜]") if len(parts := re.split(sign, cell.strip())) > 1]
    return [part.strip() for part in found[0]] if len(found) == 1 else None


def listed_texts(cell: str) -> Any | None:
    """The list that stands in one cell, or None where none does.

    It may be JSON, a Python list, or texts without quotes in brackets, `[text,text]`, which are parted at their commas.
    """
    cell = cell.strip()
    if not (cell.startswith("[") and cell.endswith("]")):
        return None
    inner = cell[1:-1].strip()
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return _python_texts(inner) if inner.startswith(("'", '"')) else [part.strip() for part in inner.split(",")]
    if value and not any(isinstance(item, str | list | dict) for item in value):
        return [part.strip() for part in inner.split(",")]  # numbers without quotes are texts as they stand
    return value


_PYTHON_TEXT = re.compile(r"""'((?:[^'\\]|\\['\\])*)'|"((?:[^"\\]|\\["\\])*)\"""")


def _python_texts(inner: str) -> list[str] | None:
    """The texts of a Python list such as `'a', "b's"`, or None where it is not one (a comma is missing, an escape is unknown)."""
    texts, at = [], 0
    while found := _PYTHON_TEXT.match(inner, at):
        texts.append(re.sub(r"\\(.)", r"\1", found.group(1) if found.group(1) is not None else found.group(2)))
        at = found.end()
        if at == len(inner):
            return texts
        if not (comma := re.compile(r"\s*,\s*").match(inner, at)):
            return None
        at = comma.end()
    return None
