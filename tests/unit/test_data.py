"""Instruction sets and prompts: what is read, what is rendered, what is told about bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jmedlora.config.benchmark import BenchmarkConfig, PromptConfig
from jmedlora.config.compose import load_sweep
from jmedlora.config.data import DataConfig
from jmedlora.config.faults import BadInput
from jmedlora.config.parts import NamedSource
from jmedlora.data.benchmarks import load_benchmark
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
