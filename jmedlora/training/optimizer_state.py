"""Adapters' weights in fp32 and Adam moments, whole, whatever DeepSpeed has made of them: sharded, flattened or kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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

from jmedlora.models.lora import AdapterPack

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Start(NamedTuple):
    """Where an adapter goes on from: the steps that are done, and what `OptimizerState.gather` gave after them; None: a fresh one."""

    steps: int = 0
    state: dict[str, Tensor] | None = None


class OptimizerState:
    """Gives and takes `weight/<name>`, `exp_avg/<name>` and `exp_avg_sq/<name>` of the adapters of a pack; every worker calls it.

    In fp32, on the CPU and at an adapter's own rank; names are those of PEFT's files.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        client: torch.optim.Optimizer,
        pack: AdapterPack,
        parameters: Sequence[torch.nn.Parameter],
        stage: int,
    ):
        """parameters: one of each adapter."""
        self._engine, self._client, self._pack, self._parameters, self._stage = engine, client, pack, parameters, stage

    def gather(self, adapter: int) -> dict[str, Tensor]:
        """The state of one adapter, after its first step."""
        parameter = self._parameters[adapter]
        found: dict[str, Tensor] = {}
        for key in (WEIGHT, *MOMENTS):
            if self._stage == 0:
                tensor = parameter if key == WEIGHT else self._client.state[parameter][key]
            else:
                tensor = safe_get_full_fp32_param(parameter) if key == WEIGHT else safe_get_full_optimizer_state(parameter, key)
            whole = tensor.detach().flatten()
            parts = self._pack.parts(adapter, whole if whole.dtype == torch.float64 else whole.float())
            found |= {f"{key}/{name}": part.to("cpu", copy=True).contiguous() for name, part in parts.items()}
        return found

    def scatter(self, starts: Sequence[Start]) -> None:
        """Puts states into a new engine, whose weights are there already; a fresh adapter gets moments of zero.

        Also where all are fresh: DeepSpeed's ZeRO 1 and 2 take note of moments once, after the first adapter's first step.
        """
        for adapter, start in enumerate(starts):
            for flat in self._flats(adapter):  # as the optimizer itself would at its first step
                steps = torch.tensor(float(start.steps), device=flat.device)
                self._client.state[flat] = {"step": steps, **{key: torch.zeros_like(flat) for key in MOMENTS}}
        if self._stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for adapter, start in enumerate(starts):
            if start.state is None:
                continue
            parameter = self._parameters[adapter]
            for key in (WEIGHT, *MOMENTS):
                value = parameter.new_empty(self._pack.shapes[adapter].rank * self._pack.width)
                self._pack.fill(adapter, {name: start.state[f"{key}/{name}"] for name in self._pack.parts(adapter)}, value)
                self._set(parameter, value, key)

    def _set(self, parameter: torch.nn.Parameter, value: Tensor, key: str) -> None:
        if self._stage == 0:
            target = parameter if key == WEIGHT else self._client.state[parameter][key]
            target.data.copy_(value)
        elif self._stage == 3:
            _set_partition(parameter, value, key)
        elif key == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _flats(self, adapter: int) -> list[Tensor]:
        """What the optimizer holds of an adapter: its parameter, or what DeepSpeed has made of it."""
        wrapper: Any = self._engine.optimizer
        if self._stage == 3:
            owners = wrapper.sub_group_to_group_id
            return [flat for place, flat in enumerate(wrapper.fp32_partitioned_groups_flat) if owners[place] == adapter]
        return list(self._client.param_groups[adapter]["params"])


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
