"""How far two ways of scoring the same systems rank them alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata, t

from jmedlora.evaluation.resampling import bootstrap_sums
from jmedlora.evaluation.statistics import holm

FEWEST_SYSTEMS = 3
"""Two systems have one order or the other: a correlation of ranks says nothing of them."""
_DIGITS = 9  # sums that differ below this are ties, added up in another order
_MOST_RESAMPLES, _FEWEST_RESAMPLES = 2_000, 200
_WORK = 40_000_000  # pairs of systems x resamples
_CHUNK = 4_000_000  # the same, at once


@dataclass(frozen=True)
class Estimate:
    """A correlation from -1 to 1 with 95 % bounds: 1.96 standard errors to both sides, found by resampling questions.

    Percentiles would not do: resampling adds noise of its own, so that nearly every resampled order agrees less than the observed one.
    All None where everything is tied.
    """

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class OrderChange:
    """Two systems of which one is significantly better by one way, and significantly worse by the other."""

    one: str
    other: str
    first_difference: float
    """Score of `other` minus score of `one`, by the first way."""
    second_difference: float
    p_holm: float
    """The larger of both ways' paired t-tests, after Holm's correction over all pairs."""


@dataclass(frozen=True)
class RankAgreement:
    """Two rankings of the same systems on the same questions."""

    systems: int
    questions: int
    tau: Estimate
    """Kendall's tau-b."""
    rho: Estimate
    """Spearman's rank correlation."""
    pairs: int
    discordant: int
    """Pairs of systems in opposite order; ties are in neither."""
    changed: list[OrderChange]


def compare_ranks(names: Sequence[str], first: np.ndarray, second: np.ndarray, seed: int = 0) -> RankAgreement:
    """Both (questions, systems): scores of the same systems on the same questions by two ways; at least three systems.

    Resampled are the questions, the same ones in both ways.
    """
    questions, systems = first.shape
    left, right = np.triu_indices(systems, 1)
    means = [np.round(values.sum(axis=0), _DIGITS) for values in (first, second)]
    resamples = max(_FEWEST_RESAMPLES, min(_MOST_RESAMPLES, _WORK // len(left)))
    drawn = [np.round(bootstrap_sums(values, seed, resamples), _DIGITS) for values in (first, second)]
    signs = [np.sign(each[right] - each[left]) for each in means]
    return RankAgreement(
        systems=systems,
        questions=questions,
        tau=_estimate(kendall_tau(*(each[None] for each in means)), kendall_tau(*drawn)),
        rho=_estimate(spearman_rho(*(each[None] for each in means)), spearman_rho(*drawn)),
        pairs=len(left),
        discordant=int((signs[0] * signs[1] < 0).sum()),
        changed=_changes(names, first, second),
    )


def kendall_tau(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """tau-b of each row; both (rows, systems), the result (rows,); NaN where all systems of a row are tied."""
    left, right = np.triu_indices(first.shape[1], 1)
    rows = max(1, _CHUNK // len(left))
    parts = [_tau(first[start : start + rows], second[start : start + rows], left, right) for start in range(0, len(first), rows)]
    return np.concatenate(parts)


def _tau(first: np.ndarray, second: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    one, other = (np.sign(values[:, right] - values[:, left]) for values in (first, second))
    untied = np.sqrt((one != 0).sum(axis=1) * (other != 0).sum(axis=1))
    return np.divide((one * other).sum(axis=1), untied, out=np.full(len(first), np.nan), where=untied > 0)


def spearman_rho(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Rank correlation of each row; shapes as in `kendall_tau`."""
    one, other = (rankdata(values, axis=1) for values in (first, second))
    one, other = one - one.mean(axis=1, keepdims=True), other - other.mean(axis=1, keepdims=True)
    spread = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
    return np.divide((one * other).sum(axis=1), spread, out=np.full(len(first), np.nan), where=spread > 0)


def _estimate(value: np.ndarray, drawn: np.ndarray) -> Estimate:
    if np.isnan(value[0]) or np.isnan(drawn).all():
        return Estimate(None, None, None)
    centre, reach = round(float(value[0]), _DIGITS), round(float(1.96 * np.nanstd(drawn)), _DIGITS)
    return Estimate(centre, max(-1.0, centre - reach), min(1.0, centre + reach))


def _changes(names: Sequence[str], first: np.ndarray, second: np.ndarray) -> list[OrderChange]:
    """Most certain first."""
    left, right = np.triu_indices(first.shape[1], 1)
    (one, p_one), (other, p_other) = (_paired_t(values, left, right) for values in (first, second))
    opposite = one * other < 0
    p = np.where(opposite, np.maximum(p_one, p_other), 1.0)  # both must be certain
    corrected = holm(p.tolist())
    found = [
        OrderChange(names[left[i]], names[right[i]], float(one[i]), float(other[i]), corrected[i])
        for i in np.flatnonzero(opposite)
        if corrected[i] < 0.05
    ]
    return sorted(found, key=lambda change: change.p_holm)


def _paired_t(values: np.ndarray, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean differences of all pairs of systems, and two-sided p of each: both (pairs,)."""
    questions = len(values)
    means = values.mean(axis=0)
    differences = means[right] - means[left]
    if questions < 2:
        return differences, np.ones(len(left))
    covariance = np.atleast_2d(np.cov(values, rowvar=False))
    variances = np.maximum(covariance[left, left] + covariance[right, right] - 2 * covariance[left, right], 0)
    errors = np.sqrt(variances / questions)
    ratios = np.divide(np.abs(differences), errors, out=np.where(np.abs(differences) > 0, np.inf, 0.0), where=errors > 0)
    return differences, 2 * t.sf(ratios, questions - 1)
