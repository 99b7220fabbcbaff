"""Which differences of a sweep are more than luck: every run against its base, and systems against each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Literal

from jmedlora.config.benchmark import ScoringWay
from jmedlora.evaluation.statistics import Comparison, holm
from jmedlora.plan.specs import EvaluationSpec, RunSpec
from jmedlora.report.answers import AnswerBook, Answers
from jmedlora.report.collect import METRICS, Metric, Results, RunResult, Score, evaluation_order
from jmedlora.report.pairs import compare_answers
from jmedlora.report.replicates import ReplicateRow, compare_replicates
from jmedlora.report.spread import PromptSpread, prompt_spreads

COMPARED_SYSTEMS = 40
"""More systems than this are not compared in all pairs, but the best of them with each other one."""


@dataclass(frozen=True)
class Row:
    """One comparison of two systems on the questions that both answered; `difference` is the run's score minus the other's.

    Each system is taken at the last step that is evaluated. The attributes are the columns of comparisons.csv, in its order.
    """

    run_key: str
    """A run; among systems that are compared with each other also a model that is evaluated as it is."""
    other_key: str
    kind: Literal["base", "run"]
    """`base`: against the run's own base; `run`: against any other system."""
    benchmark: str
    shots: int
    prompt: str
    scoring: ScoringWay
    metric: Metric
    n: int
    """Questions that both answered."""
    difference: float
    low: float
    high: float
    """95 % bounds of the difference, by resampling questions."""
    p: float
    p_holm: float
    """p after Holm's correction within its family."""
    effect: float
    """Infinite where all questions differ by the same amount."""
    effect_name: Literal["odds_ratio", "cohens_dz"]
    questions_needed: int | None
    """Questions for 80 % power at 5 %, were the true difference the observed one; None where there is no difference."""
    reversal_of_50: float | None
    """Share of random samples of 50 questions that say the opposite; None with 50 questions or fewer, or without a difference."""
    method: str
    """How p was found."""
    step: int
    other_step: int
    evaluation_key: str


@dataclass(frozen=True)
class Statistics:
    """All comparisons of a sweep, in a stable order that is not the plan's."""

    against_base: list[Row]
    """By run, evaluation and metric. Holm's family: all runs and evaluations of one metric."""
    between_runs: list[Row]
    """By evaluation, metric and systems. Holm's family: all comparisons of one evaluation and metric."""
    replicates: list[ReplicateRow]
    """Runs that differ in nothing but the seed; empty where there are none."""
    prompts: list[PromptSpread]
    """How far scores depend on the prompt; empty with one prompt."""
    notes: list[str]
    """What the reader should know of how the comparisons were made, a line each."""
    answers: AnswerBook
    """What they were made from, for whoever asks further."""
    evaluations: dict[str, EvaluationSpec]
    """By evaluation_key."""

    @cached_property
    def _by_score(self) -> dict[tuple[str, int, str, Metric], Row]:
        return {(row.run_key, row.step, row.evaluation_key, row.metric): row for row in self.against_base}

    def row_of(self, run_key: str, score: Score, metric: Metric) -> Row | None:
        """The comparison of a run's score with its base; None for a base, and for steps before the last one evaluated."""
        return self._by_score.get((run_key, score.step, score.evaluation.evaluation_key, metric))


def compute_statistics(results: Results, answers: AnswerBook) -> Statistics:
    """Everything that stored predictions allow to be compared; what has no predictions is named in the notes."""
    evaluations = sorted(results.plan.evaluations, key=evaluation_order)
    rows: list[Row] = []
    notes: list[str] = []
    for evaluation in evaluations:
        systems = _answered(results, answers, evaluation, notes)
        rows += _compared(results, systems, evaluation, notes)
    against_base = _corrected([row for row in rows if row.kind == "base"], lambda row: row.metric)
    between_runs = _corrected([row for row in rows if row.kind == "run"], lambda row: (row.evaluation_key, row.metric))
    run_order = {result.run_key: place for place, result in enumerate(results.runs)}
    return Statistics(
        against_base=sorted(against_base, key=lambda row: run_order[row.run_key]),
        between_runs=between_runs,
        replicates=compare_replicates(results, answers, evaluations),
        prompts=prompt_spreads(results),
        notes=notes,
        answers=answers,
        evaluations={evaluation.evaluation_key: evaluation for evaluation in evaluations},
    )


# ---------------------------------------------------------------- one evaluation


@dataclass(frozen=True)
class _System:
    """A run or base with its answers at the last step evaluated."""

    result: RunResult
    score: Score
    answers: Answers


def _answered(results: Results, answers: AnswerBook, evaluation: EvaluationSpec, notes: list[str]) -> list[_System]:
    systems, silent = [], []
    for result in results.runs:
        for score in result.scores_of(evaluation)[-1:]:
            own = answers.of(result.run_key, score.step, evaluation)
            if own is None:
                silent.append(result.name)
            else:
                systems.append(_System(result, score, own))
    if silent:
        notes.append(f"{evaluation.folder}: not compared, since no predictions are stored: {', '.join(silent)}")
    return systems


_Pair = tuple[Literal["base", "run"], _System, _System]
"""Kind, the other system, the run."""


def _compared(results: Results, systems: list[_System], evaluation: EvaluationSpec, notes: list[str]) -> list[Row]:
    """A row per metric and pair that has questions in common; all pairs of a metric are compared at once, with the same draws."""
    own_base = _against_base(systems)
    references = {result.run_key for result in results.references}
    peers = [system for system in systems if not system.result.is_base or system.result.run_key in references]
    if len(peers) > COMPARED_SYSTEMS:
        notes.append(f"{evaluation.folder}: of {len(peers)} systems the best of each metric is compared with each other one, not all pairs")
    rows = []
    for metric in METRICS:
        pairs = [*own_base, *_between(peers, metric)]
        found = compare_answers([(other.answers, run.answers) for _, other, run in pairs], metric)
        rows += [_row(pair, each, evaluation, metric) for pair, each in zip(pairs, found, strict=True) if each is not None]
    return rows


def _against_base(systems: list[_System]) -> list[_Pair]:
    by_key = {system.result.run_key: system for system in systems}
    return [
        ("base", by_key[system.result.spec.base_key], system)
        for system in systems
        if isinstance(system.result.spec, RunSpec) and system.result.spec.base_key in by_key
    ]


def _between(peers: list[_System], metric: Metric) -> list[_Pair]:
    if len(peers) <= COMPARED_SYSTEMS:
        return [("run", other, system) for system, other in combinations(peers, 2)]
    best = max(peers, key=lambda system: system.score.value(metric))
    return [("run", other, best) for other in peers if other is not best]


def _row(pair: _Pair, found: Comparison, evaluation: EvaluationSpec, metric: Metric) -> Row:
    kind, other, run = pair
    return Row(
        run_key=run.result.run_key,
        other_key=other.result.run_key,
        kind=kind,
        benchmark=evaluation.benchmark.name,
        shots=evaluation.shots,
        prompt=evaluation.prompt.name,
        scoring=evaluation.scoring,
        metric=metric,
        n=found.n,
        difference=found.difference,
        low=found.low,
        high=found.high,
        p=found.p,
        p_holm=found.p,  # until the family is known
        effect=found.effect,
        effect_name=found.effect_name,
        questions_needed=found.questions_needed,
        reversal_of_50=found.reversal,
        method=found.method,
        step=run.score.step,
        other_step=other.score.step,
        evaluation_key=evaluation.evaluation_key,
    )


def _corrected(rows: list[Row], family: Callable[[Row], Hashable]) -> list[Row]:
    families: dict[Hashable, list[int]] = {}
    for place, row in enumerate(rows):
        families.setdefault(family(row), []).append(place)
    corrected = {
        place: p for places in families.values() for place, p in zip(places, holm([rows[place].p for place in places]), strict=True)
    }
    return [replace(row, p_holm=corrected[place]) for place, row in enumerate(rows)]
