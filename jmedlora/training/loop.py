"""One trial: its runs one after another, over one loaded base model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist

from jmedlora.config.faults import first_line, is_out_of_memory
from jmedlora.models.load import load_base, load_tokenizer
from jmedlora.models.source import materialise
from jmedlora.plan.layout import RunFolder, Storage
from jmedlora.plan.lease import RunHeld, run_lease
from jmedlora.plan.specs import RunSpec, TrialSpec
from jmedlora.training.engine import NotFinite
from jmedlora.training.process import Worker, this_worker
from jmedlora.training.records import Listener, RunRecords, Status
from jmedlora.training.run import BaseModel, digest_tokenizer, train_run
from jmedlora.training.state import newest_state

__all__ = ["Listener", "RunOutcome", "is_finished", "train_trial"]


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended; `skipped` where it was finished before this trial began, or is being trained by another one (`held`)."""

    run_key: str
    status: Status | Literal["held"]
    error: str | None = None
    skipped: bool = False


@dataclass(frozen=True)
class _Surroundings:
    """What the runs of a trial share beside their base model."""

    storage: Storage
    sources: Path
    worker: Worker
    listener: Listener
    should_stop: Callable[[], bool]
    hints: Mapping[str, str]


def train_trial(
    trial: TrialSpec,
    storage: Storage,
    sources: Path,
    offline: bool,
    listener: Listener,
    should_stop: Callable[[], bool] = lambda: False,
    hints: Mapping[str, str] = MappingProxyType({}),
) -> list[RunOutcome]:
    """Trains those runs of a trial that are not finished, in order, from where they stand; every worker of the process group calls it.

    A run that fails is recorded, and the next goes on. With several workers an error other than a loss that is not
    finite is raised after recording, since the workers cannot know whether they still agree.
    should_stop: once it says yes on any worker, the run at hand stops after its step, with its state saved, and the trial ends.
    hints: by run key, what would need less memory; told with a run that runs out of it.
    Raises ValueError when the runs cannot share a base model, and what loading the base raises.
    """
    _check_shared(trial)
    worker = this_worker()
    around = _Surroundings(storage, sources, worker, listener, should_stop, hints)
    base: BaseModel | None = None
    outcomes: list[RunOutcome] = []
    for spec in trial.runs:
        if _agreed(worker, should_stop()):
            break
        if _agreed(worker, is_finished(storage, spec)):
            outcomes.append(RunOutcome(spec.run_key, "finished", skipped=True))
            continue
        if base is None:
            base = _load(spec, sources, offline, worker)
        outcomes.append(_train(spec, base, around))
        if outcomes[-1].status == "interrupted":
            break
    return outcomes


def is_finished(storage: Storage, spec: RunSpec) -> bool:
    """True once a run is recorded as finished and every checkpoint that is asked for is committed."""
    folder = storage.run(spec.run_key)
    try:
        status = json.loads(folder.run_json.read_text(encoding="utf-8"))["status"]
    except FileNotFoundError:
        return False
    return status == "finished" and all(folder.is_committed(step) for step in spec.checkpoint_steps)


def _train(spec: RunSpec, base: BaseModel, around: _Surroundings) -> RunOutcome:
    folder = around.storage.run(spec.run_key)
    worker = around.worker
    with _lease(folder, around) as held:
        if held:
            return RunOutcome(spec.run_key, "held", held, skipped=True)
        if _agreed(worker, is_finished(around.storage, spec)):  # by whoever held it until now
            return RunOutcome(spec.run_key, "finished", skipped=True)
        start, notes, checkpoint_steps = _start(spec, folder, worker)
        records = RunRecords(folder, spec, worker.workers, worker.device.type, around.listener, start, notes) if worker.leads else None
        status: Status = "failed"
        error: str | None = None
        try:
            is_done = train_run(spec, base, folder, around.sources, worker, records, checkpoint_steps, start, around.should_stop)
            status = "finished" if is_done else "interrupted"
        except NotFinite as reason:
            error = str(reason)
        except Exception as reason:
            error = _told(reason, around.hints.get(spec.run_key))
            if worker.workers > 1:
                if records is not None:
                    records.end(status, error)
                raise
        if records is not None:
            records.end(status, error)
        return RunOutcome(spec.run_key, status, error)


@contextmanager
def _lease(folder: RunFolder, around: _Surroundings) -> Iterator[str | None]:
    """Holds the run, by its leading worker; gives, on every worker, who else holds it, or None."""
    with ExitStack() as stack:
        held: list[str | None] = [None]
        if around.worker.leads:
            try:
                stack.enter_context(run_lease(folder, around.should_stop))
            except RunHeld as other:
                held = [str(other)]
        dist.broadcast_object_list(held, src=0)
        yield held[0]


def _told(reason: Exception, hint: str | None) -> str:
    if is_out_of_memory(reason):
        return f"out of memory: {first_line(reason)}" + (f"; what would fit: {hint}" if hint else "")
    return f"{type(reason).__name__}: {reason}"


def _start(spec: RunSpec, folder: RunFolder, worker: Worker) -> tuple[int, list[str], list[int]]:
    """The steps that are done and can be gone on from, what there is to tell about that, and when checkpoints are to be written.

    The same on every worker: as the leading one finds it. Another sweep may share the run and have asked for other checkpoints:
    what it has is written again, so that neither takes the other's away.
    """
    found: list[Any] = [None]
    if worker.leads:
        state, passed_over = newest_state(folder, spec.checkpoint_steps, spec.run_key)
        others = [step for step in folder.committed_steps() if step <= spec.total_steps]
        found = [(state.step if state else 0, passed_over, sorted({*spec.checkpoint_steps, *others}))]
    dist.broadcast_object_list(found, src=0)
    step, notes, checkpoint_steps = found[0]
    return step, notes, checkpoint_steps


def _check_shared(trial: TrialSpec) -> None:
    kinds = {
        (run.model.model_dump_json(), run.precision, run.compute_precision, run.method.double_quantisation, run.deepspeed.zero_stage)
        for run in trial.runs
    }
    if len(kinds) != 1:
        raise ValueError(f"trial {trial.trial_id}: its runs differ in base model, precision or ZeRO stage, or it has none")


def _agreed(worker: Worker, answer: bool) -> bool:
    """The leading worker's answer, on every worker: storage may look different from elsewhere for a moment."""
    answers = [answer if worker.leads else None]
    dist.broadcast_object_list(answers, src=0)
    return bool(answers[0])


def _load(spec: RunSpec, sources: Path, offline: bool, worker: Worker) -> BaseModel:
    folder = materialise(spec.model, sources, offline)
    # ZeRO-3 moves unquantised weights to the device in shards; what is quantised has to be there from the start.
    in_shards = spec.deepspeed.zero_stage == 3 and spec.precision != "nf4"
    device = torch.device("cpu") if in_shards else worker.device
    model = load_base(folder, spec.precision, spec.compute_precision, spec.method.double_quantisation, device)
    return BaseModel(model, load_tokenizer(folder), digest_tokenizer(folder))
