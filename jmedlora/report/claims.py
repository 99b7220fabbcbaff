"""What the study claimed, judged by a sweep: each claim supported, contradicted or undecided, with the numbers behind it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from scipy.stats import norm

from jmedlora.evaluation.statistics import ALPHA, POWER
from jmedlora.plan.specs import EvaluationSpec, RunSpec
from jmedlora.report.answers import AnswerBook
from jmedlora.report.collect import Metric, Results
from jmedlora.report.comparison import METRIC_NAMES
from jmedlora.report.contrasts import (
    against_base,
    contrast_of,
    english_beats_japanese,
    example_helps_less,
    is_neox,
    larger_gains_more,
    more_epochs_hurt,
    one_epoch_helps,
    one_shot_declines,
    pretraining,
    tuning_improves,
    with_shots,
)
from jmedlora.report.evidence import (
    DECIDING,
    RULE,
    Board,
    Contrast,
    Direction,
    Evidence,
    Verdict,
    decide,
    evaluation_name,
    figures,
    weigh,
)

_SYNTHETIC = ("synthetic", "made-up", "合成")


@dataclass(frozen=True)
class Claim:
    """One claim of the study that the sweep can speak to."""

    number: str
    claim: str
    verdict: Verdict
    why: str
    evidence: list[Evidence]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class OpenClaim:
    """A claim that the sweep cannot speak to, and what it would need."""

    number: str
    claim: str
    needs: str


@dataclass(frozen=True)
class Limit:
    """What the questions of one evaluation can show of a run against its base."""

    evaluation: str
    metric: Metric
    n: int
    detectable: float
    """Difference that is found with 80 % power at 5 %, for the median run: 2.8 standard errors of the paired difference."""
    comparisons: int
    """Runs that the median is over."""


@dataclass(frozen=True)
class Study:
    """All claims judged; `limits` is the study's own doubt about few questions, as numbers."""

    rule: str
    evaluations: list[str]
    """What the claims are judged on."""
    is_synthetic: bool
    claims: list[Claim]
    open: list[OpenClaim]
    limits: list[Limit]


def judge_claims(results: Results, answers: AnswerBook) -> Study:
    """Every claim by what is stored so far; runs count at the last step that is evaluated."""
    board = Board(answers)
    evaluations = studied_evaluations(results.plan.evaluations)
    asked = [(question.contrasts(results, board, evaluations), question.direction) for question in _CLAIMS]
    beside = [(question.beside(results, board, evaluations), question.direction) for question in _CLAIMS]
    weighed = weigh([*asked, *beside], board)
    claims: list[Claim] = []
    left: list[OpenClaim] = []
    for question, rows, others in zip(_CLAIMS, weighed, weighed[len(_CLAIMS) :], strict=False):
        if any(row.decides for row in rows):
            notes = [*_told(others), *question.remarks(results)]
            claims.append(Claim(question.number, question.claim, *decide(rows), rows, notes))
        else:
            left.append(OpenClaim(question.number, question.claim, question.needs))
    names = [evaluation_name(item) for item in evaluations]
    return Study(RULE, names, is_synthetic(results), claims, left, _limits(results, board, evaluations))


def claims_json(study: Study) -> str:
    """claims.json: the whole structure, every number unrounded."""
    return json.dumps(asdict(study), ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def studied_evaluations(evaluations: Sequence[EvaluationSpec]) -> list[EvaluationSpec]:
    """Those made the study's way, a written answer scored by the choices' texts; all where the sweep has none of them."""
    own = [item for item in evaluations if item.scoring == "generate" and item.prompt.answer == "text"]
    return own or list(evaluations)


def is_synthetic(results: Results) -> bool:
    """True where data or questions say of themselves that they are made up."""
    notes = [result.spec.data.note for result in results.runs if isinstance(result.spec, RunSpec)]
    notes += [item.benchmark.note for item in results.plan.evaluations]
    return any(word in note.lower() for note in notes for word in _SYNTHETIC)


# ---------------------------------------------------------------- notes


def _told(rows: Sequence[Evidence]) -> list[str]:
    """A line per contrast, with all its metrics."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        lines.setdefault((row.second, row.first), []).append(f"{METRIC_NAMES[row.metric]} {figures(row)}")
    return [f"{second} against {first}, of which the study says nothing: {'; '.join(told)}." for (second, first), told in lines.items()]


def _nothing_beside(results: Results, board: Board, evaluations: Sequence[EvaluationSpec]) -> list[Contrast]:
    return []


def _other_families(results: Results, board: Board, evaluations: Sequence[EvaluationSpec]) -> list[Contrast]:
    """The 1-shot question put to families of which the study did not say it."""
    families = dict.fromkeys(result.spec.model.family for result in results.tuned if not is_neox(result))
    contrasts = []
    for family in families:
        runs = [result for result in results.tuned if result.spec.model.family == family]
        pairs = against_base(results, board, with_shots(evaluations, 1), runs)
        contrasts += [contrast_of(pairs, "before tuning", f"{family} models, 1-shot, after tuning")] if pairs else []
    return contrasts


def _no_remarks(results: Results) -> list[str]:
    return []


def _differing_methods(results: Results) -> list[str]:
    by_model: dict[str, set[tuple[str, str]]] = {}
    for result in results.tuned:
        by_model.setdefault(result.model, set()).add((result.method, result.spec.precision))
    if len({frozenset(each) for each in by_model.values()}) < 2:
        return []
    return ["The models were not tuned by the same methods or in the same number format, so that size is not all that differs."]


# ---------------------------------------------------------------- limits


def _limits(results: Results, board: Board, evaluations: Sequence[EvaluationSpec]) -> list[Limit]:
    factor = float(norm.isf(ALPHA / 2) + norm.ppf(POWER))
    limits = []
    for evaluation in evaluations:
        pairs = against_base(results, board, [evaluation], results.tuned)
        for metric in DECIDING:
            errors, sizes = [], []
            for pair in pairs:
                first, second = board.pair(contrast_of([pair], "", ""), metric)
                if len(first) > 1 and (deviation := float(np.std(second - first, ddof=1))) > 0:
                    errors.append(deviation / np.sqrt(len(first)))
                    sizes.append(len(first))
            if errors:
                limits.append(Limit(evaluation_name(evaluation), metric, min(sizes), factor * float(np.median(errors)), len(errors)))
    return limits


# ---------------------------------------------------------------- the claims

_Contrasts = Callable[[Results, Board, Sequence[EvaluationSpec]], list[Contrast]]


@dataclass(frozen=True)
class _Question:
    """A claim, how it is put to the sweep, and what a sweep needs to answer."""

    number: str
    claim: str
    direction: Direction
    contrasts: _Contrasts
    needs: str
    beside: _Contrasts = _nothing_beside
    remarks: Callable[[Results], list[str]] = _no_remarks


_CLAIMS: Sequence[_Question] = (
    _Question(
        "1a",
        "Instruction tuning improves the scores.",
        "higher",
        tuning_improves,
        "a tuned run and its base, both evaluated",
    ),
    _Question(
        "1b",
        "The larger model gains more from tuning.",
        "higher",
        larger_gains_more,
        "tuned runs of two models of which one has at least half as many parameters again, with their bases",
        remarks=_differing_methods,
    ),
    _Question(
        "2a",
        "One epoch of tuning helps.",
        "higher",
        one_epoch_helps,
        "a run of one epoch, or a checkpoint after the first epoch, and its base",
    ),
    _Question(
        "2b",
        "More epochs than one make it worse.",
        "lower",
        more_epochs_hurt,
        "equal settings evaluated after one epoch and after at least one and a half: several durations, or checkpoints at epoch ends",
    ),
    _Question(
        "3",
        "Additional pretraining on medical text gives no gain.",
        "no gain",
        pretraining,
        "models named medcalm… and open-calm… of the same size with equal settings, or both as they are",
    ),
    _Question(
        "4a",
        "Tuning makes the 1-shot scores of OpenCALM-based models worse.",
        "lower",
        one_shot_declines,
        "a tuned run of the GPT-NeoX family and its base, both evaluated 1-shot",
        beside=_other_families,
    ),
    _Question(
        "4b",
        "After tuning, a solved example in the prompt helps OpenCALM-based models less than before.",
        "lower",
        example_helps_less,
        "a tuned run of the GPT-NeoX family and its base, both evaluated 0-shot and 1-shot",
    ),
    _Question(
        "5",
        "The English-centric 70B model beats the Japanese-centric 7B model.",
        "higher",
        english_beats_japanese,
        "an English-centric model of at least 40 billion parameters and a Japanese-centric one of at most 13 billion",
    ),
)
