"""Evidence for a claim: systems compared question by question, and the rule by which comparisons decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from jmedlora.evaluation.statistics import ALPHA, Comparison, compare_score_pairs, compare_share_pairs, holm
from jmedlora.plan.specs import EvaluationSpec
from jmedlora.report.answers import AnswerBook
from jmedlora.report.collect import Metric, RunResult
from jmedlora.report.comparison import METRIC_NAMES

DECIDING: tuple[Metric, ...] = ("accuracy", "gestalt_score")
NO_GAIN_MARGIN = 0.02
"""A gain below this does not count as one where a claim says that there is none: two points."""
FEWEST_QUESTIONS = 200
"""Below this a claim stays undecided: the study itself doubts what its fifty questions show, and asks for two hundred."""
CONTRARY_SHARE = 0.1
"""Of the single comparisons beside what decides: more of them than this must not say the opposite."""
RULE = (
    "Each claim is decided by one comparison per metric, made over everything that speaks to it: a question's scores are averaged over "
    "runs, shots and prompts first, so that the questions are what is sampled. It counts where the 95 % interval leaves out zero and p, "
    "after Holm's correction, is below 0.05; “no gain” counts where the interval ends below two points. Accuracy and Gestalt score must "
    "say the same, and of the single comparisons no more than one in ten may say the opposite after a correction of their own; otherwise "
    "the claim is undecided, and so it is with fewer than 200 questions, the number that the study asks for."
)

_COMPARED_AT_ONCE = 100  # 10,000 sums of three kinds are held for each side: half a MB a comparison

Verdict = Literal["supported", "contradicted", "undecided"]
Direction = Literal["higher", "lower", "no gain"]
"""What a claim says of the second system, measured against the first."""
Bearing = Literal["for", "against", "neither"]


@dataclass(frozen=True)
class Point:
    """A system after `step` optimizer steps; a bare model at step 0."""

    result: RunResult
    step: int


Reading = tuple[tuple[int, Point, EvaluationSpec], ...]
"""A sum of a question's scores with their signs: one score, or a gain (tuned minus base), or a gain of gains."""


@dataclass(frozen=True)
class Contrast:
    """Two sides to be compared; each side's readings are averaged question by question."""

    first_name: str
    second_name: str
    over: str
    """On what: benchmarks, shots, prompts."""
    decides: bool
    """True for the comparison that decides, False for a single one beside it."""
    first: list[Reading]
    second: list[Reading]


@dataclass(frozen=True)
class Evidence:
    """One comparison behind a verdict: `difference` is the second side's mean minus the first's."""

    decides: bool
    first: str
    second: str
    over: str
    metric: Metric
    n: int
    """Questions."""
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    """p after Holm's correction among the claim's deciding comparisons, or among its single ones."""
    effect: float | None
    """None where it is infinite: all questions differ by the same amount."""
    effect_name: str
    questions_needed: int | None
    """Questions for 80 % power at 5 %, were the true difference the observed one."""
    reversal_of_50: float | None
    """Share of random samples of 50 questions that would have said the opposite."""
    bearing: Bearing


class Board:
    """Scores of all questions of a sweep: a vector per system, evaluation and metric, one place per question of any benchmark."""

    def __init__(self, answers: AnswerBook):
        self._answers = answers
        self._places: dict[tuple[str, str], int] = {}
        self._looked_up: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}

    def has(self, point: Point, evaluation: EvaluationSpec) -> bool:
        """True where the predictions are stored."""
        return self._answers.of(point.result.run_key, point.step, evaluation) is not None

    def scores(self, point: Point, evaluation: EvaluationSpec, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
        """Places of the questions and their scores, both (questions,)."""
        own = self._answers.of(point.result.run_key, point.step, evaluation)
        if own is None:
            raise ValueError(f"{point.result.run_key} has no predictions after {point.step} steps for {evaluation.folder}")
        asked = evaluation.benchmark.name, own.problem_ids
        if asked not in self._looked_up:
            places = [self._places.setdefault((asked[0], problem), len(self._places)) for problem in own.problem_ids]
            self._looked_up[asked] = np.array(places, dtype=np.int64)
        return self._looked_up[asked], own.scores(metric)

    def mean(self, readings: Sequence[Reading], metric: Metric) -> np.ndarray:
        """The readings' mean by question, (places,); NaN where none of them has the question."""
        sums, counts = np.zeros(0), np.zeros(0)
        for reading in readings:
            total, seen = np.zeros(0), np.zeros(0)
            for sign, point, evaluation in reading:
                places, values = self.scores(point, evaluation, metric)
                total, seen = _grown(total, len(self._places)), _grown(seen, len(self._places))
                total[places] += sign * values
                seen[places] += 1
            whole = seen == len(reading)  # a sum without one of its parts is no reading
            sums, counts = _grown(sums, len(whole)), _grown(counts, len(whole))
            sums[whole] += total[whole]
            counts[whole] += 1
        return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)

    def pair(self, contrast: Contrast, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
        """Both sides of a contrast on the questions that both have, each (questions,)."""
        first, second = self.mean(contrast.first, metric), self.mean(contrast.second, metric)
        shared = min(len(first), len(second))
        both = ~np.isnan(first[:shared]) & ~np.isnan(second[:shared])
        return first[:shared][both], second[:shared][both]


def _grown(values: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([values, np.zeros(length - len(values))]) if len(values) < length else values


# ---------------------------------------------------------------- comparing


def weigh(asked: Sequence[tuple[Sequence[Contrast], Direction]], board: Board) -> list[list[Evidence]]:
    """For each claim its contrasts by accuracy and Gestalt score, what decides first; those without a question in common are left out.

    All claims at once, since random numbers are drawn once for all comparisons on as many questions.
    """
    items = [
        (place, contrast, metric)
        for place, (contrasts, _) in enumerate(asked)
        for contrast in sorted(contrasts, key=lambda each: not each.decides)
        for metric in DECIDING
    ]
    found = _compare([board.pair(contrast, metric) for _, contrast, metric in items], [metric for _, _, metric in items])
    weighed = []
    for place, (_, direction) in enumerate(asked):
        rows = [_evidence(item[1], item[2], own) for item, own in zip(items, found, strict=True) if item[0] == place and own is not None]
        families = [[row for row in rows if row.decides == decides] for decides in (True, False)]
        weighed.append([row for family in families for row in _judged(family, direction)])
    return weighed


def _compare(pairs: list[tuple[np.ndarray, np.ndarray]], metrics: Sequence[Metric]) -> list[Comparison | None]:
    """`compare_shares` or `compare_scores` of every pair, drawn once for those of as many questions; None without questions.

    McNemar's test needs rights and wrongs: means over several systems are compared like scores.
    """
    found: list[Comparison | None] = [None] * len(pairs)
    groups: dict[tuple[int, bool], list[int]] = {}
    for index, ((first, second), metric) in enumerate(zip(pairs, metrics, strict=True)):
        shares = metric != "gestalt_score" and all(bool(np.isin(side, (0, 1)).all()) for side in (first, second))
        if len(first):
            groups.setdefault((len(first), shares), []).append(index)
    for (_, shares), indices in groups.items():
        for chunk in (indices[start : start + _COMPARED_AT_ONCE] for start in range(0, len(indices), _COMPARED_AT_ONCE)):
            columns = np.column_stack([side for index in chunk for side in pairs[index]])
            places = [(2 * place, 2 * place + 1) for place in range(len(chunk))]
            compared = (compare_share_pairs if shares else compare_score_pairs)(columns, places)
            for index, comparison in zip(chunk, compared, strict=True):
                found[index] = comparison
    return found


def _evidence(contrast: Contrast, metric: Metric, found: Comparison) -> Evidence:
    return Evidence(
        decides=contrast.decides,
        first=contrast.first_name,
        second=contrast.second_name,
        over=contrast.over,
        metric=metric,
        n=found.n,
        difference=found.difference,
        low=found.low,
        high=found.high,
        p=found.p,
        p_holm=found.p,
        effect=found.effect if math.isfinite(found.effect) else None,
        effect_name=found.effect_name,
        questions_needed=found.questions_needed,
        reversal_of_50=found.reversal,
        bearing="neither",
    )


def _judged(rows: list[Evidence], direction: Direction) -> list[Evidence]:
    corrected = [replace(row, p_holm=p) for row, p in zip(rows, holm([row.p for row in rows]), strict=True)]
    return [replace(row, bearing=_bearing(row, direction)) for row in corrected]


def _bearing(row: Evidence, direction: Direction) -> Bearing:
    certain = row.p_holm < ALPHA
    better, worse = certain and row.low > 0, certain and row.high < 0
    if direction == "no gain":
        return "against" if better else "for" if row.high < NO_GAIN_MARGIN else "neither"
    if direction == "lower":
        better, worse = worse, better
    return "for" if better else "against" if worse else "neither"


# ---------------------------------------------------------------- deciding


def decide(rows: Sequence[Evidence]) -> tuple[Verdict, str]:
    """The verdict of a claim's rows, and why in one sentence."""
    deciding, single = [row for row in rows if row.decides], [row for row in rows if not row.decides]
    told = f"{deciding[0].second} against {deciding[0].first}: "
    told += "; ".join(f"{METRIC_NAMES[row.metric]} {figures(row)}" for row in deciding)
    bearings = {row.bearing for row in deciding}
    fewest = min(row.n for row in deciding)
    if bearings == {"for"} or bearings == {"against"}:
        opposite = "against" if bearings == {"for"} else "for"
        contrary = sum(row.bearing == opposite for row in single)
        if contrary:
            told += f"; but {contrary} of {len(single)} single comparisons say the opposite"
        if contrary > CONTRARY_SHARE * len(single):
            return "undecided", told
        if fewest < FEWEST_QUESTIONS:
            return "undecided", f"{told}; but {fewest} questions are fewer than the {FEWEST_QUESTIONS} that the study asks for"
        return ("supported" if bearings == {"for"} else "contradicted"), told
    if bearings == {"neither"}:
        return "undecided", f"{told}; {fewest} questions do not tell enough"
    words = " and ".join(f"{METRIC_NAMES[row.metric]} speaks {_BEARINGS[row.bearing]}" for row in deciding)
    return "undecided", f"{told}; the metrics do not agree: {words}"


_BEARINGS = {"for": "for it", "against": "against it", "neither": "neither for nor against it"}


def figures(row: Evidence) -> str:
    """Such as `+4.1 points (95 % interval +2.0 to +6.2, p = 0.003)`."""
    return f"{points(row.difference)} points (95 % interval {points(row.low)} to {points(row.high)}, {p_text(row.p_holm)})"


def points(value: float) -> str:
    """A share in hundredths, one decimal, with its sign."""
    text = f"{100 * value:+.1f}"
    return "±0.0" if float(text) == 0 else text.replace("-", "−")


def p_text(p: float) -> str:
    """`p = 0.031`, or `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


# ---------------------------------------------------------------- words


def evaluation_name(evaluation: EvaluationSpec) -> str:
    """Such as `igakuqa, 1-shot, exam-ja, log-likelihood`."""
    way = ", log-likelihood" if evaluation.scoring == "loglikelihood" else ""
    return f"{evaluation.benchmark.name}, {evaluation.shots}-shot, {evaluation.prompt.name}{way}"


def evaluations_name(evaluations: Sequence[EvaluationSpec]) -> str:
    """All of them in one: `igakuqa and jjsimqa, 0-shot and 1-shot, alpaca-ja`."""
    parts = [
        [item.benchmark.name for item in evaluations],
        [f"{shots}-shot" for shots in sorted({item.shots for item in evaluations})],
        [item.prompt.name for item in evaluations],
        ["log-likelihood"] if any(item.scoring == "loglikelihood" for item in evaluations) else [],
    ]
    return ", ".join(_listed(list(dict.fromkeys(part))) for part in parts if part)


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
