"""The objects that say who drives a sweep, in a store that is reached through fsspec, and how long its silence is borne with."""

from __future__ import annotations

import json
import logging
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from jmedlora.config.faults import first_line
from jmedlora.orchestrator.ledger import HeldByAnother

log = logging.getLogger(__name__)

EXPIRES_S = 60.0
"""After how long without renewal a holder counts as dead."""
REQUEST_S = 10.0
"""How long one request may take."""
PROTOCOLS = {"s3": "s3", "gs": "gcs"}
"""The stores that are known to refuse to create an object twice, and what `pip install 'jmedlora[…]'` adds to reach them."""
_CLOCK = "driver-clock.json"
_GENERATION = re.compile(r"driver-(\d{6,})\.json$")
_WITHOUT_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}

Result = TypeVar("Result")


class StoreUnusable(Exception):
    """A lock cannot be had from this store; the message says why in one line."""


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


class LockObjects:
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
        except Exception as error:  # of whatever kind a store's client has
            raise StoreUnusable(told_of(error)) from error

    def generations(self, within_s: float = REQUEST_S) -> list[int]:
        """The numbers of the lock objects that there are, ascending."""
        try:
            names = self._files.ls(self._folder, detail=False, refresh=True, timeout=within_s)
        except FileNotFoundError:
            return []
        return sorted(int(found[1]) for found in map(_GENERATION.search, names) if found)

    def read(self, generation: int, within_s: float = REQUEST_S) -> Holder | None:
        """None where there is no such object."""
        try:
            return Holder.read(self._files.cat_file(self._path(_name(generation)), timeout=within_s))
        except FileNotFoundError:
            return None

    def write(self, generation: int, holder: Holder, *, create: bool = False, within_s: float = REQUEST_S) -> None:
        """With `create`: FileExistsError where the object is there already, or another error that the client makes of that."""
        text = json.dumps(asdict(holder)).encode()
        self._files.pipe_file(self._path(_name(generation)), text, mode="create" if create else "overwrite", timeout=within_s)

    def age_s(self, generation: int) -> float:
        """Seconds by the store's clock since the lock object was written last; FileNotFoundError where it is gone."""
        self._files.pipe_file(self._path(_CLOCK), b"{}", timeout=REQUEST_S)
        here, then = self._written(_CLOCK), self._written(_name(generation))
        return (here - then).total_seconds()

    def remove(self, generations: list[int]) -> None:
        for name in (*map(_name, generations), _CLOCK):
            try:
                self._files.rm_file(self._path(name), timeout=REQUEST_S)
            except FileNotFoundError:  # a store may say so
                continue

    def _written(self, name: str) -> datetime:
        about: dict[str, Any] = self._files.info(self._path(name), refresh=True, timeout=REQUEST_S)
        return about["LastModified"] if "LastModified" in about else about["mtime"]

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"


def _options(protocol: str) -> dict[str, Any]:
    """What the client is opened with, beside what the user has configured: botocore's own attempts would take longer than a hold."""
    from fsspec.config import conf

    if protocol != "s3":
        return {}
    return {"config_kwargs": {**conf.get("s3", {}).get("config_kwargs", {}), "retries": {"total_max_attempts": 1}}}


def _name(generation: int) -> str:
    return f"driver-{generation:06d}.json"


def patiently(ask: Callable[[], Result], until: float) -> Result:
    """Asks again, more and more slowly, while the store is busy or silent. Raises StoreUnusable at `until`, by time.monotonic()."""
    pause_s = 0.1
    while True:
        try:
            return ask()
        except (HeldByAnother, StoreUnusable):
            raise
        except Exception as error:  # of whatever kind a store's client has
            pause_s = min(2 * pause_s, 5.0) * random.uniform(0.7, 1.0)
            if is_final(error) or time.monotonic() + pause_s >= until:
                raise StoreUnusable(told_of(error)) from error
            log.debug("the store did not answer", exc_info=True)
            time.sleep(pause_s)


def told_of(error: Exception) -> str:
    """In one line; a request that was given up says nothing itself."""
    return "the store does not answer" if isinstance(error, TimeoutError) and not str(error) else first_line(error)


def is_final(error: Exception) -> bool:
    """True for what another attempt would not change: no permission, no such bucket, no credentials."""
    return isinstance(error, (PermissionError, FileNotFoundError)) or type(error).__name__ in _WITHOUT_CREDENTIALS


def is_refusal(error: Exception) -> bool:
    """True where an object was not created since it is there. Not every store that speaks S3 says so in the words its client expects."""
    answer = getattr(error.__cause__, "response", None) or {}
    return isinstance(error, FileExistsError) or answer.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412
