"""A world of one process: simulated processes, a clock and a disk, all of them drawn from one seed.

Processes are threads of which one runs at a time. They hand over when they sleep, and after some of their operations on
files; whichever goes on is drawn. So a seed gives the same order of events every time, and a process can be killed before any
single operation: from then on it can neither write nor tell anything, whatever its `finally` blocks try.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OPERATION_S = 0.002
"""What an operation on a file takes, in simulated seconds."""
FOREVER_S = 1e12
EPOCH = 1.7e9
_CHANGING = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "ftruncate", "truncate")
_NEEDS_ROOM = ("open", "mkdir", "fsync")


class Killed(BaseException):
    """A simulated process is gone."""


class Stuck(Exception):
    """Nothing happens any more, or it never ends."""

    def __init__(self, why: str, log: list[str]):
        super().__init__(why)
        self.log = log


class Process:
    """A simulated process: a thread that runs only when it is told to."""

    def __init__(self, world: World, kind: str, work: Callable[[], Any], parent: Process | None):
        self.kind, self.parent = kind, parent
        self.value: Any = None
        self.error: Exception | None = None
        self.is_over = False
        self.is_dead = False
        self.operations = 0
        self.dies_at: int | None = None
        """The number of the operation on files that it does not live to do."""
        self.wakes_at = 0.0
        self._world, self._work = world, work
        self.go = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def kill(self) -> None:
        """Takes effect before anything else is done; its children go with it."""
        if not self.is_over and not self.is_dead:
            self.is_dead = True
        self.wakes_at = 0.0
        self.end_children()

    def end_children(self) -> None:
        """What it has started goes."""
        for other in self._world.processes:
            if other.parent is self and not other.is_over:
                other.kill()

    def _run(self) -> None:
        self.go.acquire()
        try:
            if self.is_dead:
                raise Killed
            self.value = self._work()
        except Killed:
            pass
        except Exception as error:
            self.error = error
        self.is_over = True
        self._world.turn.release()


class World:
    """All that is simulated. `log` is what happened, a line each."""

    def __init__(self, seed: int, root: Path):
        self.rng = random.Random(seed)
        self.root = root
        self.processes: list[Process] = []
        self.turn = threading.Semaphore(0)
        self.seconds = 0.0
        self.clock_shift = 0.0
        self.full_until = 0.0
        """When there is room on the disk again."""
        self.mlflow_away_for = 0
        """Calls of MLflow that still fail."""
        self.log: list[str] = []
        self._slice = 0
        self._unsynced: dict[tuple[int, int], int] = {}  # of files written to: how much of each is on the disk
        self._local = threading.local()
        self._running: Process | None = None

    # -- processes

    def start(self, kind: str, work: Callable[[], Any], parent: Process | None = None) -> Process:
        """A new process, to be given its turns by `run`."""
        process = Process(self, kind, work, parent)
        self.processes.append(process)
        return process

    @property
    def current(self) -> Process | None:
        """The simulated process that is asking, or None for the one that simulates."""
        running = self._running
        return running if running is not None and threading.current_thread() is running.thread else None

    def run(self, until: Callable[[], bool], on_turn: Callable[[], None] = lambda: None) -> None:
        """Gives turns until `until` says so; `on_turn` is called between them."""
        for _ in range(200_000):
            on_turn()
            if until():
                return
            living = [process for process in self.processes if not process.is_over]
            self.processes = living
            if not living:
                self.seconds += 1.0
                continue
            ready = [process for process in living if process.wakes_at <= self.seconds]
            if not ready:
                next_at = min(process.wakes_at for process in living)
                self.seconds = next_at if next_at < FOREVER_S else self.seconds + 1.0
                continue
            self._give_turn(self.rng.choice(ready))
        raise Stuck("it does not end", self.log)

    def kill_all(self) -> None:
        """Nothing is left running."""
        for process in self.processes:
            process.kill()
        while living := [process for process in self.processes if not process.is_over]:
            self._give_turn(living[0])
        self.processes = []

    def _give_turn(self, process: Process) -> None:
        self._slice = self.rng.randint(1, 12)
        self._running = process
        process.go.release()
        self.turn.acquire()
        self._running = None

    def sleep(self, seconds: float) -> None:
        """Lets others go on; the calling process does so after `seconds`."""
        process = self.current
        if process is None:
            return
        process.wakes_at = self.seconds + seconds
        self._hand_over(process)

    def _hand_over(self, process: Process) -> None:
        if process.is_dead:
            raise Killed
        self.turn.release()
        process.go.acquire()
        if process.is_dead:
            raise Killed

    def tell(self, line: str) -> None:
        self.log.append(f"{self.seconds:9.2f} s  {line}")

    # -- the disk

    def operation(self, name: str) -> None:
        """Before every operation that changes files: the process may be killed, the disk may be full, others may go on."""
        process = self.current
        if process is None:
            return
        if process.is_dead:
            raise Killed
        process.operations += 1
        self.seconds += OPERATION_S
        if process.dies_at is not None and process.operations >= process.dies_at:
            self.tell(f"{process.kind} dies before {name}")
            process.kill()
            raise Killed
        if self.seconds < self.full_until and name in _NEEDS_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._slice -= 1
        if self._slice <= 0:
            self._hand_over(process)

    def lose_power(self) -> None:
        """All processes die, and what was not synced to the disk is there in part only."""
        self.kill_all()
        for path in sorted(self.root.rglob("*")):
            if path.is_file() and (synced := self._unsynced.get(_identity(path.stat()))) is not None:
                size = path.stat().st_size
                os.truncate(path, self.rng.randint(min(synced, size), size))
                self.tell(f"{path.relative_to(self.root)} is cut")
        self._unsynced.clear()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Operations on files within go through `operation`; syncing to the disk is simulated."""
        real = {name: getattr(os, name) for name in (*_CHANGING, "fsync")}
        real_open = builtins.open

        def opened(file: Any, mode: str = "r", *others: Any, **named: Any) -> Any:
            if not set(mode) & set("wax+"):
                return real_open(file, mode, *others, **named)
            self.operation("open")
            stream = real_open(file, mode, *others, **named)
            if self.current is not None:
                status = os.fstat(stream.fileno())
                self._unsynced.setdefault(_identity(status), status.st_size if "w" not in mode else 0)
            return stream

        def synced(handle: int) -> None:
            self.operation("fsync")
            self._unsynced.pop(_identity(os.fstat(handle)), None)

        def hooked(name: str) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                self.operation(name)
                return real[name](*arguments, **named)

            return call

        real_flock = fcntl.flock

        def locked(handle: Any, kind: int) -> None:
            while True:
                try:
                    return real_flock(handle, kind | fcntl.LOCK_NB)
                except BlockingIOError:
                    if kind & fcntl.LOCK_NB or self.current is None:
                        raise
                    self.sleep(0.1)  # the holder can only go on if this one does not block them all

        try:
            fcntl.flock = locked
            for name in _CHANGING:
                setattr(os, name, hooked(name))
            os.fsync = synced  # type: ignore[assignment]
            builtins.open = io.open = opened
            yield
        finally:
            fcntl.flock = real_flock
            for name, function in real.items():
                setattr(os, name, function)
            builtins.open = io.open = real_open

    # -- what stands in for the module `time`

    def time(self) -> float:
        return EPOCH + self.seconds + self.clock_shift

    def monotonic(self) -> float:
        return self.seconds

    perf_counter = monotonic


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
