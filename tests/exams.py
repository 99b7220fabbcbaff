"""Question files that are made up on the spot, and what loading them says."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from jmedlora.config.benchmark import BenchmarkConfig
from jmedlora.config.faults import BadInput
from jmedlora.data.benchmarks import Benchmark, load_benchmark
from jmedlora.data.rows import Question

QUESTION = {"problem_id": "115A1", "problem_text": "問い", "choices": ["甲", "乙", "丙"], "text_only": True, "answer": ["b"], "points": "1"}


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, header: list[str], *rows: list[str], encoding: str = "utf-8-sig") -> Path:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def benchmark_of(path: Path, **keys: Any) -> BenchmarkConfig:
    return BenchmarkConfig(name="x", path=str(path), **keys)


def load(path: Path, **keys: Any) -> Benchmark:
    return load_benchmark(benchmark_of(path, **keys), Path())


def ids(questions: list[Question]) -> list[str]:
    return [question.problem_id for question in questions]


def faults_of(path: Path, **keys: Any) -> list[str]:
    with pytest.raises(BadInput) as caught:
        load(path, **keys)
    return [str(fault) for fault in caught.value.faults]


def checkout(folder: Path, years: tuple[int, ...] = (2018, 2019)) -> Path:
    """An IgakuQA checkout with two questions in each of two sections of a year, and one example."""
    for year in years:
        for section in "AB":
            exam = year - 1906
            rows = [{**QUESTION, "problem_id": f"{exam}{section}{i}", "problem_text": f"{year}{section}{i}はどれか。"} for i in (1, 2)]
            write(folder / f"data/{year}/{exam}-{section}.jsonl", rows)
    write(folder / "scripts/prompts/prompt.jsonl", [{**QUESTION, "problem_id": "100E5", "problem_text": "例題"}])
    return folder
