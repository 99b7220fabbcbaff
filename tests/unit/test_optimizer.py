import math

import pytest
import torch

from jmedlora.training.optimizer import GroupClippingAdamW


def _parameters(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]


def _set_gradients(parameters: list[torch.nn.Parameter], scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


@pytest.mark.parametrize("limit", [None, 0.5, 100.0])
def test_each_group_is_clipped_as_torch_clips_it_alone(limit: float | None) -> None:
    groups = [_parameters(0), _parameters(1)]
    alone = [_parameters(0), _parameters(1)]
    chosen = {"lr": 0.1, "weight_decay": 0.2, "max_grad_norm": limit}
    together = GroupClippingAdamW([{"params": group, **chosen} for group in groups], sharded=False)
    together.arm()
    references = [torch.optim.AdamW(group, lr=0.1, weight_decay=0.2) for group in alone]
    for step in range(3):
        norms = []
        for place, (group, expected, reference) in enumerate(zip(groups, alone, references, strict=True)):
            _set_gradients(group, 10.0**place, step)
            _set_gradients(expected, 10.0**place, step)
            norms.append(torch.nn.utils.clip_grad_norm_(expected, limit or math.inf).item())
            reference.step()
        together.step()
        assert [group["grad_norm"] for group in together.param_groups] == pytest.approx(norms, rel=1e-5)
        for group, expected in zip(groups, alone, strict=True):
            torch.testing.assert_close([p.detach() for p in group], [p.detach() for p in expected])


def test_a_group_that_is_not_finite_is_left_alone() -> None:
    good, bad = _parameters(0), _parameters(1)
    optimizer = GroupClippingAdamW([{"params": group, "lr": 0.1, "max_grad_norm": 1.0} for group in (good, bad)], sharded=False)
    optimizer.arm()
    _set_gradients(good, 1.0, 0)
    _set_gradients(bad, 1.0, 0)
    assert bad[1].grad is not None
    bad[1].grad[2] = math.nan
    before = [parameter.detach().clone() for parameter in good + bad]
    optimizer.step()
    changed = [not torch.equal(parameter, old) for parameter, old in zip(good + bad, before, strict=True)]
    assert changed == [True, True, False, False]
    assert math.isnan(optimizer.param_groups[1]["grad_norm"])


def test_a_skipped_step_leaves_weights_and_moments_and_does_not_count() -> None:
    """Three steps, the second of them skipped, against the first and the third alone; the other group takes all three."""
    groups, references = [_parameters(0), _parameters(1)], [_parameters(0), _parameters(1)]
    chosen = {"lr": 0.1, "weight_decay": 0.2, "max_grad_norm": 1.0}
    optimizer = GroupClippingAdamW([{"params": group, **chosen} for group in groups], sharded=False)
    alone = [GroupClippingAdamW([{"params": group, **chosen}], sharded=False) for group in references]
    for each in (optimizer, *alone):
        each.arm()
    for step in range(3):
        skipped = step == 1
        optimizer.param_groups[0]["is_skipped"] = skipped
        for place, (group, reference) in enumerate(zip(groups, references, strict=True)):
            _set_gradients(group, 10.0, step)
            _set_gradients(reference, 10.0, step)
            if not (skipped and place == 0):
                alone[place].step()
        before = [parameter.detach().clone() for parameter in groups[0]]
        optimizer.step()
        assert all(torch.equal(parameter, old) for parameter, old in zip(groups[0], before, strict=True)) == skipped
        for group, reference in zip(groups, references, strict=True):
            assert all(torch.equal(parameter, expected) for parameter, expected in zip(group, reference, strict=True))
    assert [int(optimizer.state[group[0]]["step"]) for group in groups] == [2, 3]


def test_steps_before_arming_leave_no_trace() -> None:
    parameters = _parameters(0)
    optimizer = GroupClippingAdamW([{"params": parameters, "lr": 0.1, "weight_decay": 0.5}], sharded=False)
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))
    assert not optimizer.state
