"""One run on a DeepSpeed engine, at any ZeRO stage."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from jmedlora.config.run import RunSettings
from jmedlora.training.loss import AnswerLoss, Collated
from jmedlora.training.optimizer import GroupClippingAdamW
from jmedlora.training.optimizer_state import WEIGHT, gather_state, scatter_state
from jmedlora.training.process import Worker

PERSISTENT_ELEMENTS = 100_000
"""ZeRO-3 keeps parameters below this size whole on every worker: gathering them costs more than it saves."""
_LARGEST_BUCKET = 50_000_000


logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed calls collectives by names that torch is renaming: a warning per call.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


class NotFinite(Exception):
    """Loss or gradient of a step is infinite or not a number; the weights are those before the step."""


class RunEngine:
    """Forward, backward, step and the adapter's weights of one run. Every worker of the trial calls every method alike."""

    def __init__(
        self,
        adapted: PeftModel,
        settings: RunSettings,
        stage: int,
        compute_precision: str,
        worker: Worker,
        steps: int = 0,
        state: dict[str, Tensor] | None = None,
    ):
        """adapted: base with a fresh adapter, on the worker's device, or on the CPU for ZeRO-3 (which moves it in pieces).

        state: what `state_tensors` gave after `steps` steps, to go on from there.
        """
        self._worker = worker
        self._adapted = adapted
        _avoid_compiling()
        self._checkpointing = settings.gradient_checkpointing
        if self._checkpointing:
            adapted.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        for name, parameter in _trainable(adapted).items() if state else ():
            parameter.data.copy_(state[f"{WEIGHT}/{name}"])  # type: ignore[index]
        if compute_precision == "bf16":
            for parameter in _trainable(adapted).values():
                parameter.data = parameter.data.to(torch.bfloat16)
        module = AnswerLoss(adapted)
        module.train()
        self._linear = torch.nn.functional.linear
        config = _engine_config(stage, compute_precision, sum(weight.numel() for weight in _trainable(adapted).values()))
        if stage == 3:
            # Piece by piece: DeepSpeed's own way would first put the whole model on every GPU.
            for buffer in module.buffers():
                buffer.data = buffer.data.to(worker.device)
            deepspeed.zero.Init(module=module, config_dict_or_path=config)
        group = {
            "params": list(_trainable(adapted).values()),
            "lr": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "max_grad_norm": settings.max_grad_norm,
        }
        self._optimizer = GroupClippingAdamW([group], sharded=stage > 0)
        engine, *_ = deepspeed.initialize(model=module, optimizer=self._optimizer, config=config)
        if not isinstance(engine, deepspeed.DeepSpeedEngine) or engine.zero_optimization_stage() != stage:
            raise RuntimeError(f"asked for a DeepSpeed engine at ZeRO stage {stage}, got {type(engine).__name__}")
        self._optimizer.arm()
        if state:
            scatter_state(engine, self._optimizer, _trainable(adapted), stage, state, steps)
        self.engine = engine
        self._stage = stage

    @property
    def device(self) -> torch.device:
        return self._worker.device

    def backward(self, batch: Collated, weight: float, labelled: int, last: bool) -> Tensor:
        """Adds the gradient of a micro-batch; returns its summed loss, detached.

        labelled: labelled tokens of the whole mini-batch, over all workers. last: the last micro-batch before `step`.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self.engine(batch.input_ids, batch.positions, batch.targets) * weight
        # DeepSpeed averages over the workers; the loss is a sum over them.
        self.engine.backward(loss * (self._worker.workers / labelled), scale_wrt_gas=False)
        return loss.detach()

    def step(self, learning_rate: float) -> float:
        """One optimizer step; returns the gradient's norm before clipping. Raises NotFinite when there is none."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
            group["grad_norm"] = float("nan")
        self.engine.step()
        norm = self._optimizer.param_groups[0]["grad_norm"]
        if norm != norm or norm == float("inf") or not self.engine.was_step_applied():
            raise NotFinite("gradient is not finite")
        return norm

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The adapter's weights, whole and on the CPU, by their names in the PeftModel."""
        parameters = _trainable(self._adapted)
        with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=self._stage == 3):
            return {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights in fp32 and moments, whole and on the CPU, as `restore` takes them; after the first step."""
        return gather_state(self.engine, self._optimizer, _trainable(self._adapted), self._stage)

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the model. The engine cannot be used afterwards."""
        if self._checkpointing:
            self._adapted.get_base_model().activation_checkpointing_disable()
        self.engine.destroy()
        torch.nn.functional.linear = self._linear  # ZeRO-3 puts its own in place, for the rest of the process


def sums_over_workers(values: list[Tensor]) -> list[float]:
    """The sums of scalars over all workers, on the first one's device."""
    device = values[0].device
    precise = torch.float64 if device.type == "cpu" else torch.float32
    totals = torch.stack([value.detach().to(device, precise) for value in values])
    dist.all_reduce(totals)
    return totals.tolist()


def _trainable(adapted: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}


def _avoid_compiling() -> None:
    """DeepSpeed would build a C++ kernel for gloo on first use: half a minute, and a compiler that may not be there."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _engine_config(stage: int, compute_precision: str, trainable: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # not used: the loop says where a mini-batch ends
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # clipped per adapter by the optimizer
        "bf16": {"enabled": compute_precision == "bf16"},
        # Gradients of several micro-batches are summed in fp32 where DeepSpeed can do so without another optimizer class.
        "data_types": {"grad_accum_dtype": "fp32"} if stage >= 2 else {},
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
