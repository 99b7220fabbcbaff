"""A folder in Hugging Face format as a frozen base model and its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import bitsandbytes.nn.modules
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from jmedlora.config.parts import Precision

# It warns of a faster kernel for 4-bit generation, from a package that asks the network.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Dropout inside the base model would draw from global random streams; adapters have their own, keyed dropout.
_BASE_DROPOUTS = ("attention_dropout", "hidden_dropout")


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """No bars of transformers within: one per worker and model would bury what the log has to tell."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; a missing pad token becomes the end-of-text or the unknown token."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def quantised(linear: nn.Linear, compute: torch.dtype, double_quantisation: bool) -> Linear4bit:
    """A layer as NF4, on its device, as `load_base` would load it."""
    _keep_packing(linear.weight.device)
    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute,
        compress_statistics=double_quantisation,
        quant_type="nf4",
        quant_storage=compute,
        device="meta",
    )
    packed = Params4bit(
        linear.weight.data,
        requires_grad=False,
        compress_statistics=double_quantisation,
        quant_type="nf4",
        quant_storage=compute,
        module=layer,
    )
    layer.weight = packed.to(linear.weight.device)
    layer.bias = linear.bias
    return layer


def _keep_packing(device: torch.device) -> None:
    """On the CPU an evaluation forward would repack the weights, which fails on widths that are no multiple of 32 and breaks training."""
    if device.type == "cpu":
        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False


def load_base(
    folder: Path,
    precision: Precision,
    compute_precision: Literal["fp32", "bf16"],
    double_quantisation: bool,
    device: str | torch.device,
) -> PreTrainedModel:
    """The base model in evaluation mode on `device`, with all parameters frozen.

    `precision` is how weights are held; what NF4 leaves unquantised, and activations, are in `compute_precision`.
    Raises ValueError when unquantised weights and activations are to differ.
    """
    compute = DTYPES[compute_precision]
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for name in _BASE_DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    if precision == "nf4":
        _keep_packing(torch.device(device))
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quantisation,
            bnb_4bit_compute_dtype=compute,
            # ZeRO-3 shards parameters of one number format; the same one keeps DeepSpeed's casts away from packed weights.
            bnb_4bit_quant_storage=compute,
        )
        placed = {"quantization_config": quantisation, "device_map": {"": torch.device(device)}}
    elif precision != compute_precision:
        raise ValueError(f"weights in {precision} with activations in {compute_precision}: only nf4 weights may differ")
    else:
        placed = {}
    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=compute, use_safetensors=True, local_files_only=True, trust_remote_code=False, **placed
        )
    if precision != "nf4":
        model = model.to(device)
    return model.eval().requires_grad_(False)
