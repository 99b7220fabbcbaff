"""What a sweep will need: memory, time, bytes on disk. All figures are estimates from shapes and counts."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from jmedlora.config.parts import ApiSource, Architecture, ModelConfig, Precision, ResourcesConfig
from jmedlora.plan.allocations import BYTES
from jmedlora.plan.memory import CHOICE_TOKENS, GIGABYTE, memory_of
from jmedlora.plan.shapes import lora_parameters
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, Plan, RunSpec, TrialSpec

GPU_TFLOPS, GPU_NF4_TFLOPS, CPU_CORE_TFLOPS = 300.0, 200.0, 0.06
"""Assumed sustained rates where `resources.tflops` gives none; on an H100, 312 to 477 were measured in bf16, 205 over NF4."""
TRIAL_START_S = 15.0
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
    disk_bytes: int


def estimate_trial(trial: TrialSpec, resources: ResourcesConfig, shapes: dict[str, Architecture]) -> TrialEstimate:
    """Estimates of one trial; `shapes` holds each model's architecture by name."""
    on_gpu = resources.gpus_per_worker > 0
    needed = [memory_of(run, trial.workers, shapes[run.model.name], on_gpu) for run in trial.runs]
    most = max(needed, key=lambda estimate: estimate.total)
    seconds = TRIAL_START_S + sum(_training_seconds(run, resources) for run in trial.runs) / trial.workers
    disk = sum(_disk_bytes(run, shapes[run.model.name]) for run in trial.runs)
    return TrialEstimate(
        memory_gb=most.total / GIGABYTE,
        memory_items={name: round(size / GIGABYTE, 4) for name, size in most.items.items()},
        host_memory_gb=max(estimate.host_bytes for estimate in needed) / GIGABYTE,
        fits=not on_gpu or most.total <= resources.gpu_memory_gb * GIGABYTE,
        seconds=seconds,
        disk_bytes=disk,
    )


def estimate_totals(plan: Plan, trials: list[TrialEstimate], resources: ResourcesConfig) -> Totals:
    """Estimates of the whole sweep."""
    points: list[tuple[RunSpec | BaseSpec, int]] = [(run, len(run.checkpoint_steps)) for run in plan.runs]
    points += [(base, 1) for base in plan.bases]
    here = [(spec, count) for spec, count in points if not spec.model.is_api]
    evaluation_s = sum(count * _evaluation_seconds(spec, item, resources) for spec, count in here for item in plan.asked_of(spec))
    side_by_side = concurrent_trials(resources)
    makespan = _makespan([trial.seconds for trial in trials], side_by_side or len(trials))
    return Totals(
        runs=len(plan.runs),
        bases=len(plan.bases),
        trials=len(plan.trials),
        evaluations=sum(count * len(plan.asked_of(spec)) for spec, count in points),
        questions=sum(count * item.questions for spec, count in points for item in plan.asked_of(spec)),
        training_tokens=round(sum(_training_tokens(run) for run in plan.runs)),
        concurrent_trials=side_by_side,
        training_hours=sum(trial.seconds for trial in trials) / 3600,
        evaluation_hours=evaluation_s / 3600,
        makespan_hours=max(makespan, evaluation_s / resources.evaluation.actors) / 3600,
        disk_bytes=sum(trial.disk_bytes for trial in trials),
    )


def concurrent_trials(resources: ResourcesConfig) -> int | None:
    """Trials that run at once: as configured, or as many as the GPUs at the cluster's maximum hold beside reserved evaluation.

    None on machines without GPUs, where it depends on their cores.
    """
    if resources.max_concurrent_trials is not None:
        return resources.max_concurrent_trials
    per_trial = resources.workers_per_trial * resources.gpus_per_worker
    if not per_trial:
        return None
    reserved = resources.evaluation.actors * resources.evaluation.gpus
    return max(1, int((resources.max_gpus - reserved) // per_trial))


def _rate(resources: ResourcesConfig, precision: Precision) -> float:
    """FLOP/s of one worker."""
    of_gpu = GPU_NF4_TFLOPS if precision == "nf4" else GPU_TFLOPS
    assumed = of_gpu * resources.gpus_per_worker if resources.gpus_per_worker else CPU_CORE_TFLOPS * resources.cpus_per_worker
    return (resources.tflops or assumed) * 1e12


def row_tokens(run: RunSpec) -> float:
    """Mean length of a run's rows, in tokens."""
    limit = run.settings.max_input_tokens + run.settings.max_target_tokens
    return min(limit, run.row_characters * run.model.tokens_per_character)


def _training_tokens(run: RunSpec) -> float:
    return run.total_steps * min(run.settings.batch_size, run.rows) * row_tokens(run)


def _training_seconds(run: RunSpec, resources: ResourcesConfig) -> float:
    """Of one worker that has all the work."""
    return _training_tokens(run) * training_flop_per_token(run) / _rate(resources, run.precision)


def training_flop_per_token(run: RunSpec) -> float:
    """Forward, and gradients of activations through the frozen weights; recomputation costs another forward pass."""
    passes = 3 if run.settings.gradient_checkpointing else 2
    return 2.0 * passes * run.model_parameters


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
    return sum(asked_tokens(evaluation, spec.model)) * 2 * spec.model_parameters / _rate(resources, spec.precision)


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
