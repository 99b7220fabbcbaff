"""A trajectory in storage: runs that are the same but for their duration, each with its folder, records, checkpoints and states."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from jmedlora.data.atomic import appearing, write_json_lines
from jmedlora.data.patience import when_there_is_room
from jmedlora.models.adapters import base_name, save_adapter
from jmedlora.models.lora import lora_config
from jmedlora.plan.checksums import AdapterDamaged, verify, verify_what_is_left
from jmedlora.plan.layout import RunFolder, Storage
from jmedlora.plan.specs import RunSpec
from jmedlora.training.records import RunRecords, Status, library_versions, read_steps
from jmedlora.training.rows import TrainingSet
from jmedlora.training.state import SavedState, keep_newest, save_state, states_of, told_passed_over


class Beginning(NamedTuple):
    """Where a trajectory goes on from, as its leading worker found it in storage."""

    step: int
    state: Path | None
    notes: dict[str, list[str]]
    """What there is to tell about that, by run."""
    checkpoint_steps: dict[str, list[int]]
    """After which steps an adapter is written, by run."""


def find_beginning(specs: Sequence[RunSpec], unfinished: Collection[str], storage: Storage) -> Beginning:
    """The newest state that any run of the trajectory has, before which every checkpoint is whole, or can be had from another of the runs.

    specs: all runs of the trajectory; unfinished: keys of those that are to be trained. What these lack of checkpoints and of records
    of the steps before is copied to them. A checkpoint cannot be made again from a later state: where one is
    damaged everywhere, training goes on from before it. Of a run that another sweep shares, the checkpoints which that has asked
    for are written again, so that neither takes the other's away.
    """
    folders = {spec.run_key: storage.run(spec.run_key) for spec in specs}
    steps = {
        spec.run_key: sorted({*spec.checkpoint_steps, *(at for at in folders[spec.run_key].committed_steps() if at <= spec.total_steps)})
        for spec in specs
        if spec.run_key in unfinished
    }
    found: list[tuple[SavedState, RunFolder]] = []
    passed_over: list[str] = []
    for spec in specs:
        whole, not_whole = states_of(folders[spec.run_key], spec.run_key)
        found += [(state, folders[spec.run_key]) for state in whole]
        passed_over += not_whole
    for state, owner in sorted(found, key=lambda item: -item[0].step):
        needed = {key: [step for step in own if step <= state.step] for key, own in steps.items()}
        try:
            lacking = {key: _lacking(own, folders[key], folders.values()) for key, own in needed.items()}
        except AdapterDamaged as lost:
            passed_over.append(told_passed_over(state.folder, str(lost)))
            continue
        copied = {
            spec.run_key: _complete(spec, lacking[spec.run_key], folders[spec.run_key], owner, state.step)
            for spec in specs
            if spec.run_key in steps
        }
        return Beginning(state.step, state.folder, {key: [*passed_over, *told] for key, told in copied.items()}, steps)
    return Beginning(0, None, {run_key: list(passed_over) for run_key in steps}, steps)


def _lacking(needed: Sequence[int], own: RunFolder, folders: Collection[RunFolder]) -> dict[int, RunFolder]:
    """The steps whose checkpoints a run lacks, and who has them. Raises AdapterDamaged for one that nobody has whole."""
    found = {}
    for step in needed:
        try:
            verify_what_is_left(own.checkpoint(step))
        except AdapterDamaged as damaged:
            others = [folder for folder in folders if folder.path != own.path and _is_whole(folder, step)]
            if not others:
                raise AdapterDamaged(f"the checkpoint of step {step} before it is not whole ({damaged})") from None
            found[step] = others[0]
    return found


def _is_whole(folder: RunFolder, step: int) -> bool:
    try:
        verify(folder.checkpoint(step))
    except AdapterDamaged:
        return False
    return True


def _complete(spec: RunSpec, lacking: Mapping[int, RunFolder], own: RunFolder, owner: RunFolder, step: int) -> list[str]:
    """Copies what a run lacks of its first `step` steps from the others of its trajectory; returns what there is to tell."""
    for at, source in lacking.items():
        with appearing(own.checkpoint(at)) as aside:
            shutil.copytree(source.checkpoint(at), aside, dirs_exist_ok=True)
    until = min(step, spec.total_steps)
    if len([line for line in read_steps(own) if line["step"] <= until]) < until:
        own.path.mkdir(parents=True, exist_ok=True)
        write_json_lines(own.train_jsonl, [line for line in read_steps(owner) if line["step"] <= until])
        return [f"its first {until} steps are those of run {owner.path.name}, which differs in its duration alone"]
    return [f"the checkpoints of steps {', '.join(map(str, lacking))} are copies of another run's of its trajectory"] if lacking else []


@dataclass
class Member:
    """A run of a trajectory that is not finished. records: on the leading worker only."""

    spec: RunSpec
    folder: RunFolder
    checkpoint_steps: list[int]
    records: RunRecords | None
    holds: ExitStack
    """Gives the run free again."""


@dataclass
class Trajectory:
    """Runs in training that differ in their duration alone, the shorter ones first; an ordinary run is the only one of its trajectory."""

    members: list[Member]
    step: int = 0
    """Optimizer steps that are done."""
    state: dict[str, Tensor] | None = None
    """What to go on from, where it is not on an engine."""
    ended: list[tuple[str, Status, str | None]] = field(default_factory=list)
    """Runs that are through: key, how, error."""
    rows: TrainingSet = field(init=False)
    targets: list[str] = field(init=False)
    """Names of the layers that the adapter changes."""

    @property
    def lead(self) -> RunSpec:
        """The longest run."""
        return self.members[-1].spec

    @property
    def is_over(self) -> bool:
        return not self.members

    def add_step(self, record: dict[str, Any]) -> None:
        """Takes the record of a step that was done."""
        self.step = record["step"]
        for member in self.members:
            if member.records is not None:
                member.records.add_step({**record, "shared_by": len(self.members)} if len(self.members) > 1 else record)

    def save(self, adapter: Callable[[], dict[str, Tensor]], state: Callable[[], dict[str, Tensor]], wants_state: bool) -> None:
        """Writes what is due after a step: checkpoints, states, the ends of runs.

        adapter, state: give the tensors, on all workers alike.
        """
        due = [member for member in self.members if self.step in member.checkpoint_steps]
        if due:
            tensors = adapter()
            for member in due:
                _checkpoint(member, self.step, tensors, self.targets)
        through = [member for member in self.members if self.step >= member.spec.total_steps]
        keeping = [member for member in self.members if member in through or (member is self.members[-1] and (wants_state or due))]
        if keeping:
            tensors = state()
            for member in keeping:
                _save_state(member, self.step, tensors)
        for member in through:
            if member.records is not None:
                keep_newest(member.folder, 1)
            self._end(member, "finished", None)

    def adopt(self) -> None:
        """Ends the runs all of whose steps are done already, in another run of the trajectory."""
        for member in [member for member in self.members if member.spec.total_steps <= self.step]:
            self._end(member, "finished", None)

    def release(self, note: str) -> None:
        """Gives the runs free without an end, with a line to tell why."""
        for member in self.members:
            if member.records is not None:
                member.records.add_note(note)
            member.holds.close()
        self.members = []

    def end(self, status: Status, error: str | None) -> None:
        """Marks the runs that are not through as failed or interrupted."""
        for member in list(self.members):
            self._end(member, status, error)

    def _end(self, member: Member, status: Status, error: str | None) -> None:
        if member.records is not None:
            member.records.end(status, error)
        self.members.remove(member)
        self.ended.append((member.spec.run_key, status, error))
        member.holds.close()


def _checkpoint(member: Member, step: int, tensors: dict[str, Tensor], targets: list[str]) -> None:
    records, spec = member.records, member.spec
    if records is not None:
        config, base = lora_config(spec.settings, targets), base_name(spec.model)
        when_there_is_room(
            lambda: save_adapter(member.folder.checkpoint(step), tensors, config, base), f"checkpoint of step {step}", records.add_note
        )
        records.add_checkpoint(step)


def _save_state(member: Member, step: int, tensors: dict[str, Tensor]) -> None:
    records, spec = member.records, member.spec
    if records is not None:
        facts = {"run_key": spec.run_key, "total_steps": spec.total_steps, "versions": library_versions()}
        records.sync()
        when_there_is_room(lambda: save_state(member.folder, step, tensors, facts), f"state of step {step}", records.add_note)
