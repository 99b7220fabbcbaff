"""The command that looks for benchmark questions among training rows."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jmedlora.cli.common import AsJson, Overrides, SweepArgument, page
from jmedlora.config.compose import load_sweep
from jmedlora.config.faults import BadInput, Fault, first_line

if TYPE_CHECKING:
    from jmedlora.config.sweep import SweepConfig
    from jmedlora.data.contamination import Leak
    from jmedlora.plan.leaks import SweepCheck

LEAKS_FOUND = 1
MAX_LEAKS = 50
"""Leaks that the table shows; `--json` and `--output` give all."""


def check(
    sweep: SweepArgument,
    overrides: Overrides = None,
    as_json: AsJson = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every leak as a line of JSON.")] = None,
) -> None:
    """Look for questions of a sweep's benchmarks in its training data; ends with 1 where there are some."""
    config = load_sweep(sweep, overrides)
    if output:
        _refuse_place(output)
    from jmedlora.config.locate import cache_dir
    from jmedlora.data.atomic import write_json_lines
    from jmedlora.plan.leaks import check_sweep

    found = check_sweep(config, cache_dir())
    if not found.compared:
        raise BadInput([Fault(config.file, "", f"nothing to compare: {'; '.join(found.missing) or 'no runs'}", "data that is here")])
    leaks = [(comparison.data, leak) for comparison in found.compared for leak in comparison.leaks]
    if output:
        try:
            write_json_lines(output, (_as_row(data, leak) for data, leak in leaks))
        except OSError as error:
            raise _unwritable(f"{output} cannot be written: {error.strerror or first_line(error)}") from None
    short = _short_questions(config, found)
    if as_json:
        print(json.dumps(_as_json(config.name, found, short), ensure_ascii=False, indent=1))
    else:
        _print_leaks(leaks, page())
        _print_verdict(found, short, page())
    if leaks:
        raise typer.Exit(LEAKS_FOUND)


def _refuse_place(output: Path) -> None:
    """Told before the comparison, which may take minutes; what stands there and is no file (a device, a pipe) would be replaced."""
    from jmedlora.data.files import kind_of

    folder = output.absolute().parent
    if kind_of(output) == "folder":
        raise _unwritable(f"{output} is a folder")
    if kind_of(folder) != "folder":
        raise _unwritable(f"{folder} is no folder that is here")
    if os.path.lexists(output) and kind_of(output) != "file":
        raise _unwritable(f"{output} is no file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(f"{output} cannot be written")


def _unwritable(problem: str) -> BadInput:
    return BadInput([Fault("command line", "--output", problem, "a file in a folder that is here and that you may write to")])


def _short_questions(config: SweepConfig, found: SweepCheck) -> dict[str, int]:
    """How many questions of each compared benchmark are too short to be a leak by their text alone."""
    from jmedlora.data.benchmarks import load_benchmark
    from jmedlora.data.contamination import count_short

    compared = {comparison.benchmark for comparison in found.compared}
    parts = [part for part in config.benchmarks if part.name in compared]
    return {part.name: count_short(load_benchmark(part, config.sources_path).questions) for part in parts}


def _as_row(data: str, leak: Leak) -> dict[str, Any]:
    return {"data": data, **asdict(leak)}


def _as_json(sweep: str, found: SweepCheck, short: dict[str, int]) -> dict[str, Any]:
    """`compared` (each pair with its counts), `leaks` (all of them) and `missing`."""
    return {
        "sweep": sweep,
        "compared": [
            {
                "data": comparison.data,
                "benchmark": comparison.benchmark,
                "rows": comparison.rows,
                "questions": comparison.questions,
                "short_questions": short[comparison.benchmark],
                "leaked_questions": len({leak.problem_id for leak in comparison.leaks}),
                "leaking_rows": len({leak.row for leak in comparison.leaks}),
                "examples": sorted({leak.problem_id for leak in comparison.examples}),
            }
            for comparison in found.compared
        ],
        "leaks": [_as_row(comparison.data, leak) for comparison in found.compared for leak in comparison.leaks],
        "missing": found.missing,
    }


def _print_leaks(leaks: list[tuple[str, Leak]], console: Console) -> None:
    if not leaks:
        return
    table = Table(box=None, header_style="bold", pad_edge=False, expand=True)
    for column in ("data", "row", "benchmark", "question", "kind", "similarity"):
        table.add_column(column, justify="right" if column == "similarity" else "left", no_wrap=column in ("row", "question", "similarity"))
    table.add_column("overlap", ratio=1, no_wrap=True, min_width=20)
    for data, leak in leaks[:MAX_LEAKS]:
        place = Path(leak.where).name if leak.where else f"row {leak.row}"
        table.add_row(*map(Text, (data, place, leak.benchmark, leak.problem_id, leak.kind, f"{leak.similarity:.1f}", leak.overlap)))
    console.print(table)
    if len(leaks) > MAX_LEAKS:
        console.print(f"... and {len(leaks) - MAX_LEAKS} more (--json or --output FILE gives all)", highlight=False)


def _print_verdict(found: SweepCheck, short: dict[str, int], console: Console) -> None:
    for comparison in found.compared:
        leaked, rows = ({getattr(leak, key) for leak in comparison.leaks} for key in ("problem_id", "row"))
        told = f"{len(leaked)} of {comparison.questions} questions in {len(rows)} of {comparison.rows} rows"
        verdict = Text(f"data {comparison.data}, benchmark {comparison.benchmark}: {told}", style="red" if leaked else "green")
        console.print(verdict, soft_wrap=True)
        if comparison.examples:
            ids = ", ".join(sorted({leak.problem_id for leak in comparison.examples}))
            console.print(Text(f"  few-shot examples among the rows, which are not evaluated: {ids}"), soft_wrap=True)
    for benchmark, count in short.items():
        told = f"{count} short questions were looked for only together with their answer or choices"
        console.print(Text(f"benchmark {benchmark}: {told}"), soft_wrap=True)
    for line in found.missing:
        console.print(Text.assemble(("not here yet, not compared", "yellow"), f": {line}"), soft_wrap=True)
