"""From answers to predictions.jsonl and metrics.json: what the local evaluator, API models and rescoring share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jmedlora.config.benchmark import MetricSettings
from jmedlora.config.clock import now
from jmedlora.config.faults import BadInput, Fault
from jmedlora.data.atomic import write_json, write_json_lines
from jmedlora.data.benchmarks import Benchmark
from jmedlora.data.patience import when_there_is_room
from jmedlora.data.rows import LETTERS, Instruction, Question, QuestionFacts
from jmedlora.evaluation.exam import mark_exam
from jmedlora.evaluation.metrics import ResponseScore, gestalt_distance, score_responses, summarise
from jmedlora.evaluation.resampling import bootstrap_sums, intervals
from jmedlora.plan.layout import METRICS, PREDICTIONS, Storage
from jmedlora.plan.specs import EvaluationSpec

SCORES = ("accuracy", "exact_match", "gestalt_score")
_FACTS = ("points", "section", "category", "human_accuracy")
Outcome = dict[str, Any] | Exception
"""The metrics of an evaluated checkpoint, or what is wrong with it."""
NORMALISATIONS = ("sum", "per_token", "per_character", "per_byte")


class Checkpoint(NamedTuple):
    """The adapter of a run after so many steps; with step 0 the bare base model."""

    run_key: str
    step: int


@dataclass(frozen=True)
class Answers:
    """What a system said to each question of an evaluation, in the questions' order."""

    texts: list[str]
    """Generated answers as they came; empty where likelihoods were asked."""
    likelihoods: list[Likelihoods]
    """Empty where answers were generated."""


@dataclass(frozen=True)
class Likelihoods:
    """Log-likelihood of each choice of a question as the continuation of its prompt, and of how many tokens."""

    sums: tuple[float, ...]
    tokens: tuple[int, ...]


def asked_rows(evaluation: EvaluationSpec, benchmark: Benchmark) -> tuple[list[Question], list[Instruction]]:
    """The questions in the prompt's language, and the solved examples that are shown before each; raises BadInput for too few."""
    shots, prompt = evaluation.shots, evaluation.prompt
    if len(benchmark.examples) < shots:
        problem = f"{shots} asks for more examples than the {len(benchmark.examples)} there are"
        raise BadInput([Fault(f"benchmark {benchmark.name}", "shots", problem, f"0 to {len(benchmark.examples)}")])
    try:
        questions = [question.in_language(prompt.language) for question in benchmark.questions]
        examples = [example.in_language(prompt.language).as_instruction() for example in benchmark.examples[:shots]]
    except ValueError as error:
        raise BadInput([Fault(f"benchmark {benchmark.name}", "prompts", str(error), "a prompt in Japanese")]) from None
    return questions, examples


def write_results(
    storage: Storage,
    run_key: str,
    step: int,
    evaluation: EvaluationSpec,
    questions: Sequence[Question],
    answers: Answers,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Scores the answers, writes predictions.jsonl, then metrics.json, and returns the metrics; `facts` are put among them.

    Waits while the disk is full; raises OSError when it stays so.
    """
    scores = score_answers(evaluation, questions, answers)
    metrics = {
        "run_key": run_key,
        "step": step,
        "evaluation_key": evaluation.evaluation_key,
        "benchmark": evaluation.benchmark.name,
        "shots": evaluation.shots,
        "prompt": evaluation.prompt.name,
        "scoring": evaluation.scoring,
        **measure(evaluation, questions, answers, scores),
        **facts,
        "time": now(),
    }
    folder = storage.run(run_key).evaluation(evaluation.folder, step)
    texts = answers.texts or [""] * len(questions)
    likelihoods: Sequence[Likelihoods | None] = answers.likelihoods or [None] * len(questions)
    rows = list(map(prediction, questions, texts, likelihoods, scores))
    when_there_is_room(lambda: write_json_lines(folder / PREDICTIONS, rows), str(folder / PREDICTIONS))
    when_there_is_room(lambda: write_json(folder / METRICS, metrics), str(folder / METRICS))
    return metrics


def score_answers(evaluation: EvaluationSpec, questions: Sequence[Question], answers: Answers) -> list[ResponseScore]:
    """A score per question."""
    if evaluation.scoring == "loglikelihood":
        return [score_likelihoods(*pair, evaluation.metrics) for pair in zip(answers.likelihoods, questions, strict=True)]
    prompt = evaluation.prompt
    return score_responses(answers.texts, questions, evaluation.metrics, marker=prompt.answer_marker, answer=prompt.answer)


def score_likelihoods(likelihoods: Likelihoods, question: Question, settings: MetricSettings) -> ResponseScore:
    """Take the choices with the highest (normalised) log-likelihood, as many as are right; their texts count as the response.

    With `multiple: top_1` the likeliest choice must be among the right ones. Ties are settled as for distances.
    """
    values = _normalised(likelihoods, question, settings.loglikelihood)
    count = 1 if settings.multiple == "top_1" else len(question.gold)
    sign = -1 if settings.ties == "last" else 1
    ranking = sorted(range(len(values)), key=lambda i: (-values[i], sign * i))
    chosen = tuple(sorted(ranking[:count]))
    accepted = (question.gold, *question.alternatives)
    correct = any(chosen[0] in gold for gold in accepted) if settings.multiple == "top_1" else chosen in accepted
    if settings.ties == "wrong" and count < len(ranking) and values[ranking[count - 1]] == values[ranking[count]]:
        correct = False
    response = ",".join(question.choices[i] for i in chosen)
    texts = [",".join(question.choices[i] for i in gold) for gold in accepted]
    return ResponseScore(response, chosen, correct, correct, max(gestalt_distance(response, text, settings) for text in texts))


def measure(evaluation: EvaluationSpec, questions: Sequence[Question], answers: Answers, scores: Sequence[ResponseScore]) -> dict[str, Any]:
    """The part of metrics.json that follows from the answers alone: scores with 95 % intervals, the exam's own marks, settings."""
    values = np.array([(score.correct, score.exact_match, score.gestalt_score) for score in scores], dtype=np.float64)
    measured: dict[str, Any] = {**summarise(scores)}
    for name, interval in zip(SCORES, intervals(values, bootstrap_sums(values, seed=0)), strict=True):
        measured |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    if evaluation.scoring == "loglikelihood":
        measured["accuracy_by_normalisation"] = {
            way: float(np.mean([_scored_by(way, *each, evaluation.metrics) for each in zip(answers.likelihoods, questions)]))
            for way in NORMALISATIONS
        }
    if evaluation.benchmark.exam is not None:
        chosen = {question.problem_id: score.chosen for question, score in zip(questions, scores)}
        measured["exam"] = mark_exam(questions, chosen, evaluation.benchmark.exam).as_dict()
    return measured | _unlike_any(evaluation, questions, scores) | made_with(evaluation)


def _unlike_any(evaluation: EvaluationSpec, questions: Sequence[Question], scores: Sequence[ResponseScore]) -> dict[str, int]:
    """How many generated answers were empty, and how many share nothing with any choice, so that the rule for ties chose for them."""
    if evaluation.scoring != "generate":
        return {}
    if evaluation.prompt.answer == "letters":
        unlike = sum(not score.chosen for score in scores)
    else:
        unlike = sum(not set(score.response) & set("".join(question.choices)) for question, score in zip(questions, scores))
    return {"empty_answers": sum(not score.response for score in scores), "no_resemblance": unlike}


def made_with(evaluation: EvaluationSpec) -> dict[str, Any]:
    """What scores follow from beside the answers: kept with them, so that it can be told when they are out of date."""
    exam = evaluation.benchmark.exam
    return {"metric_settings": evaluation.metrics.model_dump(mode="json"), "exam_rules": exam.model_dump(mode="json") if exam else None}


def question_of(row: dict[str, Any]) -> Question:
    """The question of a stored prediction, as far as scoring and the exam's rules need it."""
    accepted = [_positions(letters) for letters in row.get("accepted", [row["gold"]])]
    told = row.get("facts", {})
    facts = QuestionFacts(**{**{key: told[key] for key in _FACTS if key in told}, "prohibited": _positions(told.get("prohibited", []))})
    return Question(
        row["problem_id"],
        row["question"],
        tuple(row["choices"]),
        accepted[0],
        row.get("year"),
        row.get("text_only", True),
        alternatives=tuple(accepted[1:]),
        facts=facts,
    )


def _positions(letters: Sequence[str]) -> tuple[int, ...]:
    return tuple(LETTERS.index(letter) for letter in letters)


def _scored_by(way: str, likelihoods: Likelihoods, question: Question, settings: MetricSettings) -> bool:
    return score_likelihoods(likelihoods, question, settings.model_copy(update={"loglikelihood": way})).correct


def _normalised(likelihoods: Likelihoods, question: Question, way: str) -> list[float]:
    lengths = {
        "sum": [1] * len(question.choices),
        "per_token": list(likelihoods.tokens),
        "per_character": list(map(len, question.choices)),
        "per_byte": [len(choice.encode()) for choice in question.choices],
    }[way]
    return [value / max(1, length) for value, length in zip(likelihoods.sums, lengths, strict=True)]


def prediction(question: Question, text: str, likelihoods: Likelihoods | None, score: ResponseScore) -> dict[str, Any]:
    """A line of predictions.jsonl; choices and letters in the order in which they were shown."""
    row: dict[str, Any] = {
        "problem_id": question.problem_id,
        "question": question.text,
        "prediction": text,
        "response": score.response,
        "answer": question.answer,
        "choices": list(question.choices),
        "chosen": [LETTERS[i] for i in score.chosen],
        "gold": [LETTERS[i] for i in question.gold],
        "correct": score.correct,
        "exact_match": score.exact_match,
        "gestalt_score": score.gestalt_score,
    }
    if question.alternatives:
        row["accepted"] = [[LETTERS[i] for i in gold] for gold in (question.gold, *question.alternatives)]
    if question.year is not None:
        row["year"] = question.year
    if question.facts != QuestionFacts() or not question.text_only:  # what the exam's rules and the breakdowns of a report ask for
        facts = {key: getattr(question.facts, key) for key in _FACTS}
        row |= {"text_only": question.text_only, "facts": facts | {"prohibited": [LETTERS[i] for i in question.facts.prohibited]}}
    if likelihoods is not None:
        row |= {"loglikelihoods": list(likelihoods.sums), "choice_tokens": list(likelihoods.tokens)}
    return row
