"""Checks that look at several settings at once."""

from __future__ import annotations

import math
import os
from pathlib import Path
from urllib.parse import urlsplit

from jmedlora.config.benchmark import PromptConfig
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.locate import is_loopback, is_remote
from jmedlora.config.parts import ApiSource, Architecture, ModelConfig
from jmedlora.config.run import RunSettings
from jmedlora.config.sweep import SweepConfig
from jmedlora.data.prompts import answer_of, render_messages, render_prompt
from jmedlora.data.rows import Instruction, is_unicode
from jmedlora.plan.shapes import linear_layers

MAX_NAME_BYTES = 255
"""Longest name of a file or folder on the usual file systems."""
MAX_STEPS = 10**12
"""Optimizer steps of a run: above this, durations are typing mistakes."""


def check_storage(config: SweepConfig, faults: list[Fault]) -> None:
    """Storage must be a local folder for now, and one can be made there."""
    if is_remote(config.storage):
        faults.append(
            Fault(config.file, "storage", f"{config.storage} is not a local folder", "a path on this machine or on a shared file system")
        )
    elif problem := _storage_problem(config.storage_path):
        faults.append(Fault(config.file, "storage", f"{str(config.storage_path)!r:.80} {problem}", "a folder that you may write to"))


def _storage_problem(path: Path) -> str:
    """Why no folder can be made or written at `path`; nothing is tried."""
    try:
        if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in path.parts):
            return f"has a name of more than {MAX_NAME_BYTES} bytes"
        nearest = next(folder for folder in [path, *path.parents] if _exists(folder))
        if not nearest.is_dir():
            return "is a file" if nearest == path else f"cannot be made below the file {nearest}"
        # the administrator may write everywhere as far as `access` knows, but not make folders among the kernel's own files
        kernels = {mount.stat().st_dev for mount in (Path("/proc"), Path("/sys")) if mount.is_mount()}
        if nearest.stat().st_dev in kernels or not os.access(nearest, os.W_OK | os.X_OK):
            return "cannot be written"
    except (OSError, ValueError) as error:
        return f"cannot be a folder: {error.strerror if isinstance(error, OSError) else error}"
    return ""


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_prompt(prompt: PromptConfig, faults: list[Fault]) -> None:
    """The template must read, must show the question, and must not show the answer of the asked row."""
    if not is_unicode(prompt.template):
        faults.append(Fault(f"prompt {prompt.name}", "template", "not valid Unicode text"))
        return
    row = Instruction("instruction-mark", "choice-mark,other-mark", "", ("choice-mark", "other-mark"), "", 1)
    example = Instruction("example-instruction", "example-choice", "example-output", ("example-choice",), "example-letters", 1)
    try:
        text = "\n".join(message["content"] for message in render_messages(prompt, row, [example]))
        render_prompt(prompt, Instruction("x", "", "y"))
    except BadInput as bad:
        faults.extend(bad.faults)
        return
    for needed, what in (
        ([row.instruction], "{{ instruction }}"),
        (row.choices, "{{ input }} or the choices"),
        ([example.instruction], "the examples"),
        ([answer_of(prompt, example)], "the examples' answer"),
    ):
        if not all(part in text for part in needed):
            allowed = "a template of instruction, input, choices, letters, count and examples"
            faults.append(Fault(f"prompt {prompt.name}", "template", f"never shows {what}", allowed))


def check_reference(model: ModelConfig, config: SweepConfig, faults: list[Fault]) -> None:
    """What a model behind an address cannot do, and where it must not be asked."""
    if not isinstance(model.source, ApiSource):
        return
    where = f"model {model.name}"
    try:
        url = urlsplit(model.source.base_url)
    except ValueError as error:
        faults.append(
            Fault(where, "source.base_url", f"{model.source.base_url!r:.80}: {error}", "an address such as http://127.0.0.1:8000/v1")
        )
        return
    if "generate" not in config.evaluate.scoring:
        told = f"{model.name} is behind an address, which gives answers and not the choices' likelihoods"
        faults.append(Fault(config.file, "evaluate.scoring", told, "generate among the ways of scoring, or no such reference"))
    if config.offline and not is_loopback(model.source.base_url):
        faults.append(
            Fault(where, "source.base_url", f"{url.hostname} would be asked, and the sweep is offline", "a server on this machine")
        )
    if url.username or url.password or url.query:
        told = "holds a user name, a password or a query"
        faults.append(Fault(where, "source.base_url", told, f"an address alone, and the key in {model.source.key_env}"))
    if (model.source.input_price is None) != (model.source.output_price is None):
        faults.append(Fault(where, "source.input_price", "one price without the other", "input_price and output_price, or neither"))
    for prompt in (config.prompts[name] for name in config.evaluation_prompts):
        if prompt.chat and model.source.endpoint == "completions":
            told = f"completions takes plain text, and prompt {prompt.name} is a chat"
            faults.append(Fault(where, "source.endpoint", told, "chat, or a prompt without chat"))


def check_chat(model: ModelConfig, folder: Path | None, config: SweepConfig, faults: list[Fault]) -> None:
    """A chat prompt needs a model with a chat template, as far as its folder is known."""
    chats = [prompt.name for prompt in config.prompts.values() if prompt.chat]
    if not chats or folder is None or (folder / "chat_template.jinja").is_file():
        return
    try:
        has_template = '"chat_template"' in (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        has_template = False
    if not has_template:
        told = f"{model.name} has no chat template, which prompt {chats[0]} needs"
        faults.append(Fault(config.file, "prompts", told, "prompts without chat, or a model with a chat template"))


def check_run(run: RunSettings, config: SweepConfig, shape: Architecture | None, rows: int | None, faults: list[Fault]) -> None:
    """Combinations that would fail late: sharding, batch geometry, duration, LoRA targets, lengths.

    `shape` and `rows` are None where a fault in the model or the data has been told already.
    """
    if config.models[run.model].family in ("api", "other"):
        why = "is behind an address" if config.models[run.model].is_api else "is of a family without LoRA layers here"
        told = f"{run.model} {why} and cannot be tuned"
        faults.append(Fault(config.file, "grid.model", told, "models of the families llama and gpt_neox (references: for others)"))
        return
    workers = config.resources.workers_per_trial
    if run.batch_size < workers:
        faults.append(Fault(config.file, "training.batch_size", f"{run.batch_size} rows for {workers} workers", f"at least {workers}"))
    if rows is not None:
        _check_rows(run, config, rows, faults)
    if shape is not None:
        _check_shape(run, config, shape, faults)


def step_counts(settings: RunSettings, rows: int) -> tuple[int, int]:
    """Optimizer steps of one pass over the data, and of the whole run; never more than just above MAX_STEPS."""
    per_epoch = -(-rows // settings.batch_size)
    total = settings.max_steps if settings.max_steps is not None else min(per_epoch * (settings.epochs or 0), MAX_STEPS + 1)
    return per_epoch, min(math.ceil(total), MAX_STEPS + 1)


def _check_rows(run: RunSettings, config: SweepConfig, rows: int, faults: list[Fault]) -> None:
    where = config.file
    _, total = step_counts(run, rows)
    if total > MAX_STEPS:
        key = "epochs" if run.max_steps is None else "max_steps"
        faults.append(Fault(where, f"training.{key}", f"a run of more than {MAX_STEPS:.0e} steps", "fewer steps"))
    elif run.warmup_steps > total:
        told = f"{run.warmup_steps} is more than the {total} steps of a run"
        faults.append(Fault(where, "training.warmup_steps", told, f"at most {total}"))


def _check_shape(run: RunSettings, config: SweepConfig, shape: Architecture, faults: list[Fault]) -> None:
    where = config.file
    if isinstance(run.targets, tuple):
        names = [layer.name for layer in linear_layers(config.models[run.model].family, shape)]
        if not run.targets:
            faults.append(Fault(where, "training.targets", "no targets", f"at least one of {', '.join(names)}"))
        faults.extend(
            Fault(where, "training.targets", f"{target!r} is not a linear layer of {run.model}", ", ".join(names))
            for target in run.targets
            if target not in names
        )
    widest = min(shape.hidden_size, shape.intermediate_size)
    if run.rank > widest:
        faults.append(Fault(where, "grid.rank", f"{run.rank} is greater than the layers of {run.model} are wide", f"at most {widest}"))
    elif not 0 < run.alpha_value < math.inf:
        faults.append(Fault(where, "training.alpha", f"{run.alpha!r:.60} is not allowed", "a number greater than 0, or such as 2r"))
    if config.evaluate.max_new_tokens >= shape.max_positions:
        told = f"{config.evaluate.max_new_tokens} leaves no room for a prompt in the {shape.max_positions} positions of {run.model}"
        faults.append(Fault(where, "evaluate.max_new_tokens", told, f"less than {shape.max_positions}"))
    if run.max_input_tokens + run.max_target_tokens > shape.max_positions:
        faults.append(
            Fault(
                where,
                "training.max_input_tokens",
                f"{run.max_input_tokens} + max_target_tokens {run.max_target_tokens} is more than {run.model} can hold",
                f"together at most {shape.max_positions}",
            )
        )
