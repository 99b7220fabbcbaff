"""table.csv, table.md and costs.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from jmedlora.plan.naming import number, targets_of
from jmedlora.plan.specs import RunSpec
from jmedlora.report.collect import DOUBT_KINDS, METRICS, Results, RunResult, Score, evaluation_order
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

COLUMNS = (
    *("run_key", "model", "method", "lora_rank", "lora_alpha", "epochs", "step", "seed", "benchmark", "shots", "prompt", "n"),
    *("accuracy", "exact_match", "gestalt_score", "scoring"),
    *(f"{metric}_{bound}" for metric in METRICS for bound in ("low", "high")),
    *("precision", "lora_dropout", "lora_targets", "learning_rate", "schedule", "batch_size", "data", "training_prompt"),
    *("base_key", "evaluation_key"),
    *(f"{metric}_{p}" for metric in METRICS for p in ("p", "p_holm")),
    *DOUBT_KINDS,
)
COST_COLUMNS = (
    *("run_key", "name", "model", "method", "precision", "status", "steps", "training_seconds", "tokens", "tokens_per_s"),
    *("workers", "gpu_hours", "evaluation_seconds"),
)
_DIGITS = 6  # of what statistics compute
_DOUBTS_TOLD = 6


def table_csv(results: Results, statistics: Statistics) -> str:
    """One row per run x evaluated step x benchmark x shots x prompt x scoring; nothing in it depends on clock or machine.

    Bounds are 95 % intervals over the questions, empty where no predictions are stored. p values compare the run with its
    base, at its last evaluated step alone. Counts of answers that say little are empty where nothing has counted them.
    """
    rows = []
    for result in results.runs:
        for score in sorted(result.scores, key=lambda score: (score.step, *evaluation_order(score.evaluation))):
            rows.append(_table_row(result, score, statistics))
    return csv_text(COLUMNS, rows)


def _table_row(result: RunResult, score: Score, statistics: Statistics) -> dict[str, Any]:
    run = result.spec if isinstance(result.spec, RunSpec) else None
    return {
        "run_key": result.run_key,
        "model": result.model,
        "method": result.method,
        "lora_rank": result.rank,
        "lora_alpha": number(run.settings.alpha_value) if run else 0,
        "epochs": number(result.epochs),
        "step": score.step,
        "seed": result.seed,
        "benchmark": score.evaluation.benchmark.name,
        "shots": score.evaluation.shots,
        "prompt": score.evaluation.prompt.name,
        "n": score.n,
        "accuracy": score.accuracy,
        "exact_match": score.exact_match,
        "gestalt_score": score.gestalt_score,
        "scoring": score.evaluation.scoring,
        **_bounds(score),
        "precision": result.spec.precision,
        "lora_dropout": number(run.settings.dropout) if run else 0,
        "lora_targets": targets_of(run) if run else "",
        "learning_rate": number(run.settings.learning_rate) if run else 0,
        "schedule": run.settings.schedule if run else "",
        "batch_size": run.settings.batch_size if run else 0,
        "data": run.data.name if run else "",
        "training_prompt": run.prompt.name if run else "",
        "base_key": run.base_key if run else "",
        "evaluation_key": score.evaluation.evaluation_key,
        **_p_values(result, score, statistics),
        **dict[str, int](score.doubtful.items()),
    }


def _bounds(score: Score) -> dict[str, float]:
    return {
        f"{metric}_{name}": round(bound, _DIGITS)
        for metric, interval in score.intervals.items()
        for name, bound in (("low", interval.low), ("high", interval.high))
    }


def _p_values(result: RunResult, score: Score, statistics: Statistics) -> dict[str, str]:
    rows = {metric: statistics.row_of(result.run_key, score, metric) for metric in METRICS}
    return {f"{metric}_{name}": p_spelling(getattr(row, name)) for metric, row in rows.items() if row for name in ("p", "p_holm")}


def p_spelling(p: float) -> str:
    """Six significant digits: p values may be far smaller than any rounding to a number of decimals keeps."""
    return f"{p:.6g}"


def cost_rows(results: Results) -> list[dict[str, Any]]:
    """Seconds, tokens and GPU-hours of each run and base; GPU-hours: those reserved, divided among what trained together."""
    return [
        {
            "run_key": result.run_key,
            "name": result.name,
            "model": result.model,
            "method": result.method,
            "precision": result.spec.precision,
            "status": result.status,
            "steps": len(result.training.steps),
            "training_seconds": round(result.training.seconds, 1),
            "tokens": result.training.tokens,
            "tokens_per_s": round(result.training.tokens / result.training.seconds, 1) if result.training.seconds else "",
            "workers": 0 if result.is_base else result.workers,
            "gpu_hours": round(result.gpus * result.training.own_seconds / 3600, 4),
            "evaluation_seconds": round(sum(score.seconds for score in result.scores), 1),
        }
        for result in results.runs
    ]


def costs_csv(results: Results) -> str:
    return csv_text(COST_COLUMNS, cost_rows(results))


def csv_text(columns: Sequence[str], rows: list[dict[str, Any]]) -> str:
    """A table with a head; what a row lacks stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---------------------------------------------------------------- Markdown


def table_md(results: Results, statistics: Statistics) -> str:
    """The comparison as Markdown: each run at its last evaluated step, with its change against its own base."""
    parts = [f"# {results.plan.sweep}"]
    for comparison in compare_runs(results, statistics):
        parts += [f"## {comparison.title}", _comparison_md(comparison)]
        parts += [_escape(line) for line in doubt_lines([comparison], _DOUBTS_TOLD)]
    parts.append(
        f"In square brackets: the {INTERVALS}. In round ones: the change against the base in the same "
        "precision, \\* where p is below 0.05 and \\*\\* where it is below 0.01 after Holm's correction over the sweep. "
        "Bold: the best of its column."
    )
    failed = [
        f"- {_escape(result.name)} (`{result.run_key}`): {_escape(result.error or 'no reason stored')}"
        for result in results.tuned
        if result.status == "failed"
    ]
    if failed:
        parts += ["## Failed runs", "\n".join(failed)]
    parts.append("For research, not for clinical use.")
    return "\n\n".join(parts) + "\n"


def _comparison_md(comparison: Comparison) -> str:
    columns = [(shots, metric) for shots in comparison.shots for metric in METRICS]
    head = ["Run", "Precision", "Step", *(f"{shots}-shot {METRIC_NAMES[metric]}" for shots, metric in columns)]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    lines += [[*_labels(line), *(_cell_md(line.cells[column], line.signs(*column)) for column in columns)] for line in comparison.lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _labels(line: Line) -> list[str]:
    return [_escape(line.result.name), line.result.spec.precision, line.progress]


def _cell_md(cell: Cell | None, signs: str) -> str:
    if cell is None:
        return "–"
    parts = [f"**{score_text(cell.value)}**" if cell.is_best else score_text(cell.value)]
    if cell.interval is not None:
        parts.append(f"[{score_text(cell.interval.low)}, {score_text(cell.interval.high)}]")
    if cell.change is not None:
        parts.append(f"({change_text(cell.change)}{cell.mark.replace('*', chr(92) + '*')})")
    return " ".join(parts) + signs


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
