"""What is still to be trained, and whether a trial that died is begun again: decided from storage alone, without Ray."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from jmedlora.orchestrator.ledger import run_status
from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import Plan, RunSpec, TrialSpec

Mark = tuple[tuple[int, int], ...]
"""How far each run of a trial is: the optimizer step that a restart goes on from (one more than all once it is finished), checkpoints."""


def remaining_trials(plan: Plan, storage: Storage) -> list[TrialSpec]:
    """The trials of which a run is not finished; runs that failed earlier are among what is tried again."""
    return [trial for trial in plan.trials if any(run_status(run, storage) != "finished" for run in trial.runs)]


def trial_of_what_is_left(trial: TrialSpec, left: Sequence[RunSpec], failed: Collection[str]) -> TrialSpec:
    """The trial with the runs that are to be trained, and those of their trajectories that are done: these need not be trained again then.

    failed: keys of runs that are not to be begun again.
    """
    keys = {run.run_key for run in left}
    shared = {run.trajectory_key for run in left} if trial.share_prefixes else set()
    wanted = [run for run in trial.runs if run.run_key in keys or (run.trajectory_key in shared and run.run_key not in failed)]
    return trial.model_copy(update={"runs": wanted})


def progress_mark(trial: TrialSpec, storage: Storage) -> Mark:
    """How far a trial is, as far as a restart would find it."""
    return tuple(_mark_of(run, storage) for run in trial.runs)


def _mark_of(run: RunSpec, storage: Storage) -> tuple[int, int]:
    folder = storage.run(run.run_key)
    checkpoints = sum(folder.is_committed(step) for step in run.checkpoint_steps)
    if run_status(run, storage) == "finished":
        return run.total_steps + 1, checkpoints
    return max(folder.states(), default=0), checkpoints


class Retries:
    """Counts the deaths of a worker group: any number as long as each start gets further, few in a row without that."""

    def __init__(self, most: int, mark: Mark):
        """most: deaths in a row without progress after which the group is still begun again; mark: before the first start."""
        self._most = most
        self._best = mark
        self._in_vain = 0

    def allows(self, mark: Mark) -> bool:
        """Told after a death how far the trial is; True where it is to be begun again.

        Progress is a run further than it ever was: what is done a second time, because a state was damaged, counts as none.
        """
        best = tuple((max(step, own), max(count, known)) for (step, count), (own, known) in zip(mark, self._best, strict=True))
        self._in_vain = 0 if best != self._best else self._in_vain + 1
        self._best = best
        return self._in_vain <= self._most
