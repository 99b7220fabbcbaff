"""What the way of measuring does, on made-up answers: rankings, prompts, and the three metrics beside each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

from jmedlora.config.benchmark import PromptConfig
from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, RunSpec
from jmedlora.report.measuring import Measuring, measure, measuring_json, way_of
from jmedlora.report.ranks import compare_ranks, kendall_tau, spearman_rho
from jmedlora.report.writer import analyse
from tests.made_up import base_spec, demo, evaluation_spec, plan_of, write_answers
from tests.made_up_answers import EXAM, ZERO, base_of, model, run_of

LETTERS = PromptConfig(name="exam-ja", template="{{ instruction }}", answer="letters")
OTHER = PromptConfig(name="other-ja", template="Q: {{ instruction }}")


BY_LETTERS, BY_OTHER = evaluation_spec(0, EXAM, LETTERS), evaluation_spec(0, EXAM, OTHER)
BY_LIKELIHOOD = evaluation_spec(0, EXAM, scoring="loglikelihood")


def measured(storage: Storage, bases: Sequence[BaseSpec], evaluations: Sequence[EvaluationSpec], runs: Sequence[RunSpec] = ()) -> Measuring:
    return measure(*analyse(plan_of(list(bases), list(runs), list(evaluations)), storage))


def systems(count: int) -> list[BaseSpec]:
    return [base_of(model(f"model-{index}")) for index in range(count)]


def shares(storage: Storage, bases: Sequence[BaseSpec], evaluation: EvaluationSpec, rights: Sequence[int], questions: int = 300) -> None:
    """Each system is right on the first so many questions; its Gestalt scores are those rights, weakened."""
    for base, right in zip(bases, rights, strict=True):
        correct = np.arange(questions) < right
        write_answers(storage, base.run_key, 0, evaluation, correct, 0.2 + 0.6 * correct)


# ---------------------------------------------------------------- correlations of ranks


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12))
def test_correlations_of_ranks_are_scipys(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array([column], dtype=float) for column in zip(*pairs, strict=True))
    for own, other in ((kendall_tau, kendalltau), (spearman_rho, spearmanr)):
        [value] = own(first, second)
        if np.ptp(first) == 0 or np.ptp(second) == 0:
            assert np.isnan(value)
        else:
            assert value == pytest.approx(other(first[0], second[0]).statistic)


def test_pairs_that_change_their_order_are_named_only_where_both_ways_are_certain() -> None:
    """A and B change places clearly, C and D by one question of 300."""
    rights = {"A": (100, 160), "B": (160, 100), "C": (200, 201), "D": (201, 200)}
    first, second = (np.column_stack([np.arange(300) < right[way] for right in rights.values()]).astype(float) for way in (0, 1))
    agreement = compare_ranks(list(rights), first, second)
    assert (agreement.pairs, agreement.discordant) == (6, 2)
    assert agreement.tau.value == pytest.approx((4 - 2) / 6)
    assert agreement.tau.low is not None
    assert agreement.tau.high is not None
    assert agreement.tau.low <= agreement.tau.value <= agreement.tau.high
    [change] = agreement.changed
    assert (change.one, change.other) == ("A", "B")
    assert (change.first_difference, change.second_difference) == (pytest.approx(0.2), pytest.approx(-0.2))


def test_equal_rankings_agree_and_ties_are_no_ranking() -> None:
    values = np.column_stack([np.arange(100) < right for right in (10, 40, 80)]).astype(float)
    same = compare_ranks(["a", "b", "c"], values, values)
    assert (same.tau.value, same.tau.low, same.tau.high, same.rho.value, same.discordant) == (1.0, 1.0, 1.0, 1.0, 0)
    tied = compare_ranks(["a", "b", "c"], values, np.ones((100, 3)))
    assert (tied.tau.value, tied.rho.low) == (None, None)


# ---------------------------------------------------------------- a sweep's ways


def test_ways_are_told_by_scoring_and_by_what_is_asked_for() -> None:
    assert [way_of(item) for item in (ZERO, BY_LETTERS, BY_LIKELIHOOD)] == ["generation", "letters", "log-likelihood"]


def test_ways_that_rank_alike_and_ways_that_do_not(tmp_path: Path) -> None:
    bases, storage = systems(4), Storage(tmp_path)
    shares(storage, bases, ZERO, (50, 100, 150, 200))
    shares(storage, bases, BY_LIKELIHOOD, (80, 130, 180, 230))
    shares(storage, bases, BY_LETTERS, (200, 150, 100, 50))
    found = measured(storage, bases, [ZERO, BY_LETTERS, BY_LIKELIHOOD])
    ranks = {(item.first, item.second): item.ranks for item in found.ways}
    assert {pair: item.tau.value for pair, item in ranks.items()} == {
        ("generation", "letters"): -1.0,
        ("generation", "log-likelihood"): 1.0,
        ("letters", "log-likelihood"): -1.0,
    }
    assert len(ranks["generation", "letters"].changed) == 6
    assert ranks["generation", "log-likelihood"].changed == []
    assert {(item.systems, item.questions) for item in ranks.values()} == {(4, 300)}
    assert found.missing == []


def test_orders_by_prompt_are_told_apart_by_scoring(tmp_path: Path) -> None:
    bases, storage = systems(3), Storage(tmp_path)
    other_by_likelihood = evaluation_spec(0, EXAM, OTHER, "loglikelihood")
    for evaluation in (ZERO, BY_LIKELIHOOD, BY_OTHER):
        shares(storage, bases, evaluation, (50, 100, 150))
    shares(storage, bases, other_by_likelihood, (150, 100, 50))
    found = measured(storage, bases, [ZERO, BY_OTHER, BY_LIKELIHOOD, other_by_likelihood])
    rows = [item for item in json.loads(measuring_json(found))["prompts"] if item["metric"] == "accuracy"]
    assert [(row["scoring"], row["ranks"]["tau"]["value"]) for row in rows] == [("generate", 1.0), ("loglikelihood", -1.0)]
    assert {item.scoring for item in found.ways} == {None}
    assert {item.scoring for item in found.metrics} == {"generate"}


def test_what_is_missing_names_the_way(tmp_path: Path) -> None:
    bases, storage = systems(2), Storage(tmp_path)
    for evaluation in (BY_OTHER, ZERO):
        shares(storage, bases, evaluation, (50, 100))
    found = measured(storage, bases, [ZERO, BY_OTHER])
    assert found.missing[0] == "exam, 0-shot, generation: alpaca-ja against other-ja: 2 systems with answers to both; 3 are needed"


def test_two_systems_are_too_few_for_a_ranking_and_that_is_said(tmp_path: Path) -> None:
    bases, storage = systems(3), Storage(tmp_path)
    shares(storage, bases, ZERO, (50, 100, 150))
    shares(storage, bases[:2], BY_LETTERS, (50, 100))
    found = measured(storage, bases, [ZERO, BY_LETTERS])
    assert found.ways == []
    assert found.missing == ["exam, 0-shot: generation against letters: 2 systems with answers to both; 3 are needed"]
    assert len(found.metrics) == 2


def test_one_run_and_nothing_stored(tmp_path: Path) -> None:
    base = base_spec()
    nothing = measured(Storage(tmp_path), [base], [ZERO], [])
    assert (nothing.ways, nothing.metrics, nothing.ranges, nothing.correlations, nothing.power) == ([], [], [], [], [])
    assert nothing.missing[0].startswith("exam, 0-shot: accuracy against Gestalt score: 0 systems")
    shares(Storage(tmp_path), [base], ZERO, [50])
    one = measured(Storage(tmp_path), [base], [ZERO], [])
    assert one.metrics == []
    assert [(item.metric, item.systems) for item in one.correlations] == [("accuracy", 1), ("exact_match", 1)]


def test_prompts_range_and_rank(tmp_path: Path) -> None:
    bases, storage = systems(3), Storage(tmp_path)
    shares(storage, bases, ZERO, (50, 100, 150))
    shares(storage, bases, BY_OTHER, (65, 190, 150))
    found = measured(storage, bases, [ZERO, BY_OTHER])
    [accuracy] = [item for item in found.ranges if item.metric == "accuracy"]
    assert accuracy.median == pytest.approx(15 / 300)
    assert accuracy.largest == pytest.approx(90 / 300)
    assert (accuracy.largest_of, accuracy.prompts, accuracy.systems) == ("model-1", 2, 3)
    assert {(item.metric, item.ranks.discordant) for item in found.prompts} == {("accuracy", 1), ("Gestalt score", 1)}
    assert found.ways == []


# ---------------------------------------------------------------- what the Gestalt score adds


def test_metrics_that_contradict_each_other_in_every_system(tmp_path: Path) -> None:
    bases, storage = systems(3), Storage(tmp_path)
    for base, right in zip(bases, (60, 120, 180), strict=True):
        correct = np.arange(300) < right
        write_answers(storage, base.run_key, 0, ZERO, correct, np.where(correct, 0.1, 0.9))
    found = measured(storage, bases, [ZERO])
    assert {(item.first, item.ranks.tau.value) for item in found.metrics} == {("accuracy", -1.0), ("exact match", -1.0)}
    [accuracy, exact] = found.correlations
    assert accuracy.median == -1.0
    assert exact.highest == -1.0


def test_a_finer_metric_needs_fewer_questions(tmp_path: Path) -> None:
    """Every answer comes nearer by a little; few cross the line to being right."""
    storage, base = Storage(tmp_path), base_of(model("calm"))
    runs = [run_of(base, rank=rank) for rank in (4, 8, 16)]
    noise = np.random.default_rng(0).uniform(0, 0.2, 300)
    write_answers(storage, base.run_key, 0, ZERO, np.arange(300) < 100, 0.3 + noise)
    for run in runs:
        write_answers(storage, run.run_key, 7, ZERO, np.arange(300) < 103, 0.35 + noise[::-1])
    found = measured(storage, [base], [ZERO], runs)
    power = {item.metric: item for item in found.power}
    assert {item.comparisons for item in power.values()} == {3}
    assert {item.n for item in power.values()} == {300}
    assert (power["accuracy"].significant, power["gestalt_score"].significant) == (0.0, 1.0)
    assert power["accuracy"].questions_needed is not None
    assert power["gestalt_score"].questions_needed is not None
    assert power["gestalt_score"].questions_needed < 300 < power["accuracy"].questions_needed


def test_measuring_json_is_plain_and_the_same_every_time(tmp_path: Path) -> None:
    plan, storage = demo(tmp_path)
    first, second = (measuring_json(measure(*analyse(plan, storage))) for _ in range(2))
    assert first == second
    assert {item["kind"] for item in json.loads(first)["metrics"]} == {"metric"}
