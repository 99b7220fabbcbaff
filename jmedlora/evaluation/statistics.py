"""Whether two systems that answered the same questions differ: paired tests, sizes of effects, and how far to trust few questions.

A system is a column of values, one per question: right or wrong (shares), or anything from 0 to 1 (scores). Replicates, such as
the same run with several seeds, are averaged per question first: questions are what was sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import bdtr
from scipy.stats import hypergeom, norm
from statsmodels.stats.power import TTestPower

from jmedlora.evaluation.resampling import (
    RESAMPLES,
    SUBSET,
    TIE,
    Interval,
    bootstrap_interval,
    bootstrap_sums,
    intervals,
    question_means,
    signed_sums,
    subset_sums,
)

__all__ = [
    "Comparison",
    "Interval",
    "bootstrap_interval",
    "compare_score_pairs",
    "compare_scores",
    "compare_share_pairs",
    "compare_shares",
    "holm",
]

POWER, ALPHA = 0.8, 0.05
_Z_ALPHA, _Z_POWER = float(norm.isf(ALPHA / 2)), float(norm.ppf(POWER))
_FEW_FLIPS = 20  # fewer sign flips than this, of 10,000, do not tell a p
_T_QUESTIONS = 10_000  # from here on t and normal ask for the same number of questions

MCNEMAR = "exact McNemar"
SIGN_FLIPS = f"sign flips, {RESAMPLES}"
SIGN_FLIPS_EXACT = "sign flips, exact"
SIGN_FLIPS_TAIL = "sign flips, saddlepoint"


@dataclass(frozen=True)
class Comparison:
    """The second system against the first on `n` questions."""

    n: int
    difference: float
    """Mean of the second minus mean of the first."""
    low: float
    high: float
    """95 % bounds of the difference, by resampling questions (`bootstrap_interval`)."""
    p: float
    """Two-sided."""
    effect: float
    effect_name: Literal["odds_ratio", "cohens_dz"]
    """Odds ratio of the discordant pairs: above 1 where the second is better. Cohen's d_z: mean difference / its standard
    deviation over questions; infinite where all questions differ by the same amount."""
    questions_needed: int | None
    """Questions for 80 % power at 5 %, were the truth what was observed; None where the means are equal."""
    reversal: float | None
    """Share of random samples of 50 questions whose difference has the opposite sign; None where there are no more than 50
    questions to sample from, or the means are equal."""
    method: str
    """How p was found."""


def compare_shares(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Comparison:
    """Right or wrong answers to the same questions, (questions,): exact McNemar test.

    The odds ratio is that of discordant pairs; where one kind of them is missing, half a pair is added to both (Haldane).
    questions_needed is Connor's formula for McNemar's test (1987). reversal is exact (hypergeometric).
    With (questions, replicates) in either, a question has a mean instead of an answer: the comparison is then that of
    `compare_scores`, and its method says so. Raises ValueError for values that are neither right nor wrong.
    """
    _require_shares(np.asarray(first), np.asarray(second))
    if _replicates(first) > 1 or _replicates(second) > 1:
        return compare_scores(first, second, seed)
    return compare_share_pairs(_columns(first, second), [(0, 1)], seed)[0]


def compare_scores(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Comparison:
    """Scores of the same questions, (questions,) or (questions, replicates): paired permutation test by sign flips.

    All flips are counted where few differences are not zero (13 or fewer), else 10,000 random ones (p = (hits + 1) / 10,001).
    Where fewer than 20 of those reach the observed difference, p is the saddlepoint approximation (Lugannani and Rice 1980) of
    the same distribution: else no p could be below 1e-4, and none would survive a correction for many comparisons.
    questions_needed is the paired t-test's. reversal counts 10,000 random samples.
    """
    comparison = compare_score_pairs(_columns(first, second), [(0, 1)], seed)[0]
    replicates = max(_replicates(first), _replicates(second))
    return comparison if replicates == 1 else averaged(comparison, replicates)


def averaged(comparison: Comparison, replicates: int) -> Comparison:
    """The comparison, with a method that tells of the replicates."""
    return Comparison(**{**vars(comparison), "method": f"{comparison.method}, on means of {replicates} replicates"})


def holm(p_values: Sequence[float]) -> list[float]:
    """p values after Holm's step-down correction, in the same order; an empty family stays empty."""
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1)
    return corrected.tolist()


# ---------------------------------------------------------------- many pairs at once


def compare_share_pairs(values: np.ndarray, pairs: Sequence[tuple[int, int]], seed: int = 0) -> list[Comparison]:
    """`compare_shares` of pairs (first, second) of columns of `values`, (questions, systems): the same numbers, drawn once."""
    values = np.asarray(values, dtype=np.float64)
    _require_shares(values)
    sums = bootstrap_sums(values, seed)
    return [_compare_shares(values[:, second] - values[:, first], sums[:, second] - sums[:, first]) for first, second in pairs]


def compare_score_pairs(values: np.ndarray, pairs: Sequence[tuple[int, int]], seed: int = 0) -> list[Comparison]:
    """`compare_scores` of pairs (first, second) of columns of `values`, (questions, systems): the same numbers, drawn once."""
    values = np.asarray(values, dtype=np.float64)
    sums, flips = bootstrap_sums(values, seed), signed_sums(values, seed)
    subsets = subset_sums(values, seed) if len(values) > SUBSET else np.zeros((0, values.shape[1]))
    comparisons = []
    for first, second in pairs:
        differences = values[:, second] - values[:, first]
        of_pair = (drawn[:, second] - drawn[:, first] for drawn in (sums, flips, subsets))
        comparisons.append(_compare_scores(differences, *of_pair))
    return comparisons


def _columns(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    columns = question_means(first), question_means(second)
    if len(columns[0]) != len(columns[1]):
        raise ValueError(f"{len(columns[0])} and {len(columns[1])} questions cannot be paired")
    return np.column_stack(columns)


def _replicates(values: np.ndarray) -> int:
    shape = np.shape(values)
    return shape[1] if len(shape) == 2 else 1


def _require_shares(*arrays: np.ndarray) -> None:
    if not all(np.isin(values, (0, 1)).all() for values in arrays):
        raise ValueError("right and wrong answers are 1 and 0 (or True and False)")


# ---------------------------------------------------------------- shares


def _compare_shares(differences: np.ndarray, sums: np.ndarray) -> Comparison:
    n, gained, lost = len(differences), int((differences > 0).sum()), int((differences < 0).sum())
    half = 0.5 if min(gained, lost) == 0 else 0.0
    [bounds] = intervals(differences[:, None], sums[:, None], lowest=-1)
    return Comparison(
        n=n,
        difference=(gained - lost) / n,
        low=bounds.low,
        high=bounds.high,
        p=min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5))),
        effect=(gained + half) / (lost + half),
        effect_name="odds_ratio",
        questions_needed=_questions_for_mcnemar((gained - lost) / n, (gained + lost) / n),
        reversal=_reversal_of_shares(n, gained, lost),
        method=MCNEMAR,
    )


def _questions_for_mcnemar(difference: float, discordance: float) -> int | None:
    if difference == 0:
        return None
    spread = _Z_ALPHA * math.sqrt(discordance) + _Z_POWER * math.sqrt(discordance - difference**2)
    return math.ceil(spread**2 / difference**2)


def _reversal_of_shares(n: int, gained: int, lost: int) -> float | None:
    """Discordant questions in the sample are hypergeometric, and so are, among those, the ones that contradict the whole."""
    if n <= SUBSET or gained == lost:
        return None
    discordant = np.arange(SUBSET + 1)
    share = hypergeom.pmf(discordant, n, gained + lost, SUBSET)
    possible = share > 0
    contradicting = hypergeom.sf(discordant[possible] // 2, gained + lost, min(gained, lost), discordant[possible])
    return float(share[possible] @ contradicting)


# ---------------------------------------------------------------- scores


def _compare_scores(differences: np.ndarray, sums: np.ndarray, flips: np.ndarray, subsets: np.ndarray) -> Comparison:
    differences = np.where(np.abs(differences) <= TIE, 0.0, differences)
    total = float(differences.sum())
    p, method = _sign_flips(np.abs(differences[differences != 0]), abs(total), flips)
    effect = _cohens_dz(differences)
    [bounds] = intervals(differences[:, None], sums[:, None], lowest=-1)
    return Comparison(
        n=len(differences),
        difference=total / len(differences) if abs(total) > TIE else 0.0,
        low=bounds.low,
        high=bounds.high,
        p=p,
        effect=effect,
        effect_name="cohens_dz",
        questions_needed=_questions_for_t(effect),
        reversal=float((subsets * np.sign(total) < -TIE).mean()) if len(subsets) and abs(total) > TIE else None,
        method=method,
    )


def _sign_flips(sizes: np.ndarray, observed: float, flips: np.ndarray) -> tuple[float, str]:
    """Two-sided p of a sum of `sizes` (k,), each with a random sign, and how it was found."""
    if 2 ** len(sizes) <= RESAMPLES:
        signs = 2.0 * (np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes)) & 1) - 1
        return float((np.abs(signs @ sizes) >= observed - TIE).mean()), SIGN_FLIPS_EXACT
    hits = int((np.abs(flips) >= observed - TIE).sum())
    if hits >= _FEW_FLIPS:
        return (hits + 1) / (len(flips) + 1), SIGN_FLIPS
    return _saddlepoint(sizes, observed), SIGN_FLIPS_TAIL


def _saddlepoint(sizes: np.ndarray, observed: float) -> float:
    """2 P(sum of randomly signed sizes >= observed), for an `observed` far out; its cumulant is the sum of log cosh(t size).

    Sums of whole units lie two units apart: Daniels' correction (1987) sets the bound half-way between two of them.
    """
    least = 2.0 ** (1 - len(sizes))  # of all signs alike
    if sizes.sum() - observed <= TIE:
        return least
    unit = _unit(sizes)
    bound = observed - unit
    point = bound / (sizes @ sizes)
    for _ in range(100):  # Newton from below, where it cannot overshoot: the derivative is concave
        slope = np.tanh(point * sizes)
        step = (bound - sizes @ slope) / (sizes**2 @ (1 - slope**2))
        point += step
        if step <= 1e-12 * point:
            break
    cumulant = (np.logaddexp(point * sizes, -point * sizes) - math.log(2)).sum()
    root = math.sqrt(2 * (point * bound - cumulant))
    scaled = math.sqrt(sizes**2 @ (1 - np.tanh(point * sizes) ** 2)) * (math.sinh(point * unit) / unit if unit else point)
    tail = norm.sf(root) + norm.pdf(root) * (1 / scaled - 1 / root)
    return float(min(1.0, max(least, 2 * tail)))


def _unit(sizes: np.ndarray) -> float:
    """What all sizes are multiples of, where they are means of up to ten answers (2520 is a multiple of 1 to 10); else 0."""
    whole = np.rint(sizes * 2520).astype(np.int64)
    return float(np.gcd.reduce(whole)) / 2520 if np.allclose(sizes * 2520, whole, rtol=0, atol=1e-6) else 0.0


def _cohens_dz(differences: np.ndarray) -> float:
    mean = float(differences.mean())
    if np.ptp(differences) <= TIE:
        return math.copysign(math.inf, mean) if abs(mean) > TIE else 0.0
    return mean / float(differences.std(ddof=1))


def _questions_for_t(effect: float) -> int | None:
    """Fewest questions with which a two-sided paired t-test of this d_z has the power."""
    if abs(effect) <= TIE:
        return None
    if math.isinf(effect):
        return 2
    normal = math.ceil(((_Z_ALPHA + _Z_POWER) / effect) ** 2)
    if normal > _T_QUESTIONS:
        return normal
    candidates = np.arange(2, 9) if normal < 4 else np.arange(normal, normal + 6)  # Student's t asks for two or three questions more
    power = np.nan_to_num(TTestPower().power(abs(effect), candidates, ALPHA), nan=1.0)  # scipy cannot tell it where it is all but 1
    return int(candidates[np.argmax(power >= POWER)])
