"""What a sweep will need: memory, time, bytes on disk. All figures are estimates from shapes and counts."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from jmedlora.config.parts import ApiSource, Architecture, ModelConfig, ResourcesConfig
from jmedlora.plan.allocations import BYTES
from jmedlora.plan.costs import TRIAL_START_S, concurrent_trials, rate, step_seconds, training_tokens
from jmedlora.plan.memory import CHOICE_TOKENS, GIGABYTE, memory_of
from jmedlora.plan.packing import packed_seconds, trajectories_of, trial_trajectories
from jmedlora.plan.shapes import lora_parameters
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, Plan, RunSpec, TrialSpec

ANSWER_TOKENS = 16
"""Assumed length of an answer, where the prompt has no bound of its own."""


@dataclass(frozen=True)
class TrialEstimate:
    """One trial: memory of one worker in GB at its peak, training time in seconds, bytes that its adapters and state take on disk."""

    memory_gb: float
    memory_items: dict[str, float]
    """GB by what takes them, of the run that needs most."""
    host_memory_gb: float
    """Main memory of a worker while it loads and saves, beside what Python and its libraries take."""
    fits: bool
    seconds: float
    saved_by_prefixes_s: float
    """What training each run by itself, in a trial of its own, would take more."""
    saved_by_packing_s: float
    """What a trial for each trajectory would take more: packs share the steps' overhead, and a queue the trial's start."""
    longest_s: float
    """Arithmetic of its longest trajectory, which nothing shortens."""
    disk_bytes: int


@dataclass(frozen=True)
class Totals:
    """The whole sweep, with trials running side by side as far as the machines allow."""

    runs: int
    bases: int
    trials: int
    evaluations: int
    questions: int
    training_tokens: int
    concurrent_trials: int | None
    training_hours: float
    evaluation_hours: float
    makespan_hours: float
    lower_bound_hours: float
    """No less, at the assumed speeds, however runs are packed: the longest trajectory's arithmetic, or all of it on all machines."""
    saved_by_prefixes_hours: float
    saved_by_packing_hours: float
    """Hours of trials, not of the makespan."""
    disk_bytes: int


def estimate_trial(trial: TrialSpec, resources: ResourcesConfig, shapes: dict[str, Architecture]) -> TrialEstimate:
    """Estimates of one trial; `shapes` holds each model's architecture by name."""
    on_gpu = resources.gpus_per_worker > 0
    needed = [memory_of(run, trial.workers, shapes[run.model.name], on_gpu, pack=trial.pack) for run in trial.runs]
    most = max(needed, key=lambda estimate: estimate.total)
    shape = shapes[trial.runs[0].model.name]
    trajectories = trial_trajectories(trial, resources, shape)
    seconds = TRIAL_START_S + packed_seconds(trajectories, trial.pack) / trial.workers
    alone = sum(TRIAL_START_S + each.seconds / trial.workers for each in trial_trajectories(_unshared(trial), resources, shape))
    trained_once = sum(TRIAL_START_S + each.seconds / trial.workers for each in trajectories)
    disk = sum(_disk_bytes(run, shapes[run.model.name]) for run in trial.runs)
    return TrialEstimate(
        memory_gb=most.total / GIGABYTE,
        memory_items={name: round(size / GIGABYTE, 4) for name, size in most.items.items()},
        host_memory_gb=max(estimate.host_bytes for estimate in needed) / GIGABYTE,
        fits=not on_gpu or most.total <= resources.gpu_memory_gb * GIGABYTE,
        seconds=seconds,
        saved_by_prefixes_s=alone - trained_once,
        saved_by_packing_s=trained_once - seconds,
        longest_s=max(each.arithmetic_s for each in trajectories) / trial.workers,
        disk_bytes=disk,
    )


def _unshared(trial: TrialSpec) -> TrialSpec:
    return trial.model_copy(update={"share_prefixes": False})


def estimate_totals(plan: Plan, trials: list[TrialEstimate], resources: ResourcesConfig, shapes: dict[str, Architecture]) -> Totals:
    """Estimates of the whole sweep."""
    points: list[tuple[RunSpec | BaseSpec, int]] = [(run, len(run.checkpoint_steps)) for run in plan.runs]
    points += [(base, 1) for base in plan.bases]
    here = [(spec, count) for spec, count in points if not spec.model.is_api]
    evaluation_s = sum(count * _evaluation_seconds(spec, item, resources) for spec, count in here for item in plan.asked_of(spec))
    side_by_side = concurrent_trials(resources)
    lanes = side_by_side or len(trials) or 1
    training_s = sum(trial.seconds for trial in trials)
    makespan = max(_makespan([trial.seconds for trial in trials], lanes), evaluation_s / resources.evaluation.actors)
    if not resources.evaluation.cpus and not resources.evaluation.gpus:
        makespan = max(makespan, (training_s + evaluation_s) / lanes)  # on the cores, or GPUs, of the trials
    arithmetic = sum(run.total_steps * step_seconds(run, resources, shapes[run.model.name]) for run in _longest(plan))
    return Totals(
        runs=len(plan.runs),
        bases=len(plan.bases),
        trials=len(plan.trials),
        evaluations=sum(count * len(plan.asked_of(spec)) for spec, count in points),
        questions=sum(count * item.questions for spec, count in points for item in plan.asked_of(spec)),
        training_tokens=round(sum(training_tokens(run) for run in _longest(plan))),
        concurrent_trials=side_by_side,
        training_hours=training_s / 3600,
        evaluation_hours=evaluation_s / 3600,
        makespan_hours=makespan / 3600,
        lower_bound_hours=max([arithmetic / resources.workers_per_trial / lanes, *(trial.longest_s for trial in trials)]) / 3600,
        saved_by_prefixes_hours=sum(trial.saved_by_prefixes_s for trial in trials) / 3600,
        saved_by_packing_hours=sum(trial.saved_by_packing_s for trial in trials) / 3600,
        disk_bytes=sum(trial.disk_bytes for trial in trials),
    )


def _longest(plan: Plan) -> list[RunSpec]:
    """The longest run of every trajectory that is trained."""
    return [group[-1] for trial in plan.trials for group in trajectories_of(trial.runs, trial.share_prefixes)]


def asked_tokens(spec: EvaluationSpec, model: ModelConfig) -> tuple[float, float]:
    """Tokens of all prompts of an evaluation, and of all answers to them."""
    answer = CHOICE_TOKENS if spec.scoring == "loglikelihood" else min(spec.max_new_tokens, spec.prompt.max_new_tokens or ANSWER_TOKENS)
    return spec.questions * spec.prompt_characters * model.tokens_per_character, spec.questions * answer


def api_cost(source: ApiSource, model: ModelConfig, evaluations: list[EvaluationSpec]) -> float | None:
    """Money that the evaluations of a model behind an address will cost; None where its prices are not given."""
    if source.input_price is None or source.output_price is None:
        return None
    tokens = [asked_tokens(spec, model) for spec in evaluations]
    return sum(asked * source.input_price + new * source.output_price for asked, new in tokens) / 1e6


def _evaluation_seconds(spec: RunSpec | BaseSpec, evaluation: EvaluationSpec, resources: ResourcesConfig) -> float:
    return sum(asked_tokens(evaluation, spec.model)) * 2 * spec.model_parameters / rate(resources, spec.precision)


def _disk_bytes(run: RunSpec, shape: Architecture) -> int:
    parameters = lora_parameters(run.model.family, shape, run.settings.rank, run.settings.targets)
    adapter = int(BYTES[run.compute_precision]) * parameters
    state = 3 * 4 * parameters  # weights and two moments in fp32, kept once
    return adapter * len(run.checkpoint_steps) + state


def _makespan(seconds: list[float], lanes: int) -> float:
    """Longest-first assignment to `lanes` machines."""
    ends = [0.0] * max(1, lanes)
    for duration in sorted(seconds, reverse=True):
        heapq.heappush(ends, heapq.heappop(ends) + duration)
    return max(ends)
