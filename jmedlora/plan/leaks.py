"""Whether a sweep would train on the questions that it is scored by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jmedlora.config.benchmark import BenchmarkConfig
from jmedlora.config.data import DataConfig
from jmedlora.config.digest import key_of
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.sweep import SweepConfig
from jmedlora.data.atomic import write_json
from jmedlora.data.benchmarks import Benchmark, load_benchmark
from jmedlora.data.contamination import DEFAULT_LEAK_SETTINGS, Leak, LeakSettings, find_leaks
from jmedlora.data.files import NotHereYet, place_of, read_rows
from jmedlora.data.instructions import InstructionSet, load_instructions
from jmedlora.data.rows import Instruction

SMALL = 20_000
"""Rows, and questions at the weight of four rows, that are compared in well under a second."""
QUESTION_WEIGHT = 4
NAMED_IDS = 3
_FORMAT = 1
"""Counted up when the comparison changes, so that verdicts made before are not taken for new ones."""


@dataclass(frozen=True)
class Comparison:
    """A training set against a benchmark."""

    data: str
    benchmark: str
    rows: int
    questions: int
    leaks: list[Leak]
    examples: list[Leak]
    """Few-shot examples among the rows: no leak, since they are not evaluated, but worth knowing."""


@dataclass(frozen=True)
class SweepCheck:
    """Every training set of a sweep against every benchmark of it; `missing` names sources that are not here."""

    compared: list[Comparison]
    missing: list[str]


def is_small(rows: int, questions: int) -> bool:
    """Whether a comparison of this size may be made in passing, such as by a command that must answer at once."""
    return rows + QUESTION_WEIGHT * questions <= SMALL


def check_sweep(config: SweepConfig, cache: Path | None = None, settings: LeakSettings = DEFAULT_LEAK_SETTINGS) -> SweepCheck:
    """Compares what the sweep's runs are trained on with what they are scored by; verdicts are kept in `cache`, where one is given.

    Raises BadInput for data that cannot be read.
    """
    missing: list[str] = []
    faults: list[Fault] = []
    parts: dict[str, InstructionSet] = {}
    benchmarks: list[Benchmark] = []
    wanted: list[DataConfig | BenchmarkConfig] = [*(config.data[name] for name in _trained_on(config)), *config.benchmarks]
    for part in wanted:
        try:
            if isinstance(part, DataConfig):
                parts[part.name] = load_instructions(part, config.sources_path)
            else:
                benchmarks.append(load_benchmark(part, config.sources_path))
        except NotHereYet as absent:
            missing.append(str(absent))
        except BadInput as bad:
            faults.extend(bad.faults)
    if faults:
        raise BadInput(config.located(faults))
    compared = []
    for name, data in parts.items():
        for benchmark in benchmarks:
            leaks, examples = leaks_of(data, benchmark, cache, settings)
            leaks = _located(leaks, config.data[name], data.rows, config.sources_path)
            compared.append(Comparison(name, benchmark.name, len(data.rows), len(benchmark.questions), leaks, examples))
    return SweepCheck(compared, missing)


def leaks_in(config: SweepConfig, cache: Path | None = None) -> list[Comparison]:
    """The comparisons in which a leak was found; sources that are not here are passed over."""
    return [comparison for comparison in check_sweep(config, cache).compared if comparison.leaks]


def refuse_leaks(config: SweepConfig, cache: Path | None = None) -> None:
    """Raises BadInput with a fault per training set and benchmark whose questions it holds, unless `leaks: allow` is set."""
    if config.leaks == "allow":
        return
    if faults := [_fault(comparison) for comparison in leaks_in(config, cache)]:
        raise BadInput(faults)


def leaks_of(
    data: InstructionSet, benchmark: Benchmark, cache: Path | None = None, settings: LeakSettings = DEFAULT_LEAK_SETTINGS
) -> tuple[list[Leak], list[Leak]]:
    """Leaks of the questions and of the few-shot examples; kept as `<cache>/leaks/<key>.json` under the digests of both sides."""
    key = key_of({"format": _FORMAT, "data": data.digest, "benchmark": benchmark.digest, "settings": settings.as_dict()})
    file = cache / "leaks" / f"{key}.json" if cache else None
    kept = _kept(file) if file else None
    if kept is None:
        kept = {
            "questions": [leak.as_dict() for leak in find_leaks(data.rows, benchmark.questions, settings)],
            "examples": [leak.as_dict() for leak in find_leaks(data.rows, benchmark.examples, settings)],
        }
        if file:
            write_json(file, kept)
    return _named(kept["questions"], benchmark.name), _named(kept["examples"], benchmark.name)


def _kept(file: Path) -> dict[str, list[dict[str, Any]]] | None:
    """A verdict made before; a damaged file counts as none."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return kept if isinstance(kept, dict) and kept.keys() == {"questions", "examples"} else None
    except (FileNotFoundError, ValueError):
        return None


def _named(kept: list[dict[str, Any]], benchmark: str) -> list[Leak]:
    """The same content may go by another name in another sweep."""
    return [Leak(**{**leak, "benchmark": benchmark}) for leak in kept]


def _trained_on(config: SweepConfig) -> list[str]:
    """Names of the data that runs use, each once: the default is not used where every grid names its own."""
    usual = str(config.training["data"])
    names = [str(name) for grid in config.grids for name in grid.get("data", [usual])]
    return list(dict.fromkeys([*names, *(str(run.get("data", usual)) for run in config.extra)]))


def _located(leaks: list[Leak], config: DataConfig, rows: Sequence[Instruction], sources: Path) -> list[Leak]:
    """The leaks with `file:line` of their rows; rows made of exam questions have none."""
    if not leaks or config.format != "instructions":
        return leaks
    wanted = {leak.row for leak in leaks}
    # filters keep the file's order; what does not stand where it is expected stays without a place
    places = {
        position: where
        for position, (where, row) in enumerate(read_rows(place_of(config, sources), []))
        if position in wanted and str(row["instruction"]).strip() == rows[position].instruction
    }
    return [replace(leak, where=places.get(leak.row, "")) for leak in leaks]


def _fault(comparison: Comparison) -> Fault:
    ids = list(dict.fromkeys(leak.problem_id for leak in comparison.leaks))
    rows = len({leak.row for leak in comparison.leaks})
    named = ", ".join(ids[:NAMED_IDS]) + (", ..." if len(ids) > NAMED_IDS else "")
    questions = "1 question" if len(ids) == 1 else f"{len(ids)} questions"
    problem = f"{questions} of benchmark {comparison.benchmark} ({named}) in {rows} of {comparison.rows} rows"
    return Fault(f"data {comparison.data}", "", problem, "other data, the benchmark's filters.exclude, or leaks: allow")
