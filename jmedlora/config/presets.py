"""The parts that a sweep names: presets, inline mappings, and mappings over a preset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

from jmedlora.config.benchmark import BenchmarkConfig
from jmedlora.config.composition import find_secrets, refuse_resolvers, yaml_fault
from jmedlora.config.data import DataConfig
from jmedlora.config.faults import Fault
from jmedlora.config.locate import absolute, bundled_file, conf_dir
from jmedlora.config.origin import Origin
from jmedlora.config.validate import unknown_name, validated

PartT = TypeVar("PartT", bound=BaseModel)

_PATH_KEYS = ("path", "fewshot")
_LOCATION_KEYS = ("path", "bundled", "source")
_EXAMPLE_KEYS = ("fewshot", "fewshot_bundled", "fewshot_items")


def preset_names(group: str, search: Sequence[Path] | None = None) -> list[str]:
    """The presets of a group in the folders where they are looked for; left out: the shipped ones."""
    folders = [conf_dir()] if search is None else search
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


@dataclass
class PartReader:
    """Reads parts of any group; every fault is appended to `faults`."""

    origin: Origin
    faults: list[Fault] = field(default_factory=list)

    def read(self, group: str, kind: type[PartT], entry: Any, key: str) -> PartT | None:
        """A part from its entry in the sweep, or None with its faults."""
        if isinstance(entry, str):
            found = self._preset(group, entry, key)
            if found is None:
                return None
            content, where = found
            return self._checked(validated(kind, content, where, "", self.faults), where, "")
        own = {name: value for name, value in entry.items() if name != "preset"}
        own = _absolute_paths(own, self.origin.base(key))
        if (preset := entry.get("preset")) is not None:
            found = self._preset(group, str(preset), f"{key}.preset")
            if found is None:
                return None
            own = _merged(found[0], own)
        part = validated(kind, own, self.origin.where, key, self.faults)
        return self._checked(part, self.origin.where, key)

    def _preset(self, group: str, name: str, key: str, below: tuple[Path, ...] = ()) -> tuple[dict[str, Any], str] | None:
        """A preset's content and the file it stands in; `below`: the presets that are built on it."""
        for folder in self.origin.search:
            path = folder / group / f"{name}.yaml"
            if path.is_file() and path not in below:
                return self._preset_file(group, path, folder == conf_dir(), below)
        names = preset_names(group, self.origin.search)
        self.faults.append(Fault(self.origin.where, key, f"unknown {group} {name!r}", unknown_name(name, names)))
        return None

    def _preset_file(self, group: str, path: Path, is_shipped: bool, below: tuple[Path, ...]) -> tuple[dict[str, Any], str] | None:
        where = f"conf/{group}/{path.name}" if is_shipped else str(path)
        try:
            if refused := refuse_resolvers(path.read_text(encoding="utf-8"), where):
                self.faults += refused
                return None
            content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
            self.faults.append(yaml_fault(error, where))
            return None
        if not isinstance(content, dict):
            self.faults.append(Fault(where, "", "not a mapping", f"the keys of a {group}"))
            return None
        self.faults += find_secrets(content, lambda _: where)
        own = _absolute_paths({str(name): value for name, value in content.items() if name != "preset"}, path.parent)
        if (parent := content.get("preset")) is not None:
            found = self._preset(group, str(parent), f"{where}: preset", (*below, path))
            if found is None:
                return None
            own = _merged({key: value for key, value in found[0].items() if key != "name"}, own)
        return ({"name": path.stem, **own} if group not in ("deepspeed", "resources") else own), where

    def _checked(self, part: PartT | None, where: str, prefix: str) -> PartT | None:
        """The part, or None where a file that it names is not there."""
        if part is None:
            return None
        found: list[tuple[str, str, str]] = []
        for holder, inner in ((part, ""), (getattr(part, "source", None), "source.")):
            for name in _PATH_KEYS:
                value = getattr(holder, name, None)
                if isinstance(value, str) and not _exists(value):
                    found.append((inner + name, f"{value} does not exist", "an existing file or folder"))
        for name in ("bundled", "fewshot_bundled"):
            value = getattr(part, name, None)
            if isinstance(value, str) and not bundled_file(value).is_file():
                found.append((name, f"{value!r} is not shipped with jmedlora", "sample/instructions.jsonl or sample/questions.jsonl"))
        if isinstance(part, DataConfig | BenchmarkConfig):
            given = [name for name in _LOCATION_KEYS if getattr(part, name) is not None]
            if len(given) != 1:
                found.append(("path", " and ".join(given) + " given" if given else "missing", "exactly one of path, bundled and source"))
        for name, problem, allowed in found:
            self.faults.append(Fault(where, f"{prefix}.{name}" if prefix else name, problem, allowed))
        return None if found else part


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _absolute_paths(content: dict[str, Any], base: Path) -> dict[str, Any]:
    """The paths that the user wrote, made absolute; the file of a GGUF source is one unless it lies in a package."""
    path_keys = (*_PATH_KEYS, "file") if content.get("kind") == "gguf" and not content.get("package") else _PATH_KEYS
    result: dict[str, Any] = {}
    for name, value in content.items():
        if name in path_keys and isinstance(value, str) and value:
            result[name] = absolute(value, base)
        else:
            result[name] = _absolute_paths(value, base) if isinstance(value, dict) else value
    return result


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`; naming one place to read from, or one place of examples, replaces the other places."""
    result = dict(base)
    for alternatives in (_LOCATION_KEYS, _EXAMPLE_KEYS):
        if any(over.get(name) for name in alternatives):
            result = {name: value for name, value in result.items() if name not in alternatives}
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) and key != "source" else value
    return result
