"""What a step, a row or an answer costs: estimates from shapes, counts and assumed speeds."""

from __future__ import annotations

from jmedlora.config.parts import Architecture, Precision, ResourcesConfig
from jmedlora.plan.shapes import linear_parameters, lora_parameters
from jmedlora.plan.specs import RunSpec

GPU_TFLOPS, GPU_NF4_TFLOPS, CPU_CORE_TFLOPS = 300.0, 200.0, 0.06
"""Assumed sustained rates where `resources.tflops` gives none; on an H100, 312 to 477 were measured in bf16, 205 over NF4."""
TRIAL_START_S = 15.0
LAYER_OVERHEAD_S = 2.5e-3
"""What one layer costs in a micro-batch beside arithmetic: its modules and kernels are called forward and backward. Measured on a CPU core
(`python -m tests.bench.crossover`, all linear layers adapted); assumed for GPUs."""
PIECES = 2.0
"""Micro-batches that a mini-batch is divided into by length, on average, where their size is not given."""


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


def rate(resources: ResourcesConfig, precision: Precision) -> float:
    """FLOP/s of one worker."""
    of_gpu = GPU_NF4_TFLOPS if precision == "nf4" else GPU_TFLOPS
    assumed = of_gpu * resources.gpus_per_worker if resources.gpus_per_worker else CPU_CORE_TFLOPS * resources.cpus_per_worker
    return (resources.tflops or assumed) * 1e12


def row_tokens(run: RunSpec) -> float:
    """Mean length of a run's rows, in tokens."""
    limit = run.settings.max_input_tokens + run.settings.max_target_tokens
    return min(limit, run.row_characters * run.model.tokens_per_character)


def step_tokens(run: RunSpec) -> float:
    """Tokens of an optimizer step."""
    return min(run.settings.batch_size, run.rows) * row_tokens(run)


def training_tokens(run: RunSpec) -> float:
    return run.total_steps * step_tokens(run)


def step_seconds(run: RunSpec, resources: ResourcesConfig, shape: Architecture) -> float:
    """Arithmetic of an optimizer step, for one worker that has all the work."""
    return step_tokens(run) * training_flop_per_token(run, shape) / rate(resources, run.precision)


def step_overhead_s(run: RunSpec, resources: ResourcesConfig, shape: Architecture) -> float:
    """What an optimizer step costs beside arithmetic, however many adapters take it at once."""
    share = -(-run.settings.batch_size // resources.workers_per_trial)
    micro_batches = max(min(PIECES, share), -(-share // (run.settings.micro_batch_size or share)))
    passes = 1.5 if run.settings.gradient_checkpointing else 1.0
    return shape.layers * LAYER_OVERHEAD_S * micro_batches * passes


def seconds_alone(run: RunSpec, resources: ResourcesConfig, shape: Architecture) -> float:
    """Training time of a run by itself, without the trial's start."""
    arithmetic = step_seconds(run, resources, shape) / resources.workers_per_trial
    return run.total_steps * (arithmetic + step_overhead_s(run, resources, shape))


def training_flop_per_token(run: RunSpec, shape: Architecture) -> float:
    """Of the blocks' linear layers and the adapter: forward, gradients of activations (recomputation costs another forward), and of the
    adapter's weights. Left out: attention's products of positions, and the output projection, which answers alone go through."""
    passes = 3 if run.settings.gradient_checkpointing else 2
    adapter = lora_parameters(run.model.family, shape, run.settings.rank, run.settings.targets)
    return 2.0 * (passes * linear_parameters(run.model.family, shape) + (passes + 1) * adapter)


def tokens_worth_a_micro_batch(layers: int, weights: int, on_gpu: bool, threads: int) -> float:
    """Tokens that take as long as one more micro-batch costs by itself. weights: of all linear layers of the model's blocks."""
    tflops = GPU_TFLOPS if on_gpu else CPU_CORE_TFLOPS * threads
    return layers * LAYER_OVERHEAD_S * tflops * 1e12 / (4 * weights)
