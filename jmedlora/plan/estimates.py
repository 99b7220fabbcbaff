"""What a sweep will need: memory, time, bytes on disk. All figures are estimates from shapes and counts."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from jmedlora.config.parts import ApiSource, Architecture, Family, ModelConfig, Precision, ResourcesConfig
from jmedlora.plan.shapes import linear_parameters, lora_parameters, model_parameters
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, Plan, RunSpec, TrialSpec

GIGABYTE = 1e9
GPU_TFLOPS, CPU_CORE_TFLOPS = 200.0, 0.06
"""Assumed sustained rates where `resources.tflops` gives none."""
TRIAL_START_S = 15.0
ANSWER_TOKENS = 16
"""Assumed length of an answer, where the prompt has no bound of its own."""
CHOICE_TOKENS = 60
"""Assumed length of a question's choices together."""
_BYTES = {"fp32": 4.0, "bf16": 2.0}
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""4 bits a weight, an 8-bit scale per 64 weights, an fp32 scale per 256 of those."""


@dataclass(frozen=True)
class TrialEstimate:
    """One trial: memory of one worker in GB, training time in seconds, bytes that its adapters and state take on disk."""

    memory_gb: float
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


def weight_bytes(shape: Architecture, family: Family, precision: Precision) -> float:
    """Bytes of the base weights; NF4 leaves embeddings, norms and the output projection in 2 bytes a weight."""
    total = model_parameters(family, shape)
    if precision != "nf4":
        return total * _BYTES[precision]
    linear = linear_parameters(family, shape)
    return linear * _NF4_BYTES + (total - linear) * 2.0


def estimate_trial(trial: TrialSpec, resources: ResourcesConfig, shapes: dict[str, Architecture]) -> TrialEstimate:
    """Estimates of one trial; `shapes` holds each model's architecture by name."""
    memory = max(_memory_bytes(run, trial.workers, shapes[run.model.name]) for run in trial.runs) / GIGABYTE
    seconds = TRIAL_START_S + sum(_training_tokens(run) * training_flop_per_token(run) for run in trial.runs) / (_rate(resources) * trial.workers)
    disk = sum(_disk_bytes(run, shapes[run.model.name]) for run in trial.runs)
    return TrialEstimate(memory, not resources.gpus_per_worker or memory <= resources.gpu_memory_gb, seconds, disk)


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


def _rate(resources: ResourcesConfig) -> float:
    """FLOP/s of one worker."""
    assumed = GPU_TFLOPS * resources.gpus_per_worker if resources.gpus_per_worker else CPU_CORE_TFLOPS * resources.cpus_per_worker
    return (resources.tflops or assumed) * 1e12


def _row_tokens(run: RunSpec) -> float:
    limit = run.settings.max_input_tokens + run.settings.max_target_tokens
    return min(limit, run.row_characters * run.model.tokens_per_character)


def _training_tokens(run: RunSpec) -> float:
    return run.total_steps * min(run.settings.batch_size, run.rows) * _row_tokens(run)


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
    return sum(asked_tokens(evaluation, spec.model)) * 2 * spec.model_parameters / _rate(resources)


def _memory_bytes(run: RunSpec, workers: int, shape: Architecture) -> float:
    stage = run.deepspeed.zero_stage
    adapter = lora_parameters(run.model.family, shape, run.settings.rank, run.settings.targets)
    low = 2.0 if run.compute_precision == "bf16" else 4.0
    weights = weight_bytes(shape, run.model.family, run.precision) / (workers if stage == 3 else 1)
    gradients = adapter * low / (workers if stage >= 2 else 1)
    optimizer = adapter * 12.0 / (workers if stage >= 1 else 1)
    share = -(-run.settings.batch_size // workers)
    rows = min(share, run.settings.micro_batch_size or share)
    tokens = rows * (run.settings.max_input_tokens + run.settings.max_target_tokens)
    per_layer = tokens * (12 * shape.hidden_size + 4 * shape.intermediate_size) * low
    activations = (
        per_layer + tokens * shape.hidden_size * low * shape.layers if run.settings.gradient_checkpointing else per_layer * shape.layers
    )
    logits = rows * run.settings.max_target_tokens * shape.vocabulary * (low + 8.0)
    return weights + adapter * low + gradients + optimizer + activations + logits


def _disk_bytes(run: RunSpec, shape: Architecture) -> int:
    parameters = lora_parameters(run.model.family, shape, run.settings.rank, run.settings.targets)
    adapter = int(_BYTES[run.compute_precision]) * parameters
    state = 3 * 4 * parameters  # weights and two moments in fp32, kept once
    return adapter * len(run.checkpoint_steps) + state


def _makespan(seconds: list[float], lanes: int) -> float:
    """Longest-first assignment to `lanes` machines."""
    ends = [0.0] * max(1, lanes)
    for duration in sorted(seconds, reverse=True):
        heapq.heappush(ends, heapq.heappop(ends) + duration)
    return max(ends)
