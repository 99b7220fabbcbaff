"""The adapters of a pack on a DeepSpeed engine, at any ZeRO stage."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from torch import Tensor

from jmedlora.config.run import RunSettings
from jmedlora.models.lora import AdapterPack, TrainedWeights
from jmedlora.training.loss import AnswerLoss, Collated
from jmedlora.training.optimizer import GroupClippingAdamW
from jmedlora.training.optimizer_state import WEIGHT, OptimizerState, Start
from jmedlora.training.process import Worker

PERSISTENT_ELEMENTS = 100_000
"""ZeRO-3 keeps parameters below this size whole on every worker: gathering them costs more than it saves."""
_LARGEST_BUCKET = 50_000_000


logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed calls collectives by names that torch is renaming: a warning per call.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


class StepDropped(Exception):
    """DeepSpeed has dropped a step of all adapters, because one gradient is not finite; the weights are those before the step."""


class PackEngine:
    """Forward, backward, step and weights of the adapters of a pack. Every worker of the trial calls every method alike."""

    def __init__(
        self,
        pack: AdapterPack,
        settings: Sequence[RunSettings],
        stage: int,
        compute_precision: str,
        worker: Worker,
        starts: Sequence[Start] = (),
    ):
        """pack: on the worker's device, in a base that is there too, or on the CPU for ZeRO-3 (which moves it in pieces).

        settings: of each adapter. starts: of each adapter, where it goes on from; left out: all are fresh.
        """
        self._worker = worker
        self._pack = pack
        _avoid_compiling()
        self._checkpointing = settings[0].gradient_checkpointing
        if self._checkpointing:
            pack.model.activation_checkpointing_enable({"use_reentrant": False})
        pack.to(worker.device)
        weights = self._weights = TrainedWeights(pack)
        self._parameters = list(weights.parameters())
        starts = starts or [Start()] * len(pack)
        for adapter, (start, parameter) in enumerate(zip(starts, self._parameters, strict=True)):
            if start.state is None:
                values = pack.fresh(adapter, settings[adapter].seed)
            else:
                values = {name: start.state[f"{WEIGHT}/{name}"] for name in pack.parts(adapter)}
            pack.fill(adapter, values, parameter)
        module = AnswerLoss(pack.model, weights)
        module.train()
        self._linear = torch.nn.functional.linear
        config = _engine_config(stage, sum(parameter.numel() for parameter in self._parameters))
        if stage == 3:
            # Piece by piece: DeepSpeed's own way would first put the whole model on every GPU.
            for buffer in module.buffers():
                buffer.data = buffer.data.to(worker.device)
            deepspeed.zero.Init(module=module, config_dict_or_path=config)
        groups = [
            {"params": [parameter], "lr": each.learning_rate, "weight_decay": each.weight_decay, "max_grad_norm": each.max_grad_norm}
            for parameter, each in zip(self._parameters, settings, strict=True)
        ]
        self._optimizer = GroupClippingAdamW(groups, sharded=stage > 0)
        engine, *_ = deepspeed.initialize(model=module, optimizer=self._optimizer, config=config)
        if not isinstance(engine, deepspeed.DeepSpeedEngine) or engine.zero_optimization_stage() != stage:
            raise RuntimeError(f"asked for a DeepSpeed engine at ZeRO stage {stage}, got {type(engine).__name__}")
        # one worker has nothing to reduce, and DeepSpeed would copy all gradients for it
        engine.enable_backward_allreduce = stage > 0 or worker.workers > 1
        self._optimizer.arm()
        self.engine = engine
        self._stage = stage
        self._states = OptimizerState(engine, self._optimizer, pack, self._parameters, stage)
        self._states.scatter(starts)

    def backward(self, batch: Collated, labelled: Sequence[int], last: bool) -> Tensor:
        """Adds the gradients of a micro-batch; returns the adapters' summed losses, detached.

        labelled: of each adapter, labelled tokens of its whole mini-batch, over all workers. last: the last micro-batch before `step`.
        An adapter whose loss is not finite gets no gradient, and the others theirs, as if it were not there.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        losses = self.engine(*batch)
        broken: list[int] = []
        if len(self._pack) > 1 and not bool(torch.isfinite(losses.detach()).all()):
            broken = [adapter for adapter, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
        self._weights.muted = broken
        # DeepSpeed averages over the workers; the loss is a sum over them.
        shares = [0.0 if adapter in broken else self._worker.workers / count for adapter, count in enumerate(labelled)]
        counted = losses if not broken else torch.where(torch.isfinite(losses), losses, torch.zeros_like(losses))
        self.engine.backward((counted * counted.new_tensor(shares)).sum(), scale_wrt_gas=False)
        return losses.detach()

    def step(self, learning_rates: Sequence[float], skipped: Collection[int] = ()) -> list[float]:
        """One optimizer step of every adapter but the skipped ones; returns the gradients' norms before clipping, NaN where there is none.

        An adapter whose norm is not finite stays as it was. Raises StepDropped where DeepSpeed did so with all of them.
        """
        for adapter, group in enumerate(self._optimizer.param_groups):
            group["lr"] = learning_rates[adapter]
            group["grad_norm"] = float("nan")
            group["is_skipped"] = adapter in skipped
        self.engine.step()
        norms = [float(group["grad_norm"]) for group in self._optimizer.param_groups]
        if not self.engine.was_step_applied():
            if len(self._pack) > 1:
                raise StepDropped("a gradient is not finite")
            return [float("nan")]
        return norms

    def adapter_tensors(self, adapter: int) -> dict[str, Tensor]:
        """An adapter's weights, whole, at its own rank and on the CPU, by their names in PEFT's files."""
        parameter = self._parameters[adapter]
        with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
            parts = self._pack.parts(adapter, parameter.detach())
            return {name: part.to("cpu", self._pack.batch.weights.dtype, copy=True).contiguous() for name, part in parts.items()}

    def state_tensors(self, adapter: int) -> dict[str, Tensor]:
        """Weights in fp32 and moments, whole, at the adapter's own rank and on the CPU, as `Start` takes them; after its first step."""
        return self._states.gather(adapter)

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the model. The engine cannot be used afterwards."""
        if self._checkpointing:
            self._pack.model.activation_checkpointing_disable()
        self.engine.destroy()
        torch.nn.functional.linear = self._linear  # ZeRO-3 puts its own in place, for the rest of the process


def _avoid_compiling() -> None:
    """DeepSpeed would build a C++ kernel for gloo on first use: half a minute, and a compiler that may not be there."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _engine_config(stage: int, trainable: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # not used: the loop says where a mini-batch ends
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # clipped per adapter by the optimizer
        "bf16": {"enabled": False},  # adapters are in fp32, and the base is frozen in its own format
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": min(trainable, _LARGEST_BUCKET),
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
