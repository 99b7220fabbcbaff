"""Errors that cross from one process to another, each in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from jmedlora.config.faults import BadInput

_MODULE = re.compile(r"^(?:\w+\.)+(?=\w+: )")


class Refused(Exception):
    """Bad input that only a worker could meet, as one line of text, which Ray carries over whole."""


@contextmanager
def refusals() -> Iterator[None]:
    """Turns BadInput into Refused, its faults in one line."""
    try:
        yield
    except BadInput as bad:
        raise Refused("; ".join(str(fault) for fault in bad.faults)) from None


def told(error: BaseException) -> str:
    """An error in one line: its type, unless the message speaks for itself, and what it says."""
    text = " ".join(str(error).split())
    if isinstance(error, Refused):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def last_line(error: BaseException | None) -> str:
    """What an error says in its last line, which is the cause where a traceback stands before it; without the type's module."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _MODULE.sub("", lines[-1]).removeprefix(f"{Refused.__name__}: ") if lines else type(error).__name__


def is_refusal(error: BaseException) -> bool:
    """True for bad input that a worker met: trying again meets it again."""
    return f"{Refused.__name__}: " in str(error)


def is_told_by(why: str, errors: list[str]) -> bool:
    """True where one of `errors` gives the same cause, be it with its type before it or with the last line alone."""
    return any(error and (error.endswith(why) or why.endswith(error)) for error in errors)
