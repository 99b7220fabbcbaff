"""What a worker holds while it trains, moment by moment, in bytes, from shapes alone.

`low` is bytes of a value in the compute format. How far the figures are from real allocations: docs/gpu.md and
tests/integration/test_memory_measured.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jmedlora.config.parts import Architecture, Family, Precision
from jmedlora.plan.shapes import Linear, linear_layers, linear_parameters, lora_parameters, model_parameters, target_layers
from jmedlora.plan.specs import RunSpec

LARGEST_BUCKET = 50_000_000
"""Elements that ZeRO reduces at once; an engine's setting."""
ZERO3_LIVE = 1_050_000_000
"""Elements of gathered weights that ZeRO-3 keeps and fetches ahead at most."""
BYTES = {"fp32": 4.0, "bf16": 2.0}
"""Bytes of a value."""
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""4 bits a weight, an 8-bit scale per 64 weights, an fp32 scale per 256 of those."""
_NF4_PLAIN_BYTES = 0.5 + 4 / 64
"""Without double quantisation."""


@dataclass(frozen=True)
class Sizes:
    """What the parts of an estimate share."""

    run: RunSpec
    workers: int
    shape: Architecture
    rows: int
    tokens: float
    labelled: float
    low: float
    adapter: int
    linear: list[Linear]
    adapted: list[Linear]

    @property
    def stage(self) -> int:
        return self.run.deepspeed.zero_stage

    @property
    def family(self) -> Family:
        return self.run.model.family


def weight_bytes(
    shape: Architecture, family: Family, precision: Precision, compute: str = "bf16", double_quantisation: bool = True
) -> float:
    """Bytes of the base weights; NF4 leaves embeddings, norms, biases and the output projection in the compute format."""
    total = model_parameters(family, shape)
    if precision != "nf4":
        return total * BYTES[precision]
    linear = linear_parameters(family, shape)
    return linear * (_NF4_BYTES if double_quantisation else _NF4_PLAIN_BYTES) + (total - linear) * BYTES[compute]


def sizes_of(run: RunSpec, workers: int, shape: Architecture, row_tokens: float | None, pack: int = 1) -> Sizes:
    settings, family = run.settings, run.model.family
    share = -(-settings.batch_size // workers)
    rows = pack * min(share, settings.micro_batch_size or share)
    longest = settings.max_input_tokens + settings.max_target_tokens
    width = min(longest, row_tokens or longest)
    return Sizes(
        run=run,
        workers=workers,
        shape=shape,
        rows=rows,
        tokens=rows * width,
        labelled=rows * min(settings.max_target_tokens, width),
        low=BYTES[run.compute_precision],
        adapter=pack * lora_parameters(family, shape, settings.rank, settings.targets),
        linear=linear_layers(family, shape),
        adapted=target_layers(family, shape, settings.targets),
    )


# ---------------------------------------------------------------- what is there all the time


def held(sizes: Sizes) -> dict[str, float]:
    run, stage, workers = sizes.run, sizes.stage, sizes.workers
    weights = weight_bytes(sizes.shape, sizes.family, run.precision, run.compute_precision, run.method.double_quantisation)
    # what the layers work with; without sharding, parameters in fp32 are the same
    values = sizes.adapter * sizes.low
    parameters = 4.0 * sizes.adapter / (workers if stage == 3 else 1) if stage or run.compute_precision == "bf16" else 0.0
    items = {
        "base weights": weights / (workers if stage == 3 else 1),
        "adapter": values + parameters,
        "optimizer": sizes.adapter * (12.0 if stage else 8.0) / (workers if stage else 1),
    }
    if stage == 3 and workers > 1:
        items["gathered weights"] = min(weights + 4.0 * sizes.adapter, ZERO3_LIVE * sizes.low)
    return items


# ---------------------------------------------------------------- what comes and goes


def backward(sizes: Sizes) -> Iterable[dict[str, float]]:
    """Items of the moments of a backward pass that may be the peak: at the loss, within a layer, and where its gradients are added up."""
    shape, tokens, low = sizes.shape, sizes.tokens, sizes.low
    layer = tokens * _kept_by_layer(sizes)
    kept = {"gradients": _gradients(sizes), "activations": layer * shape.layers}
    in_layer = kept
    if sizes.run.settings.gradient_checkpointing:
        inputs = tokens * shape.hidden_size * low * shape.layers
        kept, in_layer = {**kept, "activations": inputs}, {**kept, "activations": inputs + layer}
    dequantised = max(each.in_features * each.out_features for each in sizes.linear) * low if sizes.run.precision == "nf4" else 0.0
    # per token and word: the logarithms of the probabilities and two gradients, in fp32
    yield {**kept, "logits": sizes.labelled * (12.0 * shape.vocabulary + 2 * low * shape.hidden_size)}
    yield {**in_layer, "workspace": tokens * _passing(sizes) + dequantised}
    if sizes.low < 4.0:
        yield {"gradients": kept["gradients"] + 4.0 * sizes.adapter}  # another format than that in which they are added up


def _gradients(sizes: Sizes) -> float:
    """Those of the micro-batch at hand, what is added up in fp32, and the buckets that ZeRO reduces it in."""
    bucket = 4.0 * min(sizes.adapter, LARGEST_BUCKET) if sizes.workers > 1 or sizes.stage == 3 else 0.0
    here = sizes.low * sizes.adapter
    if sizes.stage < 2:
        return here + 4.0 * sizes.adapter + (bucket if sizes.stage else 0.0)
    return here + 4.0 * sizes.adapter / sizes.workers + 2 * bucket


def optimizer_step(sizes: Sizes) -> dict[str, float]:
    """Items of the optimizer's step: gradients in fp32."""
    adapter, workers = float(sizes.adapter), sizes.workers
    if sizes.stage == 0:
        return {"gradients": 4 * adapter}
    own = adapter / workers
    bucket = 4.0 * min(adapter, LARGEST_BUCKET)
    gradients = 8 * own + bucket if sizes.stage == 3 else 4 * own
    return {"gradients": gradients, "workspace": 4 * own}


def _kept_by_layer(sizes: Sizes) -> float:
    """Bytes per token that a layer keeps for its backward pass."""
    shape, low = sizes.shape, sizes.low
    hidden, inner = shape.hidden_size, shape.intermediate_size
    kv = hidden // shape.heads * shape.kv_heads
    adapted = {layer.name for layer in sizes.adapted}
    if sizes.family == "gpt_neox":
        # the layer's input; query, key and value in one tensor that the value keeps, query and key with their positions;
        # attention's output; the input of the activation function
        kept = low * (hidden * 7 + inner)
        inputs = {hidden: [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}], inner: [{"dense_4h_to_h"}]}
    else:
        # both norms' inputs in fp32; query, key, value, attention's output; gate, its activation, and up
        kept = 8.0 * hidden + low * (2 * hidden + 2 * kv + 3 * inner)
        inputs = {hidden: [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}], inner: [{"down_proj"}]}
    if sizes.run.settings.dropout > 0:  # each adapted layer keeps what was left of its input, and the mask
        kept += sum(layer.in_features * (low + 1) for layer in sizes.adapted)
    # a layer's input is kept once for all that read it: by adapters without dropout, and by ZeRO-3's own linear layers
    of_all = sizes.stage == 3 and sizes.run.precision != "nf4"
    readers = set() if sizes.run.settings.dropout > 0 else adapted
    kept += sum(low * width for width, groups in inputs.items() for names in groups if of_all or names & readers)
    return kept + low * sizes.run.settings.rank * len(sizes.adapted) + 4 * shape.heads


def _passing(sizes: Sizes) -> float:
    """Bytes per token that one layer's backward takes beside what was kept."""
    low = sizes.low
    within = (2 if sizes.family == "gpt_neox" else 3) * low * sizes.shape.intermediate_size
    if sizes.run.settings.dropout == 0:
        return within
    # masks are mixed from 32-bit counters: one for all rows, and two values a place
    widest = max(layer.in_features for layer in sizes.adapted)
    return max(within, widest * (8 + 4 / sizes.rows + 2 * low))


def host_bytes(sizes: Sizes) -> float:
    """Main memory of a worker: the state in fp32 and the file made of it; with ZeRO-3 the whole base, before it is sharded."""
    run = sizes.run
    in_shards = sizes.stage == 3 and run.precision != "nf4"
    base = weight_bytes(sizes.shape, sizes.family, run.precision, run.compute_precision) if in_shards else 0.0
    return max(sizes.adapter * 24.0, base)
