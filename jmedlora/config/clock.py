"""The only place that asks what time it is, so that a test can move the clock."""

from __future__ import annotations

import time


def now() -> float:
    """Seconds since the epoch."""
    return time.time()
