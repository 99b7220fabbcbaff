"""`jmedlora evaluate`: a base model, an adapter, or a model behind an address, in this process."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TaskID

from jmedlora.cli.common import FAILED, AsJson, Overrides, page
from jmedlora.cli.data import name_of_file, own_questions
from jmedlora.config.benchmark import SCORING_WAYS
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.origin import COMMAND_LINE
from jmedlora.config.presets import preset_names
from jmedlora.orchestrator.stopping import INTERRUPTED

SWEEP = "evaluate"
"""The shipped sweep whose settings hold unless the command line changes them."""


def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A model preset's name, a folder in Hugging Face format, or with --base-url a served name."),
    ],
    overrides: Overrides = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="A benchmark preset or a file of questions; may be given several times.")
    ] = None,
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
        raise BadInput([Fault(COMMAND_LINE, "--adapter", f"{adapter} is not a folder", "an adapter's folder in PEFT's format")])
    try:
        config, planned = open_sweep(SWEEP, [*options, *(overrides or [])])
    except BadInput as bad:
        raise BadInput([_as_typed(fault) for fault in bad.faults]) from None
    if planned.missing:
        from jmedlora.orchestrator.preflight import fetch_missing

        planned = fetch_missing(config, planned)
    from jmedlora.evaluation.endpoint import EndpointFailed
    from jmedlora.evaluation.systems import evaluate_systems
    from jmedlora.plan.layout import Storage
    from jmedlora.report.systems import print_systems, systems_as_json

    storage = Storage(config.storage_path)
    console = page()
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal or as_json) as progress:
            bars: dict[str, TaskID] = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in bars:
                    bars[what] = progress.add_task(what, total=total)
                progress.update(bars[what], completed=done)

            resources = config.resources.evaluation
            found = list(evaluate_systems(planned, storage, config.sources_path, config.offline, adapter, show, resources))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except EndpointFailed as failed:
        print(f"jmedlora: {failed}; the same command goes on from here", file=sys.stderr)
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
        faults.append(Fault(COMMAND_LINE, "--data", f"given for {len(benchmarks or [])} benchmarks", "one benchmark, or benchmarks=[...]"))
    counts = shots.split(",") if shots else []
    if not all(count.strip().isdigit() for count in counts):
        faults.append(Fault(COMMAND_LINE, "--shots", f"{shots!r} is not allowed", "numbers with commas between, such as 0,1"))
    if completions and base_url is None:
        faults.append(Fault(COMMAND_LINE, "--completions", "given without an address", "together with --base-url"))
    if base_url is None and ("/" in model or model.startswith(".")) and not Path(model).is_dir():
        faults.append(
            Fault(COMMAND_LINE, "MODEL", f"{model} is not a folder", "a preset's name, a folder in Hugging Face format, --base-url")
        )
    ways = [way.strip() for way in scoring.split(",")] if scoring else []
    faults += [
        Fault(COMMAND_LINE, "--scoring", f"{way!r} is not allowed", " or ".join(SCORING_WAYS)) for way in ways if way not in SCORING_WAYS
    ]
    if faults:
        raise BadInput(faults)
    options = [f"references=[{_model_entry(model, base_url, completions)}]"]
    if benchmarks or data is not None or first is not None:
        names = benchmarks or ([str(data)] if data is not None else ["sample"])
        options.append(f"benchmarks=[{','.join(_benchmark_entry(name, data, first) for name in names)}]")
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
    """A preset, at a place of the user's own where one is given; or a file of questions, which goes by its own name."""
    if (own := own_questions(name, Path.cwd())) is not None:
        keys = [f"name: {_quoted(name_of_file(own))}", f"path: {_quoted(str(own))}"]
    else:
        keys = [f"preset: {_quoted(name)}", *([f"path: {_quoted(str(data.resolve()))}"] if data is not None else [])]
    if first is not None:
        keys.append(f"filters: {{first: {first}}}")
    return f"{{{', '.join(keys)}}}"


_OPTIONS = {"references": "MODEL", "prompts": "--prompt", "benchmarks": "--benchmark", "shots": "--shots", "evaluate.scoring": "--scoring"}


def _as_typed(fault: Fault) -> Fault:
    """The fault by the option that it came from: the shipped sweep that stands behind this command is nothing a user has written."""
    key = re.sub(r"\[\d+\]", "", fault.key)
    option = next((option for name, option in _OPTIONS.items() if key == name or key.startswith(f"{name}.")), None)
    if option is None or fault.where not in (COMMAND_LINE, f"conf/sweep/{SWEEP}.yaml"):
        return fault
    if key == "benchmarks.path":
        option = "--data"
    return replace(fault, where=COMMAND_LINE, key=option)


def _quoted(text: str) -> str:
    """A text in Hydra's grammar."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
