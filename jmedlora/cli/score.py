"""The command that scores prediction files made elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jmedlora.cli.common import AsJson, page
from jmedlora.cli.data import read_benchmark
from jmedlora.config.benchmark import BenchmarkConfig, ExamRules
from jmedlora.config.faults import BadInput, Fault

if TYPE_CHECKING:
    from jmedlora.data.rows import Question
    from jmedlora.evaluation.exam import ExamResult, Tally

MOST_IDS = 12
"""Ids that the page shows of each kind; `--json` gives all."""


@dataclass(frozen=True)
class Marks:
    """The marks of one system, and what its files left open."""

    benchmark: str
    sections: list[str]
    """Sections that occur in the files; empty texts stand for benchmarks that have none."""
    result: ExamResult
    missing: list[str]
    blank: list[str]
    unreadable: list[str]
    unknown: list[str]
    duplicate: list[str]
    excluded: list[str]

    def as_dict(self) -> dict[str, Any]:
        told = {key: getattr(self, key) for key in _TOLD}
        return {"benchmark": self.benchmark, **self.result.as_dict(), **told, "sections": [name for name in self.sections if name]}


_TOLD = {
    "missing": "questions without a line: counted as wrong",
    "blank": "empty predictions: counted as wrong",
    "unreadable": "predictions that are neither letters of the choices nor a number: counted as wrong",
    "unknown": "ids that the benchmark does not have: not counted",
    "duplicate": "ids with several lines: the first counts",
    "excluded": "ids that the benchmark leaves out: not counted",
}


def score(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help='Prediction files of one system: {"problem_id", "prediction"}.')],
    benchmark: Annotated[str, typer.Option(metavar="NAME", help="Name of a benchmark (`jmedlora data list`).")],
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Read the benchmark from this file or folder.")] = None,
    sources: Annotated[Path, typer.Option(metavar="DIR", help="Folder in which named sources are kept.")] = Path("sources"),
    parse: Annotated[bool, typer.Option("--parse", help="Look for answers in running text; else `a,c` alone is read.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score prediction files of one system as the exam does, without a model."""
    marks = score_files(files, read_benchmark(benchmark, [], data), sources, parse)
    if as_json:
        print(json.dumps(marks.as_dict(), ensure_ascii=False, indent=1))
    else:
        _print_marks(marks, page())


def score_files(files: Sequence[Path], config: BenchmarkConfig, sources: Path, parse: bool = False) -> Marks:
    """Marks the files' predictions on every question of each section that occurs in them.

    A section is an exam's number with a letter (112A); a benchmark without such ids is one section. Raises BadInput for bad
    lines, for a benchmark that is not here, and for files that answer none of its questions.
    """
    from jmedlora.data.benchmarks import read_all_questions
    from jmedlora.data.files import NotHereYet
    from jmedlora.evaluation.exam import mark_exam, section_of
    from jmedlora.evaluation.prediction_files import read_answers, read_prediction_files

    faults: list[Fault] = []
    try:
        questions = read_all_questions(config, sources)
    except BadInput as bad:
        faults += bad.faults
    except NotHereYet as absent:
        faults.append(Fault("command line", "--benchmark", f"not here yet: {absent}", "--data with the place of your copy"))
    try:
        predictions = read_prediction_files(files)
    except BadInput as bad:
        faults += bad.faults
    if faults:
        raise BadInput(faults)
    left_out = set(config.filters.exclude)
    by_id = {question.problem_id: question for question in questions if question.problem_id not in left_out}
    sections = {section_of(by_id[item]) for item in predictions.texts if item in by_id}
    if not sections:
        told = f"none of the {len(predictions.texts)} ids is one of benchmark {config.name}"
        raise BadInput([Fault(", ".join(map(str, files)), "problem_id", told, f"ids such as {', '.join(list(by_id)[:3])}")])
    asked: list[Question] = [question for question in by_id.values() if section_of(question) in sections]
    years = {question.year for question in asked}
    rest = [question for question in by_id.values() if section_of(question) not in sections and question.year in years]
    answers = read_answers(predictions, asked, parse)
    return Marks(
        benchmark=config.name,
        sections=sorted(sections),
        result=mark_exam(asked, answers.chosen, config.exam or ExamRules(), answers.values, rest),
        missing=[question.problem_id for question in asked if question.problem_id not in predictions.texts],
        blank=answers.blank,
        unreadable=answers.unreadable,
        unknown=[item for item in predictions.texts if item not in by_id and item not in left_out],
        duplicate=predictions.duplicate,
        excluded=[item for item in predictions.texts if item in left_out],
    )


# ---------------------------------------------------------------- printing


def _print_marks(marks: Marks, console: Console) -> None:
    result = marks.result
    table = Table("", "correct", "of", "accuracy", "points", "of", "share", "prohibited", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for sitting in result.sittings:
        if sitting.year is not None:
            table.add_row(str(sitting.year), *_cells(sitting.all))
    for name, tally in result.by_section.items():
        table.add_row(f"  {name}", *_cells(tally))
    if result.required.total:
        table.add_row("required sections", *_cells(result.required))
    for name, tally in result.by_text_only.items():
        table.add_row(name, *_cells(tally))
    table.add_row("all", *_cells(result.all), style="bold")
    console.print(table, markup=False)
    _print_categories(result, console)
    human = result.human
    if human.when_right is not None and human.when_wrong is not None:
        shares = f"{human.when_right:.1%} of the human candidates, on average, answered correctly what was right here"
        _say(console, f"{shares}, and {human.when_wrong:.1%} what was wrong here ({human.questions} questions with candidates' results)")
    _say(console, f"verdict: {result.verdict.outcome} ({'; '.join(result.verdict.reasons)})")
    for key, meaning in _TOLD.items():
        if ids := getattr(marks, key):
            more = f" and {len(ids) - MOST_IDS} more" if len(ids) > MOST_IDS else ""
            _say(console, f"{len(ids)} {key}, {meaning}: {', '.join(ids[:MOST_IDS])}{more}")


def _print_categories(result: ExamResult, console: Console) -> None:
    if not result.by_category:
        return
    table = Table("category", "correct", "of", "accuracy", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, tally in sorted(result.by_category.items(), key=lambda entry: (-entry[1].total, entry[0])):
        table.add_row(name, *_cells(tally)[:3])
    console.print(table, markup=False)


def _cells(tally: Tally) -> list[str]:
    share = f"{tally.points / tally.points_total:.1%}" if tally.points_total else "-"
    accuracy = f"{tally.correct / tally.total:.1%}"
    return [str(tally.correct), str(tally.total), accuracy, str(tally.points), str(tally.points_total), share, str(tally.prohibited)]


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
