"""A run's weights in fp32 and its Adam moments, whole, whatever DeepSpeed has made of them: sharded, flattened or kept apart."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
Named = dict[str, torch.nn.Parameter]


def gather_state(engine: deepspeed.DeepSpeedEngine, client: torch.optim.Optimizer, parameters: Named, stage: int) -> dict[str, Tensor]:
    """`weight/<name>`, `exp_avg/<name>` and `exp_avg_sq/<name>` in fp32 on the CPU; every worker calls it, after the first step."""
    masters = _masters(engine, parameters)
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key in (WEIGHT, *MOMENTS):
            if stage == 0:
                tensor = masters[name] if key == WEIGHT else client.state[masters[name]][key]
            else:
                tensor = safe_get_full_fp32_param(parameter) if key == WEIGHT else safe_get_full_optimizer_state(parameter, key)
            found[f"{key}/{name}"] = tensor.detach().float().to("cpu", copy=True).reshape(_shape(parameter))
    return found


def scatter_state(
    engine: deepspeed.DeepSpeedEngine, client: torch.optim.Optimizer, parameters: Named, stage: int, state: dict[str, Tensor], steps: int
) -> None:
    """Puts what `gather_state` gave into a new engine after `steps` optimizer steps; its low-precision weights are there already."""
    flats = engine.optimizer.fp32_partitioned_groups_flat if stage == 3 else [p for group in client.param_groups for p in group["params"]]
    for flat in flats:  # as the optimizer itself would at its first step
        client.state[flat] = {"step": torch.tensor(float(steps)), **{key: torch.zeros_like(flat) for key in MOMENTS}}
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    masters = _masters(engine, parameters)
    for name, parameter in parameters.items():
        for key in (WEIGHT, *MOMENTS):
            value = state[f"{key}/{name}"]
            if stage == 0:
                target = masters[name] if key == WEIGHT else client.state[masters[name]][key]
                target.data.copy_(value)
            elif stage == 3:
                _set_partition(parameter, value, key)
            elif key == WEIGHT:
                safe_set_full_fp32_param(parameter, value.to(parameter.device))
            else:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def _masters(engine: deepspeed.DeepSpeedEngine, parameters: Named) -> dict[str, Tensor]:
    """Without sharding: the fp32 tensor behind each parameter, which is the parameter itself unless it is in bf16."""
    wrapper: Any = engine.optimizer
    if not hasattr(wrapper, "fp32_groups"):
        return dict(parameters)
    pairs = [pair for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True) for pair in zip(low, high, strict=True)]
    by_low = {id(low): high for low, high in pairs}
    return {name: by_low[id(parameter)] for name, parameter in parameters.items()}


def _set_partition(parameter: torch.nn.Parameter, value: Tensor, key: str) -> None:
    """This worker's part of a parameter sharded by ZeRO-3, whose last part is padded where the workers do not divide it."""
    part = safe_get_local_fp32_param(parameter).numel()
    workers, rank = deepspeed.comm.get_world_size(), deepspeed.comm.get_rank()
    padded = torch.nn.functional.pad(value.flatten(), (0, part * workers - value.numel()))
    own = padded.narrow(0, part * rank, part).to(parameter.device)
    if key == WEIGHT:
        safe_set_local_fp32_param(parameter, own)
    else:
        safe_set_local_optimizer_state(parameter, own, key)


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
