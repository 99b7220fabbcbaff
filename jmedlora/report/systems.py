"""Systems evaluated one by one, as a table with intervals and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import BaseSpec, EvaluationSpec

Evaluated = tuple[str, BaseSpec, EvaluationSpec, dict[str, Any]]
"""System, its base, what it was asked, and its metrics."""

_WAYS = {"generate": "generated", "loglikelihood": "likelihood"}
SCORES = {"accuracy": "accuracy", "exact_match": "exact match", "gestalt_score": "Gestalt score"}


def systems_as_json(found: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """The metrics of each evaluation, with the system's name and the base's number format."""
    return [{"system": name, "precision": base.precision, **metrics} for name, base, _, metrics in found]


def print_systems(found: Sequence[Evaluated], storage: Storage, console: Console) -> None:
    """A table per benchmark and prompt: means with 95 % intervals over the questions; then marks and costs where there are any."""
    for (benchmark, prompt), own in groupby(sorted(found, key=_place), key=_place):
        console.print(_table(f"{benchmark}, prompt {prompt}", list(own)))
    console.print("in brackets: 95 % bootstrap intervals over the questions", style="dim")
    for name, _, evaluation, metrics in found:
        asked = f"{name}, {evaluation.benchmark.name} {evaluation.shots}-shot {evaluation.prompt.name} {_WAYS[evaluation.scoring]}"
        for line in _further(metrics):
            console.print(f"{asked}: {line}", highlight=False, soft_wrap=True)
    console.print(f"stored in {storage.root / 'runs'}", highlight=False, soft_wrap=True)


def _place(one: Evaluated) -> tuple[str, str]:
    return one[2].benchmark.name, one[2].prompt.name


def _table(title: str, found: list[Evaluated]) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("system", overflow="fold")
    for column in ("shots", "scoring", "n"):
        table.add_column(column, justify="left" if column == "scoring" else "right", no_wrap=True)
    for column in SCORES.values():
        table.add_column(column, justify="right", no_wrap=True)
    for name, _, evaluation, metrics in found:
        asked = (str(evaluation.shots), _WAYS[evaluation.scoring], str(metrics["n"]))
        table.add_row(name, *asked, *(_with_interval(metrics, score) for score in SCORES))
    return table


def _with_interval(metrics: dict[str, Any], score: str) -> str:
    return f"{metrics[score]:.3f} [{metrics[f'{score}_low']:.3f}, {metrics[f'{score}_high']:.3f}]"


def _further(metrics: dict[str, Any]) -> list[str]:
    lines = []
    if ways := metrics.get("accuracy_by_normalisation"):
        lines.append("accuracy by log-likelihood: " + ", ".join(f"{way.replace('_', ' ')} {value:.3f}" for way, value in ways.items()))
    if exam := metrics.get("exam"):
        lines.append(f"{exam['points']} of {exam['points_total']} points, {exam['prohibited']} prohibited choices")
    if metrics.get("truncated_prompts"):
        lines.append(f"{metrics['truncated_prompts']} prompts were longer than the model takes and lost their beginning")
    if metrics.get("cost") is not None:
        lines.append(f"cost {metrics['cost']:.4f} {metrics['currency']}")
    return lines
