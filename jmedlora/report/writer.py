"""All files of a sweep's report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jmedlora.data.atomic import write_text
from jmedlora.evaluation.rescoring import rescore_stored
from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import Plan
from jmedlora.report.answers import AnswerBook
from jmedlora.report.claims import claims_json, judge_claims
from jmedlora.report.collect import Results, collect_results
from jmedlora.report.intervals import with_intervals
from jmedlora.report.measuring import measure, measuring_json
from jmedlora.report.page import page_html
from jmedlora.report.significance import Statistics, compute_statistics
from jmedlora.report.statistic_tables import comparisons_csv, prompts_csv, replicates_csv
from jmedlora.report.table import costs_csv, table_csv, table_md


@dataclass(frozen=True)
class ReportFiles:
    """Where the report lies, and what it was made from."""

    folder: Path
    page: Path
    table_csv: Path
    table_md: Path
    costs_csv: Path
    comparisons_csv: Path
    claims_json: Path
    measuring_json: Path
    replicates_csv: Path | None
    """None without runs that differ in the seed alone."""
    prompts_csv: Path | None
    """None where no run was asked in several prompts."""
    results: Results
    statistics: Statistics


def analyse(plan: Plan, storage: Storage) -> tuple[Results, Statistics]:
    """What is stored of a sweep, with the interval of every score, and its statistics."""
    answers = AnswerBook(storage)
    results = with_intervals(collect_results(plan, storage), answers)
    return results, compute_statistics(results, answers)


def write_report(plan: Plan, storage: Storage) -> ReportFiles:
    """Writes the report of what is stored so far into the sweep's folder; each file is replaced in one step.

    What another sweep that shares runs has scored with settings of its own is first scored anew.
    """
    rescore_stored(plan, storage)
    results, statistics = analyse(plan, storage)
    study, measuring = judge_claims(results, statistics.answers), measure(results, statistics)
    folder = storage.sweep(plan.sweep).report
    files = ReportFiles(
        folder=folder,
        page=folder / "index.html",
        table_csv=folder / "table.csv",
        table_md=folder / "table.md",
        costs_csv=folder / "costs.csv",
        comparisons_csv=folder / "comparisons.csv",
        claims_json=folder / "claims.json",
        measuring_json=folder / "measuring.json",
        replicates_csv=_write_or_remove(folder / "replicates.csv", replicates_csv(statistics) if statistics.replicates else None),
        prompts_csv=_write_or_remove(folder / "prompts.csv", prompts_csv(statistics) if statistics.prompts else None),
        results=results,
        statistics=statistics,
    )
    write_text(files.table_csv, table_csv(results, statistics))
    write_text(files.table_md, table_md(results, statistics))
    write_text(files.costs_csv, costs_csv(results))
    write_text(files.comparisons_csv, comparisons_csv(statistics))
    write_text(files.claims_json, claims_json(study))
    write_text(files.measuring_json, measuring_json(measuring))
    write_text(files.page, page_html(results, storage, statistics, study, measuring))
    return files


def _write_or_remove(path: Path, text: str | None) -> Path | None:
    """A file of an earlier report that has nothing to say any more would contradict the others."""
    if text is None:
        path.unlink(missing_ok=True)
        return None
    write_text(path, text)
    return path
