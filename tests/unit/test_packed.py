"""The low-rank products of a pack against PEFT's own, adapter by adapter, in double precision."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from jmedlora.config.run import RunSettings
from jmedlora.models.dropout import Chances, KeyedDropout, RowsOfAdapter
from jmedlora.models.lora import AdapterPack, Shape
from jmedlora.models.packed import Batch, Layout, PackedLinear
from tests.plain_lora import PlainLora

CPU = torch.device("cpu")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COUNTS = [(2, 2, 2), (2, 3, 1), (1, 0, 4), (0, 0, 1)]


def _rows(counts: Sequence[int], step: int = 1) -> list[RowsOfAdapter]:
    return [RowsOfAdapter(range(count), step) for count in counts]


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize("counts", [*COUNTS, (3,)])
def test_rows_find_their_adapter_and_their_way_back(counts: tuple[int, ...]) -> None:
    layout = Layout(counts, CPU)
    rows = torch.randn(sum(counts), 5, 3)
    grouped = layout.group(rows)
    assert grouped.shape == (len(counts), max(counts) * 5, 3)
    for adapter, own in enumerate(rows.split(counts)):
        assert torch.equal(grouped[adapter, : 5 * len(own)], own.reshape(-1, 3))
        assert not grouped[adapter, 5 * len(own) :].any()
    assert torch.equal(layout.ungroup(grouped, 5), rows)


# ---------------------------------------------------------------- against PEFT


def _base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=90, **shape)).double().requires_grad_(False)


def _settings(rank: int, alpha: float, seed: int, dropout: float) -> RunSettings:
    facts = {"model": "m", "method": "lora", "data": "d", "prompt": "p", "epochs": 1, "targets": TARGETS}
    return RunSettings.model_validate({**facts, "rank": rank, "alpha": alpha, "seed": seed, "dropout": dropout})


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dropouts", [(0.0, 0.0, 0.0), (0.2, 0.0, 0.6), (0.3, 0.3, 0.3)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_are_peft_s(counts: tuple[int, ...], dropouts: tuple[float, ...], checkpointing: bool) -> None:
    """Mixed ranks and alphas; an adapter without rows gets gradients of zero, and what a narrower one does not use, none."""
    settings = [_settings(2, 16, 0, dropouts[0]), _settings(8, 4, 0, dropouts[1]), _settings(4, 1, 5, dropouts[2])]
    pack = AdapterPack(_base(), TARGETS, [Shape.of(each) for each in settings], CPU)
    assert all(weight.dtype == torch.float64 for weight in pack.parameters_of(0).values())
    plain = [PlainLora(_base(), each, "llama", torch.float64) for each in settings]
    generator = torch.Generator().manual_seed(1)
    for adapter, lora in enumerate(plain):
        for weight in lora.weights().values():
            nn.init.normal_(weight, std=0.1, generator=generator)
        pack.fill(adapter, lora.weights())
    model = pack.model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 90, (sum(counts), 11), generator=generator)
    pack.enter(_rows(counts, step=3))
    logits = model(input_ids=ids, use_cache=False).logits
    logits.square().sum().backward()
    for adapter, (lora, own_ids, own) in enumerate(zip(plain, ids.split(counts), logits.split(counts), strict=True)):
        if not counts[adapter]:
            assert all(weight.grad is not None and not weight.grad.any() for weight in pack.parameters_of(adapter).values())
            continue
        lora.enter(3, range(counts[adapter]))
        expected = lora.model.train()(input_ids=own_ids, use_cache=False).logits
        torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-12)
        expected.square().sum().backward()
        for name, weight in pack.parameters_of(adapter).items():
            wanted = lora.weights()[name].grad
            assert weight.grad is not None and wanted is not None
            torch.testing.assert_close(weight.grad, pack.padded(name, wanted), rtol=1e-9, atol=1e-11)


def test_in_evaluation_nothing_is_dropped() -> None:
    settings = _settings(4, 16, 0, 0.5)
    pack = AdapterPack(_base(), TARGETS, [Shape.of(settings)] * 2, CPU)
    weights = {name: pack.cut(0, name, torch.randn_like(weight)) for name, weight in pack.parameters_of(0).items()}
    for adapter in range(2):
        pack.fill(adapter, weights)
    adapted = get_peft_model(_base(), LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS), autocast_adapter_dtype=False).double()
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            weight.data.copy_(weights[name.replace(".default", "")])
    ids = torch.arange(12).view(2, 6)
    pack.enter(_rows((1, 1)))
    with torch.inference_mode():
        found, expected = pack.model.eval()(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- one layer


def _layer(dropout: float = 0.0, adapters: int = 2) -> tuple[PackedLinear, Batch]:
    torch.manual_seed(0)
    batch = Batch(torch.full((adapters, 1, 1), 2.0))
    if dropout:
        batch.dropout = KeyedDropout([Chances(seed, dropout) for seed in range(adapters)], ["layer"], CPU)
    layer = PackedLinear(nn.Linear(6, 5).requires_grad_(False), 0, adapters, 3, batch, CPU, torch.float32)
    for weight in layer.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight)
    batch.enter(_rows([2] * adapters))
    return layer, batch


def test_recomputation_finds_the_same_masks() -> None:
    layer, _ = _layer(dropout=0.5)
    rows = torch.randn(4, 7, 6, requires_grad=True)
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    plain = torch.autograd.grad(layer(rows).square().sum(), [rows, *weights])
    again = torch.autograd.grad(checkpoint(layer, rows, use_reentrant=False).square().sum(), [rows, *weights])
    assert all(map(torch.equal, plain, again))
    without = torch.autograd.grad(layer.eval()(rows).square().sum(), [rows, *weights])
    assert not any(map(torch.equal, plain, without))


@pytest.mark.parametrize("counts", [(2, 2), (3, 1)])
def test_a_muted_adapter_gets_zeros_whatever_is_not_finite(counts: tuple[int, int]) -> None:
    layer, batch = _layer()
    batch.enter(_rows(counts))
    rows = torch.randn(4, 7, 6)
    clean = torch.autograd.grad(layer(rows).square().sum(), [*layer.adapter(0), *layer.adapter(1)])
    rows[: counts[0]] = float("inf")
    out = layer(rows)
    batch.muted = [0]
    out.backward(torch.where(torch.isfinite(out), 2 * out, torch.zeros_like(out)).detach())
    for weight in layer.adapter(0):
        assert weight.grad is not None and not weight.grad.any()
    for weight, gradient in zip(layer.adapter(1), clean[2:], strict=True):
        assert weight.grad is not None and torch.equal(weight.grad, gradient)
    batch.enter(_rows(counts))
    assert batch.muted == [], "it holds for one backward"


def test_a_layer_must_be_told_which_rows_are_whose() -> None:
    layer, batch = _layer()
    batch.layout = None
    with pytest.raises(RuntimeError, match="before its pack was told"):
        layer(torch.ones(4, 7, 6))


def _stacks(layer: PackedLinear) -> tuple[Tensor, Tensor]:
    return layer.down().clone(), layer.up().clone()


def test_weights_are_found_wherever_they_are_put() -> None:
    """In place, in another number format, or somewhere else, as DeepSpeed puts them."""
    layer, _ = _layer()
    for weight in layer.adapter(1):
        with torch.no_grad():
            weight.mul_(3.0)
    for part, whole in enumerate(_stacks(layer)):
        assert torch.equal(whole, torch.stack([layer.adapter(adapter)[part].detach() for adapter in range(2)]))
    before = _stacks(layer)
    layer.cast(torch.bfloat16)
    for whole, old in zip(_stacks(layer), before, strict=True):
        assert whole.dtype == torch.bfloat16 and torch.equal(whole, old.bfloat16())
    for adapter in range(2):
        for weight in layer.adapter(adapter):
            weight.data = weight.data.clone() + 1
    for whole, old in zip(_stacks(layer), before, strict=True):
        assert torch.equal(whole, old.bfloat16() + 1)
