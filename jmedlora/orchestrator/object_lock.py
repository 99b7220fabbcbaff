"""Who drives a sweep whose storage is an object store: one object per holder, created only where there is none.

`driver-000007.json` is the seventh holding of a sweep. Whoever creates it holds the sweep, until a `driver-000008.json` is there;
that may be created once the seventh is released, or has not been renewed for as long as it says itself. The newest is never removed,
so that what a process that was paused for a while writes late is older than what counts.
Time is the store's own: how much younger an object is that was written just now. A machine's clock decides nothing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import count
from typing import Any, TypeVar

from jmedlora.config.clock import now
from jmedlora.config.faults import first_line
from jmedlora.orchestrator.ledger import HeldByAnother

log = logging.getLogger(__name__)

EXPIRES_S = 60.0
"""After how long without renewal a holder counts as dead."""
PATIENCE_S = 30.0
"""How long a store may be busy or silent before it counts as unreachable."""
PROTOCOLS = {"s3": "s3", "gs": "gcs"}
"""The stores that are known to refuse to create an object twice, and what `pip install 'jmedlora[…]'` adds to reach them."""
_RESOLUTION_S = 1.0
"""Stores tell whole seconds."""
_REQUEST_S = 10.0
_CLOCK = "driver-clock.json"
_GENERATION = re.compile(r"driver-(\d{6,})\.json$")
_WITHOUT_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}

Result = TypeVar("Result")


class StoreUnusable(Exception):
    """A lock cannot be had from this store; the message says why in one line."""


class _Lost(Exception):
    """The sweep is no longer held; the message says why."""


@dataclass(frozen=True)
class Holder:
    """What a lock object says."""

    process: int
    host: str
    start: str
    """Drawn anew at every start: tells a holder from another with the same process number."""
    since: float
    """Seconds since the epoch by the holder's own clock: for people."""
    expires_s: float
    released: bool

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {datetime.fromtimestamp(self.since, UTC):%Y-%m-%d %H:%M:%S} UTC"

    @classmethod
    def read(cls, text: bytes) -> Holder:
        """Of an object that says nothing sensible: somebody unknown, who has to be waited for."""
        try:
            told = json.loads(text)
            holder = cls(
                int(told["process"]),
                str(told["host"]),
                str(told["start"]),
                float(told["since"]),
                float(told["expires_s"]),
                told["released"] is True,
            )
            str(holder)  # a time that no calendar has is an error here
            return holder if 0 < holder.expires_s < math.inf else replace(holder, expires_s=EXPIRES_S)
        except (ValueError, KeyError, TypeError, OverflowError, OSError):
            return cls(0, "an unknown machine", "", 0.0, EXPIRES_S, False)


@contextmanager
def object_lock(
    ledger: str, on_lost: Callable[[str], None], *, expires_s: float = EXPIRES_S, patience_s: float = PATIENCE_S
) -> Iterator[None]:
    """Holds a sweep for this process, renewed by a thread; a killed holder is succeeded after `expires_s` seconds.

    `ledger`: the address of the sweep's ledger, `s3://…` or `gs://…`. `on_lost`: called once, from that thread, with the reason, when
    the sweep was taken over or could not be renewed in time; the caller is to stop.
    Raises HeldByAnother where another living process holds it, and StoreUnusable.
    """
    holding = _Holding(_Objects(ledger), on_lost, expires_s)
    holding.acquire(patience_s)
    try:
        yield
    finally:
        holding.release()


class _Objects:
    """The objects of one ledger. Every call reaches the store, and a request ends within `within_s` seconds."""

    def __init__(self, ledger: str):
        import fsspec

        protocol = ledger.partition("://")[0]
        if protocol not in PROTOCOLS:
            raise StoreUnusable(f"no lock is known for {protocol}://, only for {' and '.join(f'{known}://' for known in PROTOCOLS)}")
        try:
            self._files, self._folder = fsspec.url_to_fs(ledger, use_listings_cache=False, **_options(protocol))
        except ImportError:
            raise StoreUnusable(f"{protocol}:// needs `pip install 'jmedlora[{PROTOCOLS[protocol]}]'`") from None

    def generations(self, within_s: float = _REQUEST_S) -> list[int]:
        """The numbers of the lock objects that there are, ascending."""
        try:
            names = self._files.ls(self._folder, detail=False, refresh=True, timeout=within_s)
        except FileNotFoundError:
            return []
        return sorted(int(found[1]) for found in map(_GENERATION.search, names) if found)

    def read(self, generation: int, within_s: float = _REQUEST_S) -> Holder | None:
        """None where there is no such object."""
        try:
            return Holder.read(self._files.cat_file(self._path(_name(generation)), timeout=within_s))
        except FileNotFoundError:
            return None

    def write(self, generation: int, holder: Holder, *, create: bool = False, within_s: float = _REQUEST_S) -> None:
        """With `create`: FileExistsError where the object is there already, or another error that the client makes of that."""
        text = json.dumps(asdict(holder)).encode()
        self._files.pipe_file(self._path(_name(generation)), text, mode="create" if create else "overwrite", timeout=within_s)

    def age_s(self, generation: int) -> float:
        """Seconds by the store's clock since the lock object was written last; FileNotFoundError where it is gone."""
        self._files.pipe_file(self._path(_CLOCK), b"{}", timeout=_REQUEST_S)
        here, then = self._written(_CLOCK), self._written(_name(generation))
        return (here - then).total_seconds()

    def remove(self, generations: list[int]) -> None:
        for name in (*map(_name, generations), _CLOCK):
            try:
                self._files.rm_file(self._path(name), timeout=_REQUEST_S)
            except FileNotFoundError:  # a store may say so
                continue

    def _written(self, name: str) -> datetime:
        about: dict[str, Any] = self._files.info(self._path(name), refresh=True, timeout=_REQUEST_S)
        return about["LastModified"] if "LastModified" in about else about["mtime"]

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"


class _Holding:
    """One start of a driver: from the attempt to hold a sweep to its release."""

    def __init__(self, objects: _Objects, on_lost: Callable[[str], None], expires_s: float):
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
            newest = _patiently(self._free, until)
            began = time.monotonic()
            self._generation = newest + 1
            # the objects of a process that stood still since it looked may be gone again: only the newest counts
            if _patiently(self._create, until) and _patiently(self._objects.generations, until)[-1:] == [self._generation]:
                break
        self._held_until = began + self._me.expires_s
        if not _patiently(self._is_exclusive, until):
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
            log.warning("the sweep's lock ends in %.0f s: it could not be released: %s", self._me.expires_s, _told(error))

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
            if _is_final(error):
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
            if _is_refusal(error):
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
                    self._lose(f"its storage could not be reached for {self._me.expires_s:.0f} s: {_told(error)}")
            if self._is_lost:
                return

    def _renew(self) -> None:
        began = time.monotonic()
        newest = max(self._objects.generations(self._left_s()), default=0)
        if newest > self._generation:
            raise _Lost(f"it was taken over by {self._objects.read(newest) or 'another process'}")
        own = self._objects.read(self._generation, self._left_s())
        if own is None or own.start != self._me.start:
            raise _Lost("its lock was removed from the storage")
        if time.monotonic() >= self._held_until:  # someone may be about to take over
            raise _Lost(f"its lock could not be renewed for {self._me.expires_s:.0f} s")
        self._objects.write(self._generation, self._me, within_s=self._left_s())
        self._held_until = began + self._me.expires_s

    def _left_s(self) -> float:
        """How long a request may take, so that a store that does not answer is noticed while nobody may take over yet."""
        return max(min(_REQUEST_S, self._held_until - time.monotonic()), 0.1)

    def _lose(self, why: str) -> None:
        self._is_lost = True
        self._on_lost(why)


def _options(protocol: str) -> dict[str, Any]:
    """What the client is opened with, beside what the user has configured: botocore's own attempts would take longer than a hold."""
    from fsspec.config import conf

    if protocol != "s3":
        return {}
    return {"config_kwargs": {**conf.get("s3", {}).get("config_kwargs", {}), "retries": {"total_max_attempts": 1}}}


def _name(generation: int) -> str:
    return f"driver-{generation:06d}.json"


def _patiently(ask: Callable[[], Result], until: float) -> Result:
    """Asks again, more and more slowly, while the store is busy or silent. Raises StoreUnusable at `until`, by time.monotonic()."""
    for attempt in count():
        try:
            return ask()
        except (HeldByAnother, StoreUnusable):
            raise
        except Exception as error:  # of whatever kind a store's client has
            pause_s = min(0.1 * 2**attempt, 5.0) * random.uniform(0.5, 1.0)
            if _is_final(error) or time.monotonic() + pause_s >= until:
                raise StoreUnusable(_told(error)) from error
            log.debug("the store did not answer", exc_info=True)
            time.sleep(pause_s)
    raise AssertionError


def _told(error: Exception) -> str:
    return "the store does not answer" if isinstance(error, TimeoutError) and not str(error) else first_line(error)


def _is_final(error: Exception) -> bool:
    """True for what another attempt would not change: no permission, no such bucket, no credentials."""
    return isinstance(error, (PermissionError, FileNotFoundError)) or type(error).__name__ in _WITHOUT_CREDENTIALS


def _is_refusal(error: Exception) -> bool:
    """True where an object was not created since it is there. Not every store that speaks S3 says so in the words its client expects."""
    answer = getattr(error.__cause__, "response", None) or {}
    return isinstance(error, FileExistsError) or answer.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412
