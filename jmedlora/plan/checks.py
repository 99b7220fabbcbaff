"""Checks that look at several settings at once."""

from __future__ import annotations

import os

from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.locate import is_remote
from jmedlora.config.parts import Architecture, PromptConfig
from jmedlora.config.run import RunSettings
from jmedlora.config.sweep import SweepConfig
from jmedlora.data.prompts import render_prompt
from jmedlora.data.rows import Instruction
from jmedlora.plan.shapes import linear_layers


def check_storage(config: SweepConfig, faults: list[Fault]) -> None:
    """Storage must be a local folder for now, and one can be made there."""
    if is_remote(config.storage):
        faults.append(
            Fault(config.file, "storage", f"{config.storage} is not a local folder", "a path on this machine or on a shared file system")
        )
    elif config.storage_path.exists() and not config.storage_path.is_dir():
        faults.append(Fault(config.file, "storage", f"{config.storage} is a file", "a folder"))
    elif not os.access(next(p for p in [config.storage_path, *config.storage_path.parents] if p.exists()), os.W_OK):
        faults.append(Fault(config.file, "storage", f"{config.storage} cannot be written", "a folder that you may write to"))


def check_prompt(prompt: PromptConfig, faults: list[Fault]) -> None:
    """The template must read, must show the question, and must not show the answer of the asked row."""
    row = Instruction("instruction-mark", "input-mark", "output-mark")
    example = Instruction("example-instruction", "example-input", "example-output")
    try:
        text = render_prompt(prompt, row, [example])
        render_prompt(prompt, Instruction("x", "", "y"))
    except BadInput as bad:
        faults.extend(bad.faults)
        return
    for needed, what in (
        (row.instruction, "{{ instruction }}"),
        (row.input, "{{ input }}"),
        (example.instruction, "the examples"),
        (example.output, "the examples' output"),
    ):
        if needed not in text:
            faults.append(
                Fault(f"prompt {prompt.name}", "template", f"never shows {what}", "a template of instruction, input and examples")
            )


def check_run(run: RunSettings, config: SweepConfig, shape: Architecture | None, faults: list[Fault]) -> None:
    """Combinations that would fail late: sharding, batch geometry, LoRA targets, lengths."""
    where = config.file
    workers = config.resources.workers_per_trial
    model = config.models[run.model]
    if run.batch_size < workers:
        faults.append(Fault(where, "training.batch_size", f"{run.batch_size} rows for {workers} workers", f"at least {workers}"))
    if shape is None:
        return
    if isinstance(run.targets, tuple):
        names = [layer.name for layer in linear_layers(model.family, shape)]
        faults.extend(
            Fault(where, "training.targets", f"{target!r} is not a linear layer of {run.model}", ", ".join(names))
            for target in run.targets
            if target not in names
        )
    widest = min(shape.hidden_size, shape.intermediate_size)
    if run.rank > widest:
        faults.append(Fault(where, "grid.rank", f"{run.rank} is greater than the layers of {run.model} are wide", f"at most {widest}"))
    if run.max_input_tokens + run.max_target_tokens > shape.max_positions:
        faults.append(
            Fault(
                where,
                "training.max_input_tokens",
                f"{run.max_input_tokens} + max_target_tokens {run.max_target_tokens} is more than {run.model} can hold",
                f"together at most {shape.max_positions}",
            )
        )
