"""Who drives a sweep whose storage is an object store: one object per holder, created only where there is none.

`driver-000007.json` is the seventh holding of a sweep. Whoever creates it holds the sweep, until a `driver-000008.json` is there;
that may be created once the seventh is released, or has not been renewed for as long as it says itself. The newest is never removed,
so that what a process that was paused for a while writes late is older than what counts.
Time is the store's own: how much younger an object is that was written just now. A machine's clock decides nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from jmedlora.config.clock import now
from jmedlora.orchestrator.ledger import HeldByAnother
from jmedlora.orchestrator.lock_objects import (
    EXPIRES_S,
    REQUEST_S,
    Holder,
    LockObjects,
    StoreUnusable,
    is_final,
    is_refusal,
    patiently,
    told_of,
)

log = logging.getLogger(__name__)

PATIENCE_S = 30.0
"""How long a store may be busy or silent before it counts as unreachable."""
_RESOLUTION_S = 1.0
"""Stores tell whole seconds."""
_WHY_S = 5.0


class _Lost(Exception):
    """The sweep is no longer held; the message says why."""


@contextmanager
def object_lock(
    ledger: str, on_lost: Callable[[str], None], *, expires_s: float = EXPIRES_S, patience_s: float = PATIENCE_S
) -> Iterator[None]:
    """Holds a sweep for this process, renewed by a thread; a killed holder is succeeded after `expires_s` seconds.

    `ledger`: the address of the sweep's ledger, `s3://…` or `gs://…`. `on_lost`: called once, from that thread, with the reason, when
    the sweep was taken over or could not be renewed in time; the caller is to stop.
    Raises HeldByAnother where another living process holds it, and StoreUnusable.
    """
    holding = _Holding(LockObjects(ledger), on_lost, expires_s)
    holding.acquire(patience_s)
    try:
        yield
    finally:
        holding.release()


class _Holding:
    """One start of a driver: from the attempt to hold a sweep to its release."""

    def __init__(self, objects: LockObjects, on_lost: Callable[[str], None], expires_s: float):
        self._objects, self._on_lost = objects, on_lost
        self._me = Holder(os.getpid(), socket.gethostname(), uuid.uuid4().hex, now(), expires_s, released=False)
        self._generation = 0
        self._held_until = 0.0
        """By time.monotonic(): nobody may take over before."""
        self._is_lost = False
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="sweep-lock", daemon=True)

    def acquire(self, patience_s: float) -> None:
        """Raises HeldByAnother, StoreUnusable."""
        until = time.monotonic() + patience_s
        while True:
            newest = patiently(self._free, until)
            began = time.monotonic()
            self._generation = newest + 1
            # the objects of a process that stood still since it looked may be gone again: only the newest counts
            if patiently(self._create, until) and patiently(self._objects.generations, until)[-1:] == [self._generation]:
                break
        self._held_until = began + self._me.expires_s
        if not patiently(self._is_exclusive, until):
            self._objects.remove([self._generation])
            raise StoreUnusable("the store creates an object a second time, so it cannot tell two drivers apart")
        self._thread.start()

    def release(self) -> None:
        """Lets the next one begin at once. What the store does not take is no harm: the hold ends by itself."""
        self._ends.set()
        self._thread.join()
        if self._is_lost:
            return
        try:
            self._objects.write(self._generation, replace(self._me, released=True))
            self._objects.remove([number for number in self._objects.generations() if number < self._generation])
        except Exception as error:  # of whatever kind a store's client has
            log.warning("the sweep's lock ends in %.0f s: it could not be released: %s", self._me.expires_s, told_of(error))

    def _free(self) -> int:
        """The newest generation, which is released or dead; 0 where there is none."""
        newest = max(self._objects.generations(), default=0)
        holder = self._objects.read(newest) if newest else None
        if holder is None or holder.released:
            return newest
        try:
            left_s = holder.expires_s + _RESOLUTION_S - self._objects.age_s(newest)
        except FileNotFoundError:
            raise BlockingIOError("the lock changes hands") from None
        if left_s >= 0:
            raise HeldByAnother(f"held by {holder} (if that was killed, its hold ends in {left_s + _RESOLUTION_S:.0f} s)")
        return newest

    def _create(self) -> bool:
        """Creates the generation; False where another start was first."""
        try:
            self._objects.write(self._generation, self._me, create=True)
        except Exception as error:
            if is_final(error):
                raise
            # refused, or done and the answer was lost: a client that repeats a request meets its own object
            found = self._objects.read(self._generation)
            if found is None:
                raise
            return found.start == self._me.start
        return True

    def _is_exclusive(self) -> bool:
        try:
            self._objects.write(self._generation, self._me, create=True)
        except Exception as error:
            if is_refusal(error):
                return True
            raise
        return False

    def _keep(self) -> None:
        """Renews until the end; asks again soon where the store did not answer."""
        pause_s = self._me.expires_s / 4
        while not self._ends.wait(pause_s):
            pause_s = self._me.expires_s / 4
            try:
                self._renew()
            except _Lost as why:
                self._lose(str(why))
            except Exception as error:  # of whatever kind a store's client has
                pause_s /= 4
                log.debug("the sweep's lock could not be renewed", exc_info=True)
                if time.monotonic() + pause_s >= self._held_until:
                    self._lose(f"its storage could not be reached for {self._me.expires_s:.0f} s: {told_of(error)}")
            if self._is_lost:
                return

    def _renew(self) -> None:
        began = time.monotonic()
        # of a process that stood still, only the reason is left to be found
        newest = max(self._objects.generations(self._left_s() if began < self._held_until else _WHY_S), default=0)
        if newest > self._generation:
            raise _Lost(f"it was taken over by {self._objects.read(newest, _WHY_S) or 'another process'}")
        if time.monotonic() >= self._held_until:  # someone may be about to take over
            raise _Lost(f"its lock could not be renewed for {self._me.expires_s:.0f} s")
        own = self._objects.read(self._generation, self._left_s())
        if own is None or own.start != self._me.start:
            raise _Lost("its lock was removed from the storage")
        self._objects.write(self._generation, self._me, within_s=self._left_s())
        self._held_until = began + self._me.expires_s

    def _left_s(self) -> float:
        """How long a request may take, so that a store that does not answer is noticed while nobody may take over yet."""
        return max(min(REQUEST_S, self._held_until - time.monotonic()), 0.1)

    def _lose(self, why: str) -> None:
        self._is_lost = True
        self._on_lost(why)
