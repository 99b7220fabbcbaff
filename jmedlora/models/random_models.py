"""Random weights of a given shape, with a byte-level tokenizer: for tests and dry runs, measuring, and shapes for estimates."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.parts import Architecture, Family, ModelConfig, Precision
from jmedlora.models.load import DTYPES, quantised

_SPECIAL_TOKENS = {"<pad>": 256, "<s>": 257, "</s>": 258}
_INITIAL_SPREAD = 0.02
SMALLEST_VOCABULARY = 256 + len(_SPECIAL_TOKENS)


def model_config(family: Family, shape: Architecture) -> PreTrainedConfig:
    """The Hugging Face configuration of a shape; special tokens are those of `byte_tokenizer`."""
    common = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tied_embeddings,
        "pad_token_id": _SPECIAL_TOKENS["<pad>"],
        "bos_token_id": _SPECIAL_TOKENS["<s>"],
        "eos_token_id": _SPECIAL_TOKENS["</s>"],
    }
    if family == "gpt_neox":
        return GPTNeoXConfig(**common)
    return LlamaConfig(**common, num_key_value_heads=shape.kv_heads)


def build_model(family: Family, shape: Architecture) -> PreTrainedModel:
    """A model of a shape with weights from torch's global generator, on the current default device (`meta` included)."""
    config = model_config(family, shape)
    return GPTNeoXForCausalLM(config) if family == "gpt_neox" else LlamaForCausalLM(config)


def random_base(
    family: Family,
    shape: Architecture,
    precision: Precision,
    compute_precision: Literal["fp32", "bf16"],
    double_quantisation: bool,
    device: str | torch.device,
    seed: int = 0,
) -> PreTrainedModel:
    """What `load_base` gives for a folder of such a model, made on `device` layer by layer and never whole anywhere else.

    For measuring true shapes without their weights: 70 billion NF4 weights need no more than one layer of unquantised ones.
    The weights depend on `seed`, device and precision, unlike those that `write_random_model` writes.
    """
    device = torch.device(device)
    with init_empty_weights(include_buffers=False):
        model = build_model(family, shape)
    generator = torch.Generator(device).manual_seed(seed)
    output = model.get_output_embeddings()
    for name in [name for name, _ in model.named_modules()]:  # names alone: a list of modules would keep what is replaced
        module = model.get_submodule(name)
        _fill(module, DTYPES[compute_precision], device, generator)
        if precision == "nf4" and isinstance(module, nn.Linear) and module is not output:
            model.set_submodule(name, quantised(module, DTYPES[compute_precision], double_quantisation), strict=True)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _fill(module: nn.Module, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    """Weights of one module, which was made without: as a fresh model starts, biases 0 and norms 1."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        values = torch.zeros(parameter.shape, dtype=dtype, device=device)
        if parameter.dim() > 1:
            values.normal_(0, _INITIAL_SPREAD, generator=generator)
        elif name == "weight":
            values.fill_(1)
        setattr(module, name, nn.Parameter(values, requires_grad=False))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte and no merges: reads any text, needs no files. Puts `<s>` before a text."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab={**alphabet, **_SPECIAL_TOKENS}, merges=[]))
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", _SPECIAL_TOKENS["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def write_random_model(model: ModelConfig, seed: int, folder: Path) -> None:
    """Writes weights drawn from `seed`, config and tokenizer into `folder`.

    Raises BadInput when the model has no architecture or too small a vocabulary.
    """
    if model.architecture is None:
        raise BadInput([Fault(f"model {model.name}", "architecture", "missing", "the shape of the random weights")])
    if model.architecture.vocabulary < SMALLEST_VOCABULARY:
        problem = f"{model.architecture.vocabulary} is too small for the byte-level tokenizer"
        raise BadInput([Fault(f"model {model.name}", "architecture.vocabulary", problem, f"{SMALLEST_VOCABULARY} or more")])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = build_model(model.family, model.architecture)
    write_model(built, folder)
    byte_tokenizer().save_pretrained(folder)


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained`, also on a worker that does not lead its group: its node may have a cache of its own."""
    model.should_save_on_this_rank = lambda is_main_process: True
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)  # safetensors makes files that nobody else may read
