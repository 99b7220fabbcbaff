"""The comparison for a terminal."""

from __future__ import annotations

from itertools import groupby

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jmedlora.report.collect import METRICS, Metric, Results
from jmedlora.report.comparison import (
    INTERVALS,
    METRIC_NAMES,
    Cell,
    Comparison,
    Line,
    change_text,
    compare_runs,
    doubt_lines,
    score_text,
)
from jmedlora.report.significance import Statistics
from jmedlora.report.spread import PromptSpread

_SHOTS_PER_TABLE = 2
_HEADS: dict[Metric, str] = {"accuracy": "Acc", "exact_match": "EM", "gestalt_score": "Gestalt"}
_MARKS = "After a score, against the base in the same precision, Holm-corrected over the sweep: * p < 0.05, ** p < 0.01."
_DOUBTS_TOLD = 2


def console_comparison(results: Results, statistics: Statistics | None = None) -> Group:
    """Tables per benchmark, prompt and way of scoring: each run at its last evaluated step; best of a column bold.

    Two numbers of shots stand side by side where the terminal is wide enough for that; where it is too narrow even for one,
    bounds stand below the scores. Changes that are more than luck are marked where statistics are given.
    """
    comparisons = compare_runs(results, statistics)
    parts: list[_Tables | Text] = [_Tables(comparison) for comparison in comparisons]
    cells = [cell for comparison in comparisons for line in comparison.lines for cell in line.cells.values() if cell is not None]
    if any(cell.interval for cell in cells):
        parts.append(Text(f"After or below a score: its {INTERVALS}.", style="dim"))
    if any(cell.p_holm is not None for cell in cells):
        parts.append(Text(_MARKS, style="dim"))
    parts += [Text(line, style="yellow") for line in doubt_lines(comparisons, _DOUBTS_TOLD)]
    if statistics is not None:
        parts += [Text(line) for line in _spread_lines(results, statistics.prompts)]
        parts += [Text(f"note: {note}", style="dim") for note in statistics.notes]
    return Group(*parts)


def print_failures(results: Results, console: Console) -> None:
    """A line per failed run, uncut."""
    for result in results.tuned:
        if result.status == "failed":
            reason = " ".join((result.error or "no reason stored").split())
            console.print(Text(f"failed: {result.name} ({result.run_key}): {reason}", style="red"), soft_wrap=True)


class _Tables:
    """One comparison, laid out for the width that it is printed at."""

    def __init__(self, comparison: Comparison):
        self._comparison = comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.update(max_width=10_000)
        for layout in (self._tables(_SHOTS_PER_TABLE, " "), self._tables(1, " ")):
            if all(Measurement.get(console, room, table).maximum <= options.max_width for table in layout):
                break
        else:
            layout = self._tables(1, "\n")
        for table in layout:
            yield Padding(table, (0, 0, 1, 0))

    def _tables(self, shots_per_table: int, between: str) -> list[Table]:
        shots = self._comparison.shots
        firsts = range(0, len(shots), shots_per_table)
        return [_table(self._comparison, shots[first : first + shots_per_table], between) for first in firsts]


def _table(comparison: Comparison, shots: list[int], between: str) -> Table:
    """`between` stands between a score and its bounds."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=escape(comparison.title),
        title_justify="left",
        title_style="bold",
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("Run", min_width=16)
    table.add_column("Step", justify="right", no_wrap=True)
    widths = {(count, metric): _mark_width(comparison, count, metric) for count in shots for metric in METRICS}
    for count in shots:
        for metric in METRICS:
            head = f"{count}-shot\n{_HEADS[metric]}" if metric == METRICS[0] else f"\n{_HEADS[metric]}"
            table.add_column(head, justify="right", no_wrap=True)
        table.add_column("Gestalt\nvs base", justify="right", no_wrap=True)
    for model, lines in groupby(comparison.lines, key=lambda line: line.result.model):
        table.add_row(Text(model, style="bold"))
        for line in lines:
            table.add_row(*_row(line, shots, widths, between))
        table.add_section()
    return table


def _mark_width(comparison: Comparison, shots: int, metric: Metric) -> int:
    """Columns that the marks of a column of scores take, so that its numbers stand below each other."""
    return max((len(cell.mark + line.signs(shots, metric)) for line in comparison.lines if (cell := line.cells[shots, metric])), default=0)


def _row(line: Line, shots: list[int], widths: dict[tuple[int, Metric], int], between: str) -> list[Text]:
    style = "red" if line.result.status == "failed" else "dim" if line.result.is_base else ""
    row = [Text("  " + line.result.name.removeprefix(f"{line.result.model} "), style=style), Text(line.progress, style=style)]
    for count in shots:
        row += [_value(line.cells[count, metric], line.signs(count, metric), widths[count, metric], between) for metric in METRICS]
        row.append(_change(line.cells[count, "gestalt_score"]))
    return row


def _value(cell: Cell | None, signs: str, mark_width: int, between: str) -> Text:
    """Such as `0.325 .21-.45**`, padded to the width of the widest marks."""
    if cell is None:
        return Text("–" + " " * mark_width, style="dim")
    parts = [(score_text(cell.value), "bold green" if cell.is_best else ""), ((cell.mark + signs).ljust(mark_width), "")]
    if cell.interval is not None:
        bounds = f"{_bound(cell.interval.low)}-{_bound(cell.interval.high)}"
        if between == "\n":
            parts.append((f"\n{bounds}", "dim"))
        else:
            parts.insert(1, (f"{between}{bounds}", "dim"))
    return Text.assemble(*parts)


def _bound(value: float) -> str:
    """Two decimals in three characters: `.21`, and `1.0` for what rounds to one."""
    return "1.0" if value >= 0.995 else f"{value:.2f}"[1:]


def _change(cell: Cell | None) -> Text:
    if cell is None or cell.change is None:
        return Text("")
    text = change_text(cell.change)
    return Text(text, style={"+": "green", "−": "red"}.get(text[0], "dim"))


def _spread_lines(results: Results, spreads: list[PromptSpread]) -> list[str]:
    """How much one run's accuracy depends on the prompt, at most: a line per benchmark, shots and way of scoring where it does."""
    groups: dict[tuple[str, int, str], list[PromptSpread]] = {}
    for spread in spreads:
        groups.setdefault((spread.benchmark, spread.shots, spread.scoring), []).append(spread)
    lines = []
    for (benchmark, shots, scoring), own in groups.items():
        widest = max(own, key=lambda spread: spread.spreads["accuracy"].range)
        if score_text(widest.spreads["accuracy"].range) == score_text(0):
            continue
        found, way = widest.spreads["accuracy"], ", log-likelihood" if scoring == "loglikelihood" else ""
        lines.append(
            f"prompts, {benchmark} {shots}-shot{way}: {METRIC_NAMES['accuracy']} of one run differs by up to {score_text(found.range)}, "
            f"{results.by_key[widest.run_key].name}: {score_text(found.lowest)} with {found.lowest_prompt}, "
            f"{score_text(found.highest)} with {found.highest_prompt}"
        )
    return lines
