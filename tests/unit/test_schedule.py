import pytest
import torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from jmedlora.config.run import RunSettings
from jmedlora.training.schedule import factor

_REFERENCE = {
    "constant": lambda optimizer, warmup, total: get_constant_schedule_with_warmup(optimizer, warmup),
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (3, 20), (5, 5), (9, 4)])
def test_factor_is_that_of_transformers(schedule: str, warmup: int, total: int) -> None:
    settings = RunSettings(model="m", method="m", data="d", prompt="p", max_steps=total, schedule=schedule, warmup_steps=warmup)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = _REFERENCE[schedule](optimizer, warmup, total)
    for step in range(1, total + 1):
        assert factor(step, settings, total) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()
