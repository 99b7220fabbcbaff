"""Adapter folders in PEFT's file format, with checksums; written all or nothing."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save
from torch import Tensor

from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.parts import ModelConfig
from jmedlora.data.atomic import appearing
from jmedlora.plan.checksums import verify, why_gone, write_checksums
from jmedlora.plan.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHECKSUMS


def base_name(model: ModelConfig) -> str:
    """What an adapter calls its base: the hub repository, else the model's name; never a path of this machine."""
    return model.source.repo if model.source.kind == "hub" else model.name


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig, base: str) -> None:
    """Writes weights, PEFT config and checksums as `folder`, which appears complete or not at all.

    tensors: LoRA weights (whole, on the CPU) by their names in PEFT's files.
    """
    with appearing(folder) as aside:
        weights = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
        # By way of bytes, since safetensors makes files that nobody else may read.
        (aside / ADAPTER_WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))
        _write_config(aside, config, base)
        write_checksums(aside)


def adopt_adapter(source: Path, folder: Path) -> None:
    """Copies an adapter in PEFT's format (`adapter_model.safetensors`, `adapter_config.json`) to `folder`, with checksums.

    Raises BadInput where it is none.
    """
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (source / name).is_file()]
    if missing:
        problem = f"{source} has no {' and no '.join(missing)}{why_gone(source)}"
        raise BadInput([Fault("command line", "--adapter", problem, "an adapter's folder in PEFT's format, with safetensors")])
    if (source / CHECKSUMS).is_file():
        verify(source)
    with appearing(folder) as aside:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(source / name, aside / name)
        write_checksums(aside)


def _write_config(folder: Path, config: LoraConfig, base: str) -> None:
    told = copy.copy(config)
    told.base_model_name_or_path = base
    told.inference_mode = True
    told.save_pretrained(str(folder))
    file = folder / ADAPTER_CONFIG
    values = json.loads(file.read_text(encoding="utf-8"))
    # PEFT holds module names in a set, whose order would differ from process to process.
    values["target_modules"] = sorted(values["target_modules"])
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
