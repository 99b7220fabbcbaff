"""The plan for people and for programs."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jmedlora.config.locate import is_loopback
from jmedlora.config.parts import ApiSource
from jmedlora.config.sweep import SweepConfig
from jmedlora.plan.costs import seconds_alone
from jmedlora.plan.estimates import Totals, TrialEstimate, api_cost, estimate_totals, estimate_trial
from jmedlora.plan.fitting import hints_of, shapes_of
from jmedlora.plan.memory import GIGABYTE, evaluation_memory
from jmedlora.plan.naming import names_of
from jmedlora.plan.specs import BaseSpec, Plan, RunSpec

MAX_ROWS = 40
"""Runs that the table shows; `--json` shows all."""


def estimates_of(plan: Plan, config: SweepConfig) -> tuple[list[TrialEstimate], Totals]:
    """Estimates of every trial and of the whole."""
    shapes = shapes_of(config)
    trials = [estimate_trial(trial, config.resources, shapes) for trial in plan.trials]
    return trials, estimate_totals(plan, trials, config.resources, shapes)


def evaluation_memory_gb(plan: Plan, config: SweepConfig) -> dict[str, float]:
    """Memory of an evaluator of each base with its largest adapter, as many times as it takes at once, in GB, by the base's run key.

    Of models with known shapes.
    """
    shapes, on_gpu = shapes_of(config), config.resources.gpus_per_worker > 0
    found = {}
    for base in plan.bases:
        if (shape := shapes.get(base.model.name)) is None:
            continue
        checkpoints = sum(len(run.checkpoint_steps) for run in plan.runs if run.base_key == base.run_key)
        adapter, pack = plan.largest_adapter(base, shape), max(1, min(plan.evaluated_together, checkpoints))
        found[base.run_key] = evaluation_memory(base, plan.asked_of(base), shape, on_gpu, adapter, pack).total / GIGABYTE
    return found


def plan_as_json(plan: Plan, config: SweepConfig) -> dict[str, Any]:
    """`runs` (each with its keys, settings and model_parameters), `bases`, `evaluations`, `trials`, `totals`, `missing`, `notes`."""
    trials, totals = estimates_of(plan, config)
    evaluating = evaluation_memory_gb(plan, config)
    return {
        "sweep": plan.sweep,
        "runs": [_run_as_json(run) for run in plan.runs],
        "bases": [
            {
                "run_key": base.run_key,
                "model": base.model.name,
                "precision": base.precision,
                "model_parameters": base.model_parameters,
                "evaluation_memory_gb": evaluating.get(base.run_key),
                "provisional": base.provisional,
            }
            for base in plan.bases
        ],
        "evaluations": [
            {
                "evaluation_key": spec.evaluation_key,
                "benchmark": spec.benchmark.name,
                "shots": spec.shots,
                "prompt": spec.prompt.name,
                "scoring": spec.scoring,
                "questions": spec.questions,
            }
            for spec in plan.evaluations
        ],
        "trials": [
            {
                "trial_id": trial.trial_id,
                "runs": [run.run_key for run in trial.runs],
                "workers": trial.workers,
                "gpus": trial.workers * trial.gpus_per_worker,
                "pack": trial.pack,
                **asdict(estimate),
            }
            for trial, estimate in zip(plan.trials, trials, strict=True)
        ],
        "totals": asdict(totals),
        "keep": plan.keep.model_dump(mode="json"),
        "missing": plan.missing,
        "notes": plan.notes,
    }


def print_plan(plan: Plan, config: SweepConfig, console: Console) -> None:
    """A table of runs, then the totals; every time and size is an estimate."""
    trials, totals = estimates_of(plan, config)
    names = names_of(plan)
    if plan.runs:
        _print_runs(plan, config, console, trials, names)
    _print_totals(plan, totals, trials, config, console)


def _print_runs(plan: Plan, config: SweepConfig, console: Console, trials: list[TrialEstimate], names: dict[str, str]) -> None:
    estimate_by_run = {run.run_key: estimate for trial, estimate in zip(plan.trials, trials, strict=True) for run in trial.runs}
    gpus, shapes = config.resources.gpus_per_worker > 0, shapes_of(config)
    table = Table(title=f"sweep {plan.sweep}", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in ("run_key", "run", "steps", "checkpoints", "learning rate", "memory per " + ("GPU" if gpus else "worker"), "time"):
        table.add_column(column, justify="left" if column in ("run_key", "run") else "right", no_wrap=column != "run")
    for run in plan.runs[:MAX_ROWS]:
        estimate = estimate_by_run[run.run_key]
        largest = max(estimate.memory_items, key=lambda name: estimate.memory_items[name])
        memory = Text(f"{estimate.memory_gb:.1f} GB ({largest} {estimate.memory_items[largest]:.1f})", style="" if estimate.fits else "red")
        key = run.run_key + ("?" if run.provisional else "")
        table.add_row(
            key,
            names[run.run_key],
            str(run.total_steps),
            str(len(run.checkpoint_steps)),
            f"{run.settings.learning_rate:g}",
            memory,
            _time(seconds_alone(run, config.resources, shapes[run.model.name])),
        )
    console.print(table)
    if len(plan.runs) > MAX_ROWS:
        console.print(f"... and {len(plan.runs) - MAX_ROWS} more runs (--json shows all)")


def _print_totals(plan: Plan, totals: Totals, trials: list[TrialEstimate], config: SweepConfig, console: Console) -> None:
    bases = ", ".join(f"{base.model.name} {base.precision}{_parameters(base)}" for base in plan.bases)
    counts = f"{_counted(totals.runs, 'run')} in {_counted(totals.trials, 'trial')} over {_counted(totals.bases, 'base')}"
    console.print(f"\n{counts}: {bases}", highlight=False, markup=False)
    answers = f"{_counted(totals.evaluations, 'evaluation')} ({_counted(totals.questions, 'answer')})"
    console.print(f"{answers}; checkpoints take {_size(totals.disk_bytes)} on disk", highlight=False)
    if evaluating := evaluation_memory_gb(plan, config):
        console.print(f"an evaluator takes up to {max(evaluating.values()):.1f} GB", highlight=False)
    at_once = totals.concurrent_trials
    machines = f"{_counted(at_once, 'trial')} at once" if at_once else "trials at once: as many as the cores allow"
    console.print(
        f"estimated from shapes and assumed speeds: training {_time(totals.training_hours * 3600)}, "
        f"evaluation {_time(totals.evaluation_hours * 3600)}, all in all {_time(totals.makespan_hours * 3600)} ({machines}; "
        f"arithmetic alone: {_time(totals.lower_bound_hours * 3600)})",
        highlight=False,
    )
    _print_savings(plan, totals, console)
    for base in plan.bases:
        if isinstance(source := base.model.source, ApiSource):
            cost = api_cost(source, base.model, plan.asked_of(base))
            money = "its prices are not given" if cost is None else f"about {cost:.2f} {source.currency}"
            key = "" if is_loopback(source.base_url) or os.environ.get(source.key_env) else f"; {source.key_env} is not set here"
            console.print(f"{base.model.name} is asked at {source.base_url}: {money}{key}", highlight=False, markup=False)
            if len(plan.asked_of(base)) < len(plan.evaluations):
                console.print(f"{base.model.name} is not asked for log-likelihoods, which no address gives", highlight=False, markup=False)
    assumed = sorted({name for method in config.methods.values() for name in method.assumed if name not in config.training})
    if assumed:
        console.print(f"assumed, not reported by the study: {', '.join(assumed)}", highlight=False)
    if not all(estimate.fits for estimate in trials):
        console.print(f"[red]red[/]: more than the {config.resources.gpu_memory_gb:g} GB of a GPU (resources.gpu_memory_gb)")
        _print_hints(plan, trials, config, console)
    for line in plan.missing:
        console.print(Text.assemble(("not here yet", "yellow"), f": {line}"), soft_wrap=True)
    for line in plan.notes:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if any(spec.provisional for spec in plan.runs):
        console.print("run keys with a question mark may change once everything is here")


def _print_savings(plan: Plan, totals: Totals, console: Console) -> None:
    largest = max((trial.pack for trial in plan.trials), default=1)
    told = []
    if any(trial.share_prefixes for trial in plan.trials) and totals.saved_by_prefixes_hours > 0:
        told.append(f"shared beginnings save {_time(totals.saved_by_prefixes_hours * 3600)}")
    if totals.saved_by_packing_hours > 0:
        how = f"packs of up to {largest} adapters" if largest > 1 else "runs one after another over a base that is loaded once"
        told.append(f"{how} save {_time(totals.saved_by_packing_hours * 3600)}")
    if told:
        console.print(f"{', '.join(told)} of trials, by the same estimate", highlight=False)


def _print_hints(plan: Plan, trials: list[TrialEstimate], config: SweepConfig, console: Console) -> None:
    """What would fit, in a line for all runs that are told the same."""
    hints, names = hints_of(plan, config), names_of(plan)
    told: dict[str, list[str]] = {}
    for trial, estimate in zip(plan.trials, trials, strict=True):
        for run in trial.runs if not estimate.fits else ():
            told.setdefault(hints[run.run_key], []).append(names[run.run_key])
    for hint, runs in told.items():
        others = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
        console.print(f"what would fit, for {runs[0]}{others}: {hint}", soft_wrap=True, highlight=False, markup=False)


def _parameters(base: BaseSpec) -> str:
    return f" ({base.model_parameters / 1e9:.3g} B parameters)" if base.model_parameters else ""


def _run_as_json(run: RunSpec) -> dict[str, Any]:
    settings = run.settings.model_dump(mode="json")
    return {
        "run_key": run.run_key,
        "trajectory_key": run.trajectory_key,
        "base_key": run.base_key,
        "provisional": run.provisional,
        **settings,
        "alpha": run.settings.alpha_value,
        "precision": run.precision,
        "zero_stage": run.deepspeed.zero_stage,
        "rows": run.rows,
        "steps": run.total_steps,
        "checkpoint_steps": run.checkpoint_steps,
        "model_parameters": run.model_parameters,
    }


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} d"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
