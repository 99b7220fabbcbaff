"""Which runs train together: runs that share a trajectory, packs of trajectories over one base model, and trials that work through them.

A trial loads its base model once and takes `pack` adapters at a time through it; the next begins where one is through. Packing
saves what a step costs beside arithmetic, so it pays for small steps and not for large ones.
"""

from __future__ import annotations

import heapq
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from jmedlora.config.digest import key_of
from jmedlora.config.parts import Architecture, ResourcesConfig
from jmedlora.config.sweep import PackSize
from jmedlora.plan.costs import TRIAL_START_S, concurrent_trials, step_overhead_s, step_seconds, step_tokens
from jmedlora.plan.memory import CACHED_TOKENS, ESTIMATE_ERROR, GIGABYTE, evaluation_memory, memory_of
from jmedlora.plan.specs import Plan, RunSpec, TrialSpec

LARGEST_PACK = 16
"""Adapters at once where the sweep does not say; the gain of further ones is small, and what one fault stops grows."""
OVERHEAD_SHARE = 0.05
"""On a CPU, a pack grows until what a step costs beside arithmetic is less than this share of it; on a GPU, until arithmetic takes as long:
kernels are launched while others run."""
PACKED_TOKENS = 2 * CACHED_TOKENS
"""On a CPU, what steps of a pack have together at most: more fill its micro-batches anyway, and those of others as well."""
EVALUATED_TOGETHER = 8
"""Adapters that are evaluated at once where the sweep does not say, at most."""
LONGEST_TRIAL_S = 3600.0
"""Trials of more work are divided, so that places which become free find something to do, and scores come in early."""


@dataclass(frozen=True)
class Trajectory:
    """Runs that differ in their duration alone, the shorter ones first, and what training the longest takes."""

    runs: list[RunSpec]
    arithmetic_s: float
    """Of one worker that has all the work."""
    overhead_s: float
    """What its steps cost beside, when they are taken one adapter at a time."""

    @property
    def lead(self) -> RunSpec:
        return self.runs[-1]

    @property
    def seconds(self) -> float:
        return self.arithmetic_s + self.overhead_s


def geometry(run: RunSpec) -> tuple[object, ...]:
    """What runs have to have in common to train at once: the layers that are adapted, and how mini-batches are taken."""
    settings = run.settings
    return settings.targets, settings.micro_batch_size, settings.gradient_checkpointing


def trajectories_of(runs: Sequence[RunSpec], share_prefixes: bool) -> list[list[RunSpec]]:
    """Runs that are trained as one, the shorter ones first; in the order of each trajectory's first run."""
    groups: dict[str, list[RunSpec]] = defaultdict(list)
    for run in runs:
        groups[run.trajectory_key if share_prefixes else run.run_key].append(run)
    return [sorted(group, key=lambda run: run.total_steps) for group in groups.values()]


def make_trials(
    runs: Sequence[RunSpec], resources: ResourcesConfig, shapes: dict[str, Architecture], pack: PackSize, share_prefixes: bool
) -> list[TrialSpec]:
    """The trials of a sweep, those with most work first.

    shapes: architectures by model name. As many trials as the machines hold at once, or more where they would last long.
    """
    kinds: dict[tuple[object, ...], list[Trajectory]] = defaultdict(list)
    for group in trajectories_of(runs, share_prefixes):
        kinds[_kind(group[-1])].append(_costed(group, resources, shapes[group[-1].model.name]))
    sizes = {kind: _pack_size(own, resources, shapes, pack) for kind, own in kinds.items()}
    work = {kind: packed_seconds(own, sizes[kind]) for kind, own in kinds.items()}
    lanes = _lanes(resources)
    trials: list[tuple[float, TrialSpec]] = []
    for kind, own in kinds.items():
        share = math.ceil(lanes * work[kind] / sum(work.values())) if sum(work.values()) else 1
        wanted = max(share, math.ceil(work[kind] / resources.workers_per_trial / LONGEST_TRIAL_S))
        # a trial of less work than its start takes would not make the sweep shorter
        count = min(wanted, len(own), max(1, int(work[kind] / resources.workers_per_trial / TRIAL_START_S)))
        for part in _divided(own, count):
            together = min(sizes[kind], len(part))
            trials.append((packed_seconds(part, together), _trial(part, together, resources, share_prefixes)))
    return [trial for _, trial in sorted(trials, key=lambda item: -item[0])]


def packed_seconds(trajectories: Sequence[Trajectory], pack: int) -> float:
    """Training time of one worker that has all the work, `pack` at once: arithmetic adds up, the rest of a step is paid once for all."""
    arithmetic = sum(each.arithmetic_s for each in trajectories)
    overhead = max(max(each.overhead_s for each in trajectories), sum(each.overhead_s for each in trajectories) / pack)
    return arithmetic + overhead


def evaluated_together(plan: Plan, resources: ResourcesConfig, shapes: dict[str, Architecture], pack: PackSize) -> int:
    """How many adapters are evaluated at once, at most: as the sweep says, or as many as fit."""
    if pack != "auto":
        return pack
    on_gpu = resources.gpus_per_worker > 0
    limit = resources.gpu_memory_gb * GIGABYTE / (1 + ESTIMATE_ERROR) if on_gpu else _machine_bytes() / 3 / resources.evaluation.actors
    if on_gpu and 0 < resources.evaluation.gpus < 1:
        limit *= resources.evaluation.gpus
    found = EVALUATED_TOGETHER
    for base in plan.bases:
        if (shape := shapes.get(base.model.name)) is not None and (adapter := plan.largest_adapter(base, shape)):
            asked = plan.asked_of(base)
            while found > 1 and evaluation_memory(base, asked, shape, on_gpu, adapter, found).total > limit:
                found -= 1
    return found


def trial_trajectories(trial: TrialSpec, resources: ResourcesConfig, shape: Architecture) -> list[Trajectory]:
    """The trajectories of a trial, with their costs."""
    return [_costed(group, resources, shape) for group in trajectories_of(trial.runs, trial.share_prefixes)]


def _costed(runs: list[RunSpec], resources: ResourcesConfig, shape: Architecture) -> Trajectory:
    lead = runs[-1]
    arithmetic, overhead = step_seconds(lead, resources, shape), step_overhead_s(lead, resources, shape)
    return Trajectory(runs, lead.total_steps * arithmetic, lead.total_steps * overhead)


def _kind(run: RunSpec) -> tuple[object, ...]:
    double = run.method.double_quantisation
    return run.base_key, run.model.name, run.precision, run.compute_precision, double, run.deepspeed.zero_stage, *geometry(run)


def _pack_size(trajectories: list[Trajectory], resources: ResourcesConfig, shapes: dict[str, Architecture], pack: PackSize) -> int:
    """How many of these to train at once: as the sweep says, or as many as pay and fit."""
    if pack != "auto":
        return pack
    lead = max((each.lead for each in trajectories), key=lambda run: (run.settings.rank, run.row_characters))
    shape = shapes[lead.model.name]
    arithmetic = min(step_seconds(each.lead, resources, shape) for each in trajectories) / resources.workers_per_trial
    share = 0.5 if resources.gpus_per_worker else OVERHEAD_SHARE
    pays = math.ceil(step_overhead_s(lead, resources, shape) * (1 - share) / (share * arithmetic))
    if not resources.gpus_per_worker:
        tokens = min(step_tokens(each.lead) for each in trajectories) / resources.workers_per_trial
        pays = min(pays, math.ceil(PACKED_TOKENS / tokens))
    most = max(1, min(pays, LARGEST_PACK, len(trajectories)))
    limit = _memory_limit(resources)
    fitting = [
        size
        for size in range(1, most + 1)
        if memory_of(lead, resources.workers_per_trial, shape, resources.gpus_per_worker > 0, pack=size).total <= limit
    ]
    return max(fitting, default=1)


def _memory_limit(resources: ResourcesConfig) -> float:
    """Bytes that a worker's pack may take by the estimate: a GPU's memory, or half of what this machine's workers share."""
    if resources.gpus_per_worker:
        return resources.gpu_memory_gb * GIGABYTE / (1 + ESTIMATE_ERROR)
    workers = _lanes(resources) * resources.workers_per_trial
    return _machine_bytes() / 2 / workers


def _machine_bytes() -> float:
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _lanes(resources: ResourcesConfig) -> int:
    """Trials at once; without GPUs, as many as this machine's cores hold beside evaluation."""
    known = concurrent_trials(resources)
    if known is not None:
        return known
    free = (os.cpu_count() or 1) - resources.evaluation.cpus * resources.evaluation.actors
    return max(1, free // (resources.workers_per_trial * resources.cpus_per_worker))


def _divided(trajectories: list[Trajectory], count: int) -> list[list[Trajectory]]:
    """Longest first, each to the part that has least; within a part the longest first, and of equals the narrowest."""
    parts: list[tuple[float, int, list[Trajectory]]] = [(0.0, place, []) for place in range(count)]
    for each in sorted(trajectories, key=lambda each: (-each.seconds, each.lead.settings.rank)):
        work, place, part = heapq.heappop(parts)
        part.append(each)
        heapq.heappush(parts, (work + each.seconds, place, part))
    return [part for _, _, part in sorted(parts, key=lambda item: item[1])]


def _trial(part: list[Trajectory], pack: int, resources: ResourcesConfig, share_prefixes: bool) -> TrialSpec:
    runs = [run for each in part for run in each.runs]
    return TrialSpec(
        trial_id=key_of([run.run_key for run in runs]),
        runs=runs,
        workers=resources.workers_per_trial,
        cpus_per_worker=resources.cpus_per_worker,
        gpus_per_worker=resources.gpus_per_worker,
        pack=pack,
        share_prefixes=share_prefixes,
    )


def notes_on_sharing(runs: Sequence[RunSpec], share_prefixes: bool) -> list[str]:
    """What the reader of a plan should know about durations."""
    if not share_prefixes:
        return []
    shared = len(runs) - len(trajectories_of(runs, share_prefixes=True))
    notes = []
    if shared:
        verb = "is the beginning of another and is trained with it" if shared == 1 else "are beginnings of others and are trained with them"
        notes.append(f"{shared} of {len(runs)} runs {verb} (share_prefixes: false trains each by itself)")
    bound: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for run in runs:
        if run.settings.schedule != "constant":
            bound[_without_duration(run)].add(run.total_steps)
    if schedules := sorted({key[0] for key, steps in bound.items() if len(steps) > 1}):
        told = f"runs that differ in duration alone share nothing where the learning rate depends on it ({', '.join(schedules)})"
        notes.append(f"{told}: they are packed instead; schedule: constant would share")
    return notes


def _without_duration(run: RunSpec) -> tuple[str, ...]:
    settings = run.settings.model_dump_json(exclude={"epochs", "max_steps"})
    return run.settings.schedule, run.base_key, run.method.name, run.data_digest, run.prompt.name, settings
