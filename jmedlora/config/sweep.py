"""A whole sweep, as read and checked: the grid, its parts, and how it is evaluated and run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from jmedlora.config.benchmark import DEFAULT_METRICS, BenchmarkConfig, NamedMetrics, PromptConfig, ScoringWay
from jmedlora.config.data import DataConfig
from jmedlora.config.faults import Fault
from jmedlora.config.origin import locate_faults
from jmedlora.config.parts import FILE_NAME, DeepSpeedConfig, MethodConfig, ModelConfig, Part, ResourcesConfig, Text, Whole

Name = Annotated[str, Field(pattern=FILE_NAME)]
PartEntry = Name | dict[str, Any]
"""A preset's name, or the part itself; `preset: NAME` inside takes the preset and changes the keys beside it."""


PackSize = Literal["auto"] | Annotated[Whole, Field(ge=1)]


class EvaluateConfig(Part):
    """When checkpoints are written and scored, how answers are had and how they are scored."""

    every: Literal["epoch", "end"] | Annotated[Whole, Field(ge=1)] = "epoch"
    """`epoch`: at every epoch's end; `end`: once; a number: every so many optimizer steps. The last step always counts."""
    scoring: Annotated[list[ScoringWay], Field(min_length=1)] = ["generate"]
    """`generate`: an answer is generated and compared; `loglikelihood`: each choice is weighed as a continuation of the prompt."""
    metrics: NamedMetrics = DEFAULT_METRICS
    """How stored predictions are scored; may be changed after a sweep, which then scores again what it has stored."""
    precision: Literal["auto", "fp32", "bf16", "nf4"] = "auto"
    """How models that are evaluated as they are get loaded; `auto`: bf16 where the sweep's workers have GPUs, else fp32."""
    max_new_tokens: Annotated[Whole, Field(ge=1)] = 64
    batch_size: Annotated[Whole, Field(ge=1)] = 16


class KeepBy(Part):
    """What the best checkpoint is best at; what is left out is the first that the sweep lists."""

    metric: Literal["accuracy", "exact_match", "gestalt_score"] = "accuracy"
    benchmark: Name | None = None
    shots: Annotated[Whole, Field(ge=0)] | None = None
    prompt: Name | None = None
    scoring: ScoringWay | None = None


class KeepConfig(Part):
    """Which weights stay on disk once everything that is asked of a checkpoint is evaluated. Scores and predictions always stay."""

    checkpoints: Literal["all", "last", "best"] | Annotated[Whole, Field(ge=1)] = "all"
    """`last`: the newest; `best`: the one with the best score, the earlier of equals, and the newest; a number: the newest so many."""
    by: KeepBy = KeepBy()
    """For `best`: the score that is compared."""
    state: Literal["keep", "drop"] = "keep"
    """Whether a finished run's resumable state stays, three times as large as its adapter."""


class SweepFile(Part):
    """The keys of a sweep file. Values of the grid are checked one by one against RunSettings."""

    grid: dict[str, list[Any]] | list[dict[str, list[Any]]] = {}
    """A product of lists, or several of them."""
    extra: list[dict[str, Any]] = []
    """Single runs beside the grid."""
    references: list[PartEntry] = []
    """Models that are evaluated as they are, beside the runs: others' tuned models, models behind an API."""
    data: PartEntry = "sample"
    benchmarks: Annotated[list[PartEntry], Field(min_length=1)] = ["sample"]
    shots: Annotated[list[Annotated[Whole, Field(ge=0)]], Field(min_length=1)] = [0]
    prompts: Annotated[list[PartEntry], Field(min_length=1)] = ["alpaca-ja"]
    training: dict[str, Any] = {}
    """Settings of every run that the grid does not vary."""
    evaluate: EvaluateConfig = EvaluateConfig()
    keep: KeepConfig = KeepConfig()
    pack: PackSize = "auto"
    """Adapters that are trained, or evaluated, over one base model at once, at most; `auto`: as many as pay and fit; 1: one by one."""
    share_prefixes: bool = True
    """Whether runs that differ in duration alone are trained once, as far as the shorter one goes."""
    deepspeed: PartEntry = "zero0"
    resources: PartEntry = "local"
    storage: Text = "results"
    sources: Text = "sources"
    """Folder in which named models, data and benchmarks are looked for."""
    offline: bool = False
    """No network call at all."""
    leaks: Literal["refuse", "allow"] = "refuse"
    """Whether to train on rows that hold questions of the benchmarks (`jmedlora data check` names them)."""
    note: str = ""


class SweepConfig(Part):
    """A sweep with every preset resolved and every path absolute."""

    name: Name
    file: str
    grids: list[dict[str, list[Any]]]
    extra: list[dict[str, Any]]
    references: list[str]
    """Names of models that are evaluated as they are."""
    training: dict[str, Any]
    models: dict[str, ModelConfig]
    methods: dict[str, MethodConfig]
    data: dict[str, DataConfig]
    prompts: dict[str, PromptConfig]
    deepspeeds: dict[str, DeepSpeedConfig]
    benchmarks: list[BenchmarkConfig]
    shots: list[int]
    evaluation_prompts: list[str]
    evaluate: EvaluateConfig
    keep: KeepConfig
    pack: PackSize
    share_prefixes: bool
    resources: ResourcesConfig
    storage: str
    sources: str
    offline: bool
    leaks: Literal["refuse", "allow"]
    note: str
    overridden: list[str]
    """Dotted keys that the command line set."""

    def located(self, faults: list[Fault]) -> list[Fault]:
        """Faults of keys that came from the command line say so."""
        return locate_faults(faults, self.file, self.overridden)

    @property
    def storage_path(self) -> Path:
        return Path(self.storage)

    @property
    def sources_path(self) -> Path:
        return Path(self.sources)
