"""Adapter folders in PEFT's format, read as what they add to each linear layer of a base model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from jmedlora.models.dropout import Chances
from jmedlora.models.lora import PREFIX, Shape
from jmedlora.plan.layout import ADAPTER_WEIGHTS

# What PEFT can add beside low-rank products; with one of these, they alone would be another adapter.
_BEYOND_LOW_RANK = (
    "use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias", "use_qalora",
    "use_bdlora", "kasa_config", "arrow_config", "alora_invocation_tokens",
)  # fmt: skip


class AdapterDoesNotFit(Exception):
    """The adapter's weights and the layers that its config asks for are not the same, or it is of a kind that is not known here."""


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter that fits a base model."""

    layers: list[str]
    """Names of the linear layers that it changes."""
    shape: Shape
    """Rank and scale; no dropout."""
    weights: dict[str, torch.Tensor]
    """By their names in the file, for each layer A (rank, in) and B (out, rank), or narrower than the shape's rank."""


def open_adapter(folder: Path, model: PreTrainedModel, device: torch.device | str) -> OpenedAdapter:
    """Reads an adapter for a base model in which there is none. Raises AdapterDoesNotFit."""
    config = LoraConfig.from_pretrained(folder)
    told = config.to_dict()
    beyond = [name for name in _BEYOND_LOW_RANK if told.get(name)] + ([] if config.bias == "none" else ["bias"])
    if beyond:
        raise AdapterDoesNotFit(f"{folder}: {', '.join(beyond)}: only low-rank layers can be evaluated")
    weights = load_file(folder / ADAPTER_WEIGHTS, device=str(device))
    layers = _layers(config, model)
    unmatched = sorted(weights.keys() ^ {f"{PREFIX}{name}.{part}.weight" for name in layers for part in ("lora_A", "lora_B")})
    if unmatched or not layers:
        among = f"{unmatched[0]} among them" if unmatched else "and no layer that it changes"
        raise AdapterDoesNotFit(f"{folder}: {len(unmatched)} weights without a match in the base model, {among}")
    scales = {}
    for name, layer in layers.items():
        rank = _of_layer(config.rank_pattern, name, config.r)
        alpha = _of_layer(config.alpha_pattern, name, config.lora_alpha)
        scales[name] = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        for part, shape in (("lora_A", (rank, layer.in_features)), ("lora_B", (layer.out_features, rank))):
            found = tuple(weights[f"{PREFIX}{name}.{part}.weight"].shape)
            if found != shape:
                raise AdapterDoesNotFit(f"{folder}: {name}.{part} has the shape {found}, and {shape} is asked for")
    widest = max(weights[f"{PREFIX}{name}.lora_A.weight"].shape[0] for name in layers)
    scale = next(iter(scales.values()))
    for name, own in scales.items():
        if own != scale:  # a pattern gives layers other scales
            weights[f"{PREFIX}{name}.lora_B.weight"] *= own / scale
    return OpenedAdapter(list(layers), Shape(widest, scale * widest, Chances(0, 0.0)), weights)


def _layers(config: LoraConfig, model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers that the config asks for, by name."""
    output = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if config.target_modules == "all-linear":
        return {name: module for name, module in linear.items() if module is not output}
    return {name: module for name, module in linear.items() if check_target_module_exists(config, name)}


def _of_layer(pattern: dict[str, int], name: str, otherwise: int) -> int:
    return pattern.get(get_pattern_key(pattern.keys(), name), otherwise)
