"""LoRA layers on a frozen base model: which layers, how they start, how they drop."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.parts import Family
from jmedlora.config.run import RunSettings
from jmedlora.data.mixing import key_from
from jmedlora.models.dropout import DropoutContext, KeyedDropout

ADAPTER = "default"


class _Layers(NamedTuple):
    attention: tuple[str, ...]
    other: tuple[str, ...]


_FAMILIES: dict[Family, _Layers] = {
    "llama": _Layers(("q_proj", "k_proj", "v_proj"), ("o_proj", "gate_proj", "up_proj", "down_proj")),
    "gpt_neox": _Layers(("query_key_value",), ("dense", "dense_h_to_4h", "dense_4h_to_h")),
}


def target_modules(model: PreTrainedModel, settings: RunSettings, family: Family) -> list[str]:
    """Module names that get LoRA weights, sorted; never the output projection.

    Raises BadInput for a name that is no linear layer of the model.
    """
    layers = _FAMILIES[family]
    if settings.targets == "attention":
        wanted = set(layers.attention)
    elif settings.targets == "all-linear":
        wanted = {*layers.attention, *layers.other}
    else:
        wanted = set(settings.targets)
    output = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not output]
    unknown = sorted(name for name in wanted if not any(there == name or there.endswith(f".{name}") for there in linear))
    if unknown or not wanted:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        allowed = f"attention, all-linear, or a list of: {', '.join(known)}"
        problem = f"no linear layer of this {family} model is named {', '.join(unknown)}" if unknown else "an empty list"
        raise BadInput([Fault("run settings", "targets", problem, allowed)])
    return sorted(wanted)


def attach_lora(model: PreTrainedModel, settings: RunSettings, family: Family, device: torch.device, context: DropoutContext) -> PeftModel:
    """Puts a fresh adapter into `model` (changed in place) and returns the wrapper; only LoRA weights are trainable.

    A starts from the run's seed and the layer's name alone, B from zero; both in fp32 on `device`.
    Dropout takes its masks from `context`. `PeftModel.unload` takes the layers out again.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=int(settings.alpha_value) if settings.alpha_value.is_integer() else settings.alpha_value,
        lora_dropout=settings.dropout,
        target_modules=target_modules(model, settings, family),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT and transformers among themselves
        adapted = get_peft_model(model, config)
    for name, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A.to(device=device, dtype=torch.float32)
            layer.lora_B.to(device=device, dtype=torch.float32)
            _initialise(layer, name, settings.seed)
            if settings.dropout > 0:
                layer.lora_dropout[ADAPTER] = KeyedDropout(settings.dropout, name, context)
    return adapted


@torch.no_grad()
def _initialise(layer: LoraLayer, name: str, seed: int) -> None:
    """A as `kaiming_uniform_` with a=sqrt(5) draws it, from a generator of the layer's own; B zero."""
    first, second = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    generator = torch.Generator().manual_seed(int(key_from("lora", seed, name)[0] >> 1))
    bound = 1 / math.sqrt(layer.in_features)
    first.copy_(torch.empty(first.shape).uniform_(-bound, bound, generator=generator))
    second.zero_()
