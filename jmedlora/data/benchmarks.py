"""Question sets in IgakuQA's format: reading, filtering, few-shot examples."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jmedlora.config.benchmark import BenchmarkConfig, Filters
from jmedlora.config.digest import digest, digest_rows
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.locate import bundled_file
from jmedlora.data.files import NotHereYet, add_fault, kind_of, locate_source, read_rows
from jmedlora.data.rows import LETTERS, Question, is_unicode

IGAKUQA_EXAMPLES = Path("scripts/prompts/prompt.jsonl")
FIRST_EXAM_YEAR = 1906
"""The exam's number plus this is its year: the 112th was held in 2018."""


@dataclass(frozen=True)
class Benchmark:
    """The questions that are evaluated and, apart from them, the examples for few-shot prompts."""

    name: str
    questions: list[Question]
    examples: list[Question]
    digest: str
    """Identity of questions and examples, in this order."""


def load_benchmark(config: BenchmarkConfig, sources: Path) -> Benchmark:
    """Reads, checks and filters a benchmark.

    Raises BadInput with a fault per bad row, NotHereYet for a named source that is missing.
    """
    given = [name for name in ("fewshot", "fewshot_bundled", "fewshot_items") if getattr(config, name)]
    if len(given) > 1:
        raise BadInput(
            [
                Fault(
                    f"benchmark {config.name}",
                    given[-1],
                    f"given together with {given[0]}",
                    "one of fewshot, fewshot_bundled and fewshot_items",
                )
            ]
        )
    named = sources / "benchmarks" / config.source.name if config.source else None
    if named is not None and not kind_of(named):
        raise NotHereYet(f"benchmark {config.name}: {named}")
    path = locate_source(config.path, config.bundled, named)
    faults: list[Fault] = []
    questions = read_questions(path, config.filters, faults)
    examples = _examples(config, path, questions, faults)
    example_ids = {example.problem_id for example in examples}
    if config.fewshot_items:
        questions = [question for question in questions if question.problem_id not in example_ids]
    else:
        overlap = sorted(example_ids & {question.problem_id for question in questions})
        faults.extend(
            Fault(str(path), "fewshot", f"example {item} is also evaluated", "examples from outside the evaluated questions")
            for item in overlap
        )
    if not questions and not faults:
        faults.append(Fault(str(path), "filters", "no question is left", "filters that keep at least one question"))
    if faults:
        raise BadInput(faults)
    identity = digest_rows(question.as_dict() for question in questions)
    return Benchmark(config.name, questions, examples, digest([identity, [example.as_dict() for example in examples]]))


def read_questions(path: Path, filters: Filters, faults: list[Fault]) -> list[Question]:
    """The questions at `path` (a file, or a folder in IgakuQA's layout) that pass the filters, in the files' order."""
    rows: list[tuple[str, Question]] = []
    before = len(faults)
    seen: dict[str, str] = {}
    for file in question_files(path, filters.years, faults):
        start = len(faults)
        for where, row in read_rows(file, faults):
            question = parse_question(where, row, _year_of(file, row), faults)
            if question is None:
                if len(faults) - start >= 20:
                    break
                continue
            if question.problem_id in seen:
                add_fault(
                    faults,
                    start,
                    Fault(where, "problem_id", f"{question.problem_id} stands at {seen[question.problem_id]} already", "each id once"),
                )
                continue
            seen[question.problem_id] = where
            if _passes(question, filters):
                rows.append((where, question))
    if not seen and len(faults) == before:
        faults.append(Fault(str(path), "", "no questions", "at least one question"))
    # questions of other years stand in files that are not read
    if len(faults) == before and (filters.years is None or kind_of(path) == "file"):
        faults.extend(
            Fault(str(path), "filters.exclude", f"no question {item}", "ids of questions that are here")
            for item in filters.exclude
            if item not in seen
        )
    if filters.first is not None:
        rows = rows[: filters.first]
    for where, question in rows:
        if not question.gold:
            faults.append(Fault(where, "choices", "no choices to choose from", "questions with choices (set filters.choices)"))
        elif not all(question.choices):
            # the exam has a question whose choices are all in its picture
            faults.append(
                Fault(where, "choices", "a choice without text", "texts (leave the question out by filters.exclude or text_only)")
            )
    return [question for _, question in rows]


def question_files(path: Path, years: list[int] | None, faults: list[Fault]) -> list[Path]:
    """The question files of a folder: `data/<year>/*.jsonl` of a checkout, or the folder's own; without metadata and translations."""
    if kind_of(path) == "file":
        return [path]
    if kind_of(path) != "folder":
        faults.append(Fault(str(path), "", "does not exist", "a JSON Lines file, or a folder of them"))
        return []
    root = path / "data" if (path / "data").is_dir() else path
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and re.fullmatch(r"\d{4}", folder.name)) or [root]
    here = [int(folder.name) for folder in folders if folder.name.isdigit()]
    for year in years or []:
        if here and year not in here:
            faults.append(Fault(str(root), "filters.years", f"{year} is not here", ", ".join(map(str, here))))
    files = [
        file
        for folder in folders
        if not (years and folder.name.isdigit() and int(folder.name) not in years)
        for file in sorted(folder.glob("*.jsonl"))
    ]
    files = [file for file in files if not file.stem.endswith(("_metadata", "_translate"))]
    if not files and not faults:
        faults.append(Fault(str(path), "", "no question files in this folder", "a JSON Lines file, or a folder of them"))
    return files


def parse_question(where: str, row: dict[str, Any], year: int | None, faults: list[Fault]) -> Question | None:
    """One row as a question, or None with its faults appended.

    Questions without choices (numeric answers) are read with no gold positions; of `a or d` both are right.
    """
    start = len(faults)
    problem_id, text, choices, answer = (row.get(key) for key in ("problem_id", "problem_text", "choices", "answer"))
    if not isinstance(problem_id, str) or not problem_id:
        faults.append(Fault(where, "problem_id", _found(row, "problem_id"), "a text that is not empty"))
    if not isinstance(text, str) or not text.strip():
        faults.append(Fault(where, "problem_text", _found(row, "problem_text"), "a text that is not empty"))
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices) or len(choices) > len(LETTERS):
        faults.append(Fault(where, "choices", _found(row, "choices"), f"a list of at most {len(LETTERS)} texts"))
        choices = None
    elif len(choices) == 1:
        faults.append(Fault(where, "choices", "only one choice", f"2 to {len(LETTERS)} texts, or none"))
    if not isinstance(answer, list) or not answer or not all(isinstance(letter, str) for letter in answer):
        faults.append(Fault(where, "answer", _found(row, "answer"), "a list of letters"))
        answer = None
    if not isinstance(row.get("text_only", True), bool):
        faults.append(Fault(where, "text_only", _found(row, "text_only"), "true or false"))
    for key, texts in (("problem_id", [problem_id]), ("problem_text", [text]), ("choices", choices or [])):
        if not all(is_unicode(item) for item in texts if isinstance(item, str)):
            faults.append(Fault(where, key, f"{row[key]!r:.60} is not valid Unicode text"))
    gold: list[tuple[int, ...]] = []
    if choices and answer:
        letters = LETTERS[: len(choices)]
        for alternative in _alternatives(answer):
            wrong = [letter for letter in alternative if len(letter) != 1 or letter not in letters]
            if not alternative:
                faults.append(Fault(where, "answer", f"{answer!r:.60} names no choice", f"letters of {letters[0]} to {letters[-1]}"))
                break
            if wrong or len(set(alternative)) != len(alternative):
                faults.append(
                    Fault(
                        where,
                        "answer",
                        f"{answer!r} is not among the {len(choices)} choices",
                        f"different letters of {letters[0]} to {letters[-1]}",
                    )
                )
                break
            gold.append(tuple(sorted(letters.index(letter) for letter in alternative)))
    if len(faults) > start:
        return None
    assert isinstance(problem_id, str)
    assert isinstance(text, str)
    return Question(
        problem_id,
        text.strip(),
        tuple(choice.strip() for choice in choices or []),
        gold[0] if gold else (),
        year,
        row.get("text_only", True),
        tuple(gold[1:]),
    )


def _alternatives(answer: list[str]) -> list[list[str]]:
    """`["a or d"]` accepts either letter; everything else is one set of letters."""
    if len(answer) == 1 and " or " in answer[0]:
        return [[letter.strip()] for letter in answer[0].split(" or ")]
    return [[letter for letter in answer if letter.strip(", ")]]  # JJSIMQA has a row with a stray comma among its letters


def _found(row: dict[str, Any], key: str) -> str:
    return f"{row[key]!r:.60} is not allowed" if key in row else "missing"


def _year_of(file: Path, row: dict[str, Any]) -> int | None:
    if re.fullmatch(r"\d{4}", file.parent.name):
        return int(file.parent.name)
    exam = re.match(r"(\d{3})[A-Z]", str(row.get("problem_id", "")))
    return int(exam.group(1)) + FIRST_EXAM_YEAR if exam else None


def _passes(question: Question, filters: Filters) -> bool:
    return (
        (filters.years is None or question.year in filters.years)
        and (filters.text_only is None or question.text_only == filters.text_only)
        and (filters.choices is None or len(question.choices) == filters.choices)
        and (filters.answers is None or len(question.gold) == filters.answers)
        and question.problem_id not in filters.exclude
    )


def _examples(config: BenchmarkConfig, path: Path, questions: list[Question], faults: list[Fault]) -> list[Question]:
    if config.fewshot_items:
        by_id = {question.problem_id: question for question in questions}
        missing = [item for item in config.fewshot_items if item not in by_id]
        faults.extend(
            Fault(str(path), "fewshot_items", f"no question {item}", "ids of questions that pass the filters") for item in missing
        )
        return [by_id[item] for item in config.fewshot_items if item in by_id]
    if config.fewshot is not None:
        return read_questions(Path(config.fewshot), Filters(), faults)
    if config.fewshot_bundled is not None:
        return read_questions(bundled_file(config.fewshot_bundled), Filters(), faults)
    own = path / IGAKUQA_EXAMPLES
    return read_questions(own, Filters(), faults) if kind_of(own) == "file" else []
