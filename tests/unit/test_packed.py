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
from jmedlora.models.lora import AdapterPack, Shape, TrainedWeights
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
    weights = TrainedWeights(pack)
    assert all(weight.dtype == torch.float64 for weight in weights.parameters())
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
    anchor = weights()
    logits = model(input_ids=ids, use_cache=False).logits
    (logits.square().sum() + anchor).backward()
    gradients = [weight.grad for weight in weights.parameters()]
    for adapter, (lora, own_ids, own) in enumerate(zip(plain, ids.split(counts), logits.split(counts), strict=True)):
        gradient = gradients[adapter]
        assert gradient is not None
        if not counts[adapter]:
            assert not gradient.any()
            continue
        lora.enter(3, range(counts[adapter]))
        expected = lora.model.train()(input_ids=own_ids, use_cache=False).logits
        torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-12)
        expected.square().sum().backward()
        for name, found in pack.parts(adapter, gradient).items():
            wanted = lora.weights()[name].grad
            assert wanted is not None
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_in_evaluation_nothing_is_dropped() -> None:
    settings = _settings(4, 16, 0, 0.5)
    pack = AdapterPack(_base(), TARGETS, [Shape.of(settings)] * 2, CPU)
    weights = {name: torch.randn_like(weight) for name, weight in pack.parts(0).items()}
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
    batch = Batch(torch.full((adapters, 1, 1), 2.0), torch.randn(adapters, 3, 6 + 5), anchor=torch.zeros((), requires_grad=True))
    if dropout:
        batch.dropout = KeyedDropout([Chances(seed, dropout) for seed in range(adapters)], ["layer"], CPU)
    batch.enter(_rows([2] * adapters))
    return PackedLinear(nn.Linear(6, 5).requires_grad_(False), 0, 0, batch), batch


def _gradients(batch: Batch, out: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of the sum of squares, by the rows and by the weights of all adapters."""
    batch.gradients = None
    (of_rows,) = torch.autograd.grad(out.square().sum(), [rows])
    assert batch.gradients is not None
    return of_rows, batch.gradients


def test_recomputation_finds_the_same_masks() -> None:
    layer, batch = _layer(dropout=0.5)
    rows = torch.randn(4, 7, 6, requires_grad=True)
    plain = _gradients(batch, layer(rows), rows)
    again = _gradients(batch, checkpoint(layer, rows, use_reentrant=False), rows)
    assert all(map(torch.equal, plain, again))
    without = _gradients(batch, layer.eval()(rows), rows)
    assert not any(map(torch.equal, plain, without))


def test_a_layer_must_be_told_which_rows_are_whose() -> None:
    layer, batch = _layer()
    batch.layout = None
    with pytest.raises(RuntimeError, match="before its pack was told"):
        layer(torch.ones(4, 7, 6))


# ---------------------------------------------------------------- parameters


def _trained(*ranks: int) -> tuple[AdapterPack, TrainedWeights]:
    """Adapters with random weights, each of them with two rows to come."""
    pack = AdapterPack(_base(), TARGETS, [Shape.of(_settings(rank, 16, 0, 0.0)) for rank in ranks], CPU)
    weights = TrainedWeights(pack)
    for weight in weights.parameters():
        nn.init.normal_(weight, std=0.1)
    pack.enter(_rows([2] * len(ranks)))
    return pack, weights


def _losses(pack: AdapterPack, anchor: Tensor, counts: tuple[int, ...]) -> Tensor:
    pack.enter(_rows(counts))
    logits = pack.model(input_ids=torch.arange(sum(counts) * 6).view(-1, 6), use_cache=False).logits
    return torch.stack([own.square().sum() for own in logits.split(counts)]) + anchor


@pytest.mark.parametrize("counts", [(2, 2), (3, 1)])
def test_a_muted_adapter_gets_zeros_whatever_is_not_finite(counts: tuple[int, int]) -> None:
    pack, weights = _trained(2, 4)
    first, second = weights.parameters()
    _losses(pack, weights(), counts).sum().backward()
    assert first.grad is not None and second.grad is not None and first.grad.any()
    clean = second.grad.clone()
    weights.zero_grad()
    with torch.no_grad():
        first.fill_(float("inf"))
    losses = _losses(pack, weights(), counts)
    assert not torch.isfinite(losses[0])
    weights.muted = [0]
    losses[1].backward()
    assert not first.grad.any() and torch.equal(second.grad, clean)
    weights()
    assert weights.muted == [], "it holds for one backward"


def test_values_are_found_wherever_the_parameters_are() -> None:
    """Where the pack has them, or somewhere else, as DeepSpeed puts them, in another format too."""
    pack, weights = _trained(2, 4)
    first, second = weights.parameters()
    assert first.data_ptr() == pack.batch.weights.data_ptr(), "nothing is copied where nothing has to be"
    second.data = second.data.float() * 2
    weights()
    assert torch.equal(pack.flat(1), second.double()) and torch.equal(pack.flat(0), first)
    assert not pack.batch.weights[0, 2:].any(), "what is not used is zero"


def test_micro_batches_add_up() -> None:
    pack, weights = _trained(2, 4)
    _losses(pack, weights(), (2, 2)).sum().backward()
    once = [weight.grad.clone() for weight in weights.parameters() if weight.grad is not None]
    _losses(pack, weights(), (2, 2)).sum().backward()
    assert len(once) == 2
    for weight, gradient in zip(weights.parameters(), once, strict=True):
        assert weight.grad is not None and torch.equal(weight.grad, 2 * gradient)
