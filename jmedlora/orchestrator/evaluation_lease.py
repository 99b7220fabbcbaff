"""Who computes an evaluation: at most one process at a time, also where several sweeps ask for it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import EvaluationSpec


class EvaluatedElsewhere(Exception):
    """Another living process is at the evaluation."""


@contextmanager
def evaluation_lease(storage: Storage, run_key: str, step: int, evaluation: EvaluationSpec) -> Iterator[None]:
    """Holds an evaluation for this process, by an operating-system lock on a hidden file: it ends with the process, however that ends.

    The file goes when the block ends well and the results are there, which whoever held it open by then finds. Raises
    EvaluatedElsewhere.
    """
    results = storage.run(run_key).evaluation(evaluation.folder, step)
    path = results.with_name(f".{results.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EvaluatedElsewhere(str(results)) from None
        yield
        if storage.run(run_key).is_evaluated(evaluation.folder, step):
            path.unlink(missing_ok=True)
