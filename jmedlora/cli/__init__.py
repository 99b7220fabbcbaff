"""The command line: `app` with its commands, `main` with its exit codes. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jmedlora import __version__
from jmedlora.cli import check, data, evaluate, score, sweeps
from jmedlora.cli.common import BAD_INPUT
from jmedlora.config.faults import BadInput

app = typer.Typer(
    name="jmedlora",
    help="Sweeps of LoRA and QLoRA adapters for Japanese medicine: trained, evaluated and compared.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
COMMANDS = (
    *(sweeps.plan, sweeps.sweep, sweeps.submit, sweeps.status),
    *(evaluate.evaluate, score.score),
    *(sweeps.report, sweeps.ui, sweeps.doctor),
)
for command in COMMANDS:
    app.command()(command)
data.app.command()(check.check)
app.add_typer(data.app, name="data")


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"jmedlora {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: bad input is told in one line per fault and ends with 2."""
    try:
        app()
    except BadInput as bad:
        for fault in bad.faults:
            print(f"jmedlora: {fault}", file=sys.stderr)
        sys.exit(BAD_INPUT)
