"""What is still to be written: a bounded queue of updates, and the children that are to be written from storage instead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jmedlora.tracking.mlflow_tracker import MlflowTracker

MOST_UPDATES = 1000
"""Updates that are kept in memory."""


@dataclass(frozen=True)
class Update:
    """Something new. `concerns`: the children that it is to be seen in, that of its own run first."""

    concerns: Sequence[str]
    write: Callable[[MlflowTracker], None]


class Backlog:
    """At first, everything is behind. Not safe for threads by itself."""

    def __init__(self, everything: Sequence[str]):
        """everything: the run keys of all children."""
        self._everything = everything
        self.updates: deque[Update] = deque()
        self.behind = dict.fromkeys(everything, 0)
        """Updates that a child has missed, by run key."""

    @property
    def waiting(self) -> int:
        return len(self.updates) + sum(self.behind.values())

    def put(self, update: Update) -> None:
        """Takes an update into the queue if there is room, and if nothing before it is missing."""
        if len(self.updates) >= MOST_UPDATES or update.concerns[0] in self.behind:
            self.set_back([update])
        else:
            self.updates.append(update)

    def set_back(self, missed: Iterable[Update]) -> None:
        """Notes the children of updates that were not taken as behind, and with them what else waits of the same runs."""
        lost = deque(missed)
        while lost:
            self.note_behind(lost.popleft().concerns)
            lost.extend(update for update in self.updates if update.concerns[0] in self.behind)
            self.updates = deque(update for update in self.updates if update.concerns[0] not in self.behind)

    def empty_queue(self) -> None:
        """Everything that waits comes from storage instead."""
        waiting, self.updates = self.updates, deque()
        self.set_back(waiting)

    def note_everything(self) -> None:
        """All of storage is to be compared with MLflow once more."""
        self.note_behind(self._everything)

    def note_behind(self, run_keys: Iterable[str]) -> None:
        for run_key in run_keys:
            self.behind[run_key] = self.behind.get(run_key, 0) + 1

    def caught_up(self, run_key: str, missed: int) -> None:
        """A child holds what storage held; it stays behind where it has missed more than `missed`, the count from before, since then."""
        self.behind[run_key] -= missed
        if not self.behind[run_key]:
            del self.behind[run_key]
