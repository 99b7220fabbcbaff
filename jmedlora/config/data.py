"""Training data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from jmedlora.config.benchmark import Filters
from jmedlora.config.parts import NamedSource, Part, Text, Whole


class DataConfig(Part):
    """A training set of instruction rows (`instruction`, `input`, `output`)."""

    name: Text
    path: Text | None = None
    """JSON Lines or a JSON list; or, for `questions`, what a benchmark's path may be."""
    bundled: str | None = None
    """A file shipped with jmedlora, instead of `path`."""
    source: NamedSource | None = None
    """Data that is yet to be made or brought, instead of `path`."""
    format: Literal["instructions", "questions"] = "instructions"
    """`questions`: exam questions, each turned into a row that is answered with the choice's text."""
    filters: Filters = Filters()
    declared_rows: Annotated[Whole, Field(ge=1)] | None = None
    """Size of a source that is not here yet, so that it can be planned for."""
    note: str = ""
