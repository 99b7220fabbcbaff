"""What several commands share."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

FAILED, BAD_INPUT, HELD = 1, 2, 3
PAGE_WIDTH = 120

SweepArgument = Annotated[str, typer.Argument(metavar="SWEEP", help="A shipped sweep's name, or the path of a sweep file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the sweep, such as grid.rank=[8,64] storage=results.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def page() -> Console:
    """The terminal, or a wide page where the output goes into a file or a log."""
    return Console() if sys.stdout.isatty() else Console(width=PAGE_WIDTH)
