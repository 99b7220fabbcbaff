"""Which lock holds a sweep: that of the operating system, or an object in the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.locate import is_remote
from jmedlora.config.sweep import SweepConfig
from jmedlora.orchestrator.ledger import driver_lock
from jmedlora.orchestrator.lock_objects import StoreUnusable
from jmedlora.orchestrator.object_lock import object_lock
from jmedlora.plan.layout import Storage


@contextmanager
def sweep_lock(config: SweepConfig, sweep: str, on_lost: Callable[[str], None]) -> Iterator[None]:
    """Holds the sweep for this process.

    `on_lost`: called from a thread, with the reason, when a sweep in an object store is held no longer; a local lock is never lost.
    Raises HeldByAnother where another living driver holds it, and BadInput for a store that cannot be used.
    """
    with ExitStack() as stack:
        if is_remote(config.storage):
            try:
                stack.enter_context(object_lock(f"{config.storage.rstrip('/')}/sweeps/{sweep}/ledger", on_lost))
            except StoreUnusable as why:
                raise BadInput([Fault(config.file, "storage", f"{config.storage} cannot be used: {why}")]) from None
        else:
            stack.enter_context(driver_lock(Storage(config.storage_path).sweep(sweep)))
        yield
