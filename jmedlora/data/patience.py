"""Waiting for room on a full disk: somebody may make some, and who waits loses nothing."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

WAIT_FOR_SPACE_S = 600.0
"""Less than what the other workers of a trial wait for this one."""
TRY_EVERY_S = 2.0
_FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


def when_there_is_room(write: Callable[[], T], what: str, tell: Callable[[str], None] = log.warning) -> T:
    """The result of `write`, which is tried again while the disk is full; it must leave nothing behind when it fails.

    what: what is written, for the log; tell: takes one line about a wait that is over.
    Raises the OSError when there is still no room after WAIT_FOR_SPACE_S seconds.
    """
    started = time.monotonic()
    is_waiting = False
    while True:
        try:
            done = write()
        except OSError as error:
            waited = time.monotonic() - started
            if error.errno not in _FULL or waited >= WAIT_FOR_SPACE_S:
                raise
            if not is_waiting:
                log.warning("the disk is full: %s is written as soon as there is room (%s)", what, error)
            is_waiting = True
            time.sleep(TRY_EVERY_S)
            continue
        if is_waiting:
            tell(f"{what}: the disk was full, written after {time.monotonic() - started:.0f} s")
        return done
