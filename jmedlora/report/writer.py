"""All files of a sweep's report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jmedlora.data.atomic import write_text
from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import Plan
from jmedlora.report.collect import collect_results
from jmedlora.report.page import page_html
from jmedlora.report.table import costs_csv, table_csv, table_md


@dataclass(frozen=True)
class ReportFiles:
    """Where the report lies."""

    folder: Path
    page: Path
    table_csv: Path
    table_md: Path
    costs_csv: Path


def write_report(plan: Plan, storage: Storage) -> ReportFiles:
    """Writes the report of what is stored so far into the sweep's folder; each file is replaced in one step."""
    results = collect_results(plan, storage)
    folder = storage.sweep(plan.sweep).report
    files = ReportFiles(folder, folder / "index.html", folder / "table.csv", folder / "table.md", folder / "costs.csv")
    write_text(files.table_csv, table_csv(results))
    write_text(files.table_md, table_md(results))
    write_text(files.costs_csv, costs_csv(results))
    write_text(files.page, page_html(results, storage))
    return files
