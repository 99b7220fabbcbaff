"""Adapter folders in PEFT's file format, with checksums; written all or nothing."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save
from torch import Tensor

from jmedlora.config.digest import digest
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.parts import ModelConfig
from jmedlora.data.atomic import appearing
from jmedlora.plan.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHECKSUMS, REMOVED, WEIGHTS_ON_THEIR_WAY_OUT


class AdapterDamaged(Exception):
    """A file of an adapter folder is missing, or is not what its checksum says."""


def base_name(model: ModelConfig) -> str:
    """What an adapter calls its base: the hub repository, else the model's name; never a path of this machine."""
    return model.source.repo if model.source.kind == "hub" else model.name


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig, base: str) -> None:
    """Writes weights, PEFT config and checksums as `folder`, which appears complete or not at all.

    tensors: LoRA weights (whole, on the CPU) by their names in the PeftModel's `named_parameters`.
    """
    with appearing(folder) as aside:
        weights = {_file_key(name): tensor.contiguous() for name, tensor in sorted(tensors.items())}
        # By way of bytes, since safetensors makes files that nobody else may read.
        (aside / ADAPTER_WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))
        _write_config(aside, config, base)
        _write_checksums(aside)


def adopt_adapter(source: Path, folder: Path) -> None:
    """Copies an adapter in PEFT's format (`adapter_model.safetensors`, `adapter_config.json`) to `folder`, with checksums.

    Raises BadInput where it is none.
    """
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (source / name).is_file()]
    if missing:
        problem = f"{source} has no {' and no '.join(missing)}{_why_gone(source)}"
        raise BadInput([Fault("command line", "--adapter", problem, "an adapter's folder in PEFT's format, with safetensors")])
    if (source / CHECKSUMS).is_file():
        verify(source)
    with appearing(folder) as aside:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(source / name, aside / name)
        _write_checksums(aside)


def verify(folder: Path) -> None:
    """Raises AdapterDamaged unless every file of the folder is there with its size and SHA-256."""
    for name, facts in _checksums(folder).items():
        file = folder / name
        if not file.is_file():
            raise AdapterDamaged(f"{file}: missing{_why_gone(folder)}")
        if _facts(file) != facts:
            raise AdapterDamaged(f"{file}: differs from its checksum")


def verify_what_is_left(folder: Path) -> None:
    """The same, except that weights which a keep rule has removed are not missed."""
    try:
        verify(folder)
    except AdapterDamaged:
        config = folder / ADAPTER_CONFIG
        known = _checksums(folder)[ADAPTER_CONFIG]
        if not _why_gone(folder) or not config.is_file() or _facts(config) != known:
            raise


def _why_gone(folder: Path) -> str:
    gone = any((folder / name).is_file() for name in (REMOVED, WEIGHTS_ON_THEIR_WAY_OUT))
    return ": its weights were removed by a keep rule" if gone else ""


def adapter_digest(folder: Path) -> str:
    """Identity of an adapter's content (hex), from its checksums; equal for equal weights and config, wherever they lie."""
    return digest(_checksums(folder))


def _checksums(folder: Path) -> dict[str, dict[str, str | int]]:
    try:
        files = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        raise AdapterDamaged(f"{folder / CHECKSUMS}: missing") from None
    except (ValueError, KeyError, TypeError):
        raise AdapterDamaged(f"{folder / CHECKSUMS}: not readable") from None
    if not {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= set(files):
        raise AdapterDamaged(f"{folder / CHECKSUMS}: incomplete")
    return files


def _file_key(name: str) -> str:
    """PEFT's files name weights without the adapter's own name."""
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")


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


def _write_checksums(folder: Path) -> None:
    files = {name: _facts(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    (folder / CHECKSUMS).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def _facts(file: Path) -> dict[str, str | int]:
    with file.open("rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "bytes": file.stat().st_size}
