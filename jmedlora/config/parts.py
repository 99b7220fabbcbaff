"""The parts that a sweep is put together from: models, methods, engines, machines. Benchmarks and prompts: `benchmark`; data: `data`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Family = Literal["llama", "gpt_neox", "other", "api"]
"""`other`: any causal model that transformers knows, evaluated as it is and never tuned; `api`: a model behind an address."""
Precision = Literal["fp32", "bf16", "nf4", "api"]
"""How base weights are held; `api`: elsewhere, behind an address."""
Schedule = Literal["constant", "linear", "cosine"]
Engine = Literal["transformers", "vllm"]
"""What answers for a model whose weights are here; `vllm` needs a GPU and the extra `vllm`."""
NAME = r"^[\w-]+$"
FILE_NAME = r"^[\w-][\w.-]*$"
REPOSITORY = r"^[\w.-]+/[\w.-]+$"
COMMIT = r"^[0-9a-f]{40}$"
URL = r"^https?://\S+$"
_OPENAI = re.compile(r"https://([\w-]+\.)*openai\.com(/|$)", re.IGNORECASE)
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
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


class ApiSource(Part):
    """A model behind an OpenAI-compatible address; evaluated as it is, never tuned."""

    kind: Literal["api"]
    base_url: Annotated[str, Field(pattern=URL)]
    """Such as https://api.openai.com/v1, or http://127.0.0.1:8000/v1 for a server of one's own."""
    model: Text
    """The name by which the server knows the model."""
    endpoint: Literal["chat", "completions"] = "chat"
    """`completions` sends the prompt as plain text; `chat` sends it as messages."""
    key_env: Annotated[str, Field(pattern=VARIABLE)] = "JMEDLORA_API_KEY"
    """Environment variable that holds the key; the key itself never stands in a configuration. Left out: OPENAI_API_KEY for
    OpenAI's own hosts alone, so that no other server is sent a key that was meant for them."""
    max_concurrency: Annotated[Whole, Field(ge=1)] = 8
    timeout_s: Annotated[Number, Field(gt=0)] = 120
    max_retries: Annotated[Whole, Field(ge=0)] = 8
    """Attempts after the first, for time-outs, cut connections, 408, 409, 429 and 5xx."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls the bound on new tokens."""
    temperature: Annotated[Number, Field(ge=0)] | None = 0
    """null: not sent, for models that take none."""
    seed: Annotated[Whole, Field(ge=0)] | None = None
    input_price: Annotated[Number, Field(ge=0)] | None = None
    """Money per million prompt tokens."""
    output_price: Annotated[Number, Field(ge=0)] | None = None
    """Money per million new tokens."""
    currency: str = "USD"

    @model_validator(mode="before")
    @classmethod
    def _key_of_openai(cls, value: Any) -> Any:
        address = str(value.get("base_url", "")) if isinstance(value, dict) else ""
        return {"key_env": "OPENAI_API_KEY", **value} if _OPENAI.match(address) else value


ModelSource = Annotated[HubSource | PathSource | GgufSource | RandomSource | NamedSource | ApiSource, Field(discriminator="kind")]


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

    @model_validator(mode="before")
    @classmethod
    def _family_of_api(cls, value: Any) -> Any:
        source = value.get("source") if isinstance(value, dict) else None
        return {"family": "api", **value} if isinstance(source, dict) and source.get("kind") == "api" else value

    @property
    def is_api(self) -> bool:
        """True for a model that is evaluated through an address and has no weights here."""
        return self.source.kind == "api"


# ---------------------------------------------------------------- method


class MethodConfig(Part):
    """How the base is loaded and adapted; `defaults` are run settings that the sweep may override."""

    name: Literal["lora", "qlora"]
    quantisation: Literal["none", "nf4"] = "none"
    double_quantisation: bool = True
    defaults: dict[str, object] = {}
    assumed: list[str] = []
    """Names of settings whose value the study does not report."""


# ---------------------------------------------------------------- engine and machine


class DeepSpeedConfig(Part):
    """How DeepSpeed shards one trial over its workers."""

    zero_stage: Literal[0, 1, 2, 3] = 0


class EvaluationResources(Part):
    actors: Annotated[Whole, Field(ge=1)] = 1
    cpus: Annotated[Whole, Field(ge=0)] = 1
    """Cores of one actor; 0: none of its own, it shares those of the trials."""
    gpus: Annotated[Number, Field(ge=0)] = 0
    engine: Engine = "transformers"
    """Part of no identity: what another engine has scored is not scored again."""


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
    memory_check: Literal["refuse", "allow"] = "refuse"
    """Whether a sweep starts with runs that need more memory than a GPU has, by the plan's estimates."""
    tflops: Annotated[Number, Field(gt=0)] | None = None
    """Sustained TFLOP/s of one worker, for the plan's estimates; left out: 300 for a GPU (200 with NF4 weights), 0.06 for a CPU core."""
    max_concurrent_trials: Annotated[Whole, Field(ge=1)] | None = None
    """Left out: as many as the machines hold."""
    max_failures: Annotated[Whole, Field(ge=0)] = 2
    """Restarts of one trial's workers before the trial counts as failed."""
    evaluation: EvaluationResources = EvaluationResources()
