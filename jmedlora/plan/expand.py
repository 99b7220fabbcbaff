"""The grid and the single runs of a sweep, as settings of single runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from jmedlora.config.faults import Fault
from jmedlora.config.run import RunSettings
from jmedlora.config.sweep import SweepConfig
from jmedlora.config.validate import faults_of

MAX_RUNS = 100_000


def expand_runs(config: SweepConfig, faults: list[Fault]) -> list[RunSettings]:
    """Every run once, in the order of the file: grids first (the last axis varies fastest), then `extra`.

    Precedence, from weak to strong: the method preset's defaults, `training`, the grid or the extra run.
    """
    count = sum(math.prod(map(len, grid.values())) for grid in config.grids) + len(config.extra)
    if count > MAX_RUNS:
        faults.append(Fault(config.file, "grid", f"{count} runs", f"at most {MAX_RUNS}"))
        return []
    runs: dict[RunSettings, None] = {}
    told: set[str] = set()
    for where, own in _combinations(config):
        merged = {**config.methods[_method_name(config, own)].defaults, **config.training, **own}
        try:
            runs[RunSettings.model_validate(merged)] = None
        except ValidationError as error:
            for fault in faults_of(error, RunSettings, config.file, where):
                if str(fault) not in told:
                    told.add(str(fault))
                    faults.append(fault)
    return list(runs)


def _combinations(config: SweepConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    for position, grid in enumerate(config.grids):
        where = "grid" if len(config.grids) == 1 else f"grid[{position}]"
        for values in itertools.product(*grid.values()):
            yield where, dict(zip(grid, values, strict=True))
    for position, run in enumerate(config.extra):
        yield f"extra[{position}]", run


def _method_name(config: SweepConfig, own: dict[str, Any]) -> str:
    return str(own.get("method", config.training.get("method")))
