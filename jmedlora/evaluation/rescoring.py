"""Stored predictions scored anew where a sweep asks for other metric settings or exam rules than they were scored with."""

from __future__ import annotations

import json
from collections.abc import Sequence

from jmedlora.data.atomic import appearing
from jmedlora.evaluation.results import Answers, Likelihoods, made_with, measure, prediction, question_of, score_answers
from jmedlora.plan.layout import METRICS, PREDICTIONS, Storage
from jmedlora.plan.records import Record, damaged, finished_metrics, read_predictions
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, Plan, RunSpec

_NEEDED = ("problem_id", "question", "choices", "gold", "prediction")
"""What a stored prediction must have to be scored anew."""


def rescore_stored(plan: Plan, storage: Storage) -> int:
    """Scores every finished evaluation of a plan that is out of date; returns how many there were.

    Nothing is generated: predictions stay, what follows from them is replaced. Sweeps that share runs may ask for different
    settings; each calls this before it reads scores. Raises BadInput for predictions that are damaged.
    """
    stale = stale_evaluations(plan, storage)
    for run_key, step, evaluation, metrics in stale:
        rescore(storage, run_key, step, evaluation, metrics)
    return len(stale)


def stale_evaluations(plan: Plan, storage: Storage) -> list[tuple[str, int, EvaluationSpec, Record]]:
    """Run key, step, evaluation and stored metrics of every finished evaluation that is out of date."""
    specs: list[RunSpec | BaseSpec] = [*plan.bases, *plan.runs]
    return [
        (spec.run_key, step, evaluation, metrics)
        for spec in specs
        for step, evaluation, metrics in finished_metrics(plan, storage, spec)
        if is_stale(evaluation, metrics)
    ]


def is_stale(evaluation: EvaluationSpec, metrics: Record) -> bool:
    """Whether stored metrics were made with other settings than the evaluation asks for now."""
    return any(metrics.get(key) != value for key, value in made_with(evaluation).items())


def rescore(storage: Storage, run_key: str, step: int, evaluation: EvaluationSpec, metrics: Record) -> Record:
    """Scores one stored evaluation as it is asked for now and stores that; returns the new metrics."""
    rows = read_predictions(storage, run_key, step, evaluation, _NEEDED)
    place = storage.run(run_key).evaluation(evaluation.folder, step)
    if len(rows) != metrics["n"]:
        told = f"{len(rows)} lines for {metrics['n']} questions"
        raise damaged(str(place / PREDICTIONS), told, f"delete the folder {place}: it is made again")
    questions = list(map(question_of, rows))
    answers = Answers(
        [row["prediction"] for row in rows],
        [Likelihoods(tuple(row["loglikelihoods"]), tuple(row["choice_tokens"])) for row in rows if "loglikelihoods" in row],
    )
    scores = score_answers(evaluation, questions, answers)
    kept = {key: value for key, value in metrics.items() if key != "exam"}  # a benchmark may have lost its rules
    changed = {**kept, **measure(evaluation, questions, answers, scores)}
    with appearing(place) as folder:
        likelihoods: Sequence[Likelihoods | None] = answers.likelihoods or [None] * len(rows)
        lines = (prediction(*each) for each in zip(questions, answers.texts, likelihoods, scores, strict=True))
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        (folder / PREDICTIONS).write_text(text, encoding="utf-8")
        (folder / METRICS).write_text(json.dumps(changed, ensure_ascii=False, allow_nan=False, indent=2) + "\n", encoding="utf-8")
    return changed
