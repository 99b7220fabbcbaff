from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmedlora.data.rows import LETTERS
from jmedlora.evaluation.letters import exact_value, names_exactly, parse_letters, parse_value


def letters(text: str, expected: int = 1, choices: int = 5) -> str:
    return "".join(LETTERS[i] for i in parse_letters(text, choices, expected))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a", "a"),
        ("Ｃ", "c"),
        ("(c)", "c"),
        ("【ｃ】", "c"),
        ("b）", "b"),
        ("**b**", "b"),
        (r"$\boxed{\text{D}}$", "d"),
        ("c. 肺塞栓", "c"),
        ("c．肺塞栓", "c"),
        ("c 肺塞栓", "c"),
        ("c：カテーテル", "c"),
        ("ｄ（カテーテル）", "d"),
        ("答え：b", "b"),
        ("答えはｂです。", "b"),
        ("正解はcです", "c"),
        ("正解c", "c"),
        ("解答 e", "e"),
        ("選択肢ｃが正しい。", "c"),
        ("選択肢：c", "c"),
        ("bが正解です。", "b"),
        ("鉄欠乏性貧血（c）", "c"),
        ("The answer is B.", "b"),
        ("The correct answer is (B) Pulmonary embolism", "b"),
        ("The answer is A because of the fever", "a"),
        ("**Answer:** B", "b"),
        ("Option C is correct.", "c"),
        ("I think the answer is e", "e"),
        ("d (clostridium difficile)", "d"),
        ("51. d", "d"),
    ],
)
def test_one_letter(text: str, named: str) -> None:
    assert letters(text) == named


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("ａ，ｃ", "ac"),
        ("a､c", "ac"),
        ("a,c。", "ac"),
        ("a, c", "ac"),
        ("a・c", "ac"),
        ("a c", "ac"),
        ("(a)(c)", "ac"),
        ("(a), (c)", "ac"),
        ("ac", "ac"),
        ("ca", "ca"),
        ("A and C", "ac"),
        ("Both A and C are correct.", "ac"),
        ("正解はcとe", "ce"),
        ("答え：c 及び e", "ce"),
        ("正答：Ｃ，Ｄ", "cd"),
        ("a. 痛風、c. 喘息", "ac"),
        ("c：痛風 d：喘息", "cd"),
        ("c,c", "c"),
    ],
)
def test_several_letters(text: str, named: str) -> None:
    assert letters(text, expected=2) == named


def test_three_letters() -> None:
    assert letters("b, c, and e", expected=3) == "bce"
    assert letters("aとbとd", expected=3) == "abd"
    assert letters("abd", expected=3) == "abd"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "。",
        "痛風",
        "f",
        "1",
        "a patient with fever",
        "A patient with B cell lymphoma",
        "The answer is a patient with fever",
        "I think so",
        "B型肝炎",
        "ビタミンC",
        "C反応性蛋白",
        "hepatitis B",
        "vitamin c",
        "B12",
        "b-cell",
        "HbA1c",
        "e.g. fever",
        "not B",
        "The answer is not A.",
        "答えはaではない",
        "B is wrong.",
        "不正解はaです",
        "写真(a)、頭部MRIの水平断像(b)及び冠状断像(c)が提示されていません。",
        "心エコー図(a〜c)が表示されていない。",
        "画像がないため､この問題に回答することはできません｡",
    ],
)
def test_no_letter(text: str) -> None:
    assert letters(text) == ""


def test_words_made_of_letters_are_none() -> None:
    assert letters("be careful", expected=2) == ""
    assert letters("He had a bad cold", expected=3) == ""
    assert letters("dead", expected=4) == ""


def test_what_is_announced_goes_first() -> None:
    assert letters("まずaを考えたが、正解はc") == "c"
    assert letters("答えはaではなくcです") == "c"
    assert letters("B is wrong. The answer is C.") == "c"
    assert letters("答え：a、いや、答え：d") == "d"
    assert letters("正解はb。aは誤り。") == "b"


def test_an_explanation_adds_nothing() -> None:
    assert letters("c。aは誤り、bも誤り。") == "c"
    assert letters("c。eは胆管癌である。", expected=2) == "c"


def test_more_letters_than_asked_are_all_read() -> None:
    assert letters("a,c") == "ac"
    assert letters("aかd") == "ad"
    assert letters("ac") == "ac"


def test_letters_end_with_the_last_choice() -> None:
    assert letters("f", choices=6) == "f"
    assert letters("a,f", expected=2) == ""
    assert letters("h", choices=8) == "h"
    assert parse_letters("a", 0, 1) == ()


@given(positions=st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), data=st.data())
def test_every_list_of_letters_is_read_in_its_order(positions: list[int], data: st.DataObject) -> None:
    separator = data.draw(st.sampled_from([",", "、", "，", "・", " ", "と", ", and ", " or ", "/", ""]))
    before = data.draw(st.sampled_from(["", "答え：", "正解は", "The answer is ", "(", "\n"]))
    after = data.draw(st.sampled_from(["", "。", "です。", ".", ")", "\n"]))
    named = separator.join(data.draw(st.sampled_from([LETTERS[i], LETTERS[i].upper(), chr(ord(LETTERS[i]) + 0xFEE0)])) for i in positions)
    assert parse_letters(before + named + after, 10, len(positions)) == tuple(positions)


@given(
    text=st.text(alphabet="abcdefij ABE,、。.()（）はと答え正解型ン-12*\n", max_size=40),
    choices=st.integers(1, 10),
    expected=st.integers(1, 4),
)
def test_whatever_is_read_names_choices_once(text: str, choices: int, expected: int) -> None:
    found = parse_letters(text, choices, expected)
    assert len(set(found)) == len(found)
    assert all(0 <= position < choices for position in found)


@given(text=st.text(max_size=60))
def test_any_text_can_be_parsed(text: str) -> None:
    parse_letters(text, 5, 1)
    parse_value(text)
    exact_value(text)


def test_nothing_but_the_letters_is_exact() -> None:
    for text in ("a,c", "Ａ，Ｃ", "c、a。", "(a) (c)", "a c", "ac"):
        assert names_exactly(text, (0, 2))
    for text in ("a", "a,c,d", "答え：a,c", "a,c,c", ""):
        assert not names_exactly(text, (0, 2))
    assert not names_exactly("", ())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("26", "26"),
        ("２６", "26"),
        ("26Torr", "26"),
        ("1,440kcal", "1440"),
        ("−5", "-5"),
        ("①26torr", "26"),
        ("①2 ②6", "26"),
        ("①8.②5", "8.5"),
        ("解答: ①146②mg/dl", "146"),
        ("答え:\n27%", "27"),
        ("100−3=97。答えは97 Torr です。60歳では異なる。", "97"),
        ("0.21 × 713 = 149.73, so the answer is 26.", "26"),
        ("(36 / 0.8) - 79 = 26", "26"),
    ],
)
def test_the_number_that_is_the_answer(text: str, value: str) -> None:
    assert parse_value(text) == Decimal(value)


def test_no_number() -> None:
    assert parse_value("") is None
    assert parse_value("答えは分からない") is None


def test_a_number_alone() -> None:
    assert exact_value(" 8.50\n") == Decimal("8.5")
    assert exact_value("1,440") == 1440
    for text in ("8.5倍", "8.5.1", "①26", "", "a", "1e5", "inf", "٣x"):
        assert exact_value(text) is None
