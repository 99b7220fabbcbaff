"""Thousands of damaged rows in every format: each is a question or a fault that names it, and nothing is skipped in silence."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jmedlora.config.faults import Fault
from jmedlora.data.benchmarks import Format, QuestionSource, read_source
from jmedlora.data.files import MAX_FAULTS_PER_FILE

ROWS_PER_FORMAT = 3_000
"""At least so many damaged rows are read in each of the four formats."""

QUESTION = {"problem_text": "どれか。", "choices": ["甲", "乙", "丙"], "text_only": True, "answer": ["b"], "points": "1"}
SAMPLE = {"question": "どれか。", "options": ["甲", "乙", "丙"], "answer_idx": 1, "n_options": 3, "metadata": {}}
VALUES: list[Any] = [
    *[
        None,
        True,
        False,
        0,
        1,
        -1,
        2.5,
        10**30,
        1e308,
        float("nan"),
        float("inf"),
        "",
        " ",
        "　",
        "a",
        "z",
        "a,c",
        "a or b",
        "ａ",
        "1" * 400,
    ],
    *["\ud800", "x\u2028y", "x\x85y", "x\x00y", "\ufeff", "[1]", "{}", "true", "甲" * 5_000, "\r", "\n", '"', "\\"],
    *[
        [],
        [[]],
        [None],
        ["a", "a"],
        ["z"],
        ["ab"],
        ["a", ",", "c"],
        [""],
        ["a"] * 11,
        ["甲", ""],
        ["甲", 1],
        ["\ud800", "乙"],
        {},
        {"a": []},
    ],
]
BROKEN_LINES = [
    '{"problem_id": ',
    "[]",
    "3",
    "null",
    '"x"',
    "{}",
    "NaN",
    "{'a': 1}",
    '{"a": 1}}',
    "\u2028",
    "[" * 2_000,
    "\x00",
    "\ufeff{}",
    '{"a": 01}',
]
BROKEN_CSV = ['1,"a"b,c', "only", ",".join("abcdefghijkl"), '"x\ny",1', "\x00", ",,,,,,,,,,,,,,,,9"]
SETTINGS = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SEEDS = st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=30)


def damaged(base: dict[str, Any], key: str, position: int, chance: random.Random) -> dict[str, Any]:
    """A row with one to three wrong values, a key less or a key more; one in ten is as it should be but for a repeated id."""
    row: dict[str, Any] = {key: f"112A{position}", **base}
    if chance.random() < 0.1:
        return row | {key: f"112A{max(0, position - 1)}"}
    for _ in range(chance.randint(1, 3)):
        name = chance.choice([*row, "other"])
        if chance.random() < 0.2:
            row.pop(name, None)
        else:
            row[name] = chance.choice(VALUES)
    return row


def check(source: QuestionSource, faults: list[Fault], rows: dict[str, Any]) -> int:
    """`rows`: every row by its place. Each must be a question, or told, or lie after the stop; returns how many were looked at."""
    told = {fault.where for fault in faults}
    read = {place: problem_id for problem_id, place in source.places.items()}
    assert len(source.places) == len(source.questions) == len({question.problem_id for question in source.questions})
    assert not told & read.keys()
    assert read.keys() <= rows.keys()
    stops = [place for place, fault in enumerate(faults) if "stopped after" in fault.problem]
    silent = [place for place in rows if place not in told and place not in read]
    if stops:
        assert stops == [MAX_FAULTS_PER_FILE]
        assert len(faults) == MAX_FAULTS_PER_FILE + 1
        last = max(place for place, where in enumerate(rows) if where in told)
        assert silent == list(rows)[last + 1 :]
    else:
        assert silent == []
        assert len(faults) < MAX_FAULTS_PER_FILE
    assert told <= {*rows, str(source.path)}
    assert all("\n" not in str(fault) for fault in faults)
    for question in source.questions:
        row = rows[source.places[question.problem_id]]
        if isinstance(row, dict):
            assert question.text == (row.get("problem_text") or row.get("question")).strip()
            assert len(question.choices) == len(row["choices"] if "choices" in row else row["options"])
            assert bool(question.gold) == bool(question.choices)
            assert max(question.gold, default=0) < max(len(question.choices), 1)
    return len(rows) - len(silent)


def read_enough(run: Callable[[], None], count: list[int]) -> None:
    """Runs the property and makes sure that it has looked at as many rows as is said."""
    run()
    assert sum(count) >= ROWS_PER_FORMAT


@pytest.mark.parametrize(("form", "base", "key"), [("questions", QUESTION, "problem_id"), ("jmedbench", SAMPLE, "sample_id")])
def test_damaged_json_lines(tmp_path: Path, form: Format, base: dict[str, Any], key: str) -> None:
    count: list[int] = []
    path = tmp_path / "q.jsonl"

    @SETTINGS
    @given(SEEDS)
    def run(seeds: list[int]) -> None:
        lines, rows = [], {}
        for number, seed in enumerate(seeds, start=1):
            chance = random.Random(seed)
            if chance.random() < 0.05:
                lines.append("")  # a blank line is no row
                continue
            row = damaged(base, key, number, chance)
            broken = number > 1 and chance.random() < 0.1  # an opening bracket in front would make it another format
            lines.append(chance.choice(BROKEN_LINES) if broken else json.dumps(row, ensure_ascii=chance.random() < 0.5))
            if lines[-1].strip():
                rows[f"{path}:{number}"] = None if broken else row
        path.write_text("\n".join(lines).replace("\ud800", "\\ud800"), encoding="utf-8")
        faults: list[Fault] = []
        count.append(check(read_source(path, form, faults), faults, rows))

    read_enough(run, count)


def test_damaged_json_list(tmp_path: Path) -> None:
    count: list[int] = []
    path = tmp_path / "q.json"

    @SETTINGS
    @given(SEEDS)
    def run(seeds: list[int]) -> None:
        chances = [random.Random(seed) for seed in seeds]
        items = [
            chance.choice([None, 3, [], "x", True]) if chance.random() < 0.1 else damaged(QUESTION, "problem_id", number, chance)
            for number, chance in enumerate(chances)
        ]
        path.write_text(json.dumps(items), encoding="utf-8")
        faults: list[Fault] = []
        rows = {f"{path}[{number}]": item for number, item in enumerate(items)}
        count.append(check(read_source(path, "questions", faults), faults, rows))

    read_enough(run, count)


def test_damaged_csv(tmp_path: Path) -> None:
    count: list[int] = []
    path = tmp_path / "q.csv"
    header = ["problem_id", *QUESTION, "choice_a", "choice_b"]

    @SETTINGS
    @given(SEEDS)
    def run(seeds: list[int]) -> None:
        text, rows = csv_line(header), {}
        for number, seed in enumerate(seeds, start=1):
            chance = random.Random(seed)
            line = text.count("\n") + 1
            if chance.random() < 0.1:
                added = chance.choice(BROKEN_CSV) + "\r\n"
            else:
                row = damaged(QUESTION, "problem_id", number, chance)
                added = csv_line([cell(row.get(column, ""), chance) for column in header])
            text += added
            if added.strip(", \r\n\u2028\x85　"):
                rows[f"{path}:{line}"] = added
        path.write_bytes(text.encode())
        faults: list[Fault] = []
        count.append(check(read_source(path, "questions", faults), faults, rows))

    read_enough(run, count)


def cell(value: Any, chance: random.Random) -> str:
    """A value as a program or a person would have put it into a cell; UTF-8 holds no half of a surrogate pair."""
    value = json.loads(json.dumps(value).replace("\\ud800", "?").replace("\\r", " ").replace("\\n", " "))
    if isinstance(value, list) and chance.random() < 0.7:
        return json.dumps(value, ensure_ascii=False) if chance.random() < 0.5 else str(value)
    return "" if value is None else str(value)


def csv_line(cells: list[str]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerow(cells)
    return text.getvalue()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=300), st.sampled_from(["jsonl", "json", "csv", "parquet"]), st.sampled_from(["questions", "jmedbench"]))
def test_any_bytes_at_all_are_told(tmp_path: Path, content: bytes, ending: str, form: Format) -> None:
    path = tmp_path / f"q.{ending}"
    path.write_bytes(content)
    faults: list[Fault] = []
    source = read_source(path, form, faults)
    assert source.questions == []
    assert faults
    assert all(fault.where.startswith(str(path)) for fault in faults)
