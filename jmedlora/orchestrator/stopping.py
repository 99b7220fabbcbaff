"""Stopping with grace: the driver leaves a marker in storage, and trials, workers and evaluations look for it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from jmedlora.config.clock import now
from jmedlora.data.atomic import write_text
from jmedlora.plan.layout import SweepFolder

LOOK_EVERY_S = 0.5
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
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
