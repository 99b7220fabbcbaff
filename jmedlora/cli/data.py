"""The commands over benchmarks and training data: list, show, fetch."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Column, Table

from jmedlora.cli.common import AsJson, page
from jmedlora.config.benchmark import BenchmarkConfig, Filters
from jmedlora.config.data import DataConfig
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.locate import absolute
from jmedlora.config.origin import COMMAND_LINE, Origin
from jmedlora.config.validate import unknown_name

PartT = TypeVar("PartT", bound=BaseModel)

app = typer.Typer(help="Benchmarks and training data: what there is, what it is made of, and bringing it here.", no_args_is_help=True)

BenchmarkArgument = Annotated[
    str, typer.Argument(metavar="BENCHMARK", help="Name of a benchmark (`jmedlora data list`), or a file or folder of questions.")
]
BenchmarkName = Annotated[str, typer.Argument(metavar="BENCHMARK", help="Name of a benchmark (`jmedlora data list`).")]
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
    _print_standings(rows, page())


@app.command()
def show(
    benchmark: BenchmarkArgument,
    changes: Changes = None,
    data: DataOption = None,
    sources: Sources = Path("sources"),
    as_json: AsJson = False,
) -> None:
    """Count what a benchmark is made of, and tell the rows that are worth a look."""
    facts = describe_benchmark(read_benchmark(benchmark, changes or [], data), sources)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False, indent=1))
    else:
        _print_facts(facts, page())


@app.command()
def fetch(benchmark: BenchmarkName, sources: Sources = Path("sources")) -> None:
    """Bring a benchmark into the folder of sources, from where its authors publish it."""
    from jmedlora.data.fetch import fetch_benchmark

    print(fetch_benchmark(read_benchmark(benchmark, []), sources))


def read_benchmark(name: str, changes: Sequence[str], data: Path | None = None, cwd: Path | None = None) -> BenchmarkConfig:
    """A benchmark with changes in Hydra's syntax, keys of its filters also without `filters.`; `data`: read it from there.

    `name`: of a preset, or else the file or folder of the questions, after which the benchmark is then named. Raises BadInput
    for an unknown name, a change that cannot be made, or a path that does not exist.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from jmedlora.config.composition import apply_override

    cwd = cwd or Path.cwd()
    faults: list[Fault] = []
    own = own_questions(name, cwd)
    entry: dict[str, Any] = {"preset": name} if own is None else {"name": name_of_file(own), "path": str(own)}
    if own is not None and not own.exists():
        faults.append(Fault(COMMAND_LINE, "BENCHMARK", f"{name} does not exist", "a benchmark's name, or a file or folder of questions"))
    if own is not None and data is not None:
        faults.append(Fault(COMMAND_LINE, "--data", f"given together with {name}", "the name of a benchmark with --data, or a place alone"))
    told = "key=value, such as years=[2018,2019] or shuffle=1"
    for change in changes:
        key = change.split("=", 1)[0].split(".", 1)[0]
        full = f"filters.{change}" if key in Filters.model_fields else change
        try:
            override = OverridesParser.create().parse_override(full)
        except HydraException:
            faults.append(Fault(COMMAND_LINE, change, "cannot be read", told))
            continue
        if "=" not in change or override.is_delete() or override.is_sweep_override() or str(override.key_or_group) in ("preset", "name"):
            faults.append(Fault(COMMAND_LINE, change, "is not a change", told))
            continue
        if key not in Filters.model_fields and key not in BenchmarkConfig.model_fields:
            faults.append(Fault(COMMAND_LINE, key, "unknown key", _known_keys(key)))
            continue
        faults += apply_override(entry, override)
    if data is not None and own is None:
        entry["path"] = str(data)
    for key in ("path", "fewshot"):
        if isinstance(entry.get(key), str) and entry[key]:
            entry[key] = absolute(entry[key], cwd)
    part = None if faults else _read_part("benchmark", BenchmarkConfig, entry, cwd, faults)
    if part is None:
        raise BadInput(faults)
    return part


def name_of_file(path: Path) -> str:
    """What a benchmark is called that is a file or folder of the user's own."""
    return re.sub(r"[^\w-]", "-", path.stem) or "own"


def own_questions(name: str, cwd: Path) -> Path | None:
    """The place that is meant by a benchmark's name which is none of a preset; None for a name."""
    from jmedlora.config.presets import preset_names
    from jmedlora.data.files import kind_of

    place = Path(absolute(name, cwd))
    is_path = "/" in name or "." in name or (kind_of(place) != "" and name not in preset_names("benchmark", _origin(cwd).search))
    return place if is_path else None


def _known_keys(key: str) -> str:
    """The filters, which most changes are about, unless the key is rather another one of a benchmark."""
    others = [name for name in BenchmarkConfig.model_fields if name != "name"]
    known = next((names for names in (list(Filters.model_fields), others) if difflib.get_close_matches(key, names)), None)
    return unknown_name(key, known or Filters.model_fields)


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
    from jmedlora.config.presets import preset_names
    from jmedlora.data.files import kind_of, place_of

    faults: list[Fault] = []
    rows = []
    cwd = Path.cwd()
    for name in preset_names(group, _origin(cwd).search):
        part = _read_part(group, kind, name, cwd, faults)
        if part is None:
            continue
        place = place_of(part, sources)
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


def _print_standings(rows: list[dict[str, Any]], console: Console) -> None:
    """A table, or where it would break names and addresses in two, a line for each of them."""
    table = Table("", "name", "here", "place, and where it is from", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row["kind"], row["name"], "yes" if row["here"] else "no", f"{row['place']}\n{row['from']}")
    if console.measure(table, options=console.options.update(max_width=sys.maxsize)).maximum <= console.width:
        console.print(table, markup=False, highlight=False)
        return
    for row in rows:
        for line in (f"{row['kind']} {row['name']}: {'here' if row['here'] else 'not here'}", f"  {row['place']}", f"  {row['from']}"):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_facts(facts: dict[str, Any], console: Console) -> None:
    source, evaluated = facts["source"], facts["evaluated"]
    heads = (Column(head, justify="right", no_wrap=True) for head in _COLUMNS)
    table = Table(Column("", no_wrap=True), *heads, box=None, pad_edge=False)
    for name, counts in [*source["years"].items(), ("all", source), ("evaluated", evaluated)]:
        answers = "/".join(str(counts["answers"].get(n, 0)) for n in (1, 2, 3))
        table.add_row(str(name), *(answers if key == "answers" else str(counts[key]) for key in _COLUMNS.values()))
    console.print(f"{facts['benchmark']}: {facts['path']}", highlight=False, markup=False, soft_wrap=True)
    console.print(table, markup=False)
    lines = [
        ("filters", json.dumps(facts["filters"], ensure_ascii=False)),
        ("choices", _told(evaluated["choices"])),
        ("sections", _told(evaluated["sections"])),
        ("categories", _told(evaluated["categories"])),
        ("with prohibited choices", str(evaluated["prohibited"])),
        ("with a translation", str(evaluated["translated"])),
        ("with blank choices", str(evaluated["blank_choices"])),
        ("examples", ", ".join(facts["examples"]) or "none"),
        ("rows worth a look", str(len(facts["notes"]))),
    ]
    for name, told in lines:
        if told:
            console.print(f"{name}: {told}", highlight=False, markup=False, soft_wrap=True)
    for note in facts["notes"]:
        console.print(f"  {note}", highlight=False, markup=False, soft_wrap=True)


_COLUMNS = {
    "questions": "questions",
    "text-\nonly": "text_only",
    "and 5\nchoices": "text_only_five_choices",
    "and one\nanswer": "text_only_five_choices_one_answer",
    "answers\n1/2/3": "answers",
    "numeric": "numeric",
    "points": "points",
}


def _told(tally: dict[Any, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in tally.items())
