import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jmedlora.models.dropout import DropoutContext, KeyedDropout, keep_mask

CPU = torch.device("cpu")


def _mask(
    rows: list[int], positions: int = 40, channels: int = 24, seed: int = 0, step: int = 1, name: str = "layer", p: float = 0.3
) -> Tensor:
    context = DropoutContext(seed)
    layer = KeyedDropout(p, name, context).train()
    context.enter(step, rows, CPU)
    return layer(torch.ones(len(rows), positions, channels))


def test_mask_depends_on_seed_step_row_and_module_alone() -> None:
    reference = _mask([4])
    assert torch.equal(_mask([4]), reference)
    for other in (_mask([5]), _mask([4], seed=1), _mask([4], step=2), _mask([4], name="other")):
        assert not torch.equal(other, reference)


def test_mask_is_independent_of_batch_padding_and_other_modules() -> None:
    reference = _mask([4])
    assert torch.equal(_mask([9, 4, 2])[1:2], reference)
    assert torch.equal(_mask([4], positions=70)[:, :40], reference)
    context = DropoutContext(0)
    KeyedDropout(0.3, "another", context)
    layer = KeyedDropout(0.3, "layer", context).train()
    context.enter(1, [4], CPU)
    assert torch.equal(layer(torch.ones(1, 40, 24)), reference)


@pytest.mark.parametrize("probability", [0.0625, 0.1, 0.5, 0.9])
def test_values_are_dropped_independently_with_the_asked_probability(probability: float) -> None:
    keys = torch.tensor([1, -2, 300, 2**31 - 1], dtype=torch.int32)
    kept = keep_mask(keys, 300, 192, probability).double()
    assert kept.mean(dim=(1, 2)).tolist() == pytest.approx([1 - probability] * 4, abs=0.006)
    assert kept.mean(dim=(0, 1)).sub(1 - probability).abs().max() < 0.08, "no channel is favoured"
    centred = kept - (1 - probability)
    variance = probability * (1 - probability)
    for left, right in ((centred[:, 1:], centred[:, :-1]), (centred[..., 1:], centred[..., :-1]), (centred[1:], centred[:-1])):
        assert (left * right).mean().item() / variance == pytest.approx(0, abs=0.012)


def test_kept_values_and_gradients_are_scaled() -> None:
    context = DropoutContext(0)
    layer = KeyedDropout(0.25, "layer", context).train()
    context.enter(3, [0, 1], CPU)
    values = torch.randn(2, 30, 16, requires_grad=True)
    out = layer(values)
    out.sum().backward()
    assert values.grad is not None
    scale = out.detach() / values.detach()
    torch.testing.assert_close(values.grad, scale)
    assert {round(value, 4) for value in scale.unique().tolist()} == {0.0, 1.3333}


def test_recomputation_finds_the_same_mask() -> None:
    context = DropoutContext(0)
    layer = KeyedDropout(0.5, "layer", context).train()
    context.enter(3, [0, 1], CPU)
    values = torch.randn(2, 30, 16, requires_grad=True)
    (plain,) = torch.autograd.grad((layer(values) ** 2).sum(), values)
    (again,) = torch.autograd.grad((checkpoint(layer, values, use_reentrant=False) ** 2).sum(), values)
    assert torch.equal(plain, again)


def test_nothing_is_dropped_in_evaluation_and_nothing_without_a_context() -> None:
    layer = KeyedDropout(0.5, "layer", DropoutContext(0))
    values = torch.randn(2, 3, 4)
    assert layer.eval()(values) is values
    with pytest.raises(RuntimeError, match="before DropoutContext"):
        layer.train()(values)
