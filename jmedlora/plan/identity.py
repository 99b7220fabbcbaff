"""The three keys: what changes an adapter, a trajectory, an evaluation."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from jmedlora.config.benchmark import BenchmarkConfig, PromptConfig, ScoringWay
from jmedlora.config.digest import key_of
from jmedlora.config.parts import MethodConfig, ModelConfig, Precision
from jmedlora.config.run import RunSettings
from jmedlora.data.prompts import prompt_digest

# What neither the adapter nor its scores depend on beyond rounding.
_NOT_IDENTITY = {"model", "method", "data", "prompt", "deepspeed", "micro_batch_size", "gradient_checkpointing"}
_NOT_IN_SOURCE = {"key_env", "max_concurrency", "timeout_s", "max_retries", "max_tokens_field", "input_price", "output_price", "currency"}
"""How a model behind an address is asked, and what it costs."""
_DURATION = ("epochs", "max_steps")
_READ_WHOLE = (".json", ".jinja")
"""Configuration, tokenizer and chat template, which decide what a prompt becomes."""


def model_identity(model: ModelConfig, folder: Path | None = None) -> dict[str, Any]:
    """What names a base model's weights: its source with revision, and for random weights the shape; not its licence or notes.

    A local folder counts by the contents of its JSON files and chat template and by the names and sizes of its weight files,
    not by where it lies.
    """
    source = model.source.model_dump(mode="json", exclude=_NOT_IN_SOURCE)
    if model.source.kind in ("path", "named") and folder is not None:
        source = {"kind": "folder", "files": _folder_facts(folder)}
    if model.source.kind == "gguf" and model.source.package is None:
        source["file"] = Path(model.source.file).name
    if model.source.kind == "random":
        source["architecture"] = model.architecture.model_dump(mode="json") if model.architecture else None
    return {"family": model.family, "source": source}


def run_key(
    settings: RunSettings,
    model: dict[str, Any],
    method: MethodConfig,
    precision: Precision,
    data_digest: str,
    prompt: PromptConfig,
    steps: int,
) -> str:
    """Identity of an adapter."""
    return key_of({**_adapter_identity(settings, model, method, precision, data_digest, prompt), "steps": steps})


def trajectory_key(
    settings: RunSettings,
    model: dict[str, Any],
    method: MethodConfig,
    precision: Precision,
    data_digest: str,
    prompt: PromptConfig,
    steps: int,
) -> str:
    """The same without the duration, where the schedule has no horizon; else the run's own key."""
    identity = _adapter_identity(settings, model, method, precision, data_digest, prompt)
    return key_of(identity if settings.schedule == "constant" else {**identity, "steps": steps})


def base_key(model: dict[str, Any], precision: Precision, double_quantisation: bool) -> str:
    """Identity of a bare base model at one load precision."""
    return key_of({"model": model, "method": "base", **_load_identity(precision, double_quantisation)})


def evaluation_key(
    benchmark: BenchmarkConfig, benchmark_digest: str, prompt: PromptConfig, shots: int, scoring: ScoringWay, max_new_tokens: int
) -> str:
    """Identity of a way of having answers; how they are scored is not part of it. Log-likelihoods know no bound on new tokens."""
    greedy = {"greedy": True, "max_new_tokens": max_new_tokens, "stop": "marked line" if prompt.answer_marker else "line"}
    return key_of(
        {
            "benchmark": benchmark_digest,
            "filters": benchmark.filters.model_dump(mode="json"),
            "prompt": prompt_digest(prompt),
            "shots": shots,
            "decoding": greedy if scoring == "generate" else None,
            "scoring": scoring,
        }
    )


def _adapter_identity(
    settings: RunSettings, model: dict[str, Any], method: MethodConfig, precision: Precision, data_digest: str, prompt: PromptConfig
) -> dict[str, Any]:
    values = settings.model_dump(mode="json", exclude=_NOT_IDENTITY | set(_DURATION))
    values["alpha"] = settings.alpha_value
    return {
        "model": model,
        "method": method.name,
        **_load_identity(precision, method.double_quantisation),
        "data": data_digest,
        "prompt": prompt_digest(prompt),
        "settings": values,
    }


def _load_identity(precision: Precision, double_quantisation: bool) -> dict[str, Any]:
    return {"precision": precision, **({"double_quantisation": double_quantisation} if precision == "nf4" else {})}


def _folder_facts(folder: Path) -> list[list[Any]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix in (*_READ_WHOLE, ".safetensors", ".model"))
    return [[file.relative_to(folder).as_posix(), file.stat().st_size, _text_digest(file)] for file in files]


def _text_digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.suffix in _READ_WHOLE else None
