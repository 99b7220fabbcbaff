"""Adapters on a frozen base model: which layers they change, how they start, and a pack of them put into the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
    """N adapters put into a base model, which is changed in place until `detach`.

    `enter` says before each forward which rows belong to which adapter. Weights are named and shaped as PEFT's files have them, at an
    adapter's own rank.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        targets: Sequence[str],
        shapes: Sequence[Shape],
        device: torch.device,
    ):
        """targets: names of linear layers, whole or their last parts. Weights are zero, on `device`, in the model's format."""
        self.model = model
        self.shapes = list(shapes)
        self.rank = max(shape.rank for shape in shapes)
        """The widest one's."""
        names = [name for name, module in model.named_modules() if _is_target(name, module, targets)]
        linear = [model.get_submodule(name) for name in names]
        widths = [layer.in_features + layer.out_features for layer in linear]
        self.width: int = sum(widths)
        """Values that all layers have of one rank."""
        weights = torch.zeros(len(shapes), self.rank, self.width, device=device, dtype=model.dtype)
        scaling = torch.tensor([shape.alpha / shape.rank for shape in shapes], dtype=torch.float64)[:, None, None]
        self.batch = Batch(scaling.to(device, torch.promote_types(model.dtype, torch.float32)), weights)
        if any(shape.chances.probability for shape in shapes):
            self.batch.dropout = KeyedDropout([shape.chances for shape in shapes], [PREFIX + name for name in names], device)
        self._layers: dict[str, PackedLinear] = {}
        starts = itertools.accumulate(widths, initial=0)
        for place, (name, layer, start) in enumerate(zip(names, linear, starts)):
            packed = PackedLinear(layer, place, start, self.batch)
            _put(model, name, packed)
            self._layers[PREFIX + name] = packed

    def __len__(self) -> int:
        return len(self.shapes)

    def enter(self, adapters: Sequence[RowsOfAdapter]) -> None:
        """Sets the rows of each adapter, in the order of the batch; holds until the next call."""
        self.batch.enter(adapters)

    def flat(self, adapter: int, whole: Tensor | None = None) -> Tensor:
        """All weights of an adapter in the pack, (rank * width,), which changes with it; or its part of another (N, R, W)."""
        return (self.batch.weights if whole is None else whole)[adapter].view(-1)[: self.shapes[adapter].rank * self.width]

    def parts(self, adapter: int, flat: Tensor | None = None) -> dict[str, Tensor]:
        """The weights of an adapter, or another vector of that kind, by name: views of the same values."""
        rows = (self.flat(adapter) if flat is None else flat).view(self.shapes[adapter].rank, self.width)
        found = {}
        for name, layer in self._layers.items():
            found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = layer.down(rows), layer.up(rows).T
        return found

    @torch.no_grad()
    def fill(self, adapter: int, weights: Mapping[str, Tensor], flat: Tensor | None = None) -> None:
        """Sets an adapter's weights, of its own rank or less, in the pack or in another vector of that kind.

        Raises KeyError where the names are not its own, ValueError where a shape is not.
        """
        parts = self.parts(adapter, flat)
        if weights.keys() != parts.keys():
            raise KeyError(", ".join(sorted(weights.keys() ^ parts.keys())[:3]))
        for name, part in parts.items():
            axis, given = _rank_axis(name), weights[name]
            missing = [whole - own for whole, own in zip(part.shape, given.shape, strict=True)]
            if missing.pop(axis) < 0 or any(missing):
                raise ValueError(f"{name}: {tuple(given.shape)} does not fit into {tuple(part.shape)}")
            part.narrow(axis, 0, given.shape[axis]).copy_(given)
            part.narrow(axis, given.shape[axis], part.shape[axis] - given.shape[axis]).zero_()

    def fresh(self, adapter: int, seed: int) -> dict[str, Tensor]:
        """The weights that an adapter starts with, in fp32: A from the seed and the layer's name alone, B zero."""
        rank, found = self.shapes[adapter].rank, {}
        for name, layer in self._layers.items():
            found[f"{name}.lora_A.weight"] = initial(name, rank, layer.base_layer.in_features, seed)
            found[f"{name}.lora_B.weight"] = torch.zeros(layer.base_layer.out_features, rank)
        return found

    def to(self, device: torch.device) -> None:
        """Moves the weights, before they are trained."""
        self.batch.weights, self.batch.scaling = self.batch.weights.to(device), self.batch.scaling.to(device)

    def detach(self) -> None:
        """Takes the adapters out of the model again."""
        for name, layer in self._layers.items():
            _put(self.model, name.removeprefix(PREFIX), layer.base_layer)


class TrainedWeights(nn.Module):
    """The parameters of a pack's adapters: a vector each, in fp32 or more.

    Called once before each forward of the model: puts the values where the layers find them, and gives a scalar zero that the loss has to
    depend on, so that gradients find their way back.
    """

    def __init__(self, pack: AdapterPack):
        super().__init__()
        self._pack = pack
        dtype = torch.promote_types(pack.batch.weights.dtype, torch.float32)
        for adapter in range(len(pack)):
            values = pack.flat(adapter).to(dtype)  # the pack's own where the format is the same
            self.register_parameter(f"adapter_{adapter}", nn.Parameter(values))
        self.muted: list[int] = []
        """Adapters whose loss is not finite: their gradients are zero in the next backward, whatever is computed."""

    def __len__(self) -> int:
        return len(self._pack)

    def forward(self) -> Tensor:
        self.muted = []
        anchor: Tensor = _Values.apply(self, self._pack, *self.parameters())
        self._pack.batch.anchor = anchor
        return anchor


class _Values(torch.autograd.Function):
    """From the parameters to the values that the layers work with, and from these one's gradients to the parameters'."""

    @staticmethod
    def forward(ctx: Any, owner: TrainedWeights, pack: AdapterPack, *parameters: Tensor) -> Tensor:
        for adapter, parameter in enumerate(parameters):
            values = pack.flat(adapter)
            if values.data_ptr() != parameter.data_ptr():  # DeepSpeed has put it elsewhere, or the layers compute in another format
                values.copy_(parameter)
        ctx.owner, ctx.pack, ctx.dtype = owner, pack, parameters[0].dtype
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        pack: AdapterPack = ctx.pack
        whole = pack.batch.room_for_gradients()
        pack.batch.gradients = pack.batch.anchor = None
        for adapter in ctx.owner.muted:
            whole[adapter].zero_()
        return None, None, *(pack.flat(adapter, whole).to(ctx.dtype) for adapter in range(len(pack)))


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
