"""Keep rules: which weights and states of a sweep's runs stay on disk, and how the others go.

A checkpoint's folder stays when its weights go: with adapter_config.json, with checksums.json, by which the adapter is still
known, and with removed.json, which says when and by which rule. Its run counts as finished, and its scores stay.

Weights go in steps, each of which leaves something that is understood when the process is killed after it: they are renamed,
which gives them up; emptied; told of in removed.json; and unlinked. None of that but the record needs room on a full disk.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jmedlora.config.clock import now
from jmedlora.config.faults import BadInput, first_line
from jmedlora.data.atomic import sync, write_json
from jmedlora.plan.layout import ADAPTER_WEIGHTS, REMOVED, WEIGHTS_ON_THEIR_WAY_OUT, Storage
from jmedlora.plan.records import read_metrics, read_run
from jmedlora.plan.specs import Plan, RunSpec
from jmedlora.plan.writing import plans_lock, read_plan

log = logging.getLogger(__name__)

_DROPPED = ".dropped-"
"""Prefix of a folder that is being deleted."""


@dataclass(frozen=True)
class Removal:
    """What a keep rule has removed: weights of a checkpoint, or a state."""

    run_key: str
    what: Literal["checkpoint", "state"]
    step: int
    bytes: int


def apply_keep_rules(plan: Plan, storage: Storage, run_keys: Collection[str] | None = None) -> list[Removal]:
    """Removes what the sweep's rule does not keep, unless another sweep of this storage keeps it or has yet to evaluate it.

    Weights go once everything that any sweep asks of the checkpoint is evaluated, states once the run is finished. What cannot be
    removed is told in the log and tried again the next time. run_keys: the runs to look at; left out: all of the plan's.
    """
    if plan.keep.removes_nothing:
        return []
    removed: list[Removal] = []
    with plans_lock(storage):
        sweeps = _Sweeps(plan, storage)
        for run in plan.runs:
            if run_keys is None or run.run_key in run_keys:
                try:
                    for removal in _keep_to_rule(run, sweeps):
                        removed.append(removal)  # one by one: what went before an error is told as well
                except (OSError, BadInput) as error:  # a disk that fails; a damaged record
                    log.warning("keep rule %s: run %s is left as it is: %s", plan.keep, run.run_key, first_line(error))
    return removed


def removed_but_asked(plan: Plan, storage: Storage) -> dict[str, list[int]]:
    """By run key, the steps whose weights a keep rule has removed and of which the plan asks something that is not evaluated."""
    found = {}
    for run in plan.runs:
        folder = storage.run(run.run_key)
        removed = [step for step in folder.removed_steps() if step in run.checkpoint_steps]
        if steps := [step for step in removed if not all(folder.is_evaluated(item.folder, step) for item in plan.asked_of(run))]:
            found[run.run_key] = steps
    return found


def forget_removed(plan: Plan, storage: Storage) -> list[str]:
    """Takes away what is left of removed checkpoints that are asked for again, so that their runs are trained again; returns their keys."""
    asked = removed_but_asked(plan, storage)
    for run_key, steps in asked.items():
        for step in steps:
            _drop(storage.run(run_key).checkpoint(step))
    return list(asked)


def rule_has_changed(plan: Plan, storage: Storage) -> bool:
    """True where the plan that is stored, by which other sweeps go, has another rule."""
    stored = read_plan(storage, plan.sweep)
    return stored is not None and stored.keep != plan.keep


def notes_on_keeping(plan: Plan, storage: Storage) -> list[str]:
    """What the reader of a plan should know: what is kept at the end, and what has to be trained again."""
    notes = []
    if plan.keep.checkpoints != "all":
        notes.append(f"checkpoints whose weights are kept once all is evaluated: {plan.keep}")
    if plan.keep.state == "drop":
        notes.append("the resumable state of a finished run is not kept: the run cannot be extended")
    if asked := removed_but_asked(plan, storage):
        steps = sum(map(len, asked.values()))
        checkpoints = "1 checkpoint was" if steps == 1 else f"{steps} checkpoints were"
        runs = "its run is" if len(asked) == 1 and steps == 1 else "their run is" if len(asked) == 1 else f"their {len(asked)} runs are"
        notes.append(f"{checkpoints} removed by a keep rule and not evaluated on everything that is asked now: {runs} trained again")
    return notes


class _Sweeps:
    """This sweep, and the others of the storage, which are read once something is about to be removed."""

    def __init__(self, plan: Plan, storage: Storage):
        self.plan, self.storage = plan, storage
        self._others: dict[str, list[tuple[Plan, RunSpec]]] | None = None
        self._is_readable = True

    def of(self, run: RunSpec) -> list[tuple[Plan, RunSpec]] | None:
        """Every sweep that shares a run, with the run as that sweep plans it; None where that cannot be told."""
        if self._others is None:
            self._others = {}
            for plan in self._read():
                for each in plan.runs:
                    self._others.setdefault(each.run_key, []).append((plan, each))
        return [(self.plan, run), *self._others.get(run.run_key, [])] if self._is_readable else None

    def _read(self) -> Iterator[Plan]:
        for folder in sorted((self.storage.root / "sweeps").glob("*")):
            if folder.name == self.plan.sweep:
                continue
            try:
                plan = read_plan(self.storage, folder.name)
            except BadInput as damaged:
                self._is_readable = False
                log.warning("nothing is removed, since it cannot be told what another sweep needs: %s", first_line(damaged))
                continue
            if plan is not None:
                yield plan


def _keep_to_rule(run: RunSpec, sweeps: _Sweeps) -> Iterator[Removal]:
    if sweeps.plan.keep.checkpoints != "all":
        yield from _remove_checkpoints(run, sweeps)
    if sweeps.plan.keep.state == "drop":
        yield from _drop_states(run, sweeps)


def _remove_checkpoints(run: RunSpec, sweeps: _Sweeps) -> Iterator[Removal]:
    """Removes the weights that no sweep keeps or has yet to evaluate."""
    storage, folder = sweeps.storage, sweeps.storage.run(run.run_key)
    available = []
    for step in folder.committed_steps():
        if folder.is_removed(step):
            _finish_removing(folder.checkpoint(step), sweeps.plan)  # where a process was killed over it
        else:
            available.append(step)
    candidates = sorted({*available} - _kept(sweeps.plan, run, storage, available))
    shared = sweeps.of(run) if candidates else None
    if shared is None:
        return
    kept = set().union(*(_kept(plan, spec, storage, available) for plan, spec in shared))
    for step in candidates:
        if step not in kept and all(_is_evaluated(plan, spec, storage, step) for plan, spec in shared):
            yield Removal(run.run_key, "checkpoint", step, _remove_weights(folder.checkpoint(step), sweeps.plan))


def _is_evaluated(plan: Plan, run: RunSpec, storage: Storage, step: int) -> bool:
    """True where nothing that the sweep asks of the checkpoint is left to do; results are opened, since they cannot be had again."""
    asked = plan.asked_of(run) if step in run.checkpoint_steps else []
    return all(read_metrics(storage, run.run_key, step, evaluation) is not None for evaluation in asked)


def _kept(plan: Plan, run: RunSpec, storage: Storage, available: list[int]) -> set[int]:
    """The steps that a sweep's rule keeps of the checkpoints that are there; what is still to be evaluated may be among the others."""
    rule = plan.keep.checkpoints
    if rule == "all":
        return {*available}
    own = [step for step in available if step in run.checkpoint_steps]
    if isinstance(rule, int):
        return {*own[-rule:]}
    return {*own[-1:], *(_best(plan, run, storage, own) if rule == "best" else [])}


def _best(plan: Plan, run: RunSpec, storage: Storage, steps: list[int]) -> list[int]:
    """The step with the best score, the earliest of equals; empty where none is evaluated yet."""
    evaluation = next(spec for spec in plan.asked_of(run) if spec.folder == plan.keep.evaluation)
    found = {step: read_metrics(storage, run.run_key, step, evaluation) for step in steps}
    scores = {step: metrics[plan.keep.metric] for step, metrics in found.items() if metrics is not None}
    return [max(scores, key=lambda step: (scores[step], -step))] if scores else []


def _remove_weights(checkpoint: Path, plan: Plan) -> int:
    """Removes the weights of a checkpoint and leaves the record; returns the bytes that are free now."""
    weights = checkpoint / ADAPTER_WEIGHTS
    size = weights.stat().st_size
    weights.rename(checkpoint / WEIGHTS_ON_THEIR_WAY_OUT)
    sync(checkpoint)
    _finish_removing(checkpoint, plan)
    return size


def _finish_removing(checkpoint: Path, plan: Plan) -> None:
    """The steps after the renaming, as far as they are still to be done."""
    leaving = checkpoint / WEIGHTS_ON_THEIR_WAY_OUT
    if not leaving.is_file():
        return
    os.truncate(leaving, 0)
    if not (checkpoint / REMOVED).is_file():
        write_json(checkpoint / REMOVED, {"time": now(), "rule": str(plan.keep), "sweep": plan.sweep})
    leaving.unlink()


def _drop_states(run: RunSpec, sweeps: _Sweeps) -> Iterator[Removal]:
    """Removes the states of a finished run that no sweep keeps."""
    folder = sweeps.storage.run(run.run_key)
    for leaving in (folder.path / "state").glob(f"{_DROPPED}*"):
        shutil.rmtree(leaving)
    states = folder.states()
    if not states or (read_run(sweeps.storage, run.run_key) or {}).get("status") != "finished":
        return
    shared = sweeps.of(run)
    if shared is None or any(plan.keep.state == "keep" for plan, _ in shared):
        return
    if {step for _, spec in shared for step in spec.checkpoint_steps} <= {*folder.committed_steps()}:
        for step, path in sorted(states.items()):
            yield Removal(run.run_key, "state", step, _drop(path))


def _drop(folder: Path) -> int:
    """Removes a folder, which is gone or whole at any moment; returns the bytes that its files took."""
    size = sum(file.stat().st_size for file in folder.iterdir())
    leaving = folder.with_name(_DROPPED + folder.name)
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    shutil.rmtree(leaving)
    return size
