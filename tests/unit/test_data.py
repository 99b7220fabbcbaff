"""Instruction sets, benchmarks and prompts: what is read, what is filtered, what is told about bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmedlora.config.benchmark import BenchmarkConfig, Filters, PromptConfig
from jmedlora.config.compose import load_sweep
from jmedlora.config.data import DataConfig
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.parts import NamedSource
from jmedlora.data.benchmarks import load_benchmark, parse_question, read_questions
from jmedlora.data.files import MAX_FAULTS_PER_FILE, NotHereYet
from jmedlora.data.instructions import load_instructions
from jmedlora.data.prompts import prompt_digest, render_prompt
from jmedlora.data.rows import Instruction, Question

QUESTION = {"problem_id": "115A1", "problem_text": "問い", "choices": ["甲", "乙", "丙"], "text_only": True, "answer": ["b"], "points": "1"}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def faults_of_rows(tmp_path: Path, rows: list[Any]) -> list[str]:
    with pytest.raises(BadInput) as caught:
        load_instructions(DataConfig(name="x", path=str(write(tmp_path / "rows.jsonl", rows))), tmp_path)
    return [str(fault).replace(str(tmp_path), "") for fault in caught.value.faults]


def benchmark_of(path: Path, **keys: Any) -> BenchmarkConfig:
    return BenchmarkConfig(name="x", path=str(path), **keys)


# ---------------------------------------------------------------- instructions


def test_rows_are_read_in_order_and_trimmed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": " 問い ", "output": "答え\n"}, {"instruction": "b", "input": None, "output": "c"}])
    loaded = load_instructions(DataConfig(name="x", path=str(path)), tmp_path)
    assert loaded.rows == [Instruction("問い", "", "答え"), Instruction("b", "", "c")]


def test_every_bad_row_is_named_with_its_line(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": "a"},
        {"instruction": "", "output": 3},
        ["a"],
        {"instruction": "a", "input": 1, "output": "b"},
    ]
    assert faults_of_rows(tmp_path, rows) == [
        "/rows.jsonl:2: output: missing; allowed: a text that is not empty",
        "/rows.jsonl:3: instruction: '' is not allowed; allowed: a text that is not empty",
        "/rows.jsonl:3: output: 3 is not allowed; allowed: a text that is not empty",
        "/rows.jsonl:4: not an object; allowed: a JSON object a line",
        "/rows.jsonl:5: input: 1 is not allowed; allowed: a text, or left out",
    ]


@pytest.mark.parametrize("key", ["instruction", "input", "output"])
def test_half_a_surrogate_pair_in_a_row_is_named_with_its_line_and_key(tmp_path: Path, key: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "a", "output": "b", key: "x\ud800"}) + "\n")
    with pytest.raises(BadInput) as caught:
        load_instructions(DataConfig(name="x", path=str(path)), tmp_path)
    assert [str(fault) for fault in caught.value.faults] == [f"{path}:1: {key}: 'x\\ud800' is not valid Unicode text"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "[" + "1" * 5000 + "]", '{"a": ' + "1" * 5000 + "}", "[1, 2"])
def test_what_no_json_reader_takes_is_a_fault(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(BadInput, match=r"rows.json.*: not JSON: "):
        load_instructions(DataConfig(name="x", path=str(tmp_path / "rows.json")), tmp_path)


@pytest.mark.parametrize("path", ["/tmp/a\0b", "/tmp/" + "x" * 300, "/etc/passwd/x"])
def test_a_path_that_cannot_exist_is_a_fault(tmp_path: Path, path: str) -> None:
    for load in (
        lambda: load_instructions(DataConfig(name="x", path=path), tmp_path),
        lambda: load_benchmark(BenchmarkConfig(name="x", path=path), tmp_path),
    ):
        with pytest.raises(BadInput, match=r"cannot be read|does not exist"):
            load()


@pytest.mark.parametrize("filters", [{"years": [2018]}, {"text_only": False}, {"choices": 5}, {"answers": 1}, {"exclude": ["a"]}])
def test_filters_of_questions_on_instruction_rows_are_faults(tmp_path: Path, filters: dict[str, Any]) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}] * 3)
    with pytest.raises(BadInput, match=f"data x: filters.{next(iter(filters))}: instruction rows have nothing to filter by"):
        load_instructions(DataConfig(name="x", path=str(path), filters=filters), tmp_path)
    assert len(load_instructions(DataConfig(name="x", path=str(path), filters={"first": 2}), tmp_path).rows) == 2


def test_a_thoroughly_broken_file_does_not_flood_the_terminal(tmp_path: Path) -> None:
    assert len(faults_of_rows(tmp_path, [{"output": "b"}] * 1000)) == MAX_FAULTS_PER_FILE + 1


def test_an_empty_file_is_a_fault(tmp_path: Path) -> None:
    assert faults_of_rows(tmp_path, []) == ["/rows.jsonl: no rows; allowed: at least one row"]


def test_a_named_source_that_is_missing_is_not_bad_input(tmp_path: Path) -> None:
    with pytest.raises(NotHereYet, match="later"):
        load_instructions(DataConfig(name="x", source=NamedSource(kind="named", name="later.jsonl")), tmp_path)


def test_questions_become_rows_answered_with_the_choices_text(tmp_path: Path) -> None:
    rows = [QUESTION, {**QUESTION, "problem_id": "115A2", "answer": ["c", "a"]}]
    path = write(tmp_path / "q.jsonl", rows)
    loaded = load_instructions(DataConfig(name="x", path=str(path), format="questions"), tmp_path)
    choices = ("甲", "乙", "丙")
    assert loaded.rows == [
        Instruction("問い", "甲,乙,丙", "乙", choices, "b", 1),
        Instruction("問い", "甲,乙,丙", "甲,丙", choices, "a,c", 2),
    ]


# ---------------------------------------------------------------- benchmarks


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer": ["f"]}, "answer: ['f'] is not among the 3 choices; allowed: different letters of a to c"),
        ({"answer": ["a", "a"]}, "answer: ['a', 'a'] is not among the 3 choices; allowed: different letters of a to c"),
        ({"answer": [""]}, "answer: [''] names no choice; allowed: letters of a to c"),
        ({"answer": [","]}, "answer: [','] names no choice; allowed: letters of a to c"),
        ({"choices": ["甲"], "answer": ["a"]}, "choices: only one choice; allowed: 2 to 10 texts, or none"),
        (
            {"choices": ["甲", " "]},
            "choices: a choice without text; allowed: texts (leave the question out by filters.exclude or text_only)",
        ),
        ({"problem_text": "\ud800"}, "problem_text: '\\ud800' is not valid Unicode text"),
        ({"answer": []}, "answer: [] is not allowed; allowed: a list of letters"),
        ({"answer": "a"}, "answer: 'a' is not allowed; allowed: a list of letters"),
        ({"choices": "甲乙"}, "choices: '甲乙' is not allowed; allowed: a list of at most 10 texts"),
        ({"choices": [1, 2]}, "choices: [1, 2] is not allowed; allowed: a list of at most 10 texts"),
        ({"problem_text": None}, "problem_text: None is not allowed; allowed: a text that is not empty"),
        ({"text_only": "yes"}, "text_only: 'yes' is not allowed; allowed: true or false"),
        ({"choices": [], "answer": ["26"]}, "choices: no choices to choose from; allowed: questions with choices (set filters.choices)"),
    ],
)
def test_a_bad_question_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [QUESTION, {**QUESTION, "problem_id": "115A2", **change}]))
    with pytest.raises(BadInput) as caught:
        load_benchmark(benchmark_of(path), tmp_path)
    assert [str(fault) for fault in caught.value.faults] == [f"{path}:2: {told}"]


def test_a_benchmark_without_questions_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"q.jsonl: no questions; allowed"):
        load_benchmark(benchmark_of(write(tmp_path / "q.jsonl", [])), tmp_path)


def test_excluding_a_question_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [QUESTION, {**QUESTION, "problem_id": "115A2"}])
    with pytest.raises(BadInput, match=r"filters.exclude: no question 115A9"):
        load_benchmark(benchmark_of(path, filters={"exclude": ["115A1", "115A9"]}), tmp_path)


def test_examples_are_named_in_one_way(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [QUESTION])
    for other in ({"fewshot": str(path)}, {"fewshot_bundled": "sample/fewshot.jsonl"}):
        with pytest.raises(BadInput, match=f"benchmark x: fewshot_items: given together with {next(iter(other))}"):
            load_benchmark(benchmark_of(path, fewshot_items=["115A1"], **other), tmp_path)


def test_the_same_id_twice_is_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [QUESTION, QUESTION])
    with pytest.raises(BadInput, match=r"115A1 stands at .*q.jsonl:1 already"):
        load_benchmark(benchmark_of(path), tmp_path)


def test_filters_keep_what_they_say(tmp_path: Path) -> None:
    rows = [
        {
            **QUESTION,
            "problem_id": f"{exam}A{i}",
            "text_only": i % 2 == 0,
            "choices": ["甲", "乙", "丙"][: 2 + (i > 2)],
            "answer": ["a", "b"][: 1 + (i > 3)],
        }
        for exam in (112, 113)
        for i in range(1, 6)
    ]
    path = write(tmp_path / "q.jsonl", rows)

    def kept(**filters: Any) -> list[str]:
        return [question.problem_id for question in load_benchmark(benchmark_of(path, filters=filters), tmp_path).questions]

    assert kept() == [row["problem_id"] for row in rows]
    assert kept(years=[2019]) == [f"113A{i}" for i in range(1, 6)]
    assert kept(text_only=True) == ["112A2", "112A4", "113A2", "113A4"]
    assert kept(choices=2) == ["112A1", "112A2", "113A1", "113A2"]
    assert kept(answers=2, first=3) == ["112A4", "112A5", "113A4"]
    assert kept(exclude=["112A1"], first=1) == ["112A2"]
    with pytest.raises(BadInput, match="no question is left"):
        kept(years=[1999])


def test_either_of_two_answers_is_kept_and_stray_commas_are_dropped(tmp_path: Path) -> None:
    rows = [{**QUESTION, "answer": ["a or c"]}, {**QUESTION, "problem_id": "115A2", "answer": ["a", ",", "b"]}]
    either, both = load_benchmark(benchmark_of(write(tmp_path / "q.jsonl", rows)), tmp_path).questions
    assert (either.gold, either.alternatives) == ((0,), ((2,),))
    assert both.gold == (0, 1)


def test_examples_never_come_from_the_evaluated_questions(tmp_path: Path) -> None:
    rows = [{**QUESTION, "problem_id": f"115A{i}"} for i in range(1, 4)]
    path = write(tmp_path / "q.jsonl", rows)
    named = load_benchmark(benchmark_of(path, fewshot_items=["115A2"]), tmp_path)
    assert [q.problem_id for q in named.examples] == ["115A2"]
    assert [q.problem_id for q in named.questions] == ["115A1", "115A3"]
    with pytest.raises(BadInput, match="example 115A1 is also evaluated"):
        load_benchmark(benchmark_of(path, fewshot=str(write(tmp_path / "f.jsonl", rows[:1]))), tmp_path)
    with pytest.raises(BadInput, match="no question 999"):
        load_benchmark(benchmark_of(path, fewshot_items=["999"]), tmp_path)


def test_the_years_of_a_checkout_are_checked(tmp_path: Path) -> None:
    (tmp_path / "data" / "2018").mkdir(parents=True)
    write(tmp_path / "data" / "2018" / "112-A.jsonl", [{**QUESTION, "problem_id": "112A1"}])
    write(tmp_path / "data" / "2018" / "112-A_metadata.jsonl", [{"problem_id": "112A1"}])
    assert len(load_benchmark(benchmark_of(tmp_path, filters={"years": [2018]}), tmp_path).questions) == 1
    with pytest.raises(BadInput, match="2022 is not here; allowed: 2018"):
        load_benchmark(benchmark_of(tmp_path, filters={"years": [2022]}), tmp_path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from([*QUESTION, "other"]), JSON_VALUES))
def test_any_row_is_either_a_question_or_a_named_fault(row: dict[str, Any]) -> None:
    faults: list[Fault] = []
    question = parse_question("file:1", row, None, faults)
    assert (question is None) == bool(faults)
    assert all(fault.where == "file:1" and fault.key for fault in faults)


def test_the_real_exam_has_the_published_counts(shared_data: Path) -> None:
    def count(**filters: Any) -> int:
        faults: list[Fault] = []
        found = len(read_questions(shared_data / "igakuqa", Filters(**filters), faults))
        assert not [fault for fault in faults if fault.key != "choices"]
        return found

    assert [count(years=[year]) for year in (2018, 2019, 2020, 2021)] == [400] * 4
    assert [count(years=[year], text_only=True, choices=5) for year in (2018, 2019, 2020, 2021)] == [284, 292, 284, 298]
    assert [count(years=[year], text_only=True, choices=5, answers=1) for year in (2018, 2019, 2020, 2021)] == [239, 248, 242, 253]
    benchmark = load_sweep("smoke", [f"benchmarks=[{{preset: igakuqa, path: {shared_data / 'igakuqa'}}}]"]).benchmarks[0]
    loaded = load_benchmark(benchmark, Path())
    assert len(loaded.questions) == 1158
    assert [example.problem_id for example in loaded.examples] == ["100E5", "100A60", "100A1"]


def test_the_real_self_assessment_questions_have_the_published_counts(shared_data: Path) -> None:
    benchmark = load_sweep(
        "smoke", [f"benchmarks=[{{preset: jjsimqa, path: {shared_data / 'jjsimqa/jjsimqa.jsonl'}}}]", "shots=[0]"]
    ).benchmarks[0]
    answers = [len(question.gold) for question in load_benchmark(benchmark, Path()).questions]
    assert len(answers) == 391
    # 107_888-26 asks for two and gives ["d", ",", "e"], which raw counts take for three answers
    assert [answers.count(n) for n in (1, 2, 3)] == [216, 175, 0]


# ---------------------------------------------------------------- prompts


def alpaca() -> PromptConfig:
    return load_sweep("smoke").prompts["alpaca-ja"]


def test_the_studys_prompt_shape() -> None:
    row = Question("1", "どれか。", ("甲", "乙"), (1,)).as_instruction()
    text = render_prompt(alpaca(), row, [Instruction("例題", "丙,丁", "丁")])
    blocks = ["### 指示：\n例題", "### 入力：\n丙,丁", "### 応答：\n丁\n", "### 指示：\nどれか。", "### 入力：\n甲,乙"]
    assert [text.index(block) for block in blocks] == sorted(text.index(block) for block in blocks)
    assert text.endswith("### 応答：\n")
    assert text.count("乙") == 1
    assert "### 入力" not in render_prompt(alpaca(), Instruction("問い", "", "答え"))


def test_a_prompts_identity_is_its_template() -> None:
    prompt = alpaca()
    assert prompt_digest(prompt) == prompt_digest(prompt.model_copy(update={"name": "other", "note": "x"}))
    assert prompt_digest(prompt) != prompt_digest(prompt.model_copy(update={"template": prompt.template + " "}))


@pytest.mark.parametrize(
    "template",
    [
        "{{ instruction.__class__.__mro__ }}",
        "{{ 1/0 }}",
        "{% include 'x' %}",
        "{{ instruction + 1 }}",
        "{% for i in range(10**9) %}{{ i }}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ 10**10 * [1] }}",
        "{{ 10**10000 }}",
        "{{ " + "(" * 100_000,
        "{{ '\\ud800' }}",
    ],
)
def test_whatever_goes_wrong_in_a_template_is_its_fault(template: str) -> None:
    with pytest.raises(BadInput, match="prompt p: template: "):
        render_prompt(PromptConfig(name="p", template=template), Instruction("a", "b", "c"))


def test_a_template_may_compute() -> None:
    assert render_prompt(PromptConfig(name="p", template="{{ '-' * 3 }}{{ 2 ** 3 * 2 }}"), Instruction("a", "b", "c")) == "---16"
