"""comparisons.csv, replicates.csv and prompts.csv."""

from __future__ import annotations

from typing import Any

from jmedlora.report.collect import METRICS
from jmedlora.report.replicates import ReplicateRow
from jmedlora.report.significance import Row, Statistics
from jmedlora.report.spread import PromptSpread
from jmedlora.report.table import csv_text, p_spelling

COMPARISON_COLUMNS = (
    *("run_key", "other_key", "kind", "benchmark", "shots", "prompt", "scoring", "metric", "n", "difference", "low", "high"),
    *("p", "p_holm", "effect", "effect_name", "questions_needed", "reversal_of_50", "method", "step", "other_step", "evaluation_key"),
)
REPLICATE_COLUMNS = (
    *("run_keys", "seeds", "base_key", "benchmark", "shots", "prompt", "scoring", "metric", "step", "n", "mean", "sd", "low", "high"),
    *("difference", "difference_low", "difference_high", "p", "p_holm", "effect", "effect_name", "questions_needed", "reversal_of_50"),
    *("method", "evaluation_key"),
)
PROMPT_COLUMNS = (
    *("run_key", "benchmark", "shots", "scoring", "step", "prompts"),
    *(f"{metric}_{name}" for metric in METRICS for name in ("min", "max", "mean", "range")),
)
_DIGITS = 6


def comparisons_csv(statistics: Statistics) -> str:
    """A row per comparison: runs against their bases first, then systems against each other."""
    return csv_text(COMPARISON_COLUMNS, [_comparison_row(row) for row in (*statistics.against_base, *statistics.between_runs)])


def _comparison_row(row: Row) -> dict[str, Any]:
    return {name: _spell(name, getattr(row, name)) for name in COMPARISON_COLUMNS}


def replicates_csv(statistics: Statistics) -> str:
    """A row per group of runs that differ in the seed alone; keys and seeds are separated by blanks."""
    return csv_text(REPLICATE_COLUMNS, [_replicate_row(row) for row in statistics.replicates])


def _replicate_row(row: ReplicateRow) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(row, name) for name in REPLICATE_COLUMNS if hasattr(row, name)}
    values |= {"run_keys": " ".join(row.run_keys), "seeds": " ".join(map(str, row.seeds))}
    if row.against_base is not None:
        found = row.against_base
        values |= {"difference": found.difference, "difference_low": found.low, "difference_high": found.high, "p": found.p}
        values |= {"effect": found.effect, "effect_name": found.effect_name, "questions_needed": found.questions_needed}
        values |= {"reversal_of_50": found.reversal, "method": found.method}
    return {name: _spell(name, value) for name, value in values.items()}


def prompts_csv(statistics: Statistics) -> str:
    """A row per run, benchmark, shots and way of scoring that was asked in several prompts; their names are separated by blanks."""
    return csv_text(PROMPT_COLUMNS, [_prompt_row(row) for row in statistics.prompts])


def _prompt_row(row: PromptSpread) -> dict[str, Any]:
    values: dict[str, Any] = {"run_key": row.run_key, "benchmark": row.benchmark, "shots": row.shots, "scoring": row.scoring}
    values |= {"step": row.step, "prompts": " ".join(row.prompts)}
    for metric, spread in row.spreads.items():
        values |= {f"{metric}_min": spread.lowest, f"{metric}_max": spread.highest, f"{metric}_mean": spread.mean}
        values[f"{metric}_range"] = spread.range
    return {name: _spell(name, value) for name, value in values.items()}


def _spell(name: str, value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return p_spelling(value) if name in ("p", "p_holm") else round(value, _DIGITS)
