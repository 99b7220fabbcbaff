from __future__ import annotations

import difflib
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmedlora.config.benchmark import DEFAULT_METRICS, HARNESS_METRICS, MetricSettings
from jmedlora.data.rows import Question
from jmedlora.evaluation.metrics import (
    first_line,
    first_line_is_complete,
    gestalt_distance,
    nearest_choices,
    score_response,
    summarise,
)

AUTOJUNK = MetricSettings(autojunk=True)
# Few characters, so that texts share many, in several orders; white space, full-width forms and a supplementary character among them.
JAPANESE = st.text(alphabet="あいうの病血圧薬ー、。.,１1 aA𠮟", max_size=30)
LONG_JAPANESE = st.integers(201, 420).flatmap(lambda n: st.text(alphabet="あいうのは病血圧。", min_size=n, max_size=n))


def question(choices: Sequence[str], *gold: int) -> Question:
    return Question("1", "どれか。", tuple(choices), gold or (0,))


def plain_nearest(response: str, choices: Sequence[str], count: int, metric: MetricSettings) -> tuple[int, ...]:
    distances = [gestalt_distance(response, choice, metric) for choice in choices]
    return tuple(sorted(sorted(range(len(choices)), key=lambda i: (-distances[i], i))[:count]))


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


@pytest.mark.parametrize("metric", [DEFAULT_METRICS, AUTOJUNK, HARNESS_METRICS], ids=["default", "autojunk", "harness"])
@given(response=JAPANESE, choices=st.lists(JAPANESE, min_size=1, max_size=8), data=st.data())
def test_pruning_never_changes_the_choice(metric: MetricSettings, response: str, choices: list[str], data: st.DataObject) -> None:
    choices += data.draw(st.lists(st.sampled_from(choices), max_size=3), label="repeated")
    count = data.draw(st.integers(1, len(choices)), label="count")
    assert nearest_choices(response, choices, count, metric) == plain_nearest(response, choices, count, metric)


@settings(max_examples=30, deadline=None)
@given(response=LONG_JAPANESE, choices=st.lists(LONG_JAPANESE | JAPANESE, min_size=2, max_size=5))
def test_pruning_never_changes_the_choice_for_long_texts(response: str, choices: list[str]) -> None:
    for metric in (DEFAULT_METRICS, HARNESS_METRICS):
        assert nearest_choices(response, choices, 2, metric) == plain_nearest(response, choices, 2, metric)


def test_a_tie_goes_to_the_first_choice() -> None:
    assert nearest_choices("", ["壊血病", "痛風", "喘息"], 1) == (0,)
    assert nearest_choices("脚気", ["壊血病", "痛風", "喘息"], 1) == (0,)
    assert nearest_choices("痛", ["壊血病", "痛風", "頭痛"], 1) == (1,)


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


def test_summary_is_the_mean() -> None:
    asked = question(["壊血病", "痛風", "喘息"], 1)
    scores = [score_response(text, asked) for text in ("痛風", "痛風です", "喘息", "")]
    assert summarise(scores) == {"n": 4, "accuracy": 0.5, "exact_match": 0.25, "gestalt_score": (1 + 4 / 6) / 4}
    with pytest.raises(ValueError, match="no scores"):
        summarise([])
