"""A sweep's storage as training and evaluation would leave it, with made-up numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from importlib.resources import files
from pathlib import Path
from typing import Any

from jmedlora.config.benchmark import BenchmarkConfig, PromptConfig, ScoringWay
from jmedlora.config.data import DataConfig
from jmedlora.config.digest import key_of
from jmedlora.config.parts import DeepSpeedConfig, MethodConfig, ModelConfig, RandomSource
from jmedlora.config.run import RunSettings
from jmedlora.evaluation.results import made_with
from jmedlora.plan.layout import METRICS, PREDICTIONS, Storage
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, Plan, RunSpec, TrialSpec

MODEL = ModelConfig(name="smollm2-135m", source=RandomSource(kind="random"), family="llama")
DATA = DataConfig(name="sample", bundled="sample/instructions.jsonl", note="synthetic rows, written for this project")
BENCHMARK = BenchmarkConfig(name="sample", bundled="sample/questions.jsonl", note="synthetic questions")
PROMPT = PromptConfig(name="alpaca-ja", template="### 指示:\n{{ instruction }}\n### 応答:\n")
STEPS_PER_EPOCH = 7
BEGINNING = 1_760_000_000.0  # seconds since the epoch


def base_spec(run_key: str = "base00000032", precision: str = "fp32") -> BaseSpec:
    return BaseSpec(run_key=run_key, model=MODEL, precision=precision, compute_precision="fp32", model_parameters=134_515_008)


def run_spec(
    run_key: str, *, rank: int = 16, epochs: int = 1, method: str = "lora", base_key: str = "base00000032", **settings: Any
) -> RunSpec:
    total_steps = STEPS_PER_EPOCH * epochs
    return RunSpec(
        run_key=run_key,
        trajectory_key=run_key,
        settings=RunSettings(
            model=MODEL.name, method=method, data=DATA.name, prompt=PROMPT.name, rank=rank, epochs=epochs, alpha="2r", learning_rate=5e-4
        ).model_copy(update=settings),
        model=MODEL,
        method=MethodConfig(name=method, quantisation="nf4" if method == "qlora" else "none"),
        precision="nf4" if method == "qlora" else "fp32",
        compute_precision="fp32",
        data=DATA,
        data_digest="d" * 64,
        rows=49,
        row_characters=120,
        prompt=PROMPT,
        deepspeed=DeepSpeedConfig(),
        steps_per_epoch=STEPS_PER_EPOCH,
        total_steps=total_steps,
        checkpoint_steps=list(range(STEPS_PER_EPOCH, total_steps + 1, STEPS_PER_EPOCH)),
        base_key=base_key,
        model_parameters=134_515_008,
    )


def evaluation_spec(
    shots: int, benchmark: BenchmarkConfig = BENCHMARK, prompt: PromptConfig = PROMPT, scoring: ScoringWay = "generate"
) -> EvaluationSpec:
    usual = (benchmark.name, prompt.name, scoring) == (BENCHMARK.name, PROMPT.name, "generate")
    return EvaluationSpec(
        evaluation_key=f"eval{shots:08d}" if usual else key_of([benchmark.name, prompt.name, scoring, shots]),
        benchmark=benchmark,
        benchmark_digest="b" * 64,
        questions=40,
        prompt_characters=200,
        shots=shots,
        prompt=prompt,
        scoring=scoring,
        max_new_tokens=24,
        batch_size=8,
    )


def plan_of(bases: list[BaseSpec], runs: list[RunSpec], evaluations: list[EvaluationSpec] | None = None, sweep: str = "demo") -> Plan:
    trials = [TrialSpec(trial_id=f"trial-{run.run_key}", runs=[run], workers=1, cpus_per_worker=1, gpus_per_worker=0) for run in runs]
    chosen = evaluations if evaluations is not None else [evaluation_spec(0), evaluation_spec(1)]
    return Plan(sweep=sweep, bases=bases, runs=runs, evaluations=chosen, trials=trials, default_prompt=PROMPT.name)


def write_training(
    storage: Storage, run: RunSpec, *, started: float = BEGINNING, steps: int | None = None, error: str | None = None
) -> None:
    """run.json and train.jsonl of a run that got to `steps` (all of them if left out), failed where an error is given."""
    noise = random.Random(run.run_key)
    done = run.total_steps if steps is None else steps
    records = [
        {
            "step": step,
            "epoch": (step - 1) // run.steps_per_epoch,
            "loss": 1.1 + 2.4 * math.exp(-step * math.log2(run.settings.rank + 1) / 14) + noise.gauss(0, 0.06),
            "learning_rate": run.settings.learning_rate,
            "grad_norm": 0.8 + 1.6 * math.exp(-step / 6) + abs(noise.gauss(0, 0.1)),
            "tokens": noise.randint(600, 800),
            "seconds": noise.uniform(2.0, 2.4),
            "time": started + 2.2 * step,
        }
        for step in range(1, done + 1)
    ]
    status = "failed" if error else "finished" if done == run.total_steps else "running"
    folder = storage.run(run.run_key)
    folder.path.mkdir(parents=True)
    folder.train_jsonl.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    summary = {
        "run_key": run.run_key,
        "status": status,
        "settings": run.settings.model_dump(),
        "model": run.model.model_dump(),
        "precision": run.precision,
        "rows": run.rows,
        "total_steps": run.total_steps,
        "workers": 1,
        "zero_stage": 0,
        "versions": {"torch": "2.13.0"},
        "started": started,
        "finished": None if status == "running" else started + 2.2 * done,
        "error": error,
    }
    folder.run_json.write_text(json.dumps(summary), encoding="utf-8")


def write_evaluation(
    storage: Storage, run_key: str, step: int, evaluation: EvaluationSpec, skill: float, time: float = BEGINNING
) -> dict[str, Any]:
    """predictions.jsonl and metrics.json of a system that answers rightly with probability `skill`."""
    luck = random.Random(f"{run_key}{step}{evaluation.shots}")
    rows = []
    for line in (files("jmedlora.data") / "sample/questions.jsonl").read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        gold = "abcdefghij".index(question["answer"][0])
        chosen = gold if luck.random() < skill else luck.randrange(len(question["choices"]))
        answer, picked = question["choices"][gold], question["choices"][chosen]
        response = picked if luck.random() < 0.5 + skill / 2 else f"{picked}と考えられます。"
        rows.append(
            {
                "problem_id": question["problem_id"],
                "question": question["problem_text"],
                "prediction": response + "\n",
                "response": response,
                "answer": answer,
                "choices": question["choices"],
                "chosen": ["abcdefghij"[chosen]],
                "gold": question["answer"],
                "correct": chosen == gold,
                "exact_match": response == answer,
                "gestalt_score": SequenceMatcher(None, response, answer, autojunk=False).ratio(),
            }
        )
    return _write_evaluation(storage, run_key, step, evaluation, rows, time)


def write_answers(
    storage: Storage,
    run_key: str,
    step: int,
    evaluation: EvaluationSpec,
    correct: Iterable[bool],
    gestalt_score: Iterable[float] | None = None,
    exact_match: Iterable[bool] | None = None,
    problem_ids: Sequence[str] | None = None,
) -> dict[str, Any]:
    """predictions.jsonl and metrics.json of given scores; Gestalt score and exact match follow the right answers unless given."""
    correct = list(correct)
    ids = [f"Q{index}" for index in range(len(correct))] if problem_ids is None else problem_ids
    scores = zip(
        ids,
        correct,
        correct if exact_match is None else exact_match,
        correct if gestalt_score is None else gestalt_score,
        strict=True,
    )
    rows = [
        {
            "problem_id": problem,
            "question": f"{problem}はどれか。",
            "prediction": "甲\n" if right else "乙\n",
            "response": "甲" if right else "乙",
            "answer": "甲",
            "choices": ["甲", "乙"],
            "chosen": ["a" if right else "b"],
            "gold": ["a"],
            "correct": bool(right),
            "exact_match": bool(exact),
            "gestalt_score": float(similarity),
        }
        for problem, right, exact, similarity in scores
    ]
    return _write_evaluation(storage, run_key, step, evaluation, rows, BEGINNING)


def _write_evaluation(
    storage: Storage, run_key: str, step: int, evaluation: EvaluationSpec, rows: list[dict[str, Any]], time: float
) -> dict[str, Any]:
    metrics = {
        "run_key": run_key,
        "step": step,
        "evaluation_key": evaluation.evaluation_key,
        "benchmark": evaluation.benchmark.name,
        "shots": evaluation.shots,
        "prompt": evaluation.prompt.name,
        "n": len(rows),
        "accuracy": sum(row["correct"] for row in rows) / len(rows),
        "exact_match": sum(row["exact_match"] for row in rows) / len(rows),
        "gestalt_score": math.fsum(row["gestalt_score"] for row in rows) / len(rows),
        **made_with(evaluation),
        "scoring": evaluation.scoring,
        "adapter_digest": None if step == 0 else "a" * 64,
        "prompt_tokens": 4000,
        "new_tokens": 600,
        "truncated_prompts": 0,
        "seconds": 31.5,
        "time": time,
        "device": "cpu",
    }
    folder = storage.run(run_key).evaluation(evaluation.folder, step)
    folder.mkdir(parents=True)
    (folder / PREDICTIONS).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (folder / METRICS).write_text(json.dumps(metrics), encoding="utf-8")
    return metrics


def write_sweep(storage: Storage, plan: Plan) -> None:
    """Everything of a sweep that has run to its end: bases at step 0, runs at each of their checkpoints."""
    for index, base in enumerate(plan.bases):
        for evaluation in plan.evaluations:
            skill = 0.12 + 0.05 * evaluation.shots - 0.03 * index
            write_evaluation(storage, base.run_key, 0, evaluation, skill, BEGINNING + index)
    for index, run in enumerate(plan.runs):
        started = BEGINNING + 100 * (index + 1)
        write_training(storage, run, started=started)
        for step in run.checkpoint_steps:
            for evaluation in plan.evaluations:
                skill = 0.2 + 0.06 * math.log2(run.settings.rank) * (1 - math.exp(-step / 10)) - 0.08 * evaluation.shots * (step > 7)
                write_evaluation(storage, run.run_key, step, evaluation, skill, started + 2.2 * step + 10)


def demo_plan() -> Plan:
    """Two bases and five runs."""
    runs = [run_spec(f"lora{rank:02d}{epochs:02d}0000", rank=rank, epochs=epochs) for rank in (4, 16) for epochs in (1, 3)]
    qlora = run_spec("qlora1601000", rank=16, epochs=1, method="qlora", base_key="base00000004")
    return plan_of([base_spec(), base_spec("base00000004", "nf4")], [*runs, qlora])


def demo(root: Path) -> tuple[Plan, Storage]:
    """The sweep of `demo_plan`, run to its end, below `root`."""
    plan, storage = demo_plan(), Storage(root)
    write_sweep(storage, plan)
    return plan, storage
