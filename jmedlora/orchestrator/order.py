"""Which trial Ray Tune starts next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher


class InOrder(Searcher):
    """Gives out the trials of a plan one after another, as places become free, until the sweep is to stop."""

    def __init__(self, trial_ids: list[str], is_stopping: Callable[[], bool]):
        super().__init__()
        self._waiting = list(reversed(trial_ids))
        self._is_stopping = is_stopping

    def suggest(self, trial_id: str) -> Any:
        """The configuration of the next trial; `trial_id` is Tune's own name for it."""
        if not self._waiting or self._is_stopping():
            return Searcher.FINISHED
        return {"trial_id": self._waiting.pop()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing is learned from results."""

    def save(self, checkpoint_path: str) -> None:
        """Every start of a driver makes a searcher of its own."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called."""
