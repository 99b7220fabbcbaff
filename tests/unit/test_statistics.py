"""Intervals, paired tests and what they say of few questions, against references, by enumeration and by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from jmedlora.evaluation.resampling import SUBSET, Interval, bootstrap_sums, intervals
from jmedlora.evaluation.statistics import (
    MCNEMAR,
    SIGN_FLIPS,
    SIGN_FLIPS_EXACT,
    SIGN_FLIPS_TAIL,
    bootstrap_interval,
    compare_score_pairs,
    compare_scores,
    compare_share_pairs,
    compare_shares,
    holm,
)


def shares_of(n: int, gained: int, lost: int, both: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers of two systems with the given numbers of discordant pairs."""
    first, second = np.zeros(n, bool), np.zeros(n, bool)
    second[:gained] = True
    first[gained : gained + lost] = True
    first[gained + lost : gained + lost + both] = second[gained + lost : gained + lost + both] = True
    return first, second


# ---------------------------------------------------------------- intervals


def test_the_interval_is_the_same_on_every_machine() -> None:
    share = np.arange(200) % 5 == 0
    assert bootstrap_interval(share) == Interval(0.15, 0.26)
    similarity = (np.arange(300) * 37 % 101 / 101) ** 4
    assert bootstrap_interval(similarity) == Interval(0.166700238, 0.225603965)
    assert bootstrap_interval(similarity, seed=1) != bootstrap_interval(similarity)


def test_every_resample_draws_as_many_questions_as_there_are() -> None:
    # with a chunk smaller than the whole, so that chunks are joined
    sums = bootstrap_sums(np.column_stack([np.ones(700), np.arange(700)]), seed=3, resamples=4000)
    assert sums.shape == (4000, 2)
    assert (sums[:, 0] == 700).all()
    drawn_means = sums[:, 1] / 700
    assert drawn_means.mean() == pytest.approx(349.5, abs=0.5)
    assert drawn_means.std() == pytest.approx(np.arange(700).std() / math.sqrt(700), rel=0.05)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5])
def test_intervals_of_shares_hold_the_truth(share: float) -> None:
    values = (np.random.default_rng(5).random((200, 500)) < share).astype(float)
    held = sum(bounds.low <= share <= bounds.high for bounds in intervals(values, bootstrap_sums(values, 0))) / 500
    assert 0.93 <= held <= 0.995


def test_intervals_of_skewed_scores_hold_the_truth() -> None:
    values = np.random.default_rng(6).beta(0.3, 1.2, (150, 500))
    held = sum(bounds.low <= 0.2 <= bounds.high for bounds in intervals(values, bootstrap_sums(values, 0))) / 500
    assert 0.93 <= held <= 0.97


def test_replicates_of_a_question_stay_together() -> None:
    random = np.random.default_rng(7)
    one = random.random(120) < 0.4
    # the same answers three times are no more evidence than once
    assert bootstrap_interval(np.column_stack([one, one, one])) == bootstrap_interval(one)
    # independent answers are: the interval of their mean is narrower than that of one
    three = random.random((120, 3)) < 0.4
    together, alone = bootstrap_interval(three), bootstrap_interval(three[:, 0])
    assert together.high - together.low < 0.75 * (alone.high - alone.low)


@pytest.mark.parametrize("n", [1, 10, 50])
def test_where_all_questions_agree_the_bounds_are_wilsons(n: int) -> None:
    slack = 1.959963984540054**2 / (n + 1.959963984540054**2)  # Wilson's upper bound of 0 of n
    assert bootstrap_interval(np.zeros(n)) == Interval(0.0, pytest.approx(slack, abs=1e-9))
    assert bootstrap_interval(np.ones(n, bool)) == Interval(pytest.approx(1 - slack, abs=1e-9), 1.0)
    assert bootstrap_interval(np.zeros(n), lowest=-1) == Interval(pytest.approx(-slack, abs=1e-9), pytest.approx(slack, abs=1e-9))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.floats(0.5, 0.99))
@settings(max_examples=30, deadline=None)
def test_the_interval_holds_the_mean_and_widens_with_its_level(values: list[float], level: float) -> None:
    narrow, wide = (bootstrap_interval(np.array(values), resamples=2000, level=each) for each in (level, 0.995))
    assert 0 <= wide.low <= narrow.low + 1e-9
    assert narrow.high - 1e-9 <= wide.high <= 1
    assert wide.low - 1e-9 <= np.mean(values) <= wide.high + 1e-9


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros((3, 0)), np.zeros((2, 2, 2)), np.array([0.5, np.nan])])
def test_values_that_have_no_mean_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="values"):
        bootstrap_interval(values)


# ---------------------------------------------------------------- shares


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_mcnemar_is_statsmodels(gained: int, lost: int, both: int) -> None:
    found = compare_shares(*shares_of(gained + lost + both + 5, gained, lost, both))
    assert found.p == pytest.approx(mcnemar([[both, gained], [lost, 5]], exact=True).pvalue, abs=1e-12)
    assert found.difference == pytest.approx((gained - lost) / (gained + lost + both + 5))
    if gained and lost:
        assert found.effect == gained / lost
    else:
        assert found.effect == (gained + 0.5) / (lost + 0.5)


def test_a_comparison_of_shares_in_full() -> None:
    found = compare_shares(*shares_of(200, gained=30, lost=10, both=60))
    assert (found.n, found.difference, found.effect, found.effect_name, found.method) == (200, 0.1, 3.0, "odds_ratio", MCNEMAR)
    assert (found.low, found.high) == (0.04, 0.16)
    # Connor: (1.96 sqrt(0.2) + 0.8416 sqrt(0.2 - 0.01))^2 / 0.01
    assert found.questions_needed == 155


def test_the_questions_needed_give_the_power() -> None:
    gained, lost, n = 0.15, 0.05, compare_shares(*shares_of(200, 30, 10)).questions_needed
    assert n is not None
    drawn = np.random.default_rng(8).multinomial(n, [gained, lost, 1 - gained - lost], size=3000)
    # the uncorrected test, which the formula is of
    significant = np.abs(drawn[:, 0] - drawn[:, 1]) > 1.959964 * np.sqrt(drawn[:, 0] + drawn[:, 1])
    assert significant.mean() == pytest.approx(0.8, abs=0.05)


def test_reversals_of_shares_are_those_of_drawing() -> None:
    first, second = shares_of(300, gained=40, lost=25)
    found = compare_shares(first, second).reversal
    differences = second.astype(int) - first.astype(int)
    random = np.random.default_rng(9)
    drawn = [differences[random.choice(300, SUBSET, replace=False)].sum() < 0 for _ in range(20_000)]
    assert found == pytest.approx(np.mean(drawn), abs=0.012)


def test_reversals_by_enumeration() -> None:
    # 52 questions, 2 gained and 1 lost: a sample of 50 leaves out 2, and says the opposite when these are the two gained
    found = compare_shares(*shares_of(52, gained=2, lost=1))
    assert found.reversal == pytest.approx(1 / math.comb(52, 2))


def test_few_questions_cannot_be_sampled() -> None:
    assert compare_shares(*shares_of(50, 10, 2)).reversal is None
    assert compare_scores(np.zeros(50), np.linspace(0, 1, 50)).reversal is None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
@settings(max_examples=30, deadline=None)
def test_turning_the_pair_round_turns_the_difference_round(pairs: list[tuple[bool, bool]]) -> None:
    first, second = map(np.array, zip(*pairs, strict=True))
    one, other = compare_shares(first, second), compare_shares(second, first)
    assert (other.p, other.reversal, other.questions_needed) == (one.p, one.reversal, one.questions_needed)
    assert other.difference == -one.difference
    assert other.effect == pytest.approx(1 / one.effect)
    assert other.low == pytest.approx(-one.high, abs=2.5 / len(pairs))  # the quantiles of a lattice are taken from one side


def test_shares_must_be_right_or_wrong() -> None:
    with pytest.raises(ValueError, match="right and wrong"):
        compare_shares(np.array([0, 1]), np.array([0, 0.5]))
    with pytest.raises(ValueError, match="cannot be paired"):
        compare_shares(np.array([0, 1]), np.array([0, 1, 1]))


# ---------------------------------------------------------------- scores


def mean_difference(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray:
    return np.mean(second - first, axis=axis)


def test_few_differences_are_counted_exactly() -> None:
    random = np.random.default_rng(10)
    first = random.random(40)
    second = first.copy()
    second[:11] += random.normal(0.1, 0.2, 11)
    found = compare_scores(first, second)
    reference = permutation_test((first[:11], second[:11]), mean_difference, permutation_type="samples", vectorized=True)
    assert found.method == SIGN_FLIPS_EXACT
    assert found.p == pytest.approx(reference.pvalue, abs=1e-12)


def test_many_differences_agree_with_scipy() -> None:
    random = np.random.default_rng(11)
    first = random.beta(0.5, 1, 400)
    second = np.clip(first + random.normal(0.01, 0.3, 400) * (random.random(400) < 0.5), 0, 1)
    found = compare_scores(first, second)
    reference = permutation_test(
        (first, second), mean_difference, permutation_type="samples", vectorized=True, n_resamples=20_000, rng=np.random.default_rng(1)
    )
    assert found.method == SIGN_FLIPS
    assert found.p == pytest.approx(reference.pvalue, abs=0.015)
    differences = second - first
    assert found.effect == pytest.approx(differences.mean() / differences.std(ddof=1))


@pytest.mark.parametrize(("size", "closeness"), [("smooth", 0.15), ("thirds", 0.08)])
def test_far_tails_are_those_of_enumeration(size: str, closeness: float) -> None:
    random = np.random.default_rng(12)
    sizes = random.uniform(0.2, 1, 18) if size == "smooth" else random.integers(1, 4, 18) / 3
    all_sums = np.array(list(itertools.product((-1, 1), repeat=18))) @ sizes
    signs = np.ones(18)
    signs[np.argsort(sizes)[:1]] = -1  # a small difference against seventeen
    found = compare_scores(np.zeros(18), sizes * signs)
    assert found.method == SIGN_FLIPS_TAIL
    exact = (np.abs(all_sums) >= (sizes * signs).sum() - 1e-9).mean()
    assert exact < 1e-4
    assert found.p == pytest.approx(exact, rel=closeness)


def test_differences_that_all_point_one_way_have_the_least_p() -> None:
    assert compare_scores(np.zeros(30), np.linspace(0.1, 1, 30)).p == pytest.approx(2**-29)


def test_p_of_equal_systems_is_uniform() -> None:
    random = np.random.default_rng(13)
    values = random.beta(0.5, 1, (100, 400))
    p_values = [found.p for found in compare_score_pairs(values, [(2 * i, 2 * i + 1) for i in range(200)])]
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.04)
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize("effect", [0.05, 0.1, 0.3, 0.8, 2.0])
def test_the_questions_needed_are_statsmodels(effect: float) -> None:
    differences = np.linspace(-1, 1, 60)
    differences *= 0.2 / differences.std(ddof=1)
    found = compare_scores(np.zeros(60), differences + 0.2 * effect)
    assert found.effect == pytest.approx(effect)
    needed = found.questions_needed
    assert needed is not None
    power = TTestPower()
    assert power.power(effect, needed, 0.05) >= 0.8 - 1e-9
    assert power.power(effect, needed - 1, 0.05) < 0.8


def test_reversals_of_scores_are_close_to_the_normal_ones() -> None:
    random = np.random.default_rng(14)
    differences = random.normal(0.03, 0.3, 1000)
    found = compare_scores(np.zeros(1000), differences).reversal
    spread = differences.std() / math.sqrt(SUBSET) * math.sqrt((1000 - SUBSET) / 999)
    normal = 0.5 * math.erfc(abs(differences.mean()) / spread / math.sqrt(2))
    assert found == pytest.approx(normal, abs=0.02)


def test_golden_comparison_of_scores() -> None:
    first = np.arange(120) * 37 % 101 / 101
    second = np.arange(120) * 53 % 103 / 103
    found = compare_scores(first, second)
    assert found.p == pytest.approx(0.726027397, abs=1e-7)
    assert found.reversal == 0.3813
    assert (found.low, found.high) == (-0.090181518, 0.058807353)


# ---------------------------------------------------------------- replicates


def test_replicates_are_averaged_by_question_first() -> None:
    random = np.random.default_rng(15)
    base = random.random(150) < 0.4
    runs = random.random((150, 3)) < 0.5
    found = compare_shares(base, runs)
    averaged = compare_scores(base.astype(float), runs.mean(axis=1))
    assert found.method == f"{averaged.method}, on means of 3 replicates"
    assert (found.difference, found.low, found.high, found.p) == (averaged.difference, averaged.low, averaged.high, averaged.p)
    assert found.difference == pytest.approx(runs.mean() - base.mean())
    assert found.effect_name == "cohens_dz"


def test_one_replicate_is_none() -> None:
    first, second = shares_of(80, 12, 5)
    assert compare_shares(first[:, None], second[:, None]) == compare_shares(first, second)


# ---------------------------------------------------------------- many pairs, many p values


def test_pairs_compared_together_are_the_same_as_apart() -> None:
    values = np.random.default_rng(16).random((90, 4))
    pairs = list(itertools.combinations(range(4), 2))
    together = compare_score_pairs(values, pairs, seed=2)
    assert together == [compare_scores(values[:, first], values[:, second], seed=2) for first, second in pairs]
    right = values > 0.6
    assert compare_share_pairs(right, pairs) == [compare_shares(right[:, first], right[:, second]) for first, second in pairs]


@given(st.lists(st.floats(0, 1), max_size=40))
@settings(max_examples=100, deadline=None)
def test_holm_steps_down(p_values: list[float]) -> None:
    corrected = holm(p_values)
    smaller = [[other for other in p_values if other < p] for p in p_values]
    steps = [min(1.0, (len(p_values) - len(each)) * p) for p, each in zip(p_values, smaller, strict=True)]
    expected = [max(step for step, other in zip(steps, p_values, strict=True) if other <= p) for p in p_values]
    assert corrected == pytest.approx(expected)
    assert all(before <= after <= 1 for before, after in zip(p_values, corrected, strict=True))


def test_holm_is_statsmodels() -> None:
    # once, on all that matters: each call of theirs collects the garbage of the whole process
    p_values = [*np.random.default_rng(2).random(30) ** 4, 0.0, 1.0, 0.01, 0.01]
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


# ---------------------------------------------------------------- what has no spread


@pytest.mark.parametrize("compare", [compare_shares, compare_scores])
def test_equal_systems_do_not_differ(compare: type[compare_shares]) -> None:
    answers = np.arange(70) % 3 == 0
    found = compare(answers, answers)
    assert (found.difference, found.p, found.questions_needed, found.reversal) == (0.0, 1.0, None, None)
    assert found.low == -found.high < 0  # as many questions without a difference do not rule out a small one


def test_one_question() -> None:
    found = compare_shares(np.array([False]), np.array([True]))
    assert (found.n, found.difference, found.p, found.effect) == (1, 1.0, 1.0, 3.0)
    found = compare_scores(np.array([0.25]), np.array([0.75]))
    assert (found.difference, found.p, found.effect, found.questions_needed) == (0.5, 1.0, math.inf, 2)
    assert -1 <= found.low < 0.5 < found.high <= 1
