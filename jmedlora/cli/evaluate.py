"""`jmedlora evaluate`: a base model, an adapter, or a model behind an address, in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from jmedlora.cli.common import FAILED, INTERRUPTED, AsJson, Overrides, page
from jmedlora.config.benchmark import SCORING_WAYS
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.presets import preset_names

SWEEP = "evaluate"
"""The shipped sweep whose settings hold unless the command line changes them."""


def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A model preset's name, a folder in Hugging Face format, or with --base-url a served name."),
    ],
    overrides: Overrides = None,
    benchmark: Annotated[list[str] | None, typer.Option(help="A benchmark preset's name; may be given several times.")] = None,
    data: Annotated[Path | None, typer.Option(help="Where the benchmark's files are, in place of the preset's source.")] = None,
    shots: Annotated[str | None, typer.Option(help="Numbers of solved examples, such as 0,1.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt preset's name; may be given several times.")] = None,
    scoring: Annotated[str | None, typer.Option(help="generate, loglikelihood, or both with a comma between.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter to MODEL, evaluated beside it.")] = None,
    base_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible address that serves MODEL.")] = None,
    completions: Annotated[bool, typer.Option(help="Send plain text to the address, not messages.")] = False,
    first: Annotated[int | None, typer.Option(help="Ask the first N questions alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score a model on benchmarks: accuracy, exact match and Gestalt score with their intervals; answers are stored and not asked twice."""
    from jmedlora.plan.planner import open_sweep

    options = _options(model, benchmark, data, shots, prompt, scoring, base_url, completions, first)
    if adapter is not None and not adapter.is_dir():
        raise BadInput([Fault("command line", "--adapter", f"{adapter} is not a folder", "an adapter's folder in PEFT's format")])
    config, planned = open_sweep(SWEEP, [*options, *(overrides or [])])
    from jmedlora.evaluation.rescoring import rescore_stored
    from jmedlora.plan.layout import Storage

    if planned.missing:
        from jmedlora.orchestrator.preflight import fetch_missing

        planned = fetch_missing(config, planned)
    from jmedlora.evaluation.endpoint import EndpointFailed
    from jmedlora.evaluation.systems import evaluate_systems
    from jmedlora.report.systems import print_systems, systems_as_json

    storage = Storage(config.storage_path)
    rescore_stored(planned, storage)
    console = page()
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal or as_json) as progress:
            bars: dict[str, Any] = {}

            def show(what: str, done: int, total: int) -> None:
                bars.setdefault(what, progress.add_task(what, total=total) if what not in bars else bars[what])
                progress.update(bars[what], completed=done)

            found = list(evaluate_systems(planned, storage, config.sources_path, config.offline, adapter, show))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except EndpointFailed as failed:
        print(f"{failed}; what was answered is kept: the same command goes on from here", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    if as_json:
        print(json.dumps(systems_as_json(found), ensure_ascii=False, indent=1))
    else:
        print_systems(found, storage, console)


def _options(
    model: str,
    benchmarks: list[str] | None,
    data: Path | None,
    shots: str | None,
    prompts: list[str] | None,
    scoring: str | None,
    base_url: str | None,
    completions: bool,
    first: int | None,
) -> list[str]:
    """The options as changes to the shipped sweep; raises BadInput for what no change could say."""
    faults = []
    if data is not None and len(benchmarks or []) > 1:
        faults.append(
            Fault("command line", "--data", f"given for {len(benchmarks or [])} benchmarks", "one benchmark, or benchmarks=[...]")
        )
    counts = shots.split(",") if shots else []
    if not all(count.strip().isdigit() for count in counts):
        faults.append(Fault("command line", "--shots", f"{shots!r} is not allowed", "numbers with commas between, such as 0,1"))
    ways = [way.strip() for way in scoring.split(",")] if scoring else []
    faults += [
        Fault("command line", "--scoring", f"{way!r} is not allowed", " or ".join(SCORING_WAYS)) for way in ways if way not in SCORING_WAYS
    ]
    if faults:
        raise BadInput(faults)
    options = [f"references=[{_model_entry(model, base_url, completions)}]"]
    if benchmarks or data is not None or first is not None:
        options.append(f"benchmarks=[{','.join(_benchmark_entry(name, data, first) for name in benchmarks or ['sample'])}]")
    if counts:
        options.append(f"shots=[{','.join(counts)}]")
    if prompts:
        options.append(f"prompts=[{','.join(map(_quoted, prompts))}]")
    if ways:
        options.append(f"evaluate.scoring=[{','.join(ways)}]")
    return options


def _model_entry(model: str, base_url: str | None, completions: bool) -> str:
    if base_url is not None:
        endpoint = "completions" if completions else "chat"
        source = f"{{kind: api, base_url: {_quoted(base_url)}, model: {_quoted(model)}, endpoint: {endpoint}}}"
        return f"{{name: {_quoted(Path(model).name or model)}, source: {source}}}"
    folder = Path(model)
    if model in preset_names("model") or not folder.is_dir():
        return _quoted(model)
    source = f"{{kind: path, path: {_quoted(str(folder.resolve()))}}}"
    return f"{{name: {_quoted(folder.resolve().name)}, family: {_family(folder)}, source: {source}}}"


def _family(folder: Path) -> str:
    """The family as a folder's config.json tells it."""
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return "other"  # what is wrong with the folder is told where its weights are looked for
    return told if told in ("llama", "gpt_neox") else "other"


def _benchmark_entry(name: str, data: Path | None, first: int | None) -> str:
    keys = [f"preset: {_quoted(name)}"]
    if data is not None:
        keys.append(f"path: {_quoted(str(data.resolve()))}")
    if first is not None:
        keys.append(f"filters: {{first: {first}}}")
    return f"{{{', '.join(keys)}}}"


def _quoted(text: str) -> str:
    """A text in Hydra's grammar."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
