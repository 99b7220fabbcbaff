"""Parameter counts and weight shapes from architecture facts, without the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

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
    """The architecture given in the configuration, else read from the folder's config.json; None with a fault when neither is sound."""
    if model.architecture is not None:
        return _divisible(model.architecture, model.family, f"model {model.name}", "architecture.heads", "architecture.kv_heads", faults)
    if folder is not None and (folder / "config.json").is_file():
        return _from_config_json(folder / "config.json", model.family, faults)
    faults.append(Fault(f"model {model.name}", "architecture", "missing", "the shape facts, or a local folder with a config.json"))
    return None


def _from_config_json(path: Path, family: Family, faults: list[Fault]) -> Architecture | None:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        faults.append(Fault(str(path), "", f"cannot be read: {error}", "a transformers config.json"))
        return None
    if not isinstance(facts, dict):
        faults.append(Fault(str(path), "", "not an object", "a transformers config.json"))
        return None
    if facts.get("model_type") != family:
        faults.append(
            Fault(str(path), "model_type", f"{facts.get('model_type')!r} is not {family!r}", "llama or gpt_neox, as in the model's family")
        )
        return None
    values = {name: facts[key] for name, key in _CONFIG_KEYS.items() if facts.get(key) is not None}
    values.setdefault("kv_heads", values.get("heads"))
    try:
        shape = Architecture.model_validate(values)
    except ValidationError as error:
        # one line per fact; without its own number of key-value heads a config has as many as heads
        for detail in error.errors(include_url=False):
            name = str(detail["loc"][0])
            if name == "kv_heads" and facts.get(_CONFIG_KEYS[name]) is None:
                continue
            problem = "missing" if detail["type"] == "missing" else f"{detail['input']!r:.60} is not allowed"
            faults.append(Fault(str(path), _CONFIG_KEYS[name], problem, "a transformers config.json"))
        return None
    return _divisible(shape, family, str(path), _CONFIG_KEYS["heads"], _CONFIG_KEYS["kv_heads"], faults)


_CONFIG_KEYS = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocabulary": "vocab_size",
    "tied_embeddings": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
}


def _divisible(shape: Architecture, family: Family, where: str, heads: str, kv_heads: str, faults: list[Fault]) -> Architecture | None:
    found = []
    if shape.hidden_size % shape.heads:
        found.append(Fault(where, heads, f"{shape.heads} heads do not divide hidden_size {shape.hidden_size}", "a divisor of it"))
    if shape.heads % shape.kv_heads:
        found.append(Fault(where, kv_heads, f"{shape.kv_heads} do not divide {shape.heads} heads", "a divisor of them"))
    if not found and family == "llama" and shape.hidden_size // shape.heads % 2:
        told = f"{shape.heads} heads are {shape.hidden_size // shape.heads} wide, and positions turn pairs of values"
        found.append(Fault(where, heads, told, "heads of an even width"))
    faults.extend(found)
    return None if found else shape
