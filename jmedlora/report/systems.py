"""Systems evaluated one by one, as a table with intervals and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import BaseSpec, EvaluationSpec
from jmedlora.report.comparison import INTERVALS, METRIC_NAMES

WIDE = 110
"""Columns from which systems stand side by side in one table."""
Evaluated = tuple[str, BaseSpec, EvaluationSpec, dict[str, Any]]
"""System, its base, what it was asked, and its metrics."""

_WAYS = {"generate": "generated", "loglikelihood": "likelihood"}


def systems_as_json(found: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """The metrics of each evaluation, with the system's name and the base's number format."""
    return [{"system": name, "precision": base.precision, **metrics} for name, base, _, metrics in found]


def print_systems(found: Sequence[Evaluated], storage: Storage, console: Console) -> None:
    """A table per benchmark and prompt, on a narrow page also per system: means with 95 % intervals over the questions; then marks,
    costs and warnings where there are any."""
    is_wide = console.width >= WIDE

    def title(one: Evaluated) -> str:
        place = f"{one[2].benchmark.name}, prompt {one[2].prompt.name}"
        return place if is_wide else f"{one[0]}: {place}"

    groups: dict[str, list[Evaluated]] = {}
    for one in found:
        groups.setdefault(title(one), []).append(one)
    for heading, own in groups.items():
        console.print(_table(heading, own, is_wide))
    console.print(f"beside each score: its {INTERVALS}", style="dim", highlight=False)
    for name, _, evaluation, metrics in found:
        asked = f"{name}, {evaluation.benchmark.name} {evaluation.shots}-shot {evaluation.prompt.name} {_WAYS[evaluation.scoring]}"
        for line in _further(metrics):
            console.print(f"{asked}: {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"stored in {storage.root / 'runs'}", highlight=False, markup=False, soft_wrap=True)


def _table(title: str, found: list[Evaluated], is_wide: bool) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for column in ("system",) * is_wide:
        table.add_column(column, overflow="fold")
    for column in ("shots", "scoring", "n"):
        table.add_column(column, justify="left" if column == "scoring" else "right", no_wrap=True)
    for column in METRIC_NAMES.values():
        table.add_column(column, justify="right", no_wrap=True)
    for name, _, evaluation, metrics in found:
        asked = (str(evaluation.shots), _WAYS[evaluation.scoring], str(metrics["n"]))
        system = (escape(name),) if is_wide else ()
        table.add_row(*system, *asked, *(_with_interval(metrics, score, 3 if is_wide else 2) for score in METRIC_NAMES))
    return table


def _with_interval(metrics: dict[str, Any], score: str, digits: int) -> str:
    low, high = (f"{metrics[f'{score}_{end}']:.{digits}f}" for end in ("low", "high"))
    return f"{metrics[score]:.3f} {low}-{high}"


def _further(metrics: dict[str, Any]) -> list[str]:
    lines = []
    if ways := metrics.get("accuracy_by_normalisation"):
        lines.append("accuracy by log-likelihood: " + ", ".join(f"{way.replace('_', ' ')} {value:.3f}" for way, value in ways.items()))
    if exam := metrics.get("exam"):
        lines.append(f"{exam['points']} of {exam['points_total']} points, {exam['prohibited']} prohibited choices")
    if metrics.get("no_resemblance"):
        lines.append(f"{metrics['no_resemblance']} of {metrics['n']} answers resemble no choice ({metrics['empty_answers']} are empty)")
    if metrics.get("cut_answers"):
        lines.append(f"{metrics['cut_answers']} of {metrics['n']} answers were cut off at the bound on new tokens")
    if metrics.get("truncated_prompts"):
        lines.append(f"{metrics['truncated_prompts']} prompts were longer than the model takes and lost their beginning")
    if metrics.get("cost") is not None:
        lines.append(f"cost {metrics['cost']:.4f} {metrics['currency']}")
    return lines
