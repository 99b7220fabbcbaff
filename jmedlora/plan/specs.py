"""What the plan hands to training, evaluation, tracking and report: plain, JSON-able descriptions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from jmedlora.config.benchmark import DEFAULT_METRICS, BenchmarkConfig, MetricSettings, PromptConfig, ScoringWay
from jmedlora.config.data import DataConfig
from jmedlora.config.parts import Architecture, DeepSpeedConfig, MethodConfig, ModelConfig, Part, Precision
from jmedlora.config.run import RunSettings
from jmedlora.plan.shapes import lora_parameters


class RunSpec(Part):
    """One adapter to be trained: resolved settings, resolved parts and its identity."""

    run_key: str
    trajectory_key: str
    settings: RunSettings
    model: ModelConfig
    method: MethodConfig
    precision: Precision
    """How the base weights are held: fp32, bf16 or nf4."""
    compute_precision: Literal["fp32", "bf16"]
    """The number format of activations."""
    data: DataConfig
    data_digest: str
    rows: int
    prompt: PromptConfig
    deepspeed: DeepSpeedConfig
    steps_per_epoch: int
    total_steps: int
    checkpoint_steps: list[int]
    """Optimizer steps (1-based) after which an adapter is written and evaluated; the last is `total_steps`."""
    base_key: str
    """run_key of the base run that this run is compared with."""
    model_parameters: int
    row_characters: float
    """Mean characters of a row with its prompt, for estimates."""
    provisional: bool = False
    """True where a source is not here yet, so that the key may still change."""


class BaseSpec(Part):
    """A bare base model at one load precision, evaluated once as `step-000000`."""

    run_key: str
    model: ModelConfig
    precision: Precision
    compute_precision: Literal["fp32", "bf16"]
    double_quantisation: bool = True
    model_parameters: int
    provisional: bool = False


class EvaluationSpec(Part):
    """One way of scoring a checkpoint: benchmark x shots x prompt x way of having answers."""

    evaluation_key: str
    benchmark: BenchmarkConfig
    benchmark_digest: str
    questions: int
    prompt_characters: float
    """Mean characters of a rendered prompt, for estimates."""
    shots: Annotated[int, Field(ge=0)]
    prompt: PromptConfig
    scoring: ScoringWay = "generate"
    metrics: MetricSettings = DEFAULT_METRICS
    """How predictions are scored; not part of the identity, since stored predictions can be scored anew."""
    max_new_tokens: int
    batch_size: int
    """Prompts decoded at once; not part of the identity."""

    @property
    def folder(self) -> str:
        """Name of the folder below `evaluations/`."""
        return f"{self.benchmark.name}.{self.shots}shot.{self.prompt.name}.{self.evaluation_key}"


class TrialSpec(Part):
    """Runs that share a base model, precision, method and batch geometry, trained by one worker group."""

    trial_id: str
    runs: list[RunSpec]
    workers: int
    cpus_per_worker: int
    gpus_per_worker: int
    pack: int = 1
    """Adapters that are trained at once, at most; the others wait for their place."""
    share_prefixes: bool = False
    """Whether runs of one trajectory are trained once."""


class KeepRule(Part):
    """Which weights stay on disk once everything that is asked of a checkpoint is evaluated; part of no identity."""

    checkpoints: Literal["all", "last", "best"] | int = "all"
    metric: Literal["accuracy", "exact_match", "gestalt_score"] = "accuracy"
    evaluation: str = ""
    """EvaluationSpec.folder of the evaluation whose metric decides what is best."""
    state: Literal["keep", "drop"] = "keep"

    @property
    def removes_nothing(self) -> bool:
        return self.checkpoints == "all" and self.state == "keep"

    def at_most(self, checkpoints: int) -> int:
        """How many of so many checkpoints stay at the end, at most."""
        if self.checkpoints == "all":
            return checkpoints
        return min(checkpoints, {"last": 1, "best": 2}[self.checkpoints] if isinstance(self.checkpoints, str) else self.checkpoints)

    def __str__(self) -> str:
        if self.checkpoints == "best":
            return f"best by {self.metric} on {self.evaluation.rsplit('.', 1)[0]}, and last"
        return f"newest {self.checkpoints}" if isinstance(self.checkpoints, int) else self.checkpoints


class Plan(Part):
    """A whole sweep, ready to be started."""

    sweep: str
    bases: list[BaseSpec]
    runs: list[RunSpec]
    evaluations: list[EvaluationSpec]
    trials: list[TrialSpec]
    default_prompt: str
    """Prompt whose metrics are named without the prompt in MLflow."""
    keep: KeepRule = KeepRule()
    evaluated_together: int = 1
    """Adapters that are evaluated over one base model at once, at most; with 1 all is as if there were no packs."""
    missing: list[str] = []
    """Sources that are not here yet, a line each."""
    notes: list[str] = []
    """What the reader of a plan should know about it, a line each."""
    note: str = ""
    """The sweep file's own note, shown in the report."""

    def asked_of(self, spec: RunSpec | BaseSpec) -> list[EvaluationSpec]:
        """The evaluations of one run or base; of a model behind an address, those that ask for answers alone."""
        return [item for item in self.evaluations if item.scoring == "generate" or not spec.model.is_api]

    def largest_adapter(self, base: BaseSpec, shape: Architecture) -> int:
        """Weights of the largest adapter to a base; 0 where there is none."""
        runs = [run.settings for run in self.runs if run.base_key == base.run_key]
        return max((lora_parameters(base.model.family, shape, run.rank, run.targets) for run in runs), default=0)
