"""Memory of one worker while it trains or evaluates, item by item; and what would fit where a run does not.

Sizes are bytes for rows of the greatest length that the settings allow. The formulas are in `allocations`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jmedlora.config.parts import Architecture, ResourcesConfig
from jmedlora.plan.allocations import BYTES, backward, held, host_bytes, optimizer_step, sizes_of, weight_bytes
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, RunSpec

GIGABYTE = 1e9
GPU_OVERHEAD_BYTES = 1.9e9
"""What lies outside torch's allocator: CUDA's context, NCCL, loaded kernels (1.4 to 1.8 GB on an H100)."""
SLACK = 0.03
"""What the allocator holds beside what is used, as a share; it holds more while there is room and gives it up when there is none."""
ESTIMATE_ERROR = 0.1
"""How far estimates were from measured peaks at most, rounded up."""
CACHED_TOKENS = 2048
"""On a CPU, what goes through a model at once, about: more makes no pass faster per token, but pushes what it works on out of the cache."""
TOKENS_READ_AT_ONCE = {"cpu": CACHED_TOKENS, "cuda": 16384}
"""Of prompts."""
CHOICE_TOKENS = 60
"""Assumed length of a question's choices together."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one worker at its peak: on the GPU (or in its process), by item; and in main memory while it saves its state."""

    items: dict[str, float]
    host_bytes: float

    @property
    def total(self) -> float:
        return sum(self.items.values())

    @property
    def largest(self) -> str:
        """Name of the largest item."""
        return max(self.items, key=lambda name: self.items[name])


def memory_of(
    run: RunSpec, workers: int, shape: Architecture, on_gpu: bool, row_tokens: float | None = None, pack: int = 1
) -> MemoryEstimate:
    """The estimate of a run, or of so many like it at once.

    row_tokens: length of its rows, where they are shorter than the settings allow.
    """
    sizes = sizes_of(run, workers, shape, row_tokens, pack)
    peak = max([*backward(sizes), optimizer_step(sizes)], key=lambda moment: sum(moment.values()))
    items = {**held(sizes), **peak}
    if on_gpu:
        items |= {"CUDA and allocator": GPU_OVERHEAD_BYTES + SLACK * sum(items.values())}
    return MemoryEstimate(items, host_bytes(sizes))


# ---------------------------------------------------------------- evaluation


def evaluation_memory(
    spec: RunSpec | BaseSpec, evaluations: list[EvaluationSpec], shape: Architecture, on_gpu: bool, adapter: int = 0, pack: int = 1
) -> MemoryEstimate:
    """The estimate of an evaluator that answers these evaluations one after another, with `pack` adapters of so many weights at once.

    Prompts are taken to be twice as long as their mean, or as long as the model can read.
    """
    double = spec.method.double_quantisation if isinstance(spec, RunSpec) else spec.double_quantisation
    items: dict[str, float] = {
        "base weights": weight_bytes(shape, spec.model.family, spec.precision, spec.compute_precision, double),
        "adapter": BYTES[spec.compute_precision] * adapter * pack,
    }
    answering = [_answering(spec, each, shape, on_gpu, pack) for each in evaluations]
    if answering:
        needed = [sum(parts.values()) for parts in answering]
        items |= answering[needed.index(max(needed))]
    if on_gpu:
        items |= {"CUDA and allocator": GPU_OVERHEAD_BYTES + SLACK * sum(items.values())}
    return MemoryEstimate(items, 0.0)


def _answering(spec: RunSpec | BaseSpec, evaluation: EvaluationSpec, shape: Architecture, on_gpu: bool, pack: int) -> dict[str, float]:
    low, hidden, inner = BYTES[spec.compute_precision], shape.hidden_size, shape.intermediate_size
    rows, weighs = evaluation.batch_size * pack, evaluation.scoring == "loglikelihood"
    new = CHOICE_TOKENS if weighs else evaluation.max_new_tokens
    prompt = min(2 * evaluation.prompt_characters * spec.model.tokens_per_character, max(shape.max_positions - new, 1))
    kv = hidden // shape.heads * shape.kv_heads
    read = min(rows * prompt, TOKENS_READ_AT_ONCE["cuda" if on_gpu else "cpu"] + pack * prompt)
    return {
        "keys and values": rows * (prompt + new) * 2 * kv * low * shape.layers,
        "activations": read * (low * (2 * inner + 4 * hidden) + 4 * hidden),
        "logits": rows * (new if weighs else 1) * shape.vocabulary * (low + (0 if weighs else 4)),
    }


# ---------------------------------------------------------------- what would fit


def advice(run: RunSpec, workers: int, resources: ResourcesConfig, shape: Architecture) -> str:
    """The nearest settings that would fit a worker, and need clearly less than the run does now; for a run that does not fit."""
    on_gpu = resources.gpus_per_worker > 0
    now = memory_of(run, workers, shape, on_gpu).total
    limit = min(now * 0.9, resources.gpu_memory_gb * GIGABYTE) if on_gpu else now * 0.9
    told = []
    for family in (_smaller_batches(run, workers), _more_workers(run, workers), _quantised(run, workers)):
        for change, candidate, of_workers in family:
            needed = memory_of(candidate, of_workers, shape, on_gpu).total
            if needed <= limit:
                told.append(f"{change} ({needed / GIGABYTE:.3g} GB)")
                break
    if told:
        return "; or ".join(told[:3])
    return f"a larger GPU, shorter rows, a lower rank or a smaller model ({now / GIGABYTE:.3g} GB now); more GPUs or qlora would not do"


_Change = tuple[str, RunSpec, int]


def _smaller_batches(run: RunSpec, workers: int) -> list[_Change]:
    """Gradient checkpointing, then ever smaller micro-batches with it: the adapter stays the same."""
    share = -(-run.settings.batch_size // workers)
    now = min(share, run.settings.micro_batch_size or share)
    smaller = [size for size in (now // 2, now // 4, now // 8, 1) if 0 < size < now]
    sizes = sorted({*smaller}, reverse=True)
    checkpointing = run.settings.gradient_checkpointing
    found = [(f"micro_batch_size {size} (now {now})", _with(run, micro_batch_size=size), workers) for size in sizes[:1]]
    if not checkpointing:
        found.append(("gradient_checkpointing", _with(run, gradient_checkpointing=True), workers))
    beside = "" if checkpointing else " with gradient_checkpointing"
    for size in sizes:
        changed = _with(run, micro_batch_size=size, gradient_checkpointing=True)
        found.append((f"micro_batch_size {size} (now {now}){beside}", changed, workers))
    return found


def _more_workers(run: RunSpec, workers: int) -> list[_Change]:
    """Sharding over more GPUs, with the smallest micro-batches; what is quantised is not sharded further than ZeRO-2."""
    found = []
    least = _with(run, micro_batch_size=1, gradient_checkpointing=True)
    for count in (2, 4, 8):
        if count <= workers or count > run.settings.batch_size:
            continue
        stage: Literal[2, 3] = 2 if run.precision == "nf4" else 3
        sharded = least.model_copy(update={"deepspeed": run.deepspeed.model_copy(update={"zero_stage": stage})})
        found.append((f"ZeRO-{stage} over {count} GPUs, micro_batch_size 1, gradient_checkpointing", sharded, count))
    return found


def _quantised(run: RunSpec, workers: int) -> list[_Change]:
    """NF4 weights, which make another adapter."""
    if run.precision == "nf4":
        return []
    method = run.method.model_copy(update={"quantisation": "nf4", "double_quantisation": True})
    update: dict[str, object] = {"precision": "nf4", "method": method, "deepspeed": run.deepspeed.model_copy(update={"zero_stage": 0})}
    small = _with(run, micro_batch_size=1, gradient_checkpointing=True)
    return [
        ("qlora", run.model_copy(update=update), workers),
        ("qlora, micro_batch_size 1, gradient_checkpointing", small.model_copy(update=update), workers),
    ]


def _with(run: RunSpec, **changes: object) -> RunSpec:
    return run.model_copy(update={"settings": run.settings.model_copy(update=changes)})
