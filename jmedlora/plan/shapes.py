"""Parameter counts and weight shapes from architecture facts, without the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from jmedlora.config.faults import Fault
from jmedlora.config.parts import Architecture, Family, ModelConfig


class Linear(NamedTuple):
    """One linear layer of a block: its module name, input and output width."""

    name: str
    in_features: int
    out_features: int
    is_attention: bool


def linear_layers(family: Family, shape: Architecture) -> list[Linear]:
    """The linear layers of one transformer block, in forward order."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    if family == "gpt_neox":
        return [
            Linear("query_key_value", hidden, 3 * hidden, True),
            Linear("dense", hidden, hidden, False),
            Linear("dense_h_to_4h", hidden, inner, False),
            Linear("dense_4h_to_h", inner, hidden, False),
        ]
    kv = hidden // shape.heads * shape.kv_heads
    return [
        Linear("q_proj", hidden, hidden, True),
        Linear("k_proj", hidden, kv, True),
        Linear("v_proj", hidden, kv, True),
        Linear("o_proj", hidden, hidden, False),
        Linear("gate_proj", hidden, inner, False),
        Linear("up_proj", hidden, inner, False),
        Linear("down_proj", inner, hidden, False),
    ]


def target_layers(family: Family, shape: Architecture, targets: str | tuple[str, ...]) -> list[Linear]:
    """The layers of one block that get LoRA weights."""
    layers = linear_layers(family, shape)
    if targets == "all-linear":
        return layers
    if targets == "attention":
        return [layer for layer in layers if layer.is_attention]
    return [layer for layer in layers if layer.name in targets]


def linear_parameters(family: Family, shape: Architecture) -> int:
    """Weights of all blocks' linear layers: what NF4 quantises."""
    return shape.layers * sum(layer.in_features * layer.out_features for layer in linear_layers(family, shape))


def model_parameters(family: Family, shape: Architecture) -> int:
    """All parameters: embeddings, blocks with norms (and biases for GPT-NeoX), final norm, output projection."""
    hidden = shape.hidden_size
    embeddings = shape.vocabulary * hidden * (1 if shape.tied_embeddings else 2)
    if family == "gpt_neox":
        biases = shape.layers * sum(layer.out_features for layer in linear_layers(family, shape))
        norms = (shape.layers * 2 + 1) * 2 * hidden
    else:
        biases = 0
        norms = (shape.layers * 2 + 1) * hidden
    return embeddings + linear_parameters(family, shape) + biases + norms


def lora_parameters(family: Family, shape: Architecture, rank: int, targets: str | tuple[str, ...]) -> int:
    """Trainable parameters of one adapter."""
    return shape.layers * sum(rank * (layer.in_features + layer.out_features) for layer in target_layers(family, shape, targets))


def architecture_of(model: ModelConfig, folder: Path | None, faults: list[Fault]) -> Architecture | None:
    """The architecture given in the configuration, else read from the folder's config.json; None with a fault when neither is there."""
    if model.architecture is not None:
        return model.architecture
    if folder is not None and (folder / "config.json").is_file():
        return _from_config_json(folder / "config.json", model.family, faults)
    faults.append(Fault(f"model {model.name}", "architecture", "missing", "the shape facts, or a local folder with a config.json"))
    return None


def _from_config_json(path: Path, family: Family, faults: list[Fault]) -> Architecture | None:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        faults.append(Fault(str(path), "", f"cannot be read: {error}", "a transformers config.json"))
        return None
    if facts.get("model_type") != family:
        faults.append(
            Fault(str(path), "model_type", f"{facts.get('model_type')!r} is not {family!r}", "llama or gpt_neox, as in the model's family")
        )
        return None
    try:
        return Architecture(
            layers=facts["num_hidden_layers"],
            hidden_size=facts["hidden_size"],
            intermediate_size=facts["intermediate_size"],
            heads=facts["num_attention_heads"],
            kv_heads=facts.get("num_key_value_heads") or facts["num_attention_heads"],
            vocabulary=facts["vocab_size"],
            tied_embeddings=facts.get("tie_word_embeddings", False),
            max_positions=facts.get("max_position_embeddings", 2048),
        )
    except KeyError as missing:
        faults.append(Fault(str(path), str(missing.args[0]), "missing", "a transformers config.json"))
        return None
