"""Evaluations with given answers, question by question, so that what is said of them can be known beforehand."""

from __future__ import annotations

import numpy as np

from jmedlora.config.benchmark import BenchmarkConfig
from jmedlora.config.parts import ModelConfig, RandomSource
from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, RunSpec
from tests.made_up import base_spec, evaluation_spec, run_spec, write_answers

QUESTIONS = 400
EXAM = BenchmarkConfig(name="exam", bundled="sample/questions.jsonl", note="an exam")
ZERO, ONE = evaluation_spec(0, EXAM), evaluation_spec(1, EXAM)


def model(name: str, family: str = "llama", language: str = "") -> ModelConfig:
    return ModelConfig.model_validate({"name": name, "source": RandomSource(kind="random"), "family": family, "language": language})


def base_of(spec: ModelConfig, parameters: float = 7e9, precision: str = "fp32") -> BaseSpec:
    base = base_spec(f"base-{spec.name}-{precision}", precision)
    return base.model_copy(update={"model": spec, "model_parameters": int(parameters)})


def run_of(base: BaseSpec, *, epochs: int = 1, rank: int = 16) -> RunSpec:
    run = run_spec(f"run-{base.model.name}-{rank}-{epochs}", rank=rank, epochs=epochs, base_key=base.run_key)
    return run.model_copy(
        update={"model": base.model, "model_parameters": base.model_parameters, "data": run.data.model_copy(update={"note": ""})}
    )


def answer(
    storage: Storage,
    run_key: str,
    step: int,
    evaluation: EvaluationSpec,
    right: int,
    gestalt: float | None = None,
    questions: int = QUESTIONS,
) -> None:
    """The first `right` questions answered rightly; Gestalt scores a little uneven around `gestalt`, or around the share of rights."""
    correct = np.arange(questions) < right
    level = right / questions if gestalt is None else gestalt
    write_answers(storage, run_key, step, evaluation, correct, np.clip(level + 0.05 * np.sin(np.arange(questions) + len(run_key)), 0, 1))
