"""The commands over sweeps: plan, sweep, submit, status, report, ui, and doctor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from jmedlora.cli.common import FAILED, HELD, AsJson, Overrides, SweepArgument, page
from jmedlora.config.compose import load_sweep
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.locate import cache_dir
from jmedlora.config.sweep import SweepConfig
from jmedlora.orchestrator.stopping import INTERRUPTED, check_interrupts, interruptible

if TYPE_CHECKING:
    from jmedlora.orchestrator.driver import Outcome
    from jmedlora.plan.layout import Storage
    from jmedlora.plan.specs import Plan
    from jmedlora.report.collect import Results
    from jmedlora.report.significance import Statistics
    from jmedlora.report.writer import ReportFiles

Address = Annotated[str | None, typer.Option(help="A Ray cluster; left out: RAY_ADDRESS, or a Ray of its own on this machine.")]


def plan(sweep: SweepArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a sweep and show its runs, trials, memory, time and bytes on disk; starts nothing."""
    from jmedlora.plan.leaks import is_small, refuse_leaks
    from jmedlora.plan.planner import open_sweep
    from jmedlora.plan.rendering import plan_as_json, print_plan

    config, planned = open_sweep(sweep, overrides)
    if not planned.missing and all(is_small(run.rows, item.questions) for run in planned.runs for item in planned.evaluations):
        refuse_leaks(config)  # what takes longer than a plan may is done when the sweep starts
    if as_json:
        print(json.dumps(plan_as_json(planned, config), ensure_ascii=False, indent=1))
    else:
        print_plan(planned, config, page())


def sweep(sweep: SweepArgument, overrides: Overrides = None, address: Address = None) -> None:
    """Run a sweep, or go on with it: train, evaluate, track, report."""
    interruptible()
    try:
        _sweep(sweep, overrides, address)
    except KeyboardInterrupt:  # before or after the work itself
        print("interrupted; the same command goes on from here")
        raise typer.Exit(INTERRUPTED) from None


def _sweep(sweep: str, overrides: list[str] | None, address: str | None) -> None:
    from jmedlora.plan.planner import open_sweep

    config, planned = open_sweep(sweep, overrides)
    from jmedlora.plan.checks import check_keys
    from jmedlora.plan.fitting import check_fit
    from jmedlora.plan.layout import Storage
    from jmedlora.plan.leaks import refuse_leaks

    check_keys(planned, Storage(config.storage_path))
    if planned.missing:
        from jmedlora.orchestrator.preflight import fetch_missing

        planned = fetch_missing(config, planned)
    else:
        check_fit(planned, config, Storage(config.storage_path))
    refuse_leaks(config, cache_dir())
    # what can be wrong is known by now: from here on the heavy libraries are worth their time
    from jmedlora.orchestrator.driver import run_sweep
    from jmedlora.orchestrator.ledger import HeldByAnother

    console = page()
    check_interrupts()
    try:
        outcome = run_sweep(config, planned, address, console)
    except HeldByAnother as held:
        print(f"jmedlora: sweep {planned.sweep} is {held}", file=sys.stderr)
        raise typer.Exit(HELD) from None
    except OSError as error:  # a disk that is full, or that fails
        print(f"jmedlora: sweep {planned.sweep} stopped: {error}; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    _print_outcome(console, sweep, config.storage_path, planned.sweep, outcome)
    raise typer.Exit(outcome.exit_code)


def submit(
    sweep: SweepArgument,
    overrides: Overrides = None,
    address: Annotated[str, typer.Option(help="Address of the Ray dashboard.")] = "http://127.0.0.1:8265",
    wait: Annotated[bool, typer.Option(help="Stream the log until the job ends.")] = True,
) -> None:
    """Run a sweep as a Ray job (jobs/sweep.py), with its log streamed."""
    from jmedlora.plan.planner import open_sweep

    open_sweep(sweep, overrides)
    from jmedlora.orchestrator.submission import submit_sweep

    raise typer.Exit(submit_sweep(sweep, overrides or [], address, wait))


def status(sweep: SweepArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show where a sweep stands, from storage."""
    from jmedlora.orchestrator.ledger import standing
    from jmedlora.plan.layout import Storage
    from jmedlora.plan.naming import names_of
    from jmedlora.plan.planner import open_sweep

    config, planned = open_sweep(sweep, overrides)
    state = standing(planned, Storage(config.storage_path))
    if as_json:
        print(state.as_json())
        return
    names = names_of(planned)
    print(", ".join(f"{len(keys)} {name}" for name, keys in state.runs.items()) + f" of {len(planned.runs)} runs")
    print(f"{state.evaluations_done} of {state.evaluations} evaluations done")
    if state.checkpoints_removed:
        print(f"weights of {state.checkpoints_removed} of {state.checkpoints} checkpoints removed (keep: {planned.keep})")
    for key, error in state.errors.items():
        print(f"failed: {names[key]} ({key}): {' '.join(error.split())}")


def report(
    sweep: SweepArgument,
    overrides: Overrides = None,
    rebuild_mlflow: Annotated[bool, typer.Option("--rebuild-mlflow", help="Also write MLflow again, from storage alone.")] = False,
) -> None:
    """Write tables, plots and the HTML page of a sweep again from what is stored."""
    config = _stored_config(sweep, overrides)
    planned = _stored_plan(config.storage_path, config.name)
    from jmedlora.plan.layout import Storage

    storage = Storage(config.storage_path)
    if rebuild_mlflow:
        files = _rebuild_mlflow(planned, storage)
    else:
        from jmedlora.report.writer import write_report

        files = write_report(planned, storage)
    _print_comparison(page(), files.results, files.statistics)
    print(f"report: {files.page}")


def _rebuild_mlflow(planned: Plan, storage: Storage) -> ReportFiles:
    from jmedlora.orchestrator.ledger import HeldByAnother
    from jmedlora.orchestrator.rebuild import rebuild_mlflow
    from jmedlora.tracking.trouble import NotTracked

    try:
        files, runs = rebuild_mlflow(planned, storage)
    except HeldByAnother as held:
        print(f"jmedlora: sweep {planned.sweep} is {held}", file=sys.stderr)
        raise typer.Exit(HELD) from None
    except NotTracked as why:
        print(f"jmedlora: MLflow could not be written: {why}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    print(f"MLflow: {runs} runs and bases of {planned.sweep} are as storage holds them")
    return files


def ui(
    sweep: SweepArgument,
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(help="Port of the page on this machine.")] = 5000,
) -> None:
    """Open MLflow on a sweep."""
    config = _stored_config(sweep, overrides)
    _stored_plan(config.storage_path, config.name)
    from jmedlora.plan.layout import Storage
    from jmedlora.tracking.ui import open_ui

    raise typer.Exit(open_ui(Storage(config.storage_path), config.name, port))


def doctor(as_json: AsJson = False) -> None:
    """Tell what this machine can run, and what is missing for which method."""
    from jmedlora.orchestrator.doctor import examine, print_findings

    findings = examine()
    if as_json:
        print(json.dumps(findings, ensure_ascii=False, indent=1))
    else:
        print_findings(findings, page())


def _stored_config(sweep: str, overrides: list[str] | None) -> SweepConfig:
    """The configuration as far as it says where a sweep is stored; raises BadInput for overrides of anything else."""
    others = [override for override in overrides or [] if not override.lstrip("+").startswith("storage=")]
    if others:
        problem = "has no effect: the sweep is shown as it is stored"
        raise BadInput([Fault("command line", override, problem, "storage=FOLDER alone") for override in others])
    return load_sweep(sweep, overrides)


def _stored_plan(storage: Path, name: str) -> Any:
    from jmedlora.plan.layout import Storage
    from jmedlora.plan.writing import read_plan

    planned = read_plan(Storage(storage), name)
    if planned is None:
        raise BadInput(
            [Fault("command line", "SWEEP", f"{name} has not been run in {storage}", "a sweep that was started, with the same storage")]
        )
    return planned


def _print_outcome(console: Console, sweep: str, storage: Path, name: str, outcome: Outcome) -> None:
    if outcome.exit_code == INTERRUPTED:
        _print_problems(console, outcome)
        runs = {status: len(keys) for status, keys in outcome.standing.runs.items()}
        saved = f", {runs['interrupted']} stopped in the middle and saved" if runs["interrupted"] else ""
        console.print(f"{runs['finished']} of {sum(runs.values())} runs finished{saved}", highlight=False)
        console.print("interrupted; the same command goes on from here")
        return
    if outcome.report is not None:
        _print_comparison(console, outcome.report.results, outcome.report.statistics)
    else:
        from jmedlora.plan.layout import Storage
        from jmedlora.report.writer import analyse

        _print_comparison(console, *analyse(_stored_plan(storage, name), Storage(storage)))
    _print_problems(console, outcome)
    console.print(f"report: {storage / 'sweeps' / name / 'report' / 'index.html'}", soft_wrap=True, highlight=False)
    change = "" if storage == Path.cwd() / "results" else f" storage={storage}"
    command = sys.argv[0] if Path(sys.argv[0]).name == "jmedlora" else "jmedlora"
    console.print(f"MLflow: {command} ui {sweep}{change}", soft_wrap=True, highlight=False)


def _print_problems(console: Console, outcome: Outcome) -> None:
    for problem in outcome.problems:
        console.print(Text(f"problem: {' '.join(problem.split())}", style="red"), soft_wrap=True)


def _print_comparison(console: Console, results: Results, statistics: Statistics) -> None:
    from jmedlora.report.console import console_comparison, print_failures

    console.print(console_comparison(results, statistics))
    print_failures(results, console)
