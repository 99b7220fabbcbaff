"""Checks that look at several settings at once."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from jmedlora.config.benchmark import PromptConfig
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.locate import cache_dir, is_loopback, is_remote
from jmedlora.config.parts import ApiSource, Architecture, ModelConfig
from jmedlora.config.run import RunSettings
from jmedlora.config.sweep import SweepConfig
from jmedlora.data.prompts import answer_of, render_messages, render_prompt
from jmedlora.data.rows import Instruction, is_unicode
from jmedlora.plan.layout import Storage
from jmedlora.plan.shapes import linear_layers
from jmedlora.plan.specs import Plan

MAX_NAME_BYTES = 255
"""Longest name of a file or folder on the usual file systems."""
MAX_STEPS = 10**12
"""Optimizer steps of a run: above this, durations are typing mistakes."""
VLLM_MAX_RANK = 512


def check_storage(config: SweepConfig, faults: list[Fault]) -> None:
    """Storage must be a local folder for now, and one can be made there, as well as the cache's."""
    if is_remote(config.storage):
        faults.append(
            Fault(config.file, "storage", f"{config.storage} is not a local folder", "a path on this machine or on a shared file system")
        )
    elif problem := _storage_problem(config.storage_path):
        faults.append(Fault(config.file, "storage", f"{str(config.storage_path)!r:.80} {problem}", "a folder that you may write to"))
    if problem := _storage_problem(cache_dir()):
        told = f"{str(cache_dir())!r:.80} {problem}"
        faults.append(Fault("environment variable JMEDLORA_CACHE", "", told, "a folder that you may write to"))


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
        # not shown: it may hold a password
        faults.append(Fault(where, "source.base_url", f"no address: {error}", "an address such as http://127.0.0.1:8000/v1"))
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


def check_engine(config: SweepConfig, settings: Sequence[RunSettings], faults: list[Fault]) -> None:
    """What vLLM cannot do, where the sweep has it evaluate; whether it is installed where that is done is not known here."""
    if config.resources.evaluation.engine != "vllm":
        return
    told = []
    if not config.resources.gpus_per_worker:
        faults.append(
            Fault(
                config.file,
                "resources.evaluation.engine",
                "vllm needs a GPU, and gpus_per_worker is 0",
                "transformers, or gpus_per_worker: 1",
            )
        )
    if config.evaluate.precision == "fp32":
        faults.append(Fault(config.file, "evaluate.precision", "vllm computes adapters in bf16 alone", "auto, bf16 or nf4"))
    for name in dict.fromkeys(run.model for run in settings):
        if config.models[name].family == "gpt_neox":
            told.append(f"vllm takes no adapters to {name}, a model of the family gpt_neox")
    for name in dict.fromkeys(run.method for run in settings):
        if config.methods[name].quantisation == "nf4" and not config.methods[name].double_quantisation:
            told.append(f"vllm has no NF4 without double quantisation, which method {name} asks for")
    if settings and (widest := max(run.rank for run in settings)) > VLLM_MAX_RANK:
        told.append(f"vllm takes adapters of rank {VLLM_MAX_RANK} at most, and there is one of rank {widest}")
    faults.extend(Fault(config.file, "resources.evaluation.engine", problem, "transformers") for problem in told)


def check_keys(plan: Plan, storage: Storage) -> None:
    """Models behind an address are asked with a key, which has to be there before anything starts; raises BadInput where it is not.

    What is evaluated already needs none, nor does a server on this machine.
    """
    faults = []
    for base in plan.bases:
        source = base.model.source
        if not isinstance(source, ApiSource) or is_loopback(source.base_url) or os.environ.get(source.key_env, "").strip():
            continue
        if not all(storage.run(base.run_key).is_evaluated(item.folder, 0) for item in plan.asked_of(base)):
            told = f"not set, and {base.model.name} is asked with the key that it holds"
            faults.append(
                Fault(f"environment variable {source.key_env}", "", told, "the key, on the machine that asks (a cluster's head node)")
            )
    if faults:
        raise BadInput(faults)


def check_chat(model: ModelConfig, folder: Path | None, config: SweepConfig, faults: list[Fault]) -> None:
    """A chat prompt needs a model with a chat template, as far as its folder is known; random models have none."""
    chats = [prompt.name for prompt in config.prompts.values() if prompt.chat]
    if chats and (model.source.kind == "random" or (folder is not None and not _has_chat_template(folder))):
        told = f"{model.name} has no chat template, which prompt {chats[0]} needs"
        faults.append(Fault(config.file, "prompts", told, "prompts without chat, or a model with a chat template"))


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return '"chat_template"' in (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def check_room(model: ModelConfig, shape: Architecture | None, config: SweepConfig, faults: list[Fault]) -> None:
    """Answers must leave room for a prompt in the model's positions, as far as its shape is known."""
    if shape is None:
        return
    bounds = [(config.file, "evaluate.max_new_tokens", config.evaluate.max_new_tokens)]
    for prompt in (config.prompts[name] for name in config.evaluation_prompts):
        bounds += [(f"prompt {prompt.name}", "max_new_tokens", prompt.max_new_tokens)] if prompt.max_new_tokens else []
    for where, key, bound in bounds:
        if bound >= shape.max_positions:
            told = f"{bound} leaves no room for a prompt in the {shape.max_positions} positions of {model.name}"
            faults.append(Fault(where, key, told, f"less than {shape.max_positions}"))


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
    if config.methods[run.method].quantisation == "nf4":
        _check_packing(config.models[run.model], shape, 2 if config.resources.gpus_per_worker else 4, faults)
    if run.max_input_tokens + run.max_target_tokens > shape.max_positions:
        faults.append(
            Fault(
                where,
                "training.max_input_tokens",
                f"{run.max_input_tokens} + max_target_tokens {run.max_target_tokens} is more than {run.model} can hold",
                f"together at most {shape.max_positions}",
            )
        )


def _check_packing(model: ModelConfig, shape: Architecture, value_bytes: int, faults: list[Fault]) -> None:
    """NF4 puts two weights into a byte, and as many bytes as a value of the compute format has into a stored one."""
    for layer in linear_layers(model.family, shape):
        if layer.in_features * layer.out_features % (2 * value_bytes):
            told = f"{layer.name} of {model.name} has {layer.in_features} x {layer.out_features} weights, which NF4 cannot pack"
            faults.append(Fault(f"model {model.name}", "architecture", told, f"a multiple of {2 * value_bytes}, or a method without nf4"))
            return
