"""Adapters on a frozen base model: which layers they change, how they start, and a pack of them put into the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.parts import Family
from jmedlora.config.run import RunSettings
from jmedlora.data.mixing import key_from
from jmedlora.models.dropout import Chances, KeyedDropout, RowsOfAdapter
from jmedlora.models.packed import Batch, PackedLinear

PREFIX = "base_model.model."
"""What PEFT's files put before the names of a model's modules."""


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


class Shape(NamedTuple):
    """What the products of an adapter depend on."""

    rank: int
    alpha: float
    chances: Chances

    @classmethod
    def of(cls, settings: RunSettings) -> Shape:
        return cls(settings.rank, settings.alpha_value, Chances(settings.seed, settings.dropout))


class AdapterPack:
    """N adapters put into a base model, which is changed in place until `detach`; only their weights are trainable.

    `enter` says before each forward which rows belong to which adapter. Weights are named as PEFT's files name them, and given
    and taken at an adapter's own rank.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        targets: Sequence[str],
        shapes: Sequence[Shape],
        device: torch.device,
        dtype: torch.dtype | None = None,
    ):
        """targets: names of linear layers, whole or their last parts.

        Weights are zero, on `device`, in fp32 or more unless `dtype` says else.
        """
        dtype = dtype or torch.promote_types(model.dtype, torch.float32)
        self.model = model
        self.shapes = list(shapes)
        self.rank = max(shape.rank for shape in shapes)
        """The widest one's: of all parameters as long as they are here."""
        names = [name for name, module in model.named_modules() if _is_target(name, module, targets)]
        scaling = torch.tensor([shape.alpha / shape.rank for shape in shapes], dtype=torch.float64)[:, None, None]
        self._batch = Batch(scaling.to(device, torch.float32 if dtype != torch.float64 else dtype))
        if any(shape.chances.probability for shape in shapes):
            self._batch.dropout = KeyedDropout([shape.chances for shape in shapes], [PREFIX + name for name in names], device)
        self._layers: dict[str, PackedLinear] = {}
        for place, name in enumerate(names):
            layer = PackedLinear(model.get_submodule(name), place, len(shapes), self.rank, self._batch, device, dtype)
            _put(model, name, layer)
            self._layers[PREFIX + name] = layer

    def __len__(self) -> int:
        return len(self.shapes)

    def enter(self, adapters: Sequence[RowsOfAdapter]) -> None:
        """Sets the rows of each adapter, in the order of the batch; holds until the next call."""
        self._batch.enter(adapters)

    def mute(self, adapters: list[int]) -> None:
        """The gradients of these are zero in the next backward, even where what they are made of is not finite."""
        self._batch.muted = adapters

    def parameters_of(self, adapter: int) -> dict[str, nn.Parameter]:
        """The weights of one adapter as they stand in the model, at the pack's rank, by name."""
        found = {}
        for name, layer in self._layers.items():
            found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = layer.adapter(adapter)
        return found

    @torch.no_grad()
    def fill(self, adapter: int, weights: Mapping[str, Tensor]) -> None:
        """Sets an adapter's weights, at its own rank. Raises KeyError where the names are not its own, ValueError where a shape is not."""
        parameters = self.parameters_of(adapter)
        if weights.keys() != parameters.keys():
            raise KeyError(", ".join(sorted(weights.keys() ^ parameters.keys())[:3]))
        for name, parameter in parameters.items():
            missing = [whole - own for whole, own in zip(parameter.shape, weights[name].shape, strict=True)]
            if missing.pop(_rank_axis(name)) < 0 or any(missing):
                raise ValueError(f"{name}: {tuple(weights[name].shape)} does not fit into {tuple(parameter.shape)}")
            parameter.copy_(self.padded(name, weights[name]))

    def start(self, adapter: int, seed: int) -> None:
        """Sets an adapter's weights to those of a fresh one: A from the seed and the layer's name alone, B zero."""
        parameters = self.parameters_of(adapter)
        rank = self.shapes[adapter].rank
        for name, layer in self._layers.items():
            first = f"{name}.lora_A.weight"
            fresh = initial(name, rank, layer.base_layer.in_features, seed)
            parameters[first].data.copy_(self.padded(first, fresh))
            parameters[f"{name}.lora_B.weight"].data.zero_()

    def padded(self, name: str, weight: Tensor) -> Tensor:
        """A weight, or anything of its shape, at the pack's rank."""
        missing = self.rank - weight.shape[_rank_axis(name)]
        return nn.functional.pad(weight, (0, 0, 0, missing) if _rank_axis(name) == 0 else (0, missing))

    def cut(self, adapter: int, name: str, weight: Tensor) -> Tensor:
        """The inverse: at the adapter's own rank."""
        return weight.narrow(_rank_axis(name), 0, self.shapes[adapter].rank)

    def cast(self, dtype: torch.dtype) -> None:
        """Turns the weights into another number format, before an optimizer knows them."""
        for layer in self._layers.values():
            layer.cast(dtype)

    def detach(self) -> None:
        """Takes the adapters out of the model again."""
        for name, layer in self._layers.items():
            _put(self.model, name.removeprefix(PREFIX), layer.base_layer)


def lora_config(settings: RunSettings, targets: Sequence[str]) -> LoraConfig:
    """An adapter's settings as PEFT's files tell them."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=int(settings.alpha_value) if settings.alpha_value.is_integer() else settings.alpha_value,
        lora_dropout=settings.dropout,
        target_modules=list(targets),
        bias="none",
    )


def initial(name: str, rank: int, width: int, seed: int) -> Tensor:
    """A layer's A, (rank, width) fp32, as `kaiming_uniform_` with a=sqrt(5) draws it, from a generator of the layer's own."""
    generator = torch.Generator().manual_seed(int(key_from("lora", seed, name)[0] >> 1))
    bound = 1 / math.sqrt(width)
    return torch.empty(rank, width).uniform_(-bound, bound, generator=generator)


def _is_target(name: str, module: nn.Module, targets: Sequence[str]) -> bool:
    return isinstance(module, nn.Linear) and any(name == target or name.endswith(f".{target}") for target in targets)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _rank_axis(name: str) -> int:
    return 0 if name.endswith(".lora_A.weight") else 1
