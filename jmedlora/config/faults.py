"""Bad input, told in one line per fault."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One mistake in what the user gave.

    where: the file (with `:line` for a data file) or `command line`.
    key: the dotted key, empty where a whole file is meant.
    problem: the value that was found and what is wrong with it.
    allowed: what would be accepted, empty where `problem` says it already.
    """

    where: str
    key: str
    problem: str
    allowed: str = ""

    def __str__(self) -> str:
        head = f"{self.where}: {self.key}: {self.problem}" if self.key else f"{self.where}: {self.problem}"
        line = f"{head}; allowed: {self.allowed}" if self.allowed else head
        return " ".join(line.split())


class BadInput(Exception):
    """Raised before anything is started or written; the command line prints it and exits with 2."""

    def __init__(self, faults: list[Fault]):
        if not faults:
            raise ValueError("BadInput needs at least one fault")
        self.faults = list(dict.fromkeys(faults))
        super().__init__("\n".join(str(fault) for fault in self.faults))

    def __reduce__(self) -> tuple[type[BadInput], tuple[list[Fault]]]:
        return BadInput, (self.faults,)  # an exception is copied with its message otherwise, also between processes


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """True where a GPU, or the machine, had no memory left; told by the error's type and text, since it may come from elsewhere."""
    told = f"{type(error).__name__}: {error}"
    return any(sign in told for sign in ("OutOfMemoryError", "MemoryError", "out of memory", "can't allocate memory"))
