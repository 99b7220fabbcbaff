"""Stored predictions scored anew where a sweep asks for other metric settings than they were scored with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jmedlora.data.atomic import appearing
from jmedlora.data.rows import Question
from jmedlora.evaluation.results import Answers, Likelihoods, measure, prediction, question_of, score_answers
from jmedlora.plan.layout import METRICS, PREDICTIONS, Storage
from jmedlora.plan.records import finished_metrics, read_predictions
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, Plan, RunSpec


def rescore_stored(plan: Plan, storage: Storage) -> int:
    """Scores every finished evaluation of a plan whose settings differ from the plan's; returns how many there were.

    Nothing is generated: predictions stay, what follows from them is replaced. Sweeps that share runs may ask for different
    settings; each calls this before it reads scores.
    """
    specs: list[RunSpec | BaseSpec] = [*plan.bases, *plan.runs]
    stale = [
        (spec.run_key, step, evaluation, metrics)
        for spec in specs
        for step, evaluation, metrics in finished_metrics(plan, storage, spec)
        if metrics.get("metric_settings") != evaluation.metrics.model_dump(mode="json")
    ]
    for run_key, step, evaluation, metrics in stale:
        _rescore(storage, run_key, step, evaluation, metrics)
    return len(stale)


def _rescore(storage: Storage, run_key: str, step: int, evaluation: EvaluationSpec, metrics: dict[str, Any]) -> None:
    rows = read_predictions(storage, run_key, step, evaluation)
    questions: list[Question] = [question_of(row) for row in rows]
    answers = Answers(
        [row["prediction"] for row in rows],
        [Likelihoods(tuple(row["loglikelihoods"]), tuple(row["choice_tokens"])) for row in rows if "loglikelihoods" in row],
    )
    scores = score_answers(evaluation, questions, answers)
    changed = {**metrics, **measure(evaluation, questions, answers, scores)}
    with appearing(storage.run(run_key).evaluation(evaluation.folder, step)) as folder:
        likelihoods: Sequence[Likelihoods | None] = answers.likelihoods or [None] * len(rows)
        lines = (prediction(*each) for each in zip(questions, answers.texts, likelihoods, scores, strict=True))
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        (folder / PREDICTIONS).write_text(text, encoding="utf-8")
        (folder / METRICS).write_text(json.dumps(changed, ensure_ascii=False, allow_nan=False, indent=2) + "\n", encoding="utf-8")
