"""What is told when MLflow does not do what it is asked."""

from __future__ import annotations

import re
from datetime import datetime

from jmedlora.config.faults import first_line

_LENGTH = 400  # characters
_USER_INFO = re.compile(r"//[^/@\s]+@")


class NotTracked(Exception):
    """MLflow could not be written; the message says why, in one line without what an address may hold of passwords."""


def told(error: BaseException) -> str:
    """The kind of an error and the beginning of its message, in one line, without user names and passwords of addresses."""
    return f"{type(error).__name__}: {_USER_INFO.sub('//', first_line(error))}"[:_LENGTH]


def remedy(sweep: str) -> str:
    """What to do about what MLflow has missed."""
    return f"nothing is lost: `jmedlora report {sweep} --rebuild-mlflow` delivers it from storage"


def clock_time(seconds: float) -> str:
    """Seconds since the epoch as a time of day, here."""
    return datetime.fromtimestamp(seconds).strftime("%H:%M:%S")
