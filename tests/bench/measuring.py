"""Two arms in turns, and the row that comes of it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Taken(NamedTuple):
    """What one turn of an arm took, in the unit of its row, and what came out."""

    amount: float
    found: Any


Arm = Callable[[], Taken]
"""Does the work once."""


@dataclass(frozen=True)
class Row:
    """One ratio: how many times as much the baseline takes; of bytes, how many times as many ours has."""

    name: str
    baseline: str
    ratio: float
    spread: str
    """Of the pairs of turns that followed each other."""
    exactness: str
    machine: str
    ours: list[float]
    theirs: list[float]
    unit: str = "s"
    notes: list[str] = field(default_factory=list)
    """What explains the ratio: shapes, where time goes, shares of the arithmetic floor."""
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))


def machine() -> str:
    """What was measured on."""
    on = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores, {platform.machine()}{on}, Python {platform.python_version()}, one thread a process"


def in_turns(arms: Sequence[Arm], pairs: int) -> list[list[Taken]]:
    """Every arm so many times, ABAB; with one pair, the first arm before and after the others."""
    taken: list[list[Taken]] = [[] for _ in arms]
    for _ in range(pairs):
        for own, arm in zip(taken, arms, strict=True):
            own.append(arm())
    if pairs == 1:
        taken[0].append(arms[0]())
    return taken


def row_of(name: str, baseline: str, ours: Sequence[Taken], theirs: Sequence[Taken], exactness: str, **facts: Any) -> Row:
    """The row of two arms that were measured in turns: a ratio of medians; the spread is that of neighbouring turns."""
    own, others = [each.amount for each in ours], [each.amount for each in theirs]
    ratio = statistics.median(others) / statistics.median(own)
    each = [their / mine for mine, their in zip(own, others)] + [their / mine for mine, their in zip(own[1:], others)]
    numbers = [[float(f"{value:.4g}") for value in values] for values in (own, others)]
    told = {"machine": machine(), **facts}
    return Row(name, baseline, ratio, f"{min(each):.2f} to {max(each):.2f}", exactness, ours=numbers[0], theirs=numbers[1], **told)


class BenchFile:
    """bench.json: the newest row of every ratio, whichever runs of the bench they came from."""

    def __init__(self, folder: Path):
        self._path = folder / "bench.json"

    def rows(self) -> list[dict[str, Any]]:
        """What was measured so far; nothing where nothing was."""
        return json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else []

    def put(self, rows: Sequence[Row]) -> None:
        """Adds rows, each in place of an earlier one of the same name and baseline."""
        merged = {(row["name"], row["baseline"]): row for row in self.rows()}
        merged |= {(row.name, row.baseline): asdict(row) for row in rows}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_suffix(".tmp")
        aside.write_text(json.dumps(list(merged.values()), ensure_ascii=False, indent=1), encoding="utf-8")
        aside.replace(self._path)
