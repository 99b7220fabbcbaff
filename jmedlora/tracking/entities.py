"""What a run looks like in MLflow: parameters, metric names, datasets, tables."""

from __future__ import annotations

import json
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

from jmedlora.config.benchmark import DEFAULT_METRICS, METRIC_VARIANTS, BenchmarkConfig
from jmedlora.config.data import DataConfig
from jmedlora.config.digest import KEY_LENGTH, key_of
from jmedlora.plan.naming import epochs_of, number, targets_of
from jmedlora.plan.records import Record
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, Plan, RunSpec

_RULES_DIGITS = 8
SCORES = ("accuracy", "exact_match", "gestalt_score")
# MLflow's page groups by the first column and lays the second one side by side
_TABLE_COLUMNS = ("problem_id", "response", "answer", "question", "prediction", "chosen", "gold", "correct", "exact_match", "gestalt_score")


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def run_params(run: RunSpec, workers: int, zero_stage: int, metric_settings: str) -> dict[str, str]:
    """Parameters of a run; a base has the same keys, so that MLflow's comparison views line up.

    `metric_settings`: the name of those that its scores were made with.
    """
    settings = run.settings
    values: dict[str, Any] = {
        "model": run.model.name,
        "method": run.method.name,
        "precision": run.precision,
        "lora_rank": settings.rank,
        "lora_alpha": settings.alpha_value,
        "lora_dropout": settings.dropout,
        "lora_targets": targets_of(run),
        "epochs": epochs_of(run),
        "steps": run.total_steps,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "schedule": settings.schedule,
        "warmup_steps": settings.warmup_steps,
        "optimizer": settings.optimizer,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": "-" if settings.max_grad_norm is None else settings.max_grad_norm,
        "max_input_tokens": settings.max_input_tokens,
        "max_target_tokens": settings.max_target_tokens,
        "seed": settings.seed,
        "zero_stage": zero_stage,
        "workers": workers,
        "data": run.data.name,
        "rows": run.rows,
        "prompt": run.prompt.name,
        "model_parameters": run.model_parameters,
        "metric_settings": metric_settings,
    }
    return {key: _spell(value) for key, value in values.items()}


def base_params(base: BaseSpec, metric_settings: str) -> dict[str, str]:
    """Parameters of a bare base model: the keys of `run_params`, with 0 or `-` for what training would set."""
    values: dict[str, Any] = {
        "model": base.model.name,
        "method": "base",
        "precision": base.precision,
        **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout"), 0),
        "lora_targets": "-",
        **dict.fromkeys(("epochs", "steps", "batch_size", "learning_rate"), 0),
        "schedule": "-",
        "warmup_steps": 0,
        "optimizer": "-",
        "weight_decay": 0,
        **dict.fromkeys(("max_grad_norm", "max_input_tokens", "max_target_tokens", "seed", "zero_stage", "workers", "data"), "-"),
        "rows": 0,
        "prompt": "-",
        "model_parameters": base.model_parameters,
        "metric_settings": metric_settings,
    }
    return {key: _spell(value) for key, value in values.items()}


def metrics_named(plan: Plan) -> str:
    """The name of the plan's metric settings, or what sets them apart from the default."""
    settings = plan.evaluations[0].metrics if plan.evaluations else DEFAULT_METRICS
    names = [name for name, variant in METRIC_VARIANTS.items() if variant == settings]
    return names[0] if names else ",".join(f"{key}={value}" for key, value in settings.model_dump(exclude_defaults=True).items())


def _spell(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else str(value)


def metric_prefix(plan: Plan, evaluation: EvaluationSpec) -> str:
    """`igakuqa/1shot`; then the prompt, unless it is the sweep's own, and the way of scoring, unless answers are generated."""
    parts = [evaluation.benchmark.name, f"{evaluation.shots}shot"]
    parts += [evaluation.prompt.name] * (evaluation.prompt.name != plan.default_prompt)
    parts += [evaluation.scoring] * (evaluation.scoring != "generate")
    return "/".join(parts)


def table_path(evaluation: EvaluationSpec) -> str:
    """Where a run's predictions lie among its artifacts."""
    way = "" if evaluation.scoring == "generate" else f".{evaluation.scoring}"
    return f"predictions/{evaluation.benchmark.name}.{evaluation.shots}shot.{evaluation.prompt.name}{way}.json"


def scored_with(plan: Plan) -> dict[str, dict[str, str]]:
    """Per benchmark, by the name of a tag: for each way of evaluating, by the name of its metrics, a digest of what its scores follow from.

    Under one name, scores of different questions, settings or exam rules would be several points of one step.
    """
    tags: dict[str, dict[str, str]] = {}
    for item in plan.evaluations:
        exam = item.benchmark.exam.model_dump(mode="json") if item.benchmark.exam else None
        digest = key_of([item.evaluation_key, item.metrics.model_dump(mode="json"), exam])
        tags.setdefault(f"jmedlora.scored.{item.benchmark.name}", {})[metric_prefix(plan, item)] = digest[:_RULES_DIGITS]
    return tags


def score_points(prefix: str, metrics: Record, step: int) -> list[Metric]:
    """The scores of one evaluation, dated when it was made."""
    keys = [key for score in SCORES for key in (score, f"{score}_low", f"{score}_high") if metrics.get(key) is not None]
    values = {key: metrics[key] for key in keys}
    if (exam := metrics.get("exam")) and exam.get("points_total"):
        values |= {"exam_points": exam["points"], "exam_prohibited": exam["prohibited"]}
    return [Metric(f"{prefix}/{key}", value, milliseconds(metrics["time"]), step) for key, value in values.items()]


def change_points(prefix: str, change: Record, timestamp: int) -> list[Metric]:
    """How a run's last scores differ from its base's: `…/accuracy_change`, `…/accuracy_p`, and `…/accuracy_p_holm` over the sweep."""
    values = {"change": change["difference"], "p": change["p"], "p_holm": change["p_holm"]}
    return [Metric(f"{prefix}/{change['metric']}_{key}", value, timestamp, change["step"]) for key, value in values.items()]


def training_points(record: Record) -> list[Metric]:
    """The metrics of one optimizer step, dated when it was taken; what a step did not measure is left out."""
    values = {key: record.get(key) for key in ("loss", "learning_rate", "grad_norm")}
    if record.get("tokens") and record.get("seconds"):
        values["tokens_per_s"] = record["tokens"] / record["seconds"]
    timestamp = milliseconds(record["time"])
    return [Metric(f"train/{key}", value, timestamp, record["step"]) for key, value in values.items() if value is not None]


def predictions_table(predictions: list[Record], step: int) -> str:
    """Predictions in the JSON of MLflow's table artifacts."""
    columns = [column for column in _TABLE_COLUMNS if predictions and column in predictions[0]]
    rows = [[*(_cell(row.get(column)) for column in columns), step] for row in predictions]
    return json.dumps({"columns": [*columns, "step"], "data": rows}, ensure_ascii=False)


def _cell(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list) else value


def dataset_inputs(plan: Plan, spec: RunSpec | BaseSpec) -> list[DatasetInput]:
    """The training data (of a run) and the benchmarks; those that are not here yet have no digest and are left out."""
    inputs = [_dataset(run.data, run.data_digest, run.rows, "training") for run in [spec] if isinstance(run, RunSpec) and run.data_digest]
    benchmarks = {item.benchmark_digest: item for item in plan.evaluations if item.benchmark_digest}
    inputs += [_dataset(item.benchmark, digest, item.questions, "evaluation") for digest, item in benchmarks.items()]
    return inputs


def _dataset(part: DataConfig | BenchmarkConfig, digest: str, rows: int, context: str) -> DatasetInput:
    where = part.path or (f"jmedlora:{part.bundled}" if part.bundled else f"named:{part.source.name}" if part.source else part.name)
    dataset = Dataset(
        name=part.name,
        digest=digest[:KEY_LENGTH],  # MLflow takes 36 characters at most
        source_type="local",
        source=json.dumps({"uri": where}),
        profile=json.dumps({"num_rows": rows}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
