from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmedlora.config.benchmark import DEFAULT_METRICS, HARNESS_METRICS, BenchmarkConfig, Filters, MetricSettings
from jmedlora.data.benchmarks import load_benchmark
from jmedlora.data.rows import Question
from jmedlora.evaluation.metrics import (
    Scorer,
    answer_is_complete,
    first_line,
    first_line_is_complete,
    gestalt_distance,
    marked_answer,
    nearest_choices,
    score_letters,
    score_response,
    score_responses,
    summarise,
)
from tests.bench.metrics import made_up_responses, plain_distance, plain_score, plain_scores

AUTOJUNK = MetricSettings(autojunk=True)
SETTINGS = st.builds(
    MetricSettings,
    autojunk=st.booleans(),
    order=st.sampled_from(["response_choice", "choice_response", "mean"]),
    first_line=st.booleans(),
    nfkc=st.booleans(),
    remove_full_stops=st.booleans(),
    multiple=st.sampled_from(["top_k", "top_1"]),
    ties=st.sampled_from(["first", "last", "wrong"]),
)
# Few characters, so that texts share many, in several orders; white space, full-width forms and a supplementary character among them.
JAPANESE = st.text(alphabet="あいうの病血圧薬ー、。.,１1 aA𠮟", max_size=30)
LONG_JAPANESE = st.integers(201, 420).flatmap(lambda n: st.text(alphabet="あいうのは病血圧。", min_size=n, max_size=n))


def question(choices: Sequence[str], *gold: int) -> Question:
    return Question("1", "どれか。", tuple(choices), gold or (0,))


def plain_nearest(response: str, choices: Sequence[str], count: int, metric: MetricSettings) -> tuple[int, ...]:
    distances = [plain_distance(response, choice, metric) for choice in choices]
    later_first = -1 if metric.ties == "last" else 1
    return tuple(sorted(sorted(range(len(choices)), key=lambda i: (-distances[i], later_first * i))[:count]))


@st.composite
def asked_questions(draw: st.DrawFn, texts: st.SearchStrategy[str] = JAPANESE) -> Question:
    choices = draw(st.lists(texts, min_size=1, max_size=6))
    gold = st.sets(st.integers(0, len(choices) - 1), min_size=1).map(lambda positions: tuple(sorted(positions)))
    accepted = draw(st.lists(gold, min_size=1, max_size=2))
    return Question("1", "どれか。", tuple(choices), accepted[0], alternatives=tuple(accepted[1:]))


@st.composite
def responses_to(draw: st.DrawFn, asked: Question, texts: st.SearchStrategy[str] = JAPANESE) -> str:
    """Mostly texts around a choice, so that whole choices, parts of them and ties occur."""
    around = st.sampled_from(["", "。", "は", "\n", "A", "."]) | texts
    return draw(around) + draw(st.sampled_from([*asked.choices, asked.answer, ""])) + draw(around)


def test_known_values_show_the_order_of_the_arguments() -> None:
    assert gestalt_distance("tide", "diet") == 0.25
    assert gestalt_distance("diet", "tide") == 0.5
    assert gestalt_distance("tide", "diet", MetricSettings(order="mean")) == 0.375
    assert gestalt_distance("", "壊血病") == 0
    assert gestalt_distance("", "") == 1


@pytest.mark.parametrize("autojunk", [False, True])
@given(response=JAPANESE, choice=JAPANESE)
def test_short_texts_score_as_in_difflib(autojunk: bool, response: str, choice: str) -> None:
    expected = difflib.SequenceMatcher(None, response, choice, autojunk).ratio()
    assert gestalt_distance(response, choice, MetricSettings(autojunk=autojunk)) == expected


@pytest.mark.parametrize("autojunk", [False, True])
@settings(max_examples=40, deadline=None)
@given(response=LONG_JAPANESE, choice=LONG_JAPANESE)
def test_long_texts_score_as_in_difflib(autojunk: bool, response: str, choice: str) -> None:
    expected = difflib.SequenceMatcher(None, response, choice, autojunk).ratio()
    assert gestalt_distance(response, choice, MetricSettings(autojunk=autojunk)) == expected


def test_autojunk_matters_from_200_characters_on() -> None:
    text = "高血圧の治療薬はどれか" * 20
    assert gestalt_distance("。" + text, text) == 440 / 441
    assert gestalt_distance("。" + text, text, AUTOJUNK) == 0


@given(metric=SETTINGS, response=JAPANESE, choices=st.lists(JAPANESE, min_size=1, max_size=8), data=st.data())
def test_pruning_never_changes_the_choice(metric: MetricSettings, response: str, choices: list[str], data: st.DataObject) -> None:
    choices += data.draw(st.lists(st.sampled_from(choices), max_size=3), label="repeated")
    count = data.draw(st.integers(1, len(choices)), label="count")
    assert nearest_choices(response, choices, count, metric) == plain_nearest(response, choices, count, metric)


@settings(max_examples=30, deadline=None)
@given(metric=SETTINGS, response=LONG_JAPANESE, choices=st.lists(LONG_JAPANESE | JAPANESE, min_size=2, max_size=5))
def test_pruning_never_changes_the_choice_for_long_texts(metric: MetricSettings, response: str, choices: list[str]) -> None:
    assert nearest_choices(response, choices, 2, metric) == plain_nearest(response, choices, 2, metric)


@settings(max_examples=300, deadline=None)
@given(metric=SETTINGS, asked=asked_questions(), data=st.data())
def test_scores_are_those_of_plain_difflib(metric: MetricSettings, asked: Question, data: st.DataObject) -> None:
    response = data.draw(responses_to(asked))
    assert score_response(response, asked, metric) == plain_score(response, asked, metric)


@settings(max_examples=40, deadline=None)
@given(metric=SETTINGS, asked=asked_questions(LONG_JAPANESE | JAPANESE), data=st.data())
def test_scores_of_long_texts_are_those_of_plain_difflib(metric: MetricSettings, asked: Question, data: st.DataObject) -> None:
    response = data.draw(responses_to(asked, LONG_JAPANESE))
    assert score_response(response, asked, metric) == plain_score(response, asked, metric)


@settings(max_examples=50, deadline=None)
@given(metric=SETTINGS, questions=st.lists(asked_questions(), max_size=12), data=st.data())
def test_a_kept_scorer_scores_as_one_by_one(metric: MetricSettings, questions: list[Question], data: st.DataObject) -> None:
    kept = {answer: Scorer(questions, metric, answer=answer) for answer in ("text", "letters")}  # type: ignore[arg-type]
    for _ in range(2):
        responses = [data.draw(responses_to(asked)) for asked in questions]
        each = [score_response(*pair, metric) for pair in zip(responses, questions)]
        assert kept["text"].score(responses) == score_responses(responses, questions, metric) == each
        letters = [score_letters(*pair, metric) for pair in zip(responses, questions)]
        assert kept["letters"].score(responses) == score_responses(responses, questions, metric, answer="letters") == letters


def test_a_question_without_choices_is_refused() -> None:
    with pytest.raises(ValueError, match="112C66 has no choices"):
        score_response("26", Question("112C66", "求めよ。", (), (), value="26"))


def test_as_many_responses_as_questions() -> None:
    with pytest.raises(ValueError, match="2 responses to 1 questions"):
        score_responses(["a", "b"], [question(["壊血病", "痛風"], 0)])


def test_scores_of_real_questions(shared_data: Path) -> None:
    config = BenchmarkConfig(
        name="igakuqa", path=str(shared_data / "igakuqa" / "data" / "2018"), filters=Filters(text_only=True, choices=5)
    )
    questions = load_benchmark(config, shared_data).questions
    for metric in (DEFAULT_METRICS, HARNESS_METRICS, MetricSettings(order="choice_response", nfkc=True, ties="wrong", multiple="top_1")):
        for length in (10, 240):
            responses = made_up_responses(questions, length, seed=1)
            assert score_responses(responses, questions, metric) == plain_scores(responses, questions, metric)


def test_a_tie_goes_to_the_first_choice() -> None:
    assert nearest_choices("", ["壊血病", "痛風", "喘息"], 1) == (0,)
    assert nearest_choices("脚気", ["壊血病", "痛風", "喘息"], 1) == (0,)
    assert nearest_choices("痛", ["壊血病", "痛風", "頭痛"], 1) == (1,)


def test_a_tie_goes_to_the_last_choice_where_told() -> None:
    last = MetricSettings(ties="last")
    assert nearest_choices("痛", ["壊血病", "痛風", "頭痛", "喘息"], 1, last) == (2,)
    assert nearest_choices("痛", ["壊血病", "痛風", "頭痛", "喘息"], 3, last) == (1, 2, 3)
    assert score_response("", question(["壊血病", "痛風"], 1), last).correct


def test_a_tie_that_decides_is_wrong_where_told() -> None:
    wrong = MetricSettings(ties="wrong")
    tied = question(["痛風", "頭痛", "喘息"], 0)
    assert score_response("痛", tied).correct
    score = score_response("痛", tied, wrong)
    assert (score.chosen, score.correct, score.gestalt_score) == ((0,), False, 2 / 3)
    both = question(["痛風", "頭痛", "喘息"], 0, 1)
    assert score_response("痛", both, wrong).correct  # the tie lies within what is chosen
    assert not score_response("", question(["壊血病", "痛風"], 0), wrong).correct
    assert score_response("", question(["壊血病", "痛風"], 0, 1), wrong).correct  # nothing is left out


def test_top_1_asks_for_the_nearest_choice_alone() -> None:
    top_1 = MetricSettings(multiple="top_1")
    asked = question(["壊血病", "痛風", "夜盲症", "緑内障"], 1, 3)
    score = score_response("緑内障", asked, top_1)
    assert (score.chosen, score.correct, score.exact_match) == ((3,), True, False)
    assert score.gestalt_score == gestalt_distance("緑内障", "痛風,緑内障")
    assert not score_response("夜盲症", asked, top_1).correct
    assert score_response("緑内障,夜盲症", asked).chosen == (2, 3)
    assert not score_response("緑内障,夜盲症", asked).correct


def test_one_right_answer() -> None:
    asked = question(["壊血病", "痛風", "夜盲症", "緑内障", "喘息"], 2)
    score = score_response(" 夜盲症\n\n### 指示：", asked)
    assert (score.response, score.chosen, score.correct, score.exact_match, score.gestalt_score) == ("夜盲症", (2,), True, True, 1.0)
    near = score_response("夜盲症です。", asked)
    assert (near.correct, near.exact_match, near.gestalt_score) == (True, False, 2 * 3 / 9)
    wrong = score_response("痛風", asked)
    assert (wrong.chosen, wrong.correct, wrong.exact_match, wrong.gestalt_score) == ((1,), False, False, 0.0)


def test_an_empty_response_is_assigned_the_first_choice() -> None:
    assert score_response(" \n ", question(["壊血病", "痛風"], 0)).correct
    assert not score_response("", question(["壊血病", "痛風"], 1)).correct


def test_several_right_answers_must_all_be_the_nearest() -> None:
    asked = question(["壊血病", "痛風", "夜盲症", "緑内障", "喘息"], 1, 3)
    score = score_response("緑内障,痛風", asked)
    assert (score.chosen, score.correct, score.exact_match) == ((1, 3), True, False)
    assert score.gestalt_score == gestalt_distance("緑内障,痛風", "痛風,緑内障")
    assert score_response("痛風,緑内障", asked).exact_match
    half = score_response("痛風,夜盲症", asked)
    assert (half.chosen, half.correct) == ((1, 2), False)


def test_each_accepted_answer_counts() -> None:
    asked = Question("112B30", "どれか。", ("壊血病", "痛風", "喘息"), (0,), alternatives=((2,),))
    for text in ("壊血病", "喘息"):
        score = score_response(text, asked)
        assert (score.correct, score.exact_match, score.gestalt_score) == (True, True, 1.0)
    assert not score_response("痛風", asked).correct


def test_a_comma_inside_a_choice_is_part_of_it() -> None:
    score = score_response("1,000mL", question(["500mL", "1,000mL", "000mL"], 1))
    assert score.correct
    assert score.exact_match


def test_only_the_first_line_is_scored_unless_told_otherwise() -> None:
    asked = question(["痛風", "喘息"], 0)
    text = "\n 痛風 \r\n喘息。喘息。"
    assert score_response(text, asked).response == "痛風"
    assert score_response(text, asked, MetricSettings(first_line=False)).response == "痛風 \r\n喘息。喘息。"


def test_nfkc_folds_both_sides() -> None:
    asked = question(["ＡＢＣ", "１２０回"], 1)
    assert not score_response("120回", asked).exact_match
    folded = score_response("120回", asked, MetricSettings(nfkc=True))
    assert (folded.correct, folded.exact_match, folded.gestalt_score) == (True, True, 1.0)


def test_the_harness_removes_full_stops_from_response_and_answer_but_not_from_choices() -> None:
    asked = question(["5.5", "55"], 0)
    score = score_response("5.5.", asked, HARNESS_METRICS)
    assert (score.response, score.exact_match, score.gestalt_score) == ("55", True, 1.0)
    assert (score.chosen, score.correct) == ((1,), False)
    assert score_response("5.5", asked).correct


@given(text=st.text(alphabet="あ a\n\r\u2028\t", max_size=12), more=st.text(alphabet="い \n\r", max_size=6))
def test_a_complete_first_line_no_longer_changes(text: str, more: str) -> None:
    assert first_line(text) in text
    if first_line_is_complete(text):
        assert first_line(text)
        assert first_line(text + more) == first_line(text)


def test_first_line_is_complete_only_after_text_and_a_break() -> None:
    assert not first_line_is_complete("\n \n")
    assert not first_line_is_complete("\n痛風 ")
    assert first_line_is_complete("\n痛風\n")
    assert first_line_is_complete("痛風\n喘")


def test_the_marked_answer_follows_the_last_marker() -> None:
    text = "まず考える。答え：は後で書く。\n痛風ではない。\n\n答え： 喘息\n以上"
    assert marked_answer(text, "答え：") == " 喘息\n以上"
    assert marked_answer("痛風ではない。\n 喘息 \n\n", "答え：") == "喘息"
    assert marked_answer("", "答え：") == ""
    asked = question(["壊血病", "痛風", "喘息"], 2)
    score = score_response(text, asked, marker="答え：")
    assert (score.response, score.correct, score.exact_match) == ("喘息", True, True)
    assert score_responses([text], [asked], marker="答え：") == [score]
    assert score_response(text, asked, MetricSettings(first_line=False), marker="答え：").response == "喘息\n以上"
    assert score_letters("aを考えたがcにする\n答え：c", asked, marker="答え：").chosen == (2,)


@given(text=st.text(alphabet="あ答：\n ", max_size=14), more=st.text(alphabet="い \n", max_size=6))
def test_a_complete_answer_no_longer_changes(text: str, more: str) -> None:
    for marker in ("答：", None):
        if answer_is_complete(text, marker):
            assert score_response(text, question(["あ"], 0), marker=marker) == score_response(
                text + more, question(["あ"], 0), marker=marker
            )


def test_an_answer_is_complete_only_after_its_marker() -> None:
    assert not answer_is_complete("考える。\n考える。\n", "答え：")
    assert not answer_is_complete("考える。\n答え：\n", "答え：")
    assert not answer_is_complete("考える。\n答え：痛風", "答え：")
    assert answer_is_complete("考える。\n答え：痛風\n", "答え：")
    assert answer_is_complete("考える。\n答え：\n痛風\n", "答え：")
    assert answer_is_complete("痛風\n", None)
    assert not answer_is_complete("痛風", None)


def test_letters_are_scored_by_the_choices_that_they_name() -> None:
    asked = question(["壊血病", "痛風", "夜盲症", "緑内障", "喘息"], 1, 3)
    score = score_letters("答え：ｂ，ｄ\n理由は…", asked)
    assert (score.response, score.chosen, score.correct, score.exact_match, score.gestalt_score) == (
        "答え：ｂ，ｄ",
        (1, 3),
        True,
        False,
        1.0,
    )
    assert score_letters(" Ｄ、Ｂ。", asked).exact_match
    half = score_letters("b", asked)
    assert (half.chosen, half.correct, half.gestalt_score) == ((1,), False, gestalt_distance("痛風", "痛風,緑内障"))
    none = score_letters("分かりません。", asked)
    assert (none.chosen, none.correct, none.exact_match, none.gestalt_score) == ((), False, False, 0.0)
    assert not score_letters("b,c,d", asked).correct


def test_letters_with_top_1_ask_for_the_first_named() -> None:
    top_1 = MetricSettings(multiple="top_1")
    asked = question(["壊血病", "痛風", "夜盲症", "緑内障", "喘息"], 1, 3)
    assert score_letters("d,a", asked, top_1).correct
    assert not score_letters("a,d", asked, top_1).correct
    assert not score_letters("", asked, top_1).correct


def test_letters_of_each_accepted_answer_count() -> None:
    asked = Question("112B30", "どれか。", ("壊血病", "痛風", "喘息"), (0,), alternatives=((2,),))
    assert [score_letters(letter, asked).correct for letter in "abc"] == [True, False, True]
    assert score_letters("c", asked).gestalt_score == 1.0


def test_summary_is_the_mean() -> None:
    asked = question(["壊血病", "痛風", "喘息"], 1)
    scores = [score_response(text, asked) for text in ("痛風", "痛風です", "喘息", "")]
    assert summarise(scores) == {"n": 4, "accuracy": 0.5, "exact_match": 0.25, "gestalt_score": (1 + 4 / 6) / 4}
    with pytest.raises(ValueError, match="no scores"):
        summarise([])
