"""A few predictions side by side: the same question answered by the base, the best run and others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from jmedlora.data.rows import LETTERS
from jmedlora.plan.layout import Storage
from jmedlora.plan.records import Record, read_predictions
from jmedlora.plan.specs import EvaluationSpec
from jmedlora.report.collect import Results, RunResult
from jmedlora.report.comparison import last_score

QUESTIONS_SHOWN = 6
OTHERS_SHOWN = 2
MODELS_SHOWN = 4


@dataclass(frozen=True)
class System:
    """Who answers: a run or base, after `step` optimizer steps."""

    name: str
    """Without the model's name, which all systems of a set share."""
    note: str
    """`base`, `best run`, or nothing."""
    step: int


@dataclass(frozen=True)
class Answered:
    """One question with the answer of each system, in the order of `ExampleSet.systems`."""

    problem_id: str
    question: str
    """Empty where the predictions do not hold it."""
    choices: list[tuple[str, bool]]
    """Each choice, and whether it is right."""
    answers: list[Record]


@dataclass(frozen=True)
class ExampleSet:
    """Examples of one model."""

    model: str
    evaluation: EvaluationSpec
    systems: list[System]
    questions: list[Answered]


def choose_examples(results: Results, storage: Storage) -> list[ExampleSet]:
    """Examples of the first tuned models, on the first benchmark, written answers to the sweep's own prompt with the fewest shots."""
    if not results.plan.evaluations:
        return []
    own = results.plan.default_prompt
    evaluation = min(  # of several benchmarks the first
        results.plan.evaluations, key=lambda item: (item.scoring != "generate", item.prompt.name != own, item.shots)
    )
    models = list(dict.fromkeys(result.model for result in results.tuned))
    chosen = [_choose_of_model(results, storage, model, evaluation) for model in models[:MODELS_SHOWN]]
    return [examples for examples in chosen if examples is not None]


def _choose_of_model(results: Results, storage: Storage, model: str, evaluation: EvaluationSpec) -> ExampleSet | None:
    scored = [(result, score) for result in results.tuned if result.model == model and (score := last_score(result, evaluation))]
    ranking = [result for result, score in sorted(scored, key=lambda pair: -pair[1].gestalt_score)]
    if not ranking:
        return None
    base = results.base_of(ranking[0])
    asked = [result for result in (base, *ranking[: 1 + OTHERS_SHOWN]) if result is not None and last_score(result, evaluation)]
    notes = {ranking[0].run_key: "best run"} | ({base.run_key: "base"} if base else {})
    answers = [_answers(result, storage, evaluation) for result in asked]
    shared = [problem for problem in answers[0] if all(problem in of_one for of_one in answers)]
    picked = _pick_problems(shared, answers)
    return ExampleSet(
        model=model,
        evaluation=evaluation,
        systems=[
            System(result.name.removeprefix(f"{model} "), notes.get(result.run_key, ""), _step(result, evaluation)) for result in asked
        ],
        questions=[_answered(problem, [of_one[problem] for of_one in answers]) for problem in picked],
    )


def _step(result: RunResult, evaluation: EvaluationSpec) -> int:
    score = last_score(result, evaluation)
    return score.step if score else 0


def _answers(result: RunResult, storage: Storage, evaluation: EvaluationSpec) -> dict[str, Record]:
    predictions = read_predictions(storage, result.run_key, _step(result, evaluation), evaluation)
    return {prediction["problem_id"]: prediction for prediction in predictions}


def _pick_problems(problems: Sequence[str], answers: list[dict[str, Record]]) -> list[str]:
    """Some that training mended, some that it broke, some right and some wrong throughout: by turns, each kind in its own order."""
    kinds: dict[tuple[bool, bool], list[str]] = {(False, True): [], (True, False): [], (True, True): [], (False, False): []}
    for problem in problems:
        before, after = answers[0][problem]["correct"], answers[min(1, len(answers) - 1)][problem]["correct"]
        kinds[bool(before), bool(after)].append(problem)
    turns = chain.from_iterable(zip_longest(*kinds.values()))
    return [problem for problem in turns if problem is not None][:QUESTIONS_SHOWN]


def _answered(problem_id: str, answers: list[Record]) -> Answered:
    first = answers[0]
    choices = [(choice, LETTERS[index] in first["gold"]) for index, choice in enumerate(first["choices"])]
    return Answered(problem_id, first.get("question", ""), choices, answers)
