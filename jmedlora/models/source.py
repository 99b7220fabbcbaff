"""Base weights from any source as a local folder in Hugging Face format."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from jmedlora.config.digest import key_of
from jmedlora.config.locate import cache_dir
from jmedlora.config.parts import GgufSource, HubSource, ModelConfig, RandomSource
from jmedlora.data.atomic import appearing
from jmedlora.models.load import without_progress_bars
from jmedlora.models.random_models import write_model, write_random_model

# What a folder with a model needs, and nothing that could be executed or unpickled.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_FORMAT = 1
"""Counted up when a conversion changes, so that folders made before are not taken for new ones."""


class SourceMissing(Exception):
    """The weights of a base model are not where the configuration says, and could not be fetched."""


def materialise(model: ModelConfig, sources: Path, offline: bool) -> Path:
    """A local folder with config.json, safetensors weights and tokenizer of `model`.

    `sources` is the folder of named sources. With `offline` nothing is asked of the network.
    GGUF files are converted, and random models are built, once per cache, however many processes ask.
    Raises SourceMissing when the weights are neither here nor to be fetched.
    """
    source = model.source
    if source.kind == "hub":
        return _hub_folder(model.name, source, offline)
    if source.kind == "path":
        return _checked_folder(model.name, Path(source.path))
    if source.kind == "named":
        return _checked_folder(model.name, sources / "models" / source.name)
    if source.kind == "gguf":
        return _gguf_folder(model.name, source)
    if source.kind == "api":
        raise SourceMissing(f"model {model.name}: behind {source.base_url}, without weights to load")
    return _random_folder(model, source)


def _checked_folder(name: str, folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise SourceMissing(f"model {name}: {folder} is not a folder with a config.json")
    if not any(folder.glob("*.safetensors")):
        raise SourceMissing(f"model {name}: {folder} holds no safetensors weights")
    return folder


def _hub_folder(name: str, source: HubSource, offline: bool) -> Path:
    try:
        folder = snapshot_download(source.repo, revision=source.revision, local_files_only=offline, allow_patterns=_HUB_FILES)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        where = "the local Hugging Face cache (offline)" if offline else "the Hugging Face Hub"
        revision = f" at {source.revision}" if source.revision else ""
        raise SourceMissing(f"model {name}: {source.repo}{revision} cannot be had from {where}: {error}") from error
    return _checked_folder(name, Path(folder))


def _gguf_folder(name: str, source: GgufSource) -> Path:
    file, facts = _gguf_file(name, source)

    def convert(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True)
        # The weights were dequantised while loading; without this the saved config would still call them quantised.
        del model.config.quantization_config
        model.is_quantized = False
        model.hf_quantizer = None
        write_model(model, folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True).save_pretrained(folder)

    return _built_once({"kind": "gguf", **facts}, name, convert)


def _gguf_file(name: str, source: GgufSource) -> tuple[Path, dict[str, Any]]:
    if source.package is None:
        file = Path(source.file)
        if not file.is_file():
            raise SourceMissing(f"model {name}: no GGUF file at {file}")
        facts = file.stat()
        return file, {"file": str(file.resolve()), "bytes": facts.st_size, "modified_ns": facts.st_mtime_ns}
    # The package is not imported: it may need libraries that nobody here uses.
    try:
        package = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError:
        raise SourceMissing(f"model {name}: the Python package {source.package} is not installed") from None
    for entry in package.files or []:
        if str(entry) == source.file or str(entry).endswith(f"/{source.file}"):
            file = Path(str(package.locate_file(entry)))
            if file.is_file():
                return file, {"package": source.package, "version": package.version, "file": source.file}
    raise SourceMissing(f"model {name}: the Python package {source.package} {package.version} has no file {source.file}")


def _random_folder(model: ModelConfig, source: RandomSource) -> Path:
    facts = {
        "kind": "random",
        "family": model.family,
        "architecture": model.architecture.model_dump(mode="json") if model.architecture else None,
        "seed": source.seed,
    }
    return _built_once(facts, model.name, lambda folder: write_random_model(model, source.seed, folder))


def _built_once(facts: dict[str, Any], name: str, build: Callable[[Path], None]) -> Path:
    """The cache folder of what `facts` determine, built by one process while the others wait."""
    readable = "".join(character if character.isalnum() or character in "-._" else "-" for character in name)
    folder = cache_dir() / "models" / f"{readable}-{key_of({'format': _FORMAT, **facts})}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with without_progress_bars(), appearing(folder) as aside:
                build(aside)
                _checked_folder(name, aside)
    return folder
