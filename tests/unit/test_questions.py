"""Questions as they are read: every format, bad rows, rows that are mended, and the facts beside a section."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmedlora.config.faults import Fault
from jmedlora.data.benchmarks import open_source, read_all_questions
from jmedlora.data.files import read_rows
from jmedlora.data.letters import listed_texts
from jmedlora.data.questions import parse_question
from jmedlora.data.rows import Question, QuestionFacts
from tests.exams import QUESTION, benchmark_of, faults_of, load, write, write_csv

SAMPLE = {"sample_id": "x-1", "question": "問い", "options": ["甲", "乙"], "answer_idx": 1, "n_options": 2, "metadata": {"from": "x"}}


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer": ["f"]}, "answer: ['f'] is not among the 3 choices; allowed: different letters of a to c"),
        ({"answer": ["a", "a"]}, "answer: ['a', 'a'] has a twice; allowed: different letters of a to c"),
        ({"answer": "ca, c"}, "answer: ['c', 'a', 'c'] has c twice; allowed: different letters of a to c"),
        ({"answer": [""]}, "answer: [''] names no choice; allowed: letters of a to c"),
        ({"answer": [","]}, "answer: [','] names no choice; allowed: letters of a to c"),
        ({"answer": ["a or z"]}, "answer: ['a or z'] is not among the 3 choices; allowed: different letters of a to c"),
        ({"choices": ["甲"], "answer": ["a"]}, "choices: only one choice; allowed: 2 to 10 texts, or none"),
        (
            {"choices": ["甲", " "]},
            "choices: a choice without text; allowed: texts (leave the question out by filters.exclude or text_only)",
        ),
        ({"problem_text": "\ud800"}, "problem_text: '\\ud800' is not valid Unicode text"),
        ({"choices": ["甲", "\ud800"]}, "choices: ['甲', '\\ud800'] is not valid Unicode text"),
        ({"answer": []}, 'answer: [] is not allowed; allowed: a list of letters such as ["a"]'),
        ({"answer": " "}, "answer: ' ' is not allowed; allowed: a list of letters such as [\"a\"]"),
        ({"answer": 1}, 'answer: 1 is not allowed; allowed: a list of letters such as ["a"]'),
        ({"answer": "d"}, "answer: ['d'] is not among the 3 choices; allowed: different letters of a to c"),
        ({"choices": "甲乙"}, "choices: '甲乙' is not allowed; allowed: a list of at most 10 texts"),
        ({"choices": [1, 2]}, "choices: [1, 2] is not allowed; allowed: a list of at most 10 texts"),
        ({"problem_text": None}, "problem_text: None is not allowed; allowed: a text that is not empty"),
        ({"text_only": "yes"}, "text_only: 'yes' is not allowed; allowed: true or false"),
        ({"points": "1.5"}, "points: '1.5' is not allowed; allowed: a whole number, such as 1 or 3"),
        ({"points": 2.5}, "points: 2.5 is not allowed; allowed: a whole number, such as 1 or 3"),
        ({"points": float("nan")}, "points: nan is not allowed; allowed: a whole number, such as 1 or 3"),
        ({"category": 3}, "category: 3 is not allowed; allowed: a text that is not empty"),
        ({"choices": [], "answer": ["26"]}, "choices: no choices to choose from; allowed: questions with choices (set filters.choices)"),
        ({"choices": [], "answer": [" "]}, "answer: [' '] is empty; allowed: the value that is asked for, such as a number"),
    ],
)
def test_a_bad_question_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [QUESTION, {**QUESTION, "problem_id": "115A2", **change}]))
    assert faults_of(path) == [f"{path}:2: {told}"]


def test_every_key_of_a_bad_row_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"problem_id": " ", "choices": {}, "text_only": 1, "points": 10**400}])
    assert [fault.split(": ")[1] for fault in faults_of(path)] == ["problem_id", "problem_text", "choices", "answer", "text_only", "points"]


def test_a_broken_file_is_told_up_to_a_point(tmp_path: Path) -> None:
    faults = faults_of(write(tmp_path / "q.jsonl", [{**QUESTION, "answer": 1}] * 30))
    assert len(faults) == 21
    assert faults[-1] == f"{tmp_path}/q.jsonl: stopped after 20 faults; there may be more"
    (tmp_path / "q.json").write_text(json.dumps([{**QUESTION, "answer": 1}] * 30))
    assert faults_of(tmp_path / "q.json")[-1] == f"{tmp_path}/q.json: stopped after 20 faults; there may be more"


def test_what_is_known_of_a_question(tmp_path: Path) -> None:
    rows = [
        {**QUESTION, "problem_id": "112B7", "points": "3", "answer": ["Ｃ", " a"]},
        {**QUESTION, "problem_id": "112C1", "points": 1.0, "choices": [], "answer": ["７.20"]},
        {**QUESTION, "problem_id": "107_64-0", "answer": ["a or c"], "category": "感染症", "section": "Z"},
    ]
    first, numeric, either = read_all_questions(benchmark_of(write(tmp_path / "q.jsonl", rows)), tmp_path)
    assert (first.gold, first.letters, first.year, first.facts) == ((0, 2), "a,c", 2018, QuestionFacts(points=3, section="B"))
    assert (numeric.gold, numeric.value, numeric.answer, numeric.facts.points) == ((), "7.20", "7.20", 1)
    assert (either.gold, either.alternatives, either.year) == ((0,), ((2,),), None)
    assert (either.facts.section, either.facts.category) == ("Z", "感染症")


@pytest.mark.parametrize("answer", ["a,c", "ac", "ca", "Ａ、Ｃ", "a c", "['a', 'c']", '["a", "c"]'])
def test_an_answer_may_be_one_text_as_in_csv(tmp_path: Path, answer: str) -> None:
    rows = [
        {**QUESTION, "answer": answer},
        {**QUESTION, "problem_id": "2", "answer": "ｂ"},
        {**QUESTION, "problem_id": "3", "answer": "a or c"},
    ]
    source = open_source(benchmark_of(write(tmp_path / "q.jsonl", rows)), tmp_path)
    assert [question.gold for question in source.questions] == [(0, 2), (1,), (0,)]
    assert (source.questions[2].alternatives, source.notes) == (((2,),), [])
    [number] = read_all_questions(benchmark_of(write(tmp_path / "n.json", [{**QUESTION, "choices": [], "answer": "26"}])), tmp_path)
    assert number.value == "26"


def test_choices_that_are_seldom_meant_are_told(tmp_path: Path) -> None:
    rows = [
        {**QUESTION, "choices": ["甲", "", "乙", " 甲"]},
        {**QUESTION, "problem_id": "2", "choices": ["甲", "乙", ""]},
        {**QUESTION, "problem_id": "3", "choices": ["", "", ""]},
    ]
    path = write(tmp_path / "q.jsonl", rows)
    source = open_source(benchmark_of(path), tmp_path)
    assert source.notes == [f"{path}:1: choices: b is blank", f"{path}:1: choices: d is the same as a"]
    assert len(source.questions) == 3


def test_rows_that_were_mended_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [QUESTION, {**QUESTION, "problem_id": "2", "answer": ["a", ",", "c"]}])
    source = open_source(benchmark_of(path), tmp_path)
    assert source.questions[1].gold == (0, 2)
    assert source.notes == [f"{path}:2: answer: ['a', ',', 'c'] is read as a, c"]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from("\u2028\u2029\x85\x0b\x0c\x1c\ufeff"))
def test_only_a_line_feed_ends_a_line(tmp_path_factory: pytest.TempPathFactory, separator: str) -> None:
    path = tmp_path_factory.mktemp("lines") / "q.jsonl"
    write(path, [{**QUESTION, "problem_text": f"前{separator}後"}, {**QUESTION, "problem_id": "115A2"}])
    assert [question.text for question in load(path).questions] == [f"前{separator}後", "問い"]


# ---------------------------------------------------------------- formats


def test_a_json_list_is_read_like_json_lines(tmp_path: Path) -> None:
    rows = [QUESTION, {**QUESTION, "problem_id": "115A2"}]
    (tmp_path / "q.json").write_text(json.dumps(rows, indent=2))
    assert load(tmp_path / "q.json").questions == load(write(tmp_path / "q.jsonl", rows)).questions
    (tmp_path / "q.json").write_text(json.dumps([*rows, 3]))
    assert faults_of(tmp_path / "q.json") == [f"{tmp_path}/q.json[2]: not an object; allowed: a JSON object"]


def test_json_lines_may_begin_with_a_line_that_is_a_list(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("[]\n" + json.dumps(QUESTION) + "\n3\n")
    told = "not an object; allowed: a JSON object a line"
    assert faults_of(path) == [f"{path}:1: {told}", f"{path}:3: {told}"]
    path.write_text('[\n{"a": 1},\n{"a"\n]')
    assert faults_of(path) == [f"{path}:4: not JSON: Expecting ':' delimiter; allowed: a JSON list of objects, or an object a line"]


@pytest.mark.parametrize(
    ("header", "row"),
    [
        (["choices", "answer"], ['["甲, 一", "乙", "丙"]', '["a", "c"]']),
        (["choices", "answer"], ["['甲, 一', '乙', \"丙\"]", "['a', 'c']"]),
        (["choice_a", "choice_b", "choice_c", "choice_d", "answer"], ["甲, 一", "乙", "丙", "", "a,c"]),
        (["choice_a", "choice_b", "choice_c", "answer"], ["甲, 一", "乙", "丙", "Ａ、Ｃ"]),
        (["choice_a", "choice_b", "choice_c", "answer"], ["甲, 一", "乙", "丙", "ca"]),
        (["choice_a", "choice_b", "choice_c", "answer"], ["甲, 一", "乙", "丙", "[a,c]"]),
    ],
)
def test_csv_as_people_and_libraries_save_it(tmp_path: Path, header: list[str], row: list[str]) -> None:
    fixed = ["", "problem_id", "problem_text", "text_only", "points"]
    path = write_csv(tmp_path / "q.csv", fixed + header, ["0", "112A1", '一行目\n二行目, "引用"', "TRUE", "1.0", *row])
    [question] = load(path).questions
    assert (question.choices, question.gold, question.year) == (("甲, 一", "乙", "丙"), (0, 2), 2018)
    assert question.text == '一行目\n二行目, "引用"'


@pytest.mark.parametrize(
    "cell", ["減塩食|喫煙, 飲酒|運動", "減塩食 ｜ 喫煙, 飲酒 ｜ 運動", "減塩食\n喫煙, 飲酒\n運動\n", "減塩食\r\n喫煙, 飲酒\r\n運動"]
)
def test_choices_in_one_cell_of_csv(tmp_path: Path, cell: str) -> None:
    path = write_csv(tmp_path / "q.csv", ["problem_id", "problem_text", "choices", "answer"], ["1", "問い", cell, "b"])
    assert load(path).questions[0].choices == ("減塩食", "喫煙, 飲酒", "運動")


@pytest.mark.parametrize("cell", ["減塩,喫煙", "減塩、喫煙", "減塩|1日\n喫煙|2日"])
def test_choices_that_can_be_read_in_two_ways_are_refused(tmp_path: Path, cell: str) -> None:
    path = write_csv(tmp_path / "q.csv", ["problem_id", "problem_text", "choices", "answer"], ["1", "問い", cell, "b"])
    assert faults_of(path) == [
        f"{path}:2: choices: {cell!r} is not allowed; allowed: columns choice_a ... choice_j, or texts parted by line breaks or by | alone"
    ]


@pytest.mark.parametrize(("name", "separator"), [("q.csv", ";"), ("q.csv", "\t"), ("q.tsv", "\t"), ("q.csv", ",")])
def test_what_parts_the_columns_is_seen_in_the_header(tmp_path: Path, name: str, separator: str) -> None:
    lines = [["", ""], ["problem_id", '"problem_text"', "choice_a", "choice_b", "answer"], ["1", '"a,b;c\td,e,f"', "甲", "乙", '"a;b"']]
    (tmp_path / name).write_bytes("\r\n".join(separator.join(cells) for cells in lines).encode("utf-8-sig"))
    [question] = load(tmp_path / name).questions
    assert (question.text, question.choices, question.gold) == ("a,b;c\td,e,f", ("甲", "乙"), (0, 1))


def test_a_header_without_the_columns_is_one_fault(tmp_path: Path) -> None:
    allowed = "allowed: the columns problem_id, problem_text, choice_a ... choice_j (or choices), answer"
    for header in (["id", "question", "A", "B", "answer"], ["problem_id", "problem_text", "選択肢1", "選択肢2", "answer"]):
        path = write_csv(tmp_path / "q.csv", header, *([["1", "問い", "甲", "乙", "a"]] * 30))
        assert faults_of(path) == [f"{path}:1: header: the columns {', '.join(header)}; {allowed}"]
    path.write_text("id|question|answer\n1|問い|a\n")
    assert faults_of(path) == [f"{path}:1: header: the columns id|question|answer; {allowed}"]
    long = write_csv(tmp_path / "long.csv", [f"column {i}" for i in range(1000)])
    assert len(faults_of(long)[0]) < 500


def test_files_of_other_kinds_are_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "q.xlsx").write_bytes(b"PK\x03\x04")
    assert faults_of(tmp_path / "q.xlsx") == [f"{tmp_path}/q.xlsx: an Excel workbook: save it as `CSV UTF-8`"]
    faults: list[Fault] = []
    for name in ("none.jsonl", "none.xlsx", "none.parquet", "."):
        assert list(read_rows(tmp_path / name, faults)) == []
    assert [str(fault) for fault in faults] == [
        f"{tmp_path}/none.jsonl: cannot be read: No such file or directory; allowed: a UTF-8 file of rows",
        f"{tmp_path}/none.xlsx: cannot be read: No such file or directory; allowed: a UTF-8 file of rows",
        f"{tmp_path}/none.parquet: cannot be read: No such file or directory; allowed: a Parquet file",
        f"{tmp_path}: a folder; allowed: the files in it",
    ]


def test_the_csv_of_the_self_assessment_questions_has_choices_in_brackets(tmp_path: Path) -> None:
    header = ["problem_id", "problem_text", "choices", "text_only", "answer", "points"]
    path = write_csv(
        tmp_path / "q.csv",
        header,
        ["1_1-0", "一つ", "[甲．,乙（２）,丙]", "True", "b", "1.0"],
        ["1_1-1", "二つ", "[35,77,90.0]", "True", "ac", "1.0"],
        [""] * 6,
        ["1_1-2", "数", "", "False", "26", ""],
    )
    first, numbers, numeric = read_all_questions(benchmark_of(path), tmp_path)
    assert first.choices == ("甲．", "乙（２）", "丙")
    assert (numbers.choices, numbers.gold) == (("35", "77", "90.0"), (0, 2))
    assert (numeric.choices, numeric.value, numeric.text_only, numeric.facts.points) == ((), "26", False, 1)


def test_a_bad_row_of_csv_is_named_with_the_line_where_it_begins(tmp_path: Path) -> None:
    header = ["problem_id", "problem_text", "choices", "choice_a", "choice_b", "answer", "text_only"]
    path = write_csv(
        tmp_path / "q.csv",
        header,
        ["1", "二行\nの問い", "", "甲", "乙", "a", "1"],
        ["2", "問い", "", "甲", "乙", "z", "maybe"],
        ["3", "問い", '["甲", "乙"]', "甲", "", "a", ""],
        ["4", "問い", "甲,乙", "", "", "a", ""],
        ["5", "問い", "['甲' '乙', '丙']", "", "", "a", ""],
        ["6", "問い"],
        ["1", "問い", "", "甲", "乙", "a", ""],
    )
    assert [fault.removeprefix(f"{path}:").split("; allowed")[0] for fault in faults_of(path)] == [
        "4: text_only: 'maybe' is not allowed",
        "4: answer: ['z'] is not among the 2 choices",
        "5: choice_a: given together with choices",
        "6: choices: '甲,乙' is not allowed",
        "7: choices: \"['甲' '乙', '丙']\" is not allowed",
        "8: 2 cells under 7 columns",
        "9: problem_id: 1 stands at " + f"{path}:2 already",
    ]


def test_a_file_in_another_encoding_is_told_as_such(tmp_path: Path) -> None:
    header = ["problem_id", "problem_text", "choice_a", "choice_b", "answer"]
    path = write_csv(tmp_path / "q.csv", header, ["1", "問い", "甲", "乙", "a"], encoding="cp932")
    assert faults_of(path) == [f"{path}:2: not UTF-8: it reads as cp932 (Shift_JIS); allowed: a UTF-8 file (in Excel: save as `CSV UTF-8`)"]
    path = write_csv(tmp_path / "w.csv", header, ["1", "問い", "甲", "乙", "a"], encoding="utf-16")
    assert faults_of(path)[0].startswith(f"{path}:1: not UTF-8: it begins like UTF-16")


def test_csv_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text('problem_id,problem_text,choice_a,choice_b,answer\n1,問い,"甲,乙,a\n')
    assert faults_of(path) == [f"{path}:2: not CSV: unexpected end of data; allowed: CSV with quotes around cells that need them"]
    path.write_text("problem_id,answer,answer\n1,a,a\n")
    assert faults_of(path) == [f"{path}:1: answer: two columns of this name; allowed: each column once"]


def test_jmedbench_rows_in_every_container(tmp_path: Path) -> None:
    rows = [SAMPLE, {**SAMPLE, "sample_id": 7, "answer_idx": 0}]
    write(tmp_path / "s.jsonl", rows)
    (tmp_path / "s.json").write_text(json.dumps(rows))
    pa.parquet.write_table(
        pa.table({key: [str(row[key]) if key == "sample_id" else row[key] for row in rows] for key in SAMPLE}), tmp_path / "s.parquet"
    )
    for name in ("s.jsonl", "s.json", "s.parquet"):
        questions = load(tmp_path / name, format="jmedbench").questions
        assert questions == [Question("x-1", "問い", ("甲", "乙"), (1,)), Question("7", "問い", ("甲", "乙"), (0,))]
    (tmp_path / "s.parquet").write_bytes(b"PAR1 not really")
    assert f"{tmp_path}/s.parquet: cannot be read: " in faults_of(tmp_path / "s.parquet", format="jmedbench")[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sample_id": None}, "sample_id: None is not allowed; allowed: a text that is not empty"),
        ({"sample_id": True}, "sample_id: True is not allowed; allowed: a text that is not empty"),
        ({"sample_id": "x-1"}, "sample_id: x-1 stands at FILE:1 already; allowed: each id once"),
        ({"question": ""}, "question: '' is not allowed; allowed: a text that is not empty"),
        ({"options": "甲"}, "options: '甲' is not allowed; allowed: a list of at most 10 texts"),
        ({"options": []}, "options: an empty list; allowed: 2 to 10 texts"),
        (
            {"options": ["甲"] * 11, "answer_idx": 10, "n_options": 11},
            "options: [" + "'甲', " * 10 + "...] is not allowed; allowed: a list of at most 10 texts",
        ),
        ({"answer_idx": 2}, "answer_idx: 2 is not allowed; allowed: a position from 0 to 1"),
        ({"answer_idx": -1}, "answer_idx: -1 is not allowed; allowed: a position from 0 to 1"),
        ({"answer_idx": "a"}, "answer_idx: 'a' is not allowed; allowed: a position from 0 to 1"),
        ({"answer_idx": True}, "answer_idx: True is not allowed; allowed: a position from 0 to 1"),
        ({"n_options": 4}, "n_options: 4 with 2 options; allowed: the number of options"),
    ],
)
def test_a_bad_jmedbench_row_is_named_with_its_own_keys(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = write(tmp_path / "s.jsonl", [SAMPLE, {**SAMPLE, "sample_id": "x-2", **change}])
    assert f"{path}:2: {told.replace('FILE', str(path))}" in faults_of(path, format="jmedbench")


def test_a_jmedbench_row_without_keys_is_told_in_its_own_terms(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", [{"sample_id": "x"}, {"sample_id": "y", "question": "問い", "options": ["甲", "乙"]}])
    assert faults_of(path, format="jmedbench") == [
        f"{path}:1: answer_idx: missing; allowed: a position from 0",
        f"{path}:1: question: missing; allowed: a text that is not empty",
        f"{path}:1: options: missing; allowed: a list of at most 10 texts",
        f"{path}:2: answer_idx: missing; allowed: a position from 0 to 1",
    ]


def test_a_folder_of_jmedbench_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", [SAMPLE])
    assert faults_of(tmp_path, format="jmedbench") == [
        f"{tmp_path}: is a folder; allowed: one file of the question set: its folder holds training rows as well"
    ]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=8, alphabet=st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])), min_size=1, max_size=5)
)
def test_a_list_in_a_cell_comes_back_as_it_was(texts: list[str]) -> None:
    assert listed_texts(json.dumps(texts, ensure_ascii=False)) == texts
    if all(text.isprintable() for text in texts):
        assert listed_texts(str(texts)) == texts  # as pandas writes a column of lists


# ---------------------------------------------------------------- side files


def test_facts_beside_a_section(tmp_path: Path) -> None:
    rows = [{**QUESTION, "problem_id": f"112A{i}"} for i in range(1, 5)]
    path = write(tmp_path / "112-A.jsonl", rows)
    bare = load(path).questions
    metadata = {"category": "感染症", "kinki": [], "human_accuracy": "", "breakdown": []}
    write(
        tmp_path / "112-A_metadata.jsonl",
        [
            {"problem_id": "112A2", **metadata, "kinki": ["ca"], "human_accuracy": "39.3"},
            {"problem_id": "112A3", **metadata, "kinki": ["ｂ", " c"]},
            {"problem_id": "112A9", **metadata},
        ],
    )
    write(
        tmp_path / "112-A_translate.jsonl",
        [
            {"problem_id": "112A1", "problem_text_en": "Which?", "choices_en": ["x", "y ", "z"], "answer": ["b"], "asnwer": ["b"]},
            {"problem_id": "112A2", "problem_text_en": "Which?", "choices_en": ["x"]},
        ],
    )
    source = open_source(benchmark_of(path), tmp_path)
    first, second, third, fourth = source.questions
    assert (first.facts.question_en, first.facts.choices_en, first.facts.category) == ("Which?", ("x", "y", "z"), "")
    assert (second.facts.category, second.facts.prohibited, second.facts.human_accuracy) == ("感染症", (0, 2), pytest.approx(0.393))
    assert (second.facts.question_en, third.facts.prohibited, third.facts.human_accuracy) == ("", (1, 2), None)
    assert fourth == bare[3]
    assert [note.removeprefix(f"{tmp_path}/112-A_") for note in source.notes] == [
        "metadata.jsonl:1: kinki: ['ca'] is read as a, c",
        "metadata.jsonl:2: kinki: ['ｂ', ' c'] is read as b, c",
        "metadata.jsonl:3: '112A9' is not among the questions; left aside",
        "translate.jsonl:2: a translation with 1 choices of 3; left aside",
    ]


@pytest.mark.parametrize(
    ("suffix", "row", "told"),
    [
        ("metadata", {"kinki": ["d"]}, "kinki: ['d'] is not among the 3 choices; allowed: letters of choices"),
        ("metadata", {"kinki": "a"}, "kinki: 'a' is not allowed; allowed: a list of letters"),
        ("metadata", {"category": []}, "category: [] is not allowed; allowed: a text"),
        ("metadata", {"human_accuracy": "101"}, "human_accuracy: '101' is not allowed; allowed: a percentage, or an empty text"),
        ("metadata", {"human_accuracy": "nan"}, "human_accuracy: 'nan' is not allowed; allowed: a percentage, or an empty text"),
        ("metadata", {"human_accuracy": [1]}, "human_accuracy: [1] is not allowed; allowed: a percentage, or an empty text"),
        ("metadata", {"problem_id": 3}, "problem_id: 3 is not allowed; allowed: the id of a question"),
        ("translate", {"choices_en": ["x", "y", "z"]}, "problem_text_en: None is not allowed; allowed: a text"),
        ("translate", {"problem_text_en": "x", "choices_en": [1]}, "choices_en: [1] is not allowed; allowed: a list of texts"),
    ],
)
def test_a_damaged_side_file_is_named_with_its_line(tmp_path: Path, suffix: str, row: dict[str, Any], told: str) -> None:
    path = write(tmp_path / "112-A.jsonl", [{**QUESTION, "problem_id": "112A1"}])
    side = write(tmp_path / f"112-A_{suffix}.jsonl", [{"problem_id": "112A1", **row}])
    assert faults_of(path) == [f"{side}:1: {told}"]


def test_a_side_file_that_is_not_json_or_tells_twice_is_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "112-A.jsonl", [{**QUESTION, "problem_id": "112A1"}])
    side = write(tmp_path / "112-A_metadata.jsonl", [{"problem_id": "112A1"}] * 2)
    assert faults_of(path) == [f"{side}:2: problem_id: '112A1' stands at {side}:1 already; allowed: each id once"]
    side.write_text("{")
    assert faults_of(path)[0].startswith(f"{side}:1: not JSON")


# ---------------------------------------------------------------- any row


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*QUESTION, "category", "section", "other"]), JSON_VALUES))
def test_any_row_is_either_a_question_or_a_named_fault(row: dict[str, Any]) -> None:
    faults: list[Fault] = []
    question = parse_question("file:1", row, None, faults, [])
    assert (question is None) == bool(faults)
    assert all(fault.where == "file:1" and fault.key for fault in faults)
