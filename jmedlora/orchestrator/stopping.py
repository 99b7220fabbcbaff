"""Stopping with grace: the driver leaves a marker in storage, and trials, workers and evaluations look for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from jmedlora.config.clock import now
from jmedlora.data.atomic import write_text
from jmedlora.plan.layout import SweepFolder

LOOK_EVERY_S = 0.5
INTERRUPTED = 130
"""Exit code of what was asked to stop."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopMarker:
    """Whether one start of a driver was asked to stop. A copy of it, in another process, sees the same."""

    def __init__(self, folder: SweepFolder, attempt: str):
        self._path = folder.stop_marker(attempt)
        self._is_set = False
        self._looked = float("-inf")

    def set(self) -> None:
        """Asks everybody to stop."""
        self._is_set = True
        write_text(self._path, f"{now()}\n")

    def is_set(self) -> bool:
        """Looks into storage twice a second at most."""
        if not self._is_set and time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._looked = time.monotonic()
            self._is_set = self._path.exists()
        return self._is_set

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class _Early:
    """Signals that came before `graceful` was there to answer them."""

    count = 0


def interruptible() -> None:
    """From here on SIGINT and SIGTERM raise KeyboardInterrupt, and the second of them ends the process at once."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        _Early.count += 1
        if _Early.count > 1:
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    for number in _SIGNALS:
        signal.signal(number, on_signal)


def check_interrupts() -> None:
    """Raises KeyboardInterrupt where one was raised before and something on the way has swallowed it, as libraries do at import."""
    if _Early.count:
        raise KeyboardInterrupt


@contextmanager
def graceful(ask: Callable[[], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM calls `ask`; the next raises KeyboardInterrupt."""
    asked = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        ask()

    previous = {number: signal.signal(number, on_signal) for number in _SIGNALS}
    try:
        check_interrupts()
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
