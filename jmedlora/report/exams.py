"""How the exam itself marked each system: points, prohibited choices, pass or fail, by year and by category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jmedlora.plan.layout import Storage
from jmedlora.plan.records import Record, read_metrics
from jmedlora.plan.specs import EvaluationSpec
from jmedlora.report.collect import Results
from jmedlora.report.comparison import last_score

CATEGORY_SYSTEMS = 6
"""Systems that the table by category has room for: the best by points."""


@dataclass(frozen=True)
class ExamLine:
    """One system at its last evaluated step; `marks` is the `exam` of its metrics.json."""

    name: str
    shots: int
    marks: Record


@dataclass(frozen=True)
class ExamTables:
    """All systems of one benchmark, prompt and way of scoring."""

    lines: list[ExamLine]
    years: list[str]
    categories: list[str]
    best: list[ExamLine]
    """Those shown by category, the best first."""


def exam_tables(results: Results, storage: Storage, evaluations: Sequence[EvaluationSpec]) -> ExamTables | None:
    """None where the benchmark has no exam's rules, or nothing is marked by them yet."""
    lines = []
    for result in results.runs:
        for evaluation in evaluations:
            score = last_score(result, evaluation)
            metrics = read_metrics(storage, result.run_key, score.step, evaluation) if score else None
            if metrics and "exam" in metrics:
                lines.append(ExamLine(result.name, evaluation.shots, metrics["exam"]))
    if not lines:
        return None
    return ExamTables(
        lines=lines,
        years=sorted({year for line in lines for year in line.marks["by_year"]}),
        categories=sorted({category for line in lines for category in line.marks["by_category"]}),
        best=sorted(lines, key=lambda line: -line.marks["points"])[:CATEGORY_SYSTEMS],
    )
