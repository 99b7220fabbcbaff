"""All comparisons of a sweep in one table: systems by benchmark, prompt, way of scoring and shots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from jmedlora.report.collect import Results, RunResult
from jmedlora.report.comparison import Comparison, Line


@dataclass(frozen=True)
class SummaryRow:
    """One system; `lines` has an entry per comparison, None where it is not asked."""

    result: RunResult
    lines: list[Line | None]


@dataclass(frozen=True)
class Summary:
    """Comparisons in the plan's order, and neighbours of the same benchmark put together."""

    comparisons: Sequence[Comparison]
    benchmarks: list[tuple[str, int]]
    """Names with the number of columns below each."""
    rows: list[SummaryRow]


def summarise(results: Results, comparisons: Sequence[Comparison]) -> Summary | None:
    """None for a single comparison, which is its own summary."""
    if len(comparisons) < 2:
        return None
    lines = [{line.result.run_key: line for line in comparison.lines} for comparison in comparisons]
    return Summary(
        comparisons=comparisons,
        benchmarks=[
            (name, sum(len(comparison.shots) for comparison in own)) for name, own in groupby(comparisons, lambda each: each.benchmark)
        ],
        rows=[SummaryRow(result, [own.get(result.run_key) for own in lines]) for result in results.runs],
    )
