"""Where a key of a sweep came from: the file or the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
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
        plain = re.sub(r"\[\d+\]", "", key)
        return COMMAND_LINE if any(plain == name or plain.startswith(f"{name}.") for name in self.overridden) else self.where

    def base(self, key: str) -> Path:
        """Folder that relative paths of a key are taken from: the file's, or the working directory for shipped files and overrides."""
        return self.cwd if self.is_shipped or self.of(key) == COMMAND_LINE else self.path.parent

    def located(self, faults: list[Fault]) -> list[Fault]:
        """Faults of keys that came from the command line say so."""
        return [Fault(self.of(f.key), f.key, f.problem, f.allowed) if f.where == self.where and f.key else f for f in faults]
