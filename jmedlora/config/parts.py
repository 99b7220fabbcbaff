"""The parts that a sweep is put together from: models, methods, data, benchmarks, prompts, engines, machines."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

Family = Literal["llama", "gpt_neox"]
Precision = Literal["fp32", "bf16", "nf4"]
Schedule = Literal["constant", "linear", "cosine"]
NAME = r"^[\w-]+$"
FILE_NAME = r"^[\w-][\w.-]*$"
REPOSITORY = r"^[\w.-]+/[\w.-]+$"
Text = Annotated[str, Field(min_length=1)]


def _refuse_truth(kind: str) -> Any:
    def check(value: Any) -> Any:
        if isinstance(value, bool):  # which Python counts as 0 and 1
            raise PydanticCustomError(kind, "a number")
        return value

    return BeforeValidator(check)


Whole = Annotated[int, _refuse_truth("int_type")]
Number = Annotated[float, _refuse_truth("float_type")]


class Part(BaseModel):
    """Base of all configuration: unknown keys are faults, values are never changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


# ---------------------------------------------------------------- models


class HubSource(Part):
    """Weights on the Hugging Face Hub, or in its local cache."""

    kind: Literal["hub"]
    repo: Annotated[str, Field(pattern=REPOSITORY)]
    revision: str | None = None
    """A commit (40 hex digits) pins the weights; a branch name or nothing leaves the run keys provisional."""


class PathSource(Part):
    """A folder in Hugging Face format on this machine's file system."""

    kind: Literal["path"]
    path: Text


class GgufSource(Part):
    """A GGUF file: in an installed Python package (`package`, `file` inside it), or at a path (`file` alone)."""

    kind: Literal["gguf"]
    file: Text
    package: str | None = None


class RandomSource(Part):
    """Random weights of the architecture given in the model's `architecture`, with a byte-level tokenizer."""

    kind: Literal["random"]
    seed: Annotated[Whole, Field(ge=0)] = 0


class NamedSource(Part):
    """Something that is yet to be made or brought: looked for as `<sources>/<name>`, told as `not here yet` when missing."""

    kind: Literal["named"]
    name: Annotated[str, Field(pattern=FILE_NAME)]


ModelSource = Annotated[HubSource | PathSource | GgufSource | RandomSource | NamedSource, Field(discriminator="kind")]


class Architecture(Part):
    """Shape facts, enough to count parameters and estimate memory without the weights."""

    layers: Annotated[Whole, Field(ge=1)]
    hidden_size: Annotated[Whole, Field(ge=1)]
    intermediate_size: Annotated[Whole, Field(ge=1)]
    heads: Annotated[Whole, Field(ge=1)]
    kv_heads: Annotated[Whole, Field(ge=1)]
    vocabulary: Annotated[Whole, Field(ge=1)]
    tied_embeddings: bool = False
    max_positions: Annotated[Whole, Field(ge=1)] = 2048


class ModelConfig(Part):
    """A base model."""

    name: Text
    source: ModelSource
    family: Family
    architecture: Architecture | None = None
    """May be left out where the source is a folder with a config.json."""
    tokens_per_character: Annotated[Number, Field(gt=0)] = 1.0
    """Tokens that this model's tokenizer makes of a Japanese character, for estimates."""
    licence: str = ""
    language: str = ""
    note: str = ""


# ---------------------------------------------------------------- method


class MethodConfig(Part):
    """How the base is loaded and adapted; `defaults` are run settings that the sweep may override."""

    name: Literal["lora", "qlora"]
    quantisation: Literal["none", "nf4"] = "none"
    double_quantisation: bool = True
    defaults: dict[str, object] = {}
    assumed: list[str] = []
    """Names of settings whose value the study does not report."""


# ---------------------------------------------------------------- data


class Filters(Part):
    """Which questions of a benchmark are taken; filters are applied in this order."""

    years: list[int] | None = None
    text_only: bool | None = None
    choices: Annotated[Whole, Field(ge=2)] | None = None
    """Keep questions with exactly this many choices."""
    answers: Annotated[Whole, Field(ge=1)] | None = None
    """Keep questions with exactly this many right answers."""
    exclude: list[str] = []
    first: Annotated[Whole, Field(ge=1)] | None = None
    """Keep the first n of what is left."""


class DataConfig(Part):
    """A training set of instruction rows (`instruction`, `input`, `output`)."""

    name: Text
    path: Text | None = None
    """JSON Lines or a JSON list; or, for `questions`, what a benchmark's path may be."""
    bundled: str | None = None
    """A file shipped with jmedlora, instead of `path`."""
    source: NamedSource | None = None
    """Data that is yet to be made or brought, instead of `path`."""
    format: Literal["instructions", "questions"] = "instructions"
    """`questions`: exam questions, each turned into a row that is answered with the choice's text."""
    filters: Filters = Filters()
    declared_rows: Annotated[Whole, Field(ge=1)] | None = None
    """Size of a source that is not here yet, so that it can be planned for."""
    note: str = ""


class BenchmarkConfig(Part):
    """A question set in IgakuQA's format, with the examples that few-shot prompts may use."""

    name: Annotated[str, Field(pattern=NAME)]
    path: Text | None = None
    """A JSON Lines file, or a folder: an IgakuQA checkout (`data/<year>/*.jsonl`) or one of its year folders."""
    bundled: str | None = None
    source: NamedSource | None = None
    fewshot: str | None = None
    """JSON Lines of examples; for an IgakuQA checkout its own three are found without this."""
    fewshot_bundled: str | None = None
    fewshot_items: list[str] = []
    """Ids of questions of the benchmark itself to be used as examples; these are then not evaluated."""
    filters: Filters = Filters()
    declared_questions: Annotated[Whole, Field(ge=1)] | None = None
    note: str = ""


class PromptConfig(Part):
    """A Jinja2 template of `instruction`, `input` and `examples` (each with instruction, input, output)."""

    name: Annotated[str, Field(pattern=NAME)]
    template: Text
    note: str = ""


# ---------------------------------------------------------------- engine and machine


class DeepSpeedConfig(Part):
    """How DeepSpeed shards one trial over its workers."""

    zero_stage: Literal[0, 1, 2, 3] = 0


class EvaluationResources(Part):
    actors: Annotated[Whole, Field(ge=1)] = 1
    cpus: Annotated[Whole, Field(ge=1)] = 1
    gpus: Annotated[Number, Field(ge=0)] = 0


class ResourcesConfig(Part):
    """What one trial takes, and what there is at most."""

    workers_per_trial: Annotated[Whole, Field(ge=1)] = 1
    cpus_per_worker: Annotated[Whole, Field(ge=1)] = 1
    gpus_per_worker: Annotated[Whole, Field(ge=0, le=1)] = 0
    """A worker drives one GPU, or none."""
    max_gpus: Annotated[Whole, Field(ge=0)] = 0
    """GPUs of the cluster at its largest, not today's."""
    gpu_memory_gb: Annotated[Number, Field(gt=0)] = 80
    """Memory of one GPU, for the plan's estimates."""
    tflops: Annotated[Number, Field(gt=0)] | None = None
    """Sustained TFLOP/s of one worker, for the plan's estimates; left out: 200 for a GPU, 0.06 for a CPU core."""
    max_concurrent_trials: Annotated[Whole, Field(ge=1)] | None = None
    """Left out: as many as the machines hold."""
    max_failures: Annotated[Whole, Field(ge=0)] = 2
    """Restarts of one trial's workers before the trial counts as failed."""
    evaluation: EvaluationResources = EvaluationResources()
