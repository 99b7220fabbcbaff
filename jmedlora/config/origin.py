"""Where a key of a sweep came from: the file or the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from jmedlora.config.faults import Fault
from jmedlora.config.locate import conf_dir

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Origin:
    """One sweep file with the overrides it was called with."""

    path: Path
    overrides: tuple[str, ...]
    cwd: Path

    @cached_property
    def is_shipped(self) -> bool:
        return self.path.is_relative_to(conf_dir())

    @cached_property
    def where(self) -> str:
        """The file as told to people."""
        return f"conf/{self.path.relative_to(conf_dir())}" if self.is_shipped else str(self.path)

    @cached_property
    def search(self) -> list[Path]:
        """Folders in which preset groups are looked for: beside the user's file, above it, and the shipped ones."""
        return [conf_dir()] if self.is_shipped else [self.path.parent, self.path.parent.parent, conf_dir()]

    @cached_property
    def overridden(self) -> set[str]:
        """The dotted keys that the command line sets."""
        return {override.lstrip("+~").split("=", 1)[0] for override in self.overrides}

    def of(self, key: str) -> str:
        """`command line` or the file, for one dotted key."""
        return COMMAND_LINE if is_overridden(key, self.overridden) else self.where

    def base(self, key: str) -> Path:
        """Folder that relative paths of a key are taken from: the file's, or the working directory for shipped files and overrides."""
        return self.cwd if self.is_shipped or self.of(key) == COMMAND_LINE else self.path.parent

    def located(self, faults: list[Fault]) -> list[Fault]:
        """Faults of keys that came from the command line say so."""
        return locate_faults(faults, self.where, self.overridden)


def is_overridden(key: str, overridden: Iterable[str]) -> bool:
    """True where the command line set a key, something above it, or (`benchmarks.0.path`) a place inside the list that it names."""
    plain = _without_places(key)
    names = {_without_places(name) for name in overridden}
    return any(plain == name or plain.startswith(f"{name}.") for name in names)


def locate_faults(faults: list[Fault], file: str, overridden: Iterable[str]) -> list[Fault]:
    """Those faults of `file` whose key the command line set, told as such."""
    return [replace(f, where=COMMAND_LINE) if f.where == file and f.key and is_overridden(f.key, overridden) else f for f in faults]


def _without_places(key: str) -> str:
    return re.sub(r"\[\d+\]|\.\d+(?=\.|$)", "", key)
