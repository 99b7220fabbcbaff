"""The comparison for a terminal."""

from __future__ import annotations

from itertools import groupby

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from jmedlora.report.collect import METRICS, Metric, Results
from jmedlora.report.comparison import METRIC_NAMES, Cell, Comparison, Line, change_text, compare_runs, score_text
from jmedlora.report.significance import Statistics
from jmedlora.report.spread import PromptSpread

_SHOTS_PER_TABLE = 2
_HEADS: dict[Metric, str] = {"accuracy": "Acc", "exact_match": "EM", "gestalt_score": "Gestalt"}
_INTERVALS = "±: half of the 95 % interval over the questions."
_MARKS = "After a score, against the base in the same precision, Holm-corrected over the sweep: * p < 0.05, ** p < 0.01."


def console_comparison(results: Results, statistics: Statistics | None = None) -> Group:
    """Tables per benchmark, prompt and way of scoring: each run at its last evaluated step; best of a column bold.

    Two numbers of shots stand side by side where the terminal is wide enough for that. Changes that are more than luck are
    marked where statistics are given.
    """
    comparisons = compare_runs(results, statistics)
    parts: list[_Tables | Text] = [_Tables(comparison) for comparison in comparisons]
    cells = [cell for comparison in comparisons for line in comparison.lines for cell in line.cells.values() if cell is not None]
    if any(cell.interval for cell in cells):
        parts.append(Text(_INTERVALS, style="dim"))
    if any(cell.p_holm is not None for cell in cells):
        parts.append(Text(_MARKS, style="dim"))
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
        wide = self._tables(_SHOTS_PER_TABLE)
        fits = all(Measurement.get(console, options.update(max_width=10_000), table).maximum <= options.max_width for table in wide)
        yield from wide if fits else self._tables(1)

    def _tables(self, shots_per_table: int) -> list[Table]:
        shots = self._comparison.shots
        return [_table(self._comparison, shots[first : first + shots_per_table]) for first in range(0, len(shots), shots_per_table)]


def _table(comparison: Comparison, shots: list[int]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=escape(comparison.title),
        title_justify="left",
        title_style="bold",
        padding=(0, 1),
        collapse_padding=True,
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
            table.add_row(*_row(line, shots, widths))
        table.add_section()
    return table


def _mark_width(comparison: Comparison, shots: int, metric: Metric) -> int:
    """Columns that the marks of a column of scores take, so that its numbers stand below each other."""
    return max((len(cell.mark) for line in comparison.lines if (cell := line.cells[shots, metric])), default=0)


def _row(line: Line, shots: list[int], widths: dict[tuple[int, Metric], int]) -> list[Text]:
    style = "red" if line.result.status == "failed" else "dim" if line.result.is_base else ""
    row = [Text("  " + line.result.name.removeprefix(f"{line.result.model} "), style=style), Text(line.progress, style=style)]
    for count in shots:
        row += [_value(line.cells[count, metric], widths[count, metric]) for metric in METRICS]
        row.append(_change(line.cells[count, "gestalt_score"]))
    return row


def _value(cell: Cell | None, mark_width: int) -> Text:
    """Such as `0.325±.07**`, padded to the width of the widest mark."""
    if cell is None:
        return Text("–" + " " * mark_width, style="dim")
    text = Text(score_text(cell.value), style="bold green" if cell.is_best else "")
    if cell.interval is not None:
        half = (cell.interval.high - cell.interval.low) / 2
        text = Text.assemble(text, (f"±{half:.2f}".replace("0.", ".", 1), "dim"))
    return Text.assemble(text, cell.mark.ljust(mark_width))


def _change(cell: Cell | None) -> Text:
    if cell is None or cell.change is None:
        return Text("")
    text = change_text(cell.change)
    return Text(text, style={"+": "green", "−": "red"}.get(text[0], "dim"))


def _spread_lines(results: Results, spreads: list[PromptSpread]) -> list[str]:
    """How much one run's accuracy depends on the prompt, at most: a line per benchmark, shots and way of scoring."""
    groups: dict[tuple[str, int, str], list[PromptSpread]] = {}
    for spread in spreads:
        groups.setdefault((spread.benchmark, spread.shots, spread.scoring), []).append(spread)
    lines = []
    for (benchmark, shots, scoring), own in groups.items():
        widest = max(own, key=lambda spread: spread.spreads["accuracy"].range)
        found, way = widest.spreads["accuracy"], ", log-likelihood" if scoring == "loglikelihood" else ""
        lines.append(
            f"prompts, {benchmark} {shots}-shot{way}: {METRIC_NAMES['accuracy']} of one run differs by up to {score_text(found.range)}, "
            f"{results.by_key[widest.run_key].name}: {score_text(found.lowest)} with {found.lowest_prompt}, "
            f"{score_text(found.highest)} with {found.highest_prompt}"
        )
    return lines
