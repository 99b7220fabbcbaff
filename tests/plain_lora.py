"""An adapter as PEFT itself computes it, with this project's start and dropout: what packs are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from jmedlora.config.parts import Family
from jmedlora.config.run import RunSettings
from jmedlora.models.dropout import Chances, KeyedDropout, RowsOfAdapter
from jmedlora.models.lora import initial, lora_config, target_modules

CPU = torch.device("cpu")


class PlainLora:
    """One adapter in PEFT's own layers."""

    def __init__(self, model: PreTrainedModel, settings: RunSettings, family: Family, dtype: torch.dtype = torch.float32):
        targets = target_modules(model, settings, family)
        self.model: PeftModel = get_peft_model(model, lora_config(settings, targets))
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, LoraLayer)}
        self._dropout = KeyedDropout([Chances(settings.seed, settings.dropout)], list(layers), CPU)
        for place, (name, layer) in enumerate(layers.items()):
            layer.lora_A.to(dtype=dtype)
            layer.lora_B.to(dtype=dtype)
            layer.lora_A["default"].weight.data.copy_(initial(name, settings.rank, layer.in_features, settings.seed))
            if settings.dropout:
                layer.lora_dropout["default"] = _Dropping(self._dropout, place)

    def enter(self, step: int, rows: Sequence[int]) -> None:
        """Sets what dropout depends on."""
        self._dropout.enter([RowsOfAdapter(rows, step)])

    def weights(self) -> dict[str, nn.Parameter]:
        """The adapter's weights, named as in PEFT's files."""
        return {name.replace(".default", ""): weight for name, weight in self.model.named_parameters() if weight.requires_grad}


class _Dropping(nn.Module):
    def __init__(self, dropout: KeyedDropout, place: int):
        super().__init__()
        self._dropout, self._place = dropout, place

    def forward(self, values: Tensor) -> Tensor:
        masks = self._dropout.masks(self._place, values.shape[1], values.shape[2], values.dtype)
        return values * masks.keep * masks.scale
