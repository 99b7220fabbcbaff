"""A report read back: its tables, its page, and what the terminal shows."""

from __future__ import annotations

import csv
import io
from html.parser import HTMLParser

from rich.console import Console

from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import Plan
from jmedlora.report.console import console_comparison, print_failures
from jmedlora.report.table import table_csv
from jmedlora.report.writer import analyse


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def table_of(plan: Plan, storage: Storage) -> str:
    """The text of table.csv."""
    return table_csv(*analyse(plan, storage))


def console_text(plan: Plan, storage: Storage, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    results, statistics = analyse(plan, storage)
    console.print(console_comparison(results, statistics))
    print_failures(results, console)
    return console.export_text()


class Page(HTMLParser):
    """Attributes and text of a page; the text of scripts and styles apart."""

    def __init__(self, html: str):
        super().__init__()
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self.code: dict[str, str] = {}
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._inside = f"{tag}#{dict(attrs).get('id', '')}" if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.code[self._inside] = self.code.get(self._inside, "") + data
        else:
            self.text += data
