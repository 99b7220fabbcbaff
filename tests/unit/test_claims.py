"""What the study claimed, judged on made-up predictions whose truth is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jmedlora.plan.layout import PREDICTIONS, Storage
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, Plan, RunSpec
from jmedlora.report.answers import AnswerBook
from jmedlora.report.claims import Claim, Study, claims_json, judge_claims
from jmedlora.report.collect import collect_results
from jmedlora.report.contrasts import points_by_epoch, pretraining_pairs
from jmedlora.report.evidence import Evidence
from tests.made_up import demo, evaluation_spec, plan_of
from tests.made_up_answers import EXAM, ONE, QUESTIONS, ZERO, answer, base_of, model, run_of


def judged(storage: Storage, bases: Sequence[BaseSpec], runs: Sequence[RunSpec], evaluations: Sequence[EvaluationSpec] = (ZERO,)) -> Study:
    plan = plan_of(list(bases), list(runs), list(evaluations))
    return judge_claims(collect_results(plan, storage), AnswerBook(storage))


def claim_of(study: Study, number: str) -> Claim:
    [claim] = [claim for claim in study.claims if claim.number == number]
    return claim


def deciding(claim: Claim, metric: str = "accuracy") -> Evidence:
    [row] = [row for row in claim.evidence if row.decides and row.metric == metric]
    return row


# ---------------------------------------------------------------- tuning improves


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [(100, 160, "supported"), (160, 100, "contradicted"), (100, 102, "undecided"), (100, 100, "undecided")],
)
def test_a_run_is_judged_against_its_base(tmp_path: Path, before: int, after: int, verdict: str) -> None:
    base = base_of(model("calm"))
    run = run_of(base)
    storage = Storage(tmp_path)
    answer(storage, base.run_key, 0, ZERO, before, gestalt=0.3)
    answer(storage, run.run_key, 7, ZERO, after, gestalt=0.3 + (after - before) / QUESTIONS * (abs(after - before) > 2))
    claim = claim_of(judged(storage, [base], [run]), "1a")
    assert claim.verdict == verdict
    row = deciding(claim)
    assert row.difference == (after - before) / QUESTIONS
    assert row.n == QUESTIONS
    assert row.low <= row.difference <= row.high
    if verdict == "supported":  # exact McNemar: 60 discordant questions, all of one kind, doubled by Holm for two metrics
        assert row.p == 2 * 0.5**60
        assert row.p_holm == pytest.approx(2 * row.p)
        assert "+15.0 points (95 % interval" in claim.why


def test_metrics_that_do_not_agree_leave_a_claim_undecided_with_both_numbers(tmp_path: Path) -> None:
    base = base_of(model("calm"))
    run = run_of(base)
    storage = Storage(tmp_path)
    answer(storage, base.run_key, 0, ZERO, 100, gestalt=0.5)
    answer(storage, run.run_key, 7, ZERO, 160, gestalt=0.4)
    claim = claim_of(judged(storage, [base], [run]), "1a")
    assert claim.verdict == "undecided"
    assert deciding(claim).bearing == "for"
    assert deciding(claim, "gestalt_score").bearing == "against"
    assert "accuracy +15.0 points" in claim.why
    assert "Gestalt score −10.0 points" in claim.why
    assert claim.why.endswith("the metrics do not agree: accuracy speaks for it and Gestalt score speaks against it")


def test_one_run_that_gets_significantly_worse_stands_against_a_rise_on_average(tmp_path: Path) -> None:
    base = base_of(model("calm"))
    good, bad = run_of(base, rank=4), run_of(base, rank=16)
    storage = Storage(tmp_path)
    answer(storage, base.run_key, 0, ZERO, 100)
    answer(storage, good.run_key, 7, ZERO, 220)
    answer(storage, bad.run_key, 7, ZERO, 60)
    claim = claim_of(judged(storage, [base], [good, bad]), "1a")
    assert deciding(claim).difference == pytest.approx((120 - 40) / 2 / QUESTIONS)
    assert deciding(claim).bearing == "for"
    assert claim.verdict == "undecided"
    assert "2 of 4 single comparisons say the opposite" in claim.why
    assert {row.bearing for row in claim.evidence if row.second == "calm lora r16 1ep"} == {"against"}
    singles = {(row.second, row.metric): row.difference for row in claim.evidence if not row.decides}
    assert singles["calm lora r4 1ep", "accuracy"] == pytest.approx(120 / QUESTIONS)
    assert singles["calm lora r16 1ep", "accuracy"] == pytest.approx(-40 / QUESTIONS)


def test_one_contrary_run_of_many_does_not_undo_a_claim_but_is_told(tmp_path: Path) -> None:
    base = base_of(model("calm"))
    runs = [run_of(base, rank=rank) for rank in range(1, 12)]
    storage = Storage(tmp_path)
    answer(storage, base.run_key, 0, ZERO, 100)
    for run in runs:
        answer(storage, run.run_key, 7, ZERO, 60 if run.settings.rank == 1 else 220)
    claim = claim_of(judged(storage, [base], runs), "1a")
    assert claim.verdict == "supported"
    assert claim.why.endswith("; but 2 of 22 single comparisons say the opposite")


def test_shots_are_averaged_by_question_not_counted_as_further_questions(tmp_path: Path) -> None:
    base = base_of(model("calm"))
    run = run_of(base)
    storage = Storage(tmp_path)
    for evaluation, after in ((ZERO, 140), (ONE, 180)):
        answer(storage, base.run_key, 0, evaluation, 100)
        answer(storage, run.run_key, 7, evaluation, after)
    claim = claim_of(judged(storage, [base], [run], [ZERO, ONE]), "1a")
    assert deciding(claim).n == QUESTIONS
    assert deciding(claim).difference == pytest.approx((40 + 80) / 2 / QUESTIONS)
    assert deciding(claim).over == "exam, 0-shot and 1-shot, alpaca-ja"
    assert {row.over: row.difference for row in claim.evidence if not row.decides and row.metric == "accuracy"} == {
        "exam, 0-shot, alpaca-ja": pytest.approx(0.1),
        "exam, 1-shot, alpaca-ja": pytest.approx(0.2),
    }


def test_log_likelihoods_and_letters_do_not_enter_the_claims(tmp_path: Path) -> None:
    base = base_of(model("calm"))
    run = run_of(base)
    weighed = evaluation_spec(3, EXAM, scoring="loglikelihood")
    storage = Storage(tmp_path)
    for evaluation, after in ((ZERO, 160), (weighed, 0)):
        answer(storage, base.run_key, 0, evaluation, 100)
        answer(storage, run.run_key, 7, evaluation, after)
    study = judged(storage, [base], [run], [ZERO, weighed])
    assert study.evaluations == ["exam, 0-shot, alpaca-ja"]
    assert claim_of(study, "1a").verdict == "supported"
    alone = judged(storage, [base], [run], [weighed])
    assert alone.evaluations == ["exam, 3-shot, alpaca-ja, log-likelihood"]
    assert claim_of(alone, "1a").verdict == "contradicted"


# ---------------------------------------------------------------- the larger model gains more


@pytest.mark.parametrize(
    ("small_gain", "large_gain", "verdict"), [(20, 100, "supported"), (100, 20, "contradicted"), (50, 51, "undecided")]
)
def test_gains_of_a_larger_and_a_smaller_model(tmp_path: Path, small_gain: int, large_gain: int, verdict: str) -> None:
    storage = Storage(tmp_path)
    small, large = base_of(model("small"), 1e9), base_of(model("large"), 7e9)
    runs = [run_of(small), run_of(large)]
    for base, run, gain in zip((small, large), runs, (small_gain, large_gain), strict=True):
        answer(storage, base.run_key, 0, ZERO, 100, gestalt=0.3)
        answer(storage, run.run_key, 7, ZERO, 100 + gain, gestalt=0.3 + gain / QUESTIONS)
    claim = claim_of(judged(storage, [small, large], runs), "1b")
    assert claim.verdict == verdict
    assert deciding(claim).difference == pytest.approx((large_gain - small_gain) / QUESTIONS)
    assert (deciding(claim).first, deciding(claim).second) == ("gain of small", "gain of large")


def test_models_of_one_size_cannot_say_what_size_does(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    bases = [base_of(model("one"), 6.8e9), base_of(model("other"), 7e9)]
    runs = [run_of(base) for base in bases]
    for base, run in zip(bases, runs, strict=True):
        answer(storage, base.run_key, 0, ZERO, 100)
        answer(storage, run.run_key, 7, ZERO, 160)
    study = judged(storage, bases, runs)
    [left] = [item for item in study.open if item.number == "1b"]
    assert left.needs.startswith("tuned runs of two models")


# ---------------------------------------------------------------- epochs


def epochs_sweep(storage: Storage, scores: dict[int, int]) -> tuple[BaseSpec, RunSpec]:
    """A run of three epochs, evaluated after each."""
    base = base_of(model("calm"))
    run = run_of(base, epochs=3)
    answer(storage, base.run_key, 0, ZERO, 100)
    for epoch, right in scores.items():
        answer(storage, run.run_key, 7 * epoch, ZERO, right)
    return base, run


@pytest.mark.parametrize(
    ("scores", "helps", "hurts"),
    [
        ({1: 180, 2: 150, 3: 120}, "supported", "supported"),
        ({1: 60, 2: 100, 3: 180}, "contradicted", "contradicted"),
        ({1: 100, 2: 100, 3: 100}, "undecided", "undecided"),
    ],
)
def test_checkpoints_of_one_run_tell_what_epochs_do(tmp_path: Path, scores: dict[int, int], helps: str, hurts: str) -> None:
    storage = Storage(tmp_path)
    base, run = epochs_sweep(storage, scores)
    study = judged(storage, [base], [run])
    assert claim_of(study, "2a").verdict == helps
    assert deciding(claim_of(study, "2a")).difference == pytest.approx((scores[1] - 100) / QUESTIONS)
    claim = claim_of(study, "2b")
    assert claim.verdict == hurts
    assert deciding(claim).difference == pytest.approx((scores[3] - scores[1]) / QUESTIONS)
    by_epochs = {row.second: row.difference for row in claim.evidence if not row.decides and row.metric == "accuracy"}
    assert by_epochs == {f"after {epoch} epochs": pytest.approx((scores[epoch] - scores[1]) / QUESTIONS) for epoch in (2, 3)}


def test_runs_of_several_durations_stand_for_their_epochs(tmp_path: Path) -> None:
    """The one-epoch run itself is taken, not the first checkpoint of the three-epoch run; other settings are another group."""
    base = base_of(model("calm"))
    short, long, other = run_of(base), run_of(base, epochs=3), run_of(base, epochs=3, rank=4)
    storage = Storage(tmp_path)
    answer(storage, base.run_key, 0, ZERO, 100)
    answer(storage, short.run_key, 7, ZERO, 190)
    for step, right in ((7, 170), (21, 110)):
        answer(storage, long.run_key, step, ZERO, right)
    answer(storage, other.run_key, 21, ZERO, 300)
    plan = plan_of([base], [other, long, short], [ZERO])
    groups = points_by_epoch(collect_results(plan, storage))
    told = sorted([[(epochs, point.result.run_key) for epochs, point in group.items()] for group in groups])
    assert told == [[(1.0, short.run_key), (3.0, long.run_key)], [(3.0, other.run_key)]]
    assert deciding(claim_of(judged(storage, [base], plan.runs), "2b")).difference == pytest.approx(-80 / QUESTIONS)


# ---------------------------------------------------------------- additional pretraining


@pytest.mark.parametrize(("plain", "more", "verdict"), [(120, 121, "supported"), (120, 80, "supported"), (120, 200, "contradicted")])
def test_no_gain_needs_an_interval_that_ends_below_the_margin(tmp_path: Path, plain: int, more: int, verdict: str) -> None:
    storage = Storage(tmp_path)
    bases = [base_of(model("open-calm-7b", "gpt_neox"), 6.8e9), base_of(model("medcalm", "gpt_neox"), 6.8e9)]
    runs = [run_of(base) for base in bases]
    for base, run, right in zip(bases, runs, (plain, more), strict=True):
        answer(storage, base.run_key, 0, ZERO, right, gestalt=right / 400)
        answer(storage, run.run_key, 7, ZERO, right, gestalt=right / 400)
    claim = claim_of(judged(storage, bases, runs), "3")
    assert deciding(claim).difference == pytest.approx((more - plain) / QUESTIONS)
    assert claim.verdict == verdict


def test_an_interval_that_reaches_over_the_margin_is_no_proof_of_no_gain(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    bases = [base_of(model("open-calm-7b")), base_of(model("medcalm"))]
    for base, right in zip(bases, (20, 22), strict=True):
        answer(storage, base.run_key, 0, ZERO, right, questions=40)
    claim = claim_of(judged(storage, bases, []), "3")
    assert deciding(claim).high >= 0.02
    assert claim.verdict == "undecided"


def test_pretraining_is_compared_with_equal_settings_alone(tmp_path: Path) -> None:
    plain, more = base_of(model("open-calm-7b"), 6.8e9), base_of(model("MedCALM-v2"), 6.9e9)
    small, quantised = base_of(model("open-calm-1b"), 1.4e9), base_of(model("medcalm"), 6.8e9, "nf4")
    runs = [run_of(plain), run_of(plain, rank=4), run_of(more), run_of(more, epochs=3), run_of(small)]
    plan = plan_of([plain, more, small, quantised], runs, [ZERO])
    pairs = pretraining_pairs(collect_results(plan, Storage(tmp_path)))
    assert {(one.run_key, other.run_key) for one, other in pairs} == {
        (plain.run_key, more.run_key),
        ("run-open-calm-7b-16-1", "run-MedCALM-v2-16-1"),
    }


# ---------------------------------------------------------------- one shot


def shots_sweep(storage: Storage, family: str, rights: Sequence[int]) -> tuple[BaseSpec, RunSpec]:
    """Right answers of base and run: 0-shot before and after, 1-shot before and after."""
    base = base_of(model(f"some-{family}", family))
    run = run_of(base)
    for key, step, evaluation, right in zip((base.run_key, run.run_key) * 2, (0, 7, 0, 7), (ZERO, ZERO, ONE, ONE), rights, strict=True):
        answer(storage, key, step, evaluation, right)
    return base, run


@pytest.mark.parametrize(
    ("rights", "level", "example"),
    [
        ((100, 180, 160, 120), "supported", "supported"),  # 1-shot -40; the example's help from +60 to -60
        ((100, 300, 160, 220), "contradicted", "supported"),  # better after tuning, but the example helps no more
        ((100, 101, 160, 161), "undecided", "undecided"),
    ],
)
def test_one_shot_after_tuning(tmp_path: Path, rights: tuple[int, ...], level: str, example: str) -> None:
    storage = Storage(tmp_path)
    base, run = shots_sweep(storage, "gpt_neox", rights)
    study = judged(storage, [base], [run], [ZERO, ONE])
    assert claim_of(study, "4a").verdict == level
    assert deciding(claim_of(study, "4a")).difference == pytest.approx((rights[3] - rights[2]) / QUESTIONS)
    assert claim_of(study, "4b").verdict == example
    change = (rights[3] - rights[1]) - (rights[2] - rights[0])
    assert deciding(claim_of(study, "4b")).difference == pytest.approx(change / QUESTIONS)
    assert claim_of(study, "4a").notes == []


def test_other_families_answer_the_same_question_as_a_note(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    neox = shots_sweep(storage, "gpt_neox", (100, 180, 160, 120))
    llama = shots_sweep(storage, "llama", (100, 180, 160, 240))
    study = judged(storage, [neox[0], llama[0]], [neox[1], llama[1]], [ZERO, ONE])
    claim = claim_of(study, "4a")
    assert claim.verdict == "supported"
    assert deciding(claim).difference == pytest.approx(-40 / QUESTIONS)
    assert claim.notes[0].startswith(
        "llama models, 1-shot, after tuning against before tuning, of which the study says nothing: accuracy +20.0 points"
    )
    alone = judged(storage, [llama[0]], [llama[1]], [ZERO, ONE])
    assert {"4a", "4b"} <= {item.number for item in alone.open}


# ---------------------------------------------------------------- large and English, small and Japanese


@pytest.mark.parametrize(("japanese", "english", "verdict"), [(100, 180, "supported"), (180, 100, "contradicted"), (100, 101, "undecided")])
def test_the_large_english_model_against_the_small_japanese_one(tmp_path: Path, japanese: int, english: int, verdict: str) -> None:
    storage = Storage(tmp_path)
    small, large = base_of(model("open-calm-7b", language="Japanese"), 6.8e9), base_of(model("llama2-70b", language="English"), 69e9)
    tiny = base_of(model("tiny", language="English"), 1e8)
    runs = [run_of(small), run_of(large), run_of(tiny)]
    for key, step, right in (
        *((small.run_key, 0, japanese), (large.run_key, 0, english), (tiny.run_key, 0, 400)),
        *((runs[0].run_key, 7, japanese), (runs[1].run_key, 7, english), (runs[2].run_key, 7, 0)),
    ):
        answer(storage, key, step, ZERO, right)
    claim = claim_of(judged(storage, [small, large, tiny], runs), "5")
    assert claim.verdict == verdict
    assert deciding(claim).difference == pytest.approx((english - japanese) / QUESTIONS)
    assert (deciding(claim).first, deciding(claim).second) == ("open-calm-7b, tuned", "llama2-70b, tuned")
    assert {row.first for row in claim.evidence if not row.decides} == {"open-calm-7b, as they are"}


def test_references_alone_can_answer_for_size_and_language(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    small, large = base_of(model("open-calm-7b", language="Japanese"), 6.8e9), base_of(model("llama2-70b", language="English"), 69e9)
    answer(storage, small.run_key, 0, ZERO, 100)
    answer(storage, large.run_key, 0, ZERO, 180)
    study = judged(storage, [small, large], [])
    assert [claim.number for claim in study.claims] == ["5"]
    assert claim_of(study, "5").verdict == "supported"


# ---------------------------------------------------------------- limits, and little to go by


def test_limits_are_numbers(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    base = base_of(model("calm"))
    run = run_of(base)
    answer(storage, base.run_key, 0, ZERO, 100)
    answer(storage, run.run_key, 7, ZERO, 120)
    study = judged(storage, [base], [run])
    [limit] = [limit for limit in study.limits if limit.metric == "accuracy"]
    # 20 of 400 questions differ, by one each: 2.8 standard errors of their mean
    deviation = np.std([1.0] * 20 + [0.0] * 380, ddof=1)
    assert limit.detectable == pytest.approx(2.8016 * deviation / 20, rel=1e-4)
    assert (limit.n, limit.comparisons) == (QUESTIONS, 1)
    reversal = deciding(claim_of(study, "1a")).reversal_of_50
    assert reversal == 0.0  # no question turned wrong


def test_the_sample_sweep_comes_out_undecided_and_says_that_it_is_synthetic(tmp_path: Path) -> None:
    plan, storage = demo(tmp_path)
    study = judge_claims(collect_results(plan, storage), AnswerBook(storage))
    assert study.is_synthetic
    assert {item.number for item in study.open} == {"1b", "3", "4a", "4b", "5"}
    assert {row.n for claim in study.claims for row in claim.evidence} == {40}
    assert {row.reversal_of_50 for claim in study.claims for row in claim.evidence} == {None}  # fewer than 50 questions to draw from
    assert {claim.verdict for claim in study.claims} == {"undecided"}
    assert deciding(claim_of(study, "1a")).bearing == "for"
    assert claim_of(study, "1a").why.endswith("but 40 questions are fewer than the 200 that the study asks for")


def test_what_is_not_evaluated_is_left_out(tmp_path: Path) -> None:
    base = base_of(model("calm"))
    run, waiting = run_of(base), run_of(base, epochs=3)
    storage = Storage(tmp_path)
    answer(storage, base.run_key, 0, ZERO, 100)
    answer(storage, run.run_key, 7, ZERO, 160)
    answer(storage, run.run_key, 7, ONE, 160)  # its base is not there yet
    study = judged(storage, [base], [run, waiting], [ZERO, ONE])
    assert deciding(claim_of(study, "1a")).over == "exam, 0-shot, alpaca-ja"
    (storage.run(base.run_key).evaluation(ZERO.folder, 0) / PREDICTIONS).unlink()  # the metrics stay
    empty = judged(storage, [base], [run, waiting], [ZERO, ONE])
    assert empty.claims == []
    assert empty.limits == []
    assert len(empty.open) == 8


def test_only_questions_that_both_answered_are_compared(tmp_path: Path) -> None:
    base = base_of(model("calm"))
    run = run_of(base)
    storage = Storage(tmp_path)
    answer(storage, base.run_key, 0, ZERO, 50, questions=200)
    answer(storage, run.run_key, 7, ZERO, 90, questions=300)
    row = deciding(claim_of(judged(storage, [base], [run]), "1a"))
    assert row.n == 200
    assert row.difference == pytest.approx(40 / 200)


def test_claims_json_holds_everything_and_is_the_same_every_time(tmp_path: Path) -> None:
    plan, storage = demo(tmp_path)
    texts = {claims_json(judge_claims(collect_results(order, storage), AnswerBook(storage))) for order in (plan, _turned(plan))}
    assert len(texts) == 1
    stored = json.loads(texts.pop())
    assert set(stored) == {"rule", "evaluations", "is_synthetic", "claims", "open", "limits"}
    assert {claim["verdict"] for claim in stored["claims"]} <= {"supported", "contradicted", "undecided"}


def _turned(plan: Plan) -> Plan:
    return plan.model_copy(update={name: getattr(plan, name)[::-1] for name in ("bases", "runs", "trials")})
