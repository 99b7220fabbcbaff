"""Benchmarks: the questions of a source that are evaluated, and the examples that few-shot prompts may show."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jmedlora.config.benchmark import BenchmarkConfig, Filters
from jmedlora.config.digest import digest, digest_rows
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.locate import bundled_file
from jmedlora.data.files import NotHereYet, add_fault, is_table, kind_of, place_of, read_rows
from jmedlora.data.questions import QUESTION_COLUMNS, from_cells, parse_jmedbench, parse_question
from jmedlora.data.rows import Question
from jmedlora.data.selection import select, shuffle_choices
from jmedlora.data.sidefiles import SUFFIXES, with_facts

IGAKUQA_EXAMPLES = Path("scripts/prompts/prompt.jsonl")
_INSIDE_CHECKOUT = re.compile(r"\.|data(/\d{4}(/[^/]+)?)?")
"""Places in an IgakuQA checkout that a path may name: itself, `data`, a year, a section."""

Format = Literal["questions", "jmedbench"]


@dataclass(frozen=True)
class Benchmark:
    """The questions that are evaluated and, apart from them, the examples for few-shot prompts."""

    name: str
    questions: list[Question]
    examples: list[Question]
    digest: str
    """Identity of questions and examples, in this order."""


@dataclass(frozen=True)
class QuestionSource:
    """Everything that stands at a place, before any filter."""

    path: Path
    questions: list[Question]
    places: dict[str, str]
    """`file:line` by id."""
    notes: list[str]
    """What was mended or left aside while reading, a line each, naming file and line."""


def load_benchmark(config: BenchmarkConfig, sources: Path) -> Benchmark:
    """Reads, checks and filters a benchmark, and shuffles choices where it says so.

    Raises BadInput with a fault per bad row, NotHereYet for a source that is not in `sources` yet.
    """
    source = open_source(config, sources)
    faults: list[Fault] = []
    questions, examples = select_questions(config, source, faults)
    for question in [*questions, *examples]:
        _refuse_unaskable(question, source.places.get(question.problem_id, str(source.path)), faults)
    if faults:
        raise BadInput(faults)
    if config.shuffle is not None:
        questions = [shuffle_choices(question, config.shuffle) for question in questions]
    identity = digest_rows(question.as_dict() for question in questions)
    return Benchmark(config.name, questions, examples, digest([identity, [example.as_dict() for example in examples]]))


def read_all_questions(config: BenchmarkConfig, sources: Path) -> list[Question]:
    """Every question of a benchmark's source, without its filters: also those with numeric answers or blank choices.

    Raises BadInput and NotHereYet as `load_benchmark` does.
    """
    return open_source(config, sources).questions


def open_source(config: BenchmarkConfig, sources: Path) -> QuestionSource:
    """What stands at a benchmark's place; raises BadInput and NotHereYet as `load_benchmark` does."""
    path = place_of(config, sources)
    if config.source and not kind_of(path):
        how = "" if config.source.kind == "named" else f"; `{_fetch_command(config.name, sources)}` brings it"
        raise NotHereYet(f"benchmark {config.name}: {path}{how}")
    faults: list[Fault] = []
    source = read_source(path, config.format, faults)
    if faults:
        raise BadInput(faults)
    return source


def _fetch_command(name: str, sources: Path) -> str:
    """The command that fetches into this folder: without a word about it where it is the command's own."""
    usual = sources.resolve() == Path("sources").resolve()
    return f"jmedlora data fetch {name}" + ("" if usual else f" --sources {shlex.quote(str(sources))}")


def select_questions(config: BenchmarkConfig, source: QuestionSource, faults: list[Fault]) -> tuple[list[Question], list[Question]]:
    """The questions that pass a benchmark's filters, and its examples, which are never among them, by id or by text."""
    where = str(source.path)
    given = [name for name in ("fewshot", "fewshot_bundled", "fewshot_items") if getattr(config, name)]
    if len(given) > 1:
        told = f"given together with {given[0]}"
        faults.append(Fault(f"benchmark {config.name}", given[-1], told, "one of fewshot, fewshot_bundled and fewshot_items"))
        return [], []
    examples = _named_examples(config, source, faults) if config.fewshot_items else _brought_examples(config, source.path, faults)
    ids, texts = {example.problem_id for example in examples}, {example.text for example in examples}
    if config.fewshot_items:
        ids |= {question.problem_id for question in source.questions if question.text in texts}
        return select(source.questions, config.filters, where, faults, frozenset(ids)), examples
    questions = select(source.questions, config.filters, where, faults)
    allowed = "examples from outside the evaluated questions (or leave the question out by filters.exclude)"
    for question in questions:
        if question.problem_id in ids:
            faults.append(Fault(where, "fewshot", f"example {question.problem_id} is also evaluated", allowed))
        elif question.text in texts:
            faults.append(Fault(where, "fewshot", f"an example has the text of {question.problem_id}, which is evaluated", allowed))
    return questions, examples


def read_questions(path: Path, filters: Filters, faults: list[Fault]) -> list[Question]:
    """The questions at `path` (a file, or a folder in IgakuQA's layout) that pass the filters and can be asked, in the files' order."""
    before = len(faults)
    source = read_source(path, "questions", faults)
    if len(faults) > before:
        return source.questions  # what filters name may stand in a row that could not be read
    questions = select(source.questions, filters, str(path), faults)
    for question in questions:
        _refuse_unaskable(question, source.places[question.problem_id], faults)
    return questions


def read_source(path: Path, form: Format, faults: list[Fault]) -> QuestionSource:
    """Every question at `path` with what is known beside it; each row is a question or has a fault, at most 20 a file."""
    before = len(faults)
    questions: list[Question] = []
    places: dict[str, str] = {}
    notes: list[str] = []
    for file in question_files(path, form, faults):
        own = _read_file(file, form, places, faults, notes)
        questions += with_facts(file, own, faults, notes) if form == "questions" else own
    if not questions and len(faults) == before:
        faults.append(Fault(str(path), "", "no questions", "at least one question"))
    return QuestionSource(path, questions, places, notes)


def question_files(path: Path, form: Format, faults: list[Fault]) -> list[Path]:
    """The question files of a folder: `data/<year>/*.jsonl` of a checkout, or the folder's own; without metadata and translations."""
    kind = kind_of(path)
    if kind == "file":
        return [path]
    if kind != "folder":
        faults.append(Fault(str(path), "", "does not exist", "a file of questions, or a folder of them"))
        return []
    if form == "jmedbench":
        faults.append(Fault(str(path), "", "is a folder", "one file of the question set: its folder holds training rows as well"))
        return []
    try:
        root = path / "data" if (path / "data").is_dir() else path
        folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and re.fullmatch(r"\d{4}", folder.name)) or [root]
        files = [file for folder in folders for file in sorted(folder.glob("*.jsonl")) if not file.stem.endswith(SUFFIXES)]
    except OSError as error:
        faults.append(Fault(str(path), "", f"cannot be read: {error.strerror}", "a folder that can be read"))
        return []
    if not files:
        faults.append(Fault(str(path), "", "no question files in this folder", "a JSON Lines file, or a folder of them"))
    return files


def _read_file(file: Path, form: Format, places: dict[str, str], faults: list[Fault], notes: list[str]) -> list[Question]:
    start = len(faults)
    year = int(file.parent.name) if re.fullmatch(r"\d{4}", file.parent.name) else None
    questions: list[Question] = []
    for where, row in read_rows(file, faults, QUESTION_COLUMNS if form == "questions" else None):
        found: list[Fault] = []
        if form == "jmedbench":
            question = parse_jmedbench(where, row, found, notes)
        else:
            question = parse_question(where, from_cells(where, row, found) if is_table(file) else row, year, found, notes)
        if question and question.problem_id in places:
            key = "sample_id" if form == "jmedbench" else "problem_id"
            told = f"{question.problem_id} stands at {places[question.problem_id]} already"
            found.append(Fault(where, key, told, "each id once"))
        if question and not found:
            places[question.problem_id] = where
            questions.append(question)
        if any(not add_fault(faults, start, fault) for fault in found):
            break
    return questions


def _refuse_unaskable(question: Question, where: str, faults: list[Fault]) -> None:
    if not question.gold:
        faults.append(Fault(where, "choices", "no choices to choose from", "questions with choices (set filters.choices)"))
    elif not all(question.choices):
        # the exam has a question whose choices are all in its picture
        allowed = "texts (leave the question out by filters.exclude or text_only)"
        faults.append(Fault(where, "choices", "a choice without text", allowed))


def _named_examples(config: BenchmarkConfig, source: QuestionSource, faults: list[Fault]) -> list[Question]:
    by_id = {question.problem_id: question for question in source.questions}
    for item in dict.fromkeys(config.fewshot_items):
        if item not in by_id:
            faults.append(Fault(str(source.path), "fewshot_items", f"no question {item}", "ids of questions that are here"))
        elif config.fewshot_items.count(item) > 1:
            faults.append(Fault(f"benchmark {config.name}", "fewshot_items", f"{item} twice", "each id once"))
    return [by_id[item] for item in config.fewshot_items if item in by_id]


def _brought_examples(config: BenchmarkConfig, path: Path, faults: list[Fault]) -> list[Question]:
    """Examples from a file of their own; an IgakuQA checkout has three."""
    if config.fewshot is not None:
        return read_source(Path(config.fewshot), config.format, faults).questions
    if config.fewshot_bundled is not None:
        return read_source(bundled_file(config.fewshot_bundled), "questions", faults).questions
    own = _examples_of_checkout(path) if config.format == "questions" else None
    return read_source(own, "questions", faults).questions if own else []


def _examples_of_checkout(path: Path) -> Path | None:
    place = path.absolute()
    for folder in [place, *place.parents][:4]:
        examples = folder / IGAKUQA_EXAMPLES
        if _INSIDE_CHECKOUT.fullmatch(place.relative_to(folder).as_posix()) and kind_of(examples) == "file":
            return examples
    return None
