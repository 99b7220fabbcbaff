"""Memory estimates: by hand, in the right direction, and what is advised where a run does not fit."""

from __future__ import annotations

import itertools

import pytest

from jmedlora.config.parts import ResourcesConfig
from jmedlora.plan.allocations import weight_bytes
from jmedlora.plan.memory import GPU_OVERHEAD_BYTES, SLACK, advice, memory_of
from jmedlora.plan.shapes import lora_parameters
from tests.bench.cases import CALM_7B, LLAMA_13B, LLAMA_70B, Case, base_cases

GPU = ResourcesConfig(gpus_per_worker=1, max_gpus=8, gpu_memory_gb=80)


def case(name: str = "calm-7b", **changes: object) -> Case:
    return base_cases(tiny=False)[name].changed(**changes)


def total(asked: Case, workers: int = 1) -> float:
    return memory_of(asked.spec(), workers, asked.shape, on_gpu=True).total


def test_what_is_held_by_hand() -> None:
    items = memory_of(case(rank=64).spec(), 1, CALM_7B, on_gpu=True).items
    adapter = lora_parameters("gpt_neox", CALM_7B, 64, "attention")
    assert items["base weights"] == 2 * 6_871_982_080
    assert items["adapter"] == (2 + 4) * adapter, "what the layers compute with, and what is trained"
    assert items["optimizer"] == 8 * adapter
    rest = sum(size for name, size in items.items() if name != "CUDA and allocator")
    assert items["CUDA and allocator"] == GPU_OVERHEAD_BYTES + SLACK * rest


@pytest.mark.parametrize("name", ["calm-7b", "llama-7b", "llama-13b", "llama-70b"])
def test_more_of_anything_needs_more(name: str) -> None:
    for key, values in {"rows": (1, 2, 4, 8), "rank": (8, 64, 128), "target_tokens": (64, 256, 512), "dropout": (0.0, 0.1)}.items():
        needed = [total(case(name, **{key: value})) for value in values]
        assert all(less <= more for less, more in itertools.pairwise(needed)), key
    assert total(case(name, rows=4, checkpointing=True)) < total(case(name, rows=4, checkpointing=False))
    assert total(case(name, rows=4, targets="attention", dropout=0.0)) < total(case(name, rows=4, targets="all-linear", dropout=0.0))


def test_double_quantisation_and_compute_format_count() -> None:
    assert weight_bytes(LLAMA_13B, "llama", "nf4", "bf16", True) < weight_bytes(LLAMA_13B, "llama", "nf4", "bf16", False)
    assert weight_bytes(LLAMA_13B, "llama", "nf4", "bf16") < weight_bytes(LLAMA_13B, "llama", "nf4", "fp32")


def test_sharding_divides_what_it_shards() -> None:
    wide = {"rank": 256, "targets": "all-linear", "rows": 1, "accumulated": 8}
    alone, sharded = (memory_of(case(stage=2, **wide).spec(), workers, CALM_7B, True).items for workers in (1, 4))
    assert sharded["optimizer"] == alone["optimizer"] / 4
    assert sharded["base weights"] == alone["base weights"]
    whole, parts = (memory_of(case(stage=3, **wide).spec(), workers, CALM_7B, True).items for workers in (1, 4))
    assert parts["base weights"] == whole["base weights"] / 4
    assert 0 < parts["gathered weights"] < whole["base weights"]


def test_state_takes_main_memory() -> None:
    adapter = lora_parameters("llama", LLAMA_70B, 128, "all-linear")
    assert memory_of(case("llama-70b", rank=128).spec(), 1, LLAMA_70B, True).host_bytes == 24 * adapter


def advised(asked: Case, resources: ResourcesConfig = GPU) -> str:
    return advice(asked.spec(), resources.workers_per_trial, resources, asked.shape)


def test_advice_names_what_fits() -> None:
    told = advised(case(rows=32, accumulated=1, rank=64))
    assert total(case(rows=32, rank=64)) > 80e9
    assert told.startswith("micro_batch_size 16 (now 32) (")
    assert "qlora" in told
    assert 0 < float(told.split(" GB")[0].rsplit("(", 1)[1]) < 80
    checkpointed = advised(case(rows=32, accumulated=1, rank=64), GPU.model_copy(update={"gpu_memory_gb": 40}))
    assert checkpointed.startswith("gradient_checkpointing (")
    four = advised(case("llama-70b", rows=1, rank=128, accumulated=8), GPU.model_copy(update={"gpu_memory_gb": 70}))
    assert four.startswith("ZeRO-2 over 4 GPUs") and "qlora" not in four


def test_advice_of_a_run_that_ran_out_needs_less_than_it_did() -> None:
    """Whatever the estimate said of it, and also without a GPU."""
    small = case(rows=4, rank=8)
    assert total(small) < 80e9
    for resources in (GPU, ResourcesConfig()):
        told = advised(small, resources)
        assert float(told.split(" GB")[0].rsplit("(", 1)[1]) * 1e9 < 0.91 * total(small)


def test_advice_where_nothing_fits() -> None:
    told = advised(case("llama-70b", rows=1, rank=128), GPU.model_copy(update={"gpu_memory_gb": 24}))
    assert told.startswith("a larger GPU") and "\n" not in told
