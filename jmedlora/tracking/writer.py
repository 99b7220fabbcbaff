"""Writes one sweep to MLflow in a thread of its own: who tells it something never waits, and nothing is lost while MLflow is away.

Storage is the outbox. What is told has been stored before, so an update that MLflow does not take, or that there is no
room for, is dropped, and its runs are noted as behind; once MLflow answers again, they are written from storage.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jmedlora.config.clock import now
from jmedlora.plan.layout import Storage
from jmedlora.plan.records import Record
from jmedlora.plan.specs import Plan
from jmedlora.tracking.backlog import Backlog, Update
from jmedlora.tracking.states import shown_by
from jmedlora.tracking.sweep_record import Ending, begin_sweep, end_sweep, read_record
from jmedlora.tracking.trouble import clock_time, remedy, told

if TYPE_CHECKING:
    from jmedlora.tracking.mlflow_tracker import MlflowTracker

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S, CLOSING_PAUSE_S = 1.0, 60.0, 5.0
"""Between attempts, doubled each time; the last is the longest while somebody waits for the end."""
PATIENCE_S: dict[Ending, float] = {"finished": 60.0, "failed": 60.0, "interrupted": 10.0}
"""How long the end is waited for while MLflow takes nothing at all."""
LIMIT_S: dict[Ending, float] = {"finished": 3600.0, "failed": 3600.0, "interrupted": 20.0}
"""How long it is waited for where MLflow is slow."""
CLOSING_ROUNDS = 3
"""Attempts at the end with a run that MLflow does not take although it answers."""
_SWEEP = "the sweep itself"


@dataclass
class _Closing:
    status: Ending
    report: Path | None
    changes: Sequence[Record]
    rounds: int = 0
    """Attempts after which something was not taken."""
    is_repeated: bool = False
    """True in the second round, which follows where there was trouble: MLflow may still work off calls that nobody waits for."""
    is_done: threading.Event = field(default_factory=threading.Event)


class _GivenUp(Exception):
    pass


class TrackingWriter:
    """One for each start of a sweep; it begins with what storage holds already."""

    def __init__(self, tracking_uri: str, plan: Plan, storage: Storage):
        self._uri, self._plan, self._storage = tracking_uri, plan, storage
        self._tracker: MlflowTracker | None = None
        self._change = threading.Condition()  # guards what follows
        self._backlog = Backlog([base.run_key for base in plan.bases] + [run.run_key for run in plan.runs])
        self._faults: dict[str, str] = {}  # what MLflow says to children that it does not take although it answers
        self._away_since: float | None = None
        self._why = ""
        self._was_trouble = False
        self._is_known = False  # what MLflow holds; after a failure it has to be looked at anew
        self._pause_s = 0.0
        self._next_attempt = 0.0  # on the monotonic clock
        self._heard = time.monotonic()
        self._closing: _Closing | None = None
        _note(lambda: begin_sweep(plan, storage))
        threading.Thread(target=self._work, name="tracking", daemon=True).start()

    # ---------------------------------------------------------------- what is told; returns at once

    def train_steps(self, run_key: str, records: list[Record]) -> None:
        """Optimizer steps of a run: lines of its train.jsonl."""
        self._put(Update([run_key], lambda tracker: tracker.log_train(run_key, records)))

    def run_ended(self, run_key: str) -> None:
        """A run has ended, as its run.json says."""
        self._put(Update([run_key], partial(_sync, run_key)))

    def evaluated(self, metrics: Record) -> None:
        """An evaluation is finished, and stored as these `metrics`."""
        concerns = shown_by(self._plan, metrics["run_key"])
        self._put(Update(concerns, lambda tracker: tracker.log_evaluation(metrics)))

    def trouble(self) -> str | None:
        """What a user should know while it lasts, in one line: since when MLflow is away, or what it refuses."""
        with self._change:
            waiting = f"{self._backlog.waiting} updates waiting"
            if self._away_since is not None:
                return f"MLflow unreachable since {clock_time(self._away_since)}, {waiting}"
            return f"MLflow lacks {self._refusals()}, {waiting}" if self._faults else None

    def finish(self, status: Ending, report: Path | None = None, changes: Sequence[Record] = ()) -> list[str]:
        """Waits until everything is written, with the report's folder, how runs differ from their bases, and the sweep's end.

        It waits as long as MLflow takes something, `LIMIT_S` at most, and gives up once it has taken nothing for `PATIENCE_S`.
        Returns what is wrong then: a line, or none.
        """
        _note(lambda: end_sweep(self._plan, self._storage, status))
        limit = time.monotonic() + LIMIT_S[status]
        with self._change:
            self._closing = closing = _Closing(status, report, changes)
            self._heard, self._next_attempt = time.monotonic(), 0.0
            self._look_at_everything()
            self._change.notify()
        while not closing.is_done.wait(0.1):
            if time.monotonic() > min(limit, self._heard + PATIENCE_S[status]):
                break
        with self._change:
            if closing.is_done.is_set() and not self._faults:
                return []
            closing.is_done.set()  # the thread gives up as well
            why = self._why or (f"MLflow lacks {self._refusals()}" if self._faults else "MLflow does not answer in time")
        return [f"not everything was written ({why}); {remedy(self._plan.sweep)}"]

    def _put(self, update: Update) -> None:
        with self._change:
            if self._away_since is not None:
                self._backlog.set_back([update])
            else:
                self._backlog.put(update)
            self._change.notify()

    # ---------------------------------------------------------------- the thread

    def _work(self) -> None:
        with suppress(_GivenUp):
            self._go_on()

    def _go_on(self) -> None:
        while (closing := self._closing) is None or not closing.is_done.is_set():
            update = self._next()
            if update is not None:
                if not self._attempt(update.write, update.concerns[0], update):
                    self._postpone()
            elif not (self._reach() and self._catch_up()):
                self._postpone()
            elif closing is not None and closing is self._closing:
                self._close(closing)

    def _next(self) -> Update | None:
        """Waits for something to do: an update; None: runs are behind, or the end is asked for, and an attempt is due."""
        with self._change:
            while not self._backlog.updates:
                due = self._backlog.behind or self._closing is not None
                wait_s = self._next_attempt - time.monotonic() if due else None
                if wait_s is not None and wait_s <= 0:
                    return None
                self._change.wait(wait_s)
            return self._backlog.updates.popleft()

    def _reach(self) -> bool:
        """Looks, unless that is known, at what MLflow holds, and mends what calls without an answer have left there."""
        while not self._is_known:
            closing = self._closing
            try:
                if self._tracker is None:
                    from jmedlora.tracking.mlflow_tracker import MlflowTracker  # takes seconds, which nobody need wait for

                    self._tracker = MlflowTracker(self._uri, self._plan, self._storage, self._is_heard)
                created = self._tracker.start(closing.status if closing else None)
            except _GivenUp:
                raise
            except Exception as error:
                self._lose(error)
                return False
            with self._change:
                if self._away_since is not None:
                    log.warning("MLflow answers again; what it has missed since %s is written now", clock_time(self._away_since))
                self._away_since, self._why = None, ""
                self._backlog.note_behind(created)
                self._is_known = closing is self._closing  # else the end was asked for meanwhile, and is to be looked at as such
        return True

    def _catch_up(self) -> bool:
        """Writes all that is behind from storage; False where something of it was not taken."""
        with self._change:
            behind = dict(self._backlog.behind) if self._is_known else {}  # else the end was asked for just now
        taken = True
        for run_key, missed in behind.items():
            if self._attempt(partial(_sync, run_key), run_key):
                with self._change:
                    self._backlog.caught_up(run_key, missed)
            elif self._away_since is not None:
                return False
            else:
                taken = False
        if taken:
            self._pause_s = 0.0
        return taken or self._accepts_refusals()

    def _close(self, closing: _Closing) -> None:
        """The last writes; runs are written by now, but for those that MLflow does not take."""
        ended = read_record(self._plan, self._storage).finished
        writes: list[Callable[[MlflowTracker], None]] = [
            lambda tracker: tracker.log_changes(closing.changes),
            lambda tracker: tracker.log_report(closing.report) if closing.report else None,
            lambda tracker: tracker.finish_sweep(closing.status, ended),
        ]
        for write in writes:
            if not self._attempt(write, _SWEEP) and (self._away_since is not None or not self._accepts_refusals()):
                self._postpone()
                return
        with self._change:
            if self._was_trouble and not closing.is_repeated:
                closing.is_repeated = True
                self._look_at_everything()
            else:
                closing.is_done.set()

    def _attempt(self, write: Callable[[MlflowTracker], None], name: str, update: Update | None = None) -> bool:
        """Writes, and notes a failure: as MLflow's where it takes nothing else either, else as that of `name`."""
        assert self._tracker is not None, "runs are behind until MLflow was reached"
        try:
            write(self._tracker)
            self._is_heard()
        except _GivenUp:
            raise
        except Exception as error:
            self._refused(error, name, update)
            return False
        with self._change:
            self._faults.pop(name, None)
        return True

    def _refused(self, error: Exception, name: str, update: Update | None) -> None:
        assert self._tracker is not None
        with self._change:
            self._backlog.set_back([update] if update else [])
            self._was_trouble, self._is_known = True, False
        try:
            self._tracker.probe()
        except Exception as again:
            self._lose(again)
            return
        with self._change:
            if name not in self._faults:
                log.warning("MLflow did not take what is new of %s: %s", name, told(error), exc_info=error)
            self._faults[name] = told(error)

    def _lose(self, error: Exception) -> None:
        with self._change:
            if self._away_since is None:
                self._away_since = now()
                log.warning("MLflow cannot be written (%s); it gets later what it misses now", told(error))
            self._why, self._was_trouble, self._is_known = told(error), True, False
            self._backlog.empty_queue()

    def _look_at_everything(self) -> None:
        """Lets the next round compare all of storage with MLflow; the lock is held."""
        self._is_known = False
        self._backlog.note_everything()

    def _postpone(self) -> None:
        with self._change:
            longest = LONGEST_PAUSE_S if self._closing is None else CLOSING_PAUSE_S
            self._pause_s = min(longest, max(FIRST_PAUSE_S, 2 * self._pause_s))
            self._next_attempt = time.monotonic() + self._pause_s

    def _accepts_refusals(self) -> bool:
        """True once enough was tried at the end with what MLflow does not take although it answers."""
        if self._closing is None:
            return False
        self._closing.rounds += 1
        return self._closing.rounds >= CLOSING_ROUNDS

    def _refusals(self) -> str:
        names = list(self._faults)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"{names[0]}{more}: {self._faults[names[0]]}"

    def _is_heard(self) -> None:
        """Told whenever MLflow has taken something; where the end is not waited for any more, the thread ends here."""
        self._heard = time.monotonic()
        if self._closing is not None and self._closing.is_done.is_set():
            raise _GivenUp


def _sync(run_key: str, tracker: MlflowTracker) -> None:
    tracker.sync(run_key)


def _note(write: Callable[[], None]) -> None:
    """The sweep's times are worth no failure: without them, they follow from its runs."""
    try:
        write()
    except OSError as error:
        log.warning("the times of the sweep could not be stored: %s", error)
