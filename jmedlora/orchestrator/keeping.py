"""Keep rules while a sweep runs: applied from time to time, and at the end."""

from __future__ import annotations

import logging
import threading

from jmedlora.config.sweep import SweepConfig
from jmedlora.orchestrator.ledger import driver_lock
from jmedlora.plan.layout import Storage
from jmedlora.plan.retention import Removal, apply_keep_rules, rule_has_changed
from jmedlora.plan.specs import Plan
from jmedlora.plan.writing import write_plan

log = logging.getLogger(__name__)

EVERY_S = 60.0


class KeepingToRule:
    """Within, the plan's rule is applied every minute, in a thread of its own; and once more at the end, however that comes."""

    def __init__(self, plan: Plan, storage: Storage, every_s: float = EVERY_S):
        self.removed: list[Removal] = []
        self._plan, self._storage, self._every_s = plan, storage, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_applying, daemon=True)

    def __enter__(self) -> KeepingToRule:
        if not self._plan.keep.removes_nothing:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._apply()

    def _keep_applying(self) -> None:
        while not self._over.wait(self._every_s):
            self._apply()

    def _apply(self) -> None:
        try:
            self.removed += apply_keep_rules(self._plan, self._storage)
        except OSError:  # what is not removed now is removed the next time
            log.warning("keep rule %s: could not be applied", self._plan.keep, exc_info=True)


def settle_rule(config: SweepConfig, plan: Plan, storage: Storage) -> list[Removal]:
    """Applies the rule to a sweep that is complete; where it differs from the stored plan's, other sweeps learn of it first.

    Raises HeldByAnother where a living driver works on the sweep.
    """
    has_changed = rule_has_changed(plan, storage)
    if plan.keep.removes_nothing and not has_changed:
        return []
    with driver_lock(storage.sweep(plan.sweep)):
        if has_changed:
            write_plan(config, plan, storage)
        return apply_keep_rules(plan, storage)


def told(removed: list[Removal]) -> str:
    """What was removed, in one line."""
    checkpoints = sum(each.what == "checkpoint" for each in removed)
    megabytes = sum(each.bytes for each in removed) / 1e6
    return f"keep rule: weights of {checkpoints} checkpoints and {len(removed) - checkpoints} states removed, {megabytes:.1f} MB"
