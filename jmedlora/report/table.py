"""table.csv, table.md and costs.csv."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from jmedlora.plan.naming import number, targets_of
from jmedlora.plan.specs import RunSpec
from jmedlora.report.collect import METRICS, Results, RunResult, Score
from jmedlora.report.comparison import METRIC_NAMES, Cell, Comparison, Line, change_text, compare_runs, score_text

COLUMNS = (
    *("run_key", "model", "method", "lora_rank", "lora_alpha", "epochs", "step", "seed", "benchmark", "shots", "prompt", "n"),
    *("accuracy", "exact_match", "gestalt_score", "precision"),
    *("accuracy_low", "accuracy_high", "exact_match_low", "exact_match_high"),
    *("lora_dropout", "lora_targets", "learning_rate", "schedule", "batch_size", "data", "training_prompt", "base_key", "evaluation_key"),
)
COST_COLUMNS = (
    *("run_key", "name", "model", "method", "precision", "status", "steps", "training_seconds", "tokens", "tokens_per_s"),
    *("workers", "gpu_hours", "evaluation_seconds"),
)
_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def table_csv(results: Results) -> str:
    """One row per run x evaluated step x benchmark x shots x prompt; nothing in it depends on clock or machine.

    Bounds of accuracy and exact match are Wilson's 95 % intervals over the questions.
    """
    rows = []
    for result in results.runs:
        for score in sorted(result.scores, key=lambda score: (score.step, *_evaluation_order(score))):
            rows.append(_table_row(result, score))
    return _csv_text(COLUMNS, rows)


def _evaluation_order(score: Score) -> tuple[str, str, int]:
    return score.evaluation.benchmark.name, score.evaluation.prompt.name, score.evaluation.shots


def _table_row(result: RunResult, score: Score) -> dict[str, Any]:
    run = result.spec if isinstance(result.spec, RunSpec) else None
    accuracy_low, accuracy_high = wilson_interval(score.accuracy, score.n)
    exact_low, exact_high = wilson_interval(score.exact_match, score.n)
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
        "precision": result.spec.precision,
        "accuracy_low": accuracy_low,
        "accuracy_high": accuracy_high,
        "exact_match_low": exact_low,
        "exact_match_high": exact_high,
        "lora_dropout": number(run.settings.dropout) if run else 0,
        "lora_targets": targets_of(run) if run else "",
        "learning_rate": number(run.settings.learning_rate) if run else 0,
        "schedule": run.settings.schedule if run else "",
        "batch_size": run.settings.batch_size if run else 0,
        "data": run.data.name if run else "",
        "training_prompt": run.prompt.name if run else "",
        "base_key": run.base_key if run else "",
        "evaluation_key": score.evaluation.evaluation_key,
    }


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `n` questions, rounded to six digits."""
    if n == 0:
        return 0.0, 1.0
    square = _Z95 * _Z95
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = _Z95 / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return round(max(0.0, centre - half), 6), round(min(1.0, centre + half), 6)


def cost_rows(results: Results) -> list[dict[str, Any]]:
    """Seconds, tokens and GPU-hours of each run and base; GPU-hours are those reserved while it trained."""
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
            "gpu_hours": round(result.gpus * result.training.seconds / 3600, 4),
            "evaluation_seconds": round(sum(score.seconds for score in result.scores), 1),
        }
        for result in results.runs
    ]


def costs_csv(results: Results) -> str:
    return _csv_text(COST_COLUMNS, cost_rows(results))


def _csv_text(columns: Sequence[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---------------------------------------------------------------- Markdown


def table_md(results: Results) -> str:
    """The comparison as Markdown: each run at its last evaluated step, with its change against its own base."""
    parts = [f"# {results.plan.sweep}"]
    for comparison in compare_runs(results):
        parts += [f"## {comparison.benchmark}, prompt {comparison.prompt}", _comparison_md(comparison)]
    parts.append("In brackets: the change against the base in the same precision. Bold: the best of its column.")
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
    lines += [[*_labels(line), *(_cell_md(line.cells[column]) for column in columns)] for line in comparison.lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _labels(line: Line) -> list[str]:
    return [_escape(line.result.name), line.result.spec.precision, line.progress]


def _cell_md(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    value = f"**{score_text(cell.value)}**" if cell.is_best else score_text(cell.value)
    return value if cell.change is None else f"{value} ({change_text(cell.change)})"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
