"""The comparison for a terminal."""

from __future__ import annotations

from itertools import groupby

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from jmedlora.report.collect import METRICS, Metric, Results
from jmedlora.report.comparison import Cell, Comparison, Line, change_text, compare_runs, score_text

_SHOTS_PER_TABLE = 2  # what fits into 100 columns
_HEADS: dict[Metric, str] = {"accuracy": "Acc", "exact_match": "EM", "gestalt_score": "Gestalt"}


def console_comparison(results: Results) -> Group:
    """Tables per benchmark and prompt: each run at its last evaluated step; best of a column bold."""
    parts = []
    for comparison in compare_runs(results):
        for first in range(0, len(comparison.shots), _SHOTS_PER_TABLE):
            parts.append(_table(comparison, comparison.shots[first : first + _SHOTS_PER_TABLE]))
    return Group(*parts)


def print_failures(results: Results, console: Console) -> None:
    """A line per failed run, uncut."""
    for result in results.tuned:
        if result.status == "failed":
            reason = " ".join((result.error or "no reason stored").split())
            console.print(Text(f"failed: {result.name} ({result.run_key}): {reason}", style="red"), soft_wrap=True)


def _table(comparison: Comparison, shots: list[int]) -> Table:
    title = f"{comparison.benchmark}, prompt {comparison.prompt}"
    table = Table(box=box.SIMPLE_HEAD, title=escape(title), title_justify="left", title_style="bold", padding=(0, 1), collapse_padding=True)
    table.add_column("Run", min_width=16)
    table.add_column("Step", justify="right", no_wrap=True)
    for count in shots:
        for metric in METRICS:
            head = f"{count}-shot\n{_HEADS[metric]}" if metric == METRICS[0] else f"\n{_HEADS[metric]}"
            table.add_column(head, justify="right", no_wrap=True)
        table.add_column("Gestalt\nvs base", justify="right", no_wrap=True)
    for model, lines in groupby(comparison.lines, key=lambda line: line.result.model):
        table.add_row(Text(model, style="bold"))
        for line in lines:
            table.add_row(*_row(line, shots))
        table.add_section()
    return table


def _row(line: Line, shots: list[int]) -> list[Text]:
    style = "red" if line.result.status == "failed" else "dim" if line.result.is_base else ""
    row = [Text("  " + line.result.name.removeprefix(f"{line.result.model} "), style=style), Text(line.progress, style=style)]
    for count in shots:
        cells = {metric: line.cells[count, metric] for metric in METRICS}
        row += [_value(cells[metric]) for metric in METRICS]
        row.append(_change(cells["gestalt_score"]))
    return row


def _value(cell: Cell | None) -> Text:
    return Text("–", style="dim") if cell is None else Text(score_text(cell.value), style="bold green" if cell.is_best else "")


def _change(cell: Cell | None) -> Text:
    if cell is None or cell.change is None:
        return Text("")
    text = change_text(cell.change)
    return Text(text, style={"+": "green", "−": "red"}.get(text[0], "dim"))
