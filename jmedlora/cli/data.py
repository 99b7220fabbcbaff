"""The commands over benchmarks and training data: list, show, fetch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel
from rich.table import Column, Table

from jmedlora.cli.common import AsJson, page
from jmedlora.config.benchmark import BenchmarkConfig, Filters
from jmedlora.config.data import DataConfig
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.locate import absolute
from jmedlora.config.origin import COMMAND_LINE, Origin

PartT = TypeVar("PartT", bound=BaseModel)

app = typer.Typer(help="Benchmarks and training data: what there is, what it is made of, and bringing it here.", no_args_is_help=True)

BenchmarkArgument = Annotated[str, typer.Argument(metavar="BENCHMARK", help="Name of a benchmark (`jmedlora data list`).")]
DataOption = Annotated[Path | None, typer.Option(metavar="DIR", help="Read the benchmark from this file or folder.")]
Sources = Annotated[Path, typer.Option(metavar="DIR", help="Folder in which named sources are kept.")]
Changes = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the benchmark, such as years=[2018] or choices=null.")
]


@app.command(name="list")
def list_(sources: Sources = Path("sources"), as_json: AsJson = False) -> None:
    """List the benchmarks and training sets that have a name, where each is looked for, and whether it is here."""
    rows = [*_standings("benchmark", BenchmarkConfig, sources), *_standings("data", DataConfig, sources)]
    if as_json:
        print(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    table = Table("", "name", "here", Column("place", overflow="fold"), Column("from", overflow="fold"), box=None)
    for row in rows:
        table.add_row(row["kind"], row["name"], "yes" if row["here"] else "no", row["place"], row["from"])
    page().print(table)


@app.command()
def show(
    benchmark: BenchmarkArgument,
    changes: Changes = None,
    data: DataOption = None,
    sources: Sources = Path("sources"),
    as_json: AsJson = False,
) -> None:
    """Count what a benchmark is made of, and tell the rows that were mended while it was read."""
    facts = describe_benchmark(read_benchmark(benchmark, changes or [], data), sources)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False, indent=1))
    else:
        _print_facts(facts)


@app.command()
def fetch(benchmark: BenchmarkArgument, sources: Sources = Path("sources")) -> None:
    """Bring a benchmark into the folder of sources, from where its authors publish it."""
    from jmedlora.data.fetch import fetch_benchmark

    print(fetch_benchmark(read_benchmark(benchmark, []), sources))


def preset_names(group: str, cwd: Path | None = None) -> list[str]:
    """Names of the presets of a group: the user's own in `./<group>` or `./conf/<group>`, and the shipped ones."""
    folders = [folder / group for folder in _origin(cwd or Path.cwd()).search]
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def read_benchmark(name: str, changes: Sequence[str], data: Path | None = None, cwd: Path | None = None) -> BenchmarkConfig:
    """A named benchmark with changes in Hydra's syntax, keys of its filters also without `filters.`; `data`: read it from there.

    Raises BadInput for an unknown name, a change that cannot be made, or a path that does not exist.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from jmedlora.config.composition import apply_override

    cwd = cwd or Path.cwd()
    entry: dict[str, Any] = {"preset": name}
    faults: list[Fault] = []
    told = "key=value, such as years=[2018,2019] or shuffle=1"
    for change in changes:
        full = f"filters.{change}" if change.split("=", 1)[0].split(".", 1)[0] in Filters.model_fields else change
        try:
            override = OverridesParser.create().parse_override(full)
        except HydraException:
            faults.append(Fault(COMMAND_LINE, change, "cannot be read", told))
            continue
        if "=" not in change or override.is_delete() or override.is_sweep_override() or str(override.key_or_group) in ("preset", "name"):
            faults.append(Fault(COMMAND_LINE, change, "is not a change", told))
            continue
        faults += apply_override(entry, override)
    if data is not None:
        entry["path"] = str(data)
    for key in ("path", "fewshot"):
        if isinstance(entry.get(key), str) and entry[key]:
            entry[key] = absolute(entry[key], cwd)
    part = None if faults else _read_part("benchmark", BenchmarkConfig, entry, cwd, faults)
    if part is None:
        raise BadInput(faults)
    return part


def describe_benchmark(config: BenchmarkConfig, sources: Path) -> dict[str, Any]:
    """Counts of a benchmark's source and of what its filters keep; raises BadInput where it is not here or has bad rows."""
    from jmedlora.data.benchmarks import open_source, select_questions
    from jmedlora.data.counting import count_questions
    from jmedlora.data.files import NotHereYet

    try:
        source = open_source(config, sources)
    except NotHereYet as absent:
        name, place = str(absent).split(": ", 1)
        raise BadInput([Fault(name, "", f"not here yet: {place}", "--data with the place of your copy")]) from None
    faults: list[Fault] = []
    kept, examples = select_questions(config, source, faults)
    if faults:
        raise BadInput(faults)
    return {
        "benchmark": config.name,
        "path": str(source.path),
        "filters": config.filters.model_dump(mode="json", exclude_defaults=True),
        "source": count_questions(source.questions),
        "evaluated": count_questions(kept),
        "examples": [example.problem_id for example in examples],
        "notes": source.notes,
    }


# ---------------------------------------------------------------- presets


def _origin(cwd: Path) -> Origin:
    """As if a sweep in `./conf` named the parts, so that presets of the user's own are found there and beside it."""
    return Origin(cwd / "conf" / "sweep.yaml", (), cwd)


def _read_part(group: str, kind: type[PartT], entry: Any, cwd: Path, faults: list[Fault]) -> PartT | None:
    from jmedlora.config.presets import PartReader

    reader = PartReader(_origin(cwd))
    part = reader.read(group, kind, entry, "")
    for fault in reader.faults:
        from_here = fault.where == reader.origin.where
        key = fault.key.lstrip(".").replace("preset", group.upper()) if fault.key in ("", ".preset") else fault.key
        faults.append(replace(fault, where=COMMAND_LINE, key=key) if from_here else fault)
    return part


def _standings(group: str, kind: type[BenchmarkConfig] | type[DataConfig], sources: Path) -> list[dict[str, Any]]:
    from jmedlora.data.files import kind_of, locate_source

    faults: list[Fault] = []
    rows = []
    for name in preset_names(group):
        part = _read_part(group, kind, name, Path.cwd(), faults)
        if part is None:
            continue
        folder = sources / ("benchmarks" if group == "benchmark" else "data")
        place = locate_source(part.path, part.bundled, folder / part.source.name if part.source else None)
        rows.append({"kind": group, "name": name, "here": bool(kind_of(place)), "place": str(place), "from": _origin_of(part)})
    if faults:
        raise BadInput(faults)
    return rows


def _origin_of(part: BenchmarkConfig | DataConfig) -> str:
    source = part.source
    if source is None:
        return "shipped" if part.bundled else "a path"
    if source.kind == "github":
        return f"github.com/{source.repo}"
    return f"huggingface.co/datasets/{source.repo}" if source.kind == "dataset" else "to be brought or made"


# ---------------------------------------------------------------- printing


def _print_facts(facts: dict[str, Any]) -> None:
    source, evaluated = facts["source"], facts["evaluated"]
    table = Table("", *_COLUMNS, box=None)
    for name, counts in [*source["years"].items(), ("all", source), ("evaluated", evaluated)]:
        answers = "/".join(str(counts["answers"].get(n, 0)) for n in (1, 2, 3))
        table.add_row(str(name), *(answers if key == "answers" else str(counts[key]) for key in _COLUMNS.values()))
    console = page()
    console.print(f"{facts['benchmark']}: {facts['path']}", highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    lines = [
        ("filters", json.dumps(facts["filters"], ensure_ascii=False)),
        ("choices", _told(evaluated["choices"])),
        ("sections", _told(evaluated["sections"])),
        ("categories", _told(evaluated["categories"])),
        ("with prohibited choices", str(evaluated["prohibited"])),
        ("with a translation", str(evaluated["translated"])),
        ("with blank choices", str(evaluated["blank_choices"])),
        ("examples", ", ".join(facts["examples"]) or "none"),
        ("mended or left aside", str(len(facts["notes"]))),
    ]
    for name, told in lines:
        if told:
            console.print(f"{name}: {told}", highlight=False, markup=False, soft_wrap=True)
    for note in facts["notes"]:
        console.print(f"  {note}", highlight=False, markup=False, soft_wrap=True)


_COLUMNS = {
    "questions": "questions",
    "text-only": "text_only",
    "and 5 choices": "text_only_five_choices",
    "and one answer": "text_only_five_choices_one_answer",
    "answers 1/2/3": "answers",
    "numeric": "numeric",
    "points": "points",
}


def _told(tally: dict[Any, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in tally.items())
