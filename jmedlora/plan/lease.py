"""Who trains a run: at most one worker group at a time, also where several sweeps share the run."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from jmedlora.config.clock import now
from jmedlora.plan.layout import RunFolder

WAIT_S = 60.0
"""How long to wait for a lease: what a killed worker group needs until its last process is gone."""
_POLL_S = 0.2


class RunHeld(Exception):
    """Another living worker group trains the run; the message says which."""


@contextmanager
def run_lease(folder: RunFolder, gives_up: Callable[[], bool] = lambda: False, wait_s: float = WAIT_S) -> Iterator[None]:
    """Holds a run for this process, by an operating-system lock on lease.json: it ends with the process, however that ends.

    Raises RunHeld when somebody else still holds it after `wait_s` seconds, or as soon as `gives_up` says so.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.lease.open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + wait_s
        while not _lock(file, fcntl.LOCK_EX):
            if time.monotonic() >= deadline or gives_up():
                raise RunHeld(_holder(file))
            time.sleep(_POLL_S)
        _tell(file, {"process": os.getpid(), "host": socket.gethostname(), "since": now()})
        yield
        _tell(file, None)


def is_held(folder: RunFolder) -> bool:
    """True while a living process holds the run."""
    try:
        with folder.lease.open(encoding="utf-8") as file:
            return not _lock(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _tell(file: IO[str], holder: dict[str, object] | None) -> None:
    """For people who look; the lock holds without it, so that a full disk does no harm."""
    with suppress(OSError):
        os.ftruncate(file.fileno(), 0)
        if holder:
            os.write(file.fileno(), json.dumps(holder).encode())


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        told = json.load(file)
        return f"trained by process {told['process']} on {told['host']}"
    except (ValueError, KeyError, TypeError):
        return "trained by a process that has just begun"
