"""One trial: its runs over one loaded base model, as many at once as its pack has places, the others as places become free."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist

from jmedlora.config.faults import first_line, is_out_of_memory
from jmedlora.data.patience import when_there_is_room
from jmedlora.models.load import load_base, load_tokenizer
from jmedlora.models.lora import target_modules
from jmedlora.models.source import materialise
from jmedlora.plan.layout import RunFolder, Storage
from jmedlora.plan.lease import WAIT_S, RunHeld, run_lease
from jmedlora.plan.packing import geometry, trajectories_of
from jmedlora.plan.specs import RunSpec, TrialSpec
from jmedlora.training.engine import StepDropped
from jmedlora.training.pack import Wishes, training_pack
from jmedlora.training.process import Worker, this_worker
from jmedlora.training.records import Listener, RunRecords, Status
from jmedlora.training.rows import BaseModel, TrainingSet, digest_tokenizer
from jmedlora.training.state import SavedState
from jmedlora.training.trajectory import Beginning, Member, Trajectory, find_beginning

__all__ = ["Listener", "RunOutcome", "is_finished", "train_trial"]

STATE_EVERY_S = 300.0
"""What a killed run loses at most, beside the step that it was at; a state is written at every checkpoint as well."""


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended; `skipped` where it was finished before this trial began, or is being trained by another one (`held`)."""

    run_key: str
    status: Status | Literal["held"]
    error: str | None = None
    skipped: bool = False


def train_trial(
    trial: TrialSpec,
    storage: Storage,
    sources: Path,
    offline: bool,
    listener: Listener,
    should_stop: Callable[[], bool] = lambda: False,
    hints: Mapping[str, str] = MappingProxyType({}),
) -> list[RunOutcome]:
    """Trains those runs of a trial that are not finished from where they stand; every worker of the process group calls it.

    Runs begin in the trial's order, up to `trial.pack` at once; with `trial.share_prefixes` runs of one trajectory are one of
    these. A run that fails is recorded, and the others go on. With several workers an error other than a loss that is not
    finite is raised after recording, since the workers cannot know whether they still agree.
    should_stop: once it says yes on any worker, the runs at hand stop after their step, with their state saved, and the trial ends.
    hints: by run key, what would need less memory; told with a run that runs out of it.
    Raises ValueError when the runs cannot share a base model, and what loading the base raises.
    """
    _check_shared(trial)
    return _Trial(trial, storage, sources, offline, this_worker(), listener, should_stop, hints).train()


def is_finished(storage: Storage, spec: RunSpec) -> bool:
    """True once a run is recorded as finished and every checkpoint that is asked for is committed."""
    folder = storage.run(spec.run_key)
    try:
        status = json.loads(folder.run_json.read_text(encoding="utf-8"))["status"]
    except FileNotFoundError:
        return False
    return status == "finished" and all(folder.is_committed(step) for step in spec.checkpoint_steps)


@dataclass
class _Trial:
    trial: TrialSpec
    storage: Storage
    sources: Path
    offline: bool
    worker: Worker
    listener: Listener
    should_stop: Callable[[], bool]
    hints: Mapping[str, str]

    def __post_init__(self) -> None:
        self.base: BaseModel | None = None
        self.outcomes: dict[str, RunOutcome] = {}
        self.is_stopping = False
        self.places = self.trial.pack
        self.leases = ExitStack()
        """Gives all runs free, however the trial ends."""

    def train(self) -> list[RunOutcome]:
        """Trains until all is done or the trial is to stop; outcomes are in the order in which runs ended."""
        waiting = deque(trajectories_of(self.trial.runs, self.trial.share_prefixes))
        training: list[Trajectory] = []
        with self.leases:
            while waiting or training:
                if not training and self._agreed(self.should_stop()):
                    break
                while waiting and len(training) < self.places and _fits(waiting[0], training):
                    # while others train, nobody is waited for: what is held comes with the next worker group
                    if (opened := self._open(waiting.popleft(), wait_s=0.0 if training else WAIT_S)) is not None:
                        training.append(opened)
                if training:
                    training, again = self._train_together(training)
                    waiting.extendleft(reversed(again))
                if self.is_stopping:
                    break
        return list(self.outcomes.values())

    # -- a trajectory's beginning

    def _open(self, specs: list[RunSpec], wait_s: float) -> Trajectory | None:
        """Takes runs into hand, the shorter ones first; None where nothing is left to train. wait_s: for whoever holds one of them."""
        members: list[Member] = []
        for spec in specs:
            if self._agreed(is_finished(self.storage, spec)):
                self.outcomes[spec.run_key] = RunOutcome(spec.run_key, "finished", skipped=True)
                continue
            holds = ExitStack()
            self.leases.callback(holds.close)
            folder = self.storage.run(spec.run_key)
            if held := self._lease(folder, holds, wait_s):
                self.outcomes[spec.run_key] = RunOutcome(spec.run_key, "held", held, skipped=True)
            elif self._agreed(is_finished(self.storage, spec)):  # by whoever held it until now
                self.outcomes[spec.run_key] = RunOutcome(spec.run_key, "finished", skipped=True)
                holds.close()
            else:
                members.append(Member(spec, folder, [], None, holds))
        if not members:
            return None
        if self.base is None:
            self.base = self._load(members[0].spec)
        return self._begin(specs, members, self.base)

    def _begin(self, specs: list[RunSpec], members: list[Member], base: BaseModel) -> Trajectory | None:
        """Reads where the runs stand, and their rows."""
        beginning = self._beginning(specs, [member.spec.run_key for member in members])
        for member in members:
            spec = member.spec
            member.checkpoint_steps = beginning.checkpoint_steps[spec.run_key]
            if self.worker.leads:
                start, notes = min(beginning.step, spec.total_steps), beginning.notes[spec.run_key]
                workers, device = self.worker.workers, self.worker.device.type
                member.records = RunRecords(member.folder, spec, workers, device, self.listener, start, notes)
        trajectory = Trajectory(members, beginning.step)
        try:
            lead = trajectory.lead
            trajectory.rows = TrainingSet(lead, base, self.sources)
            trajectory.targets = target_modules(base.model, lead.settings, lead.model.family)
            for member in members:
                if member.records is not None:
                    member.records.tell(truncated_rows=trajectory.rows.truncated)
            trajectory.adopt()
            if not trajectory.is_over and beginning.state is not None:
                trajectory.state = SavedState(beginning.step, beginning.state).tensors()
        except Exception as reason:
            self._failed(trajectory, reason)
        if not trajectory.is_over:
            return trajectory
        self._take_outcomes(trajectory)
        return None

    def _beginning(self, specs: list[RunSpec], unfinished: list[str]) -> Beginning:
        """The same on every worker: as the leading one finds it."""
        found: list[Any] = [None]
        if self.worker.leads:
            found = [when_there_is_room(lambda: find_beginning(specs, unfinished, self.storage), "what runs take from each other")]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _lease(self, folder: RunFolder, holds: ExitStack, wait_s: float) -> str | None:
        """Holds the run, by its leading worker; tells, on every worker, who else holds it."""
        held: list[str | None] = [None]
        if self.worker.leads:
            try:
                holds.enter_context(run_lease(folder, self.should_stop, wait_s))
            except RunHeld as other:
                held = [str(other)]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    # -- training

    def _train_together(self, training: list[Trajectory]) -> tuple[list[Trajectory], list[list[RunSpec]]]:
        """Trains until one is through or has failed, or the trial is to stop; returns those that go on, and those to be begun again."""
        assert self.base is not None
        try:
            with training_pack(training, self.base, self.worker) as pack:
                saved_at = time.monotonic()
                while True:
                    is_due = self.worker.leads and time.monotonic() - saved_at >= STATE_EVERY_S
                    stepped, wishes = pack.step(Wishes(is_due, self.should_stop()))
                    for place, (each, result) in enumerate(zip(training, stepped, strict=True)):
                        if result.record is None:
                            each.end("failed", result.problem)
                            continue
                        each.add_step(result.record)
                        each.save(
                            lambda place=place: pack.adapter_tensors(place),  # type: ignore[misc]
                            lambda place=place: pack.state_tensors(place),  # type: ignore[misc]
                            wishes.state or wishes.stop,
                        )
                    if wishes.state:
                        saved_at = time.monotonic()
                    self.is_stopping = wishes.stop
                    if self.is_stopping:
                        for each in training:
                            each.end("interrupted", None)
                    left = [(place, each) for place, each in enumerate(training) if not each.is_over]
                    if len(left) < len(training):
                        for place, each in left:
                            each.state = pack.state_tensors(place)
                        break
        except Exception as reason:
            return [], self._broken(training, reason)
        for each in training:
            self._take_outcomes(each)
        return [each for _, each in left], []

    def _broken(self, training: list[Trajectory], reason: Exception) -> list[list[RunSpec]]:
        """After an error that hit all of a pack: its runs are begun again one by one, from what is stored; one alone has failed."""
        if len(training) == 1 or (self.worker.workers > 1 and not isinstance(reason, StepDropped)):
            for each in training:
                self._failed(each, reason)
                self._take_outcomes(each)
            if self.worker.workers > 1:
                raise reason
            return []
        self.places = 1
        again = []
        for each in training:
            again.append([member.spec for member in each.members])
            each.release(f"trained without others from here on: {first_line(reason)}")
            self._take_outcomes(each)
        return again

    def _failed(self, trajectory: Trajectory, reason: Exception) -> None:
        hint = self.hints.get(trajectory.lead.run_key)
        trajectory.end("failed", _told(reason, hint))

    def _take_outcomes(self, trajectory: Trajectory) -> None:
        for run_key, status, error in trajectory.ended:
            self.outcomes[run_key] = RunOutcome(run_key, status, error)

    def _agreed(self, answer: bool) -> bool:
        """The leading worker's answer, on every worker: storage may look different from elsewhere for a moment."""
        answers = [answer if self.worker.leads else None]
        dist.broadcast_object_list(answers, src=0)
        return bool(answers[0])

    def _load(self, spec: RunSpec) -> BaseModel:
        folder = materialise(spec.model, self.sources, self.offline)
        # ZeRO-3 moves unquantised weights to the device in shards; what is quantised has to be there from the start.
        in_shards = spec.deepspeed.zero_stage == 3 and spec.precision != "nf4"
        device = torch.device("cpu") if in_shards else self.worker.device
        model = load_base(folder, spec.precision, spec.compute_precision, spec.method.double_quantisation, device)
        return BaseModel(model, load_tokenizer(folder), digest_tokenizer(folder))


def _fits(specs: list[RunSpec], training: list[Trajectory]) -> bool:
    """Whether runs can train beside those that are in training already."""
    return all(geometry(each.lead) == geometry(specs[-1]) for each in training)


def _told(reason: Exception, hint: str | None) -> str:
    if is_out_of_memory(reason):
        return f"out of memory: {first_line(reason)}" + (f"; what would fit: {hint}" if hint else "")
    return f"{type(reason).__name__}: {reason}"


def _check_shared(trial: TrialSpec) -> None:
    kinds = {
        (run.model.model_dump_json(), run.precision, run.compute_precision, run.method.double_quantisation, run.deepspeed.zero_stage)
        for run in trial.runs
    }
    if len(kinds) != 1:
        raise ValueError(f"trial {trial.trial_id}: its runs differ in base model, precision or ZeRO stage, or it has none")
