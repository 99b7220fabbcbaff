"""What figures share: colours and markers, rows of axes, sizes and titles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from jmedlora.report.collect import Results, RunResult

COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#ec4899", "#84cc16")
BASE_COLOUR = "#8a94a6"
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
_ROW_HEIGHT = 330  # pixels


class Styles:
    """One colour per method and rank, one marker per number of epochs; a legend entry for each colour."""

    def __init__(self, results: Results):
        groups = dict.fromkeys((result.method, result.rank) for result in results.tuned)
        self._colours = {group: COLOURS[index % len(COLOURS)] for index, group in enumerate(groups)}
        epochs = sorted({result.epochs for result in results.tuned})
        self._symbols = {value: SYMBOLS[index % len(SYMBOLS)] for index, value in enumerate(epochs)}
        self._references = {result.run_key for result in results.references}
        self._told: set[str] = set()

    def line(self, result: RunResult) -> dict[str, Any]:
        """Keyword arguments of a Scatter trace."""
        bare = "as it is" if result.run_key in self._references else "base"
        name = bare if result.is_base else f"{result.method} rank {result.rank}"
        first = name not in self._told
        self._told.add(name)
        colour = BASE_COLOUR if result.is_base else self._colours[result.method, result.rank]
        return {
            "name": name,
            "meta": result.name,
            "legendgroup": name,
            "showlegend": first,
            "line": {"color": colour, "width": 2, "dash": "dash" if result.method == "qlora" else "solid"},
            "marker": {"color": colour, "size": 8, "symbol": "x" if result.is_base else self._symbols[result.epochs]},
        }


def axes_grid(models: Sequence[str], columns: Sequence[str], shared_yaxes: str) -> go.Figure:
    """A row of axes per model, a column per number of shots."""
    several = len(models) > 1
    titles = [", ".join(filter(None, [model if several else "", column])) for model in models for column in columns]
    return make_subplots(
        rows=len(models),
        cols=len(columns),
        subplot_titles=titles,
        shared_yaxes=shared_yaxes,
        horizontal_spacing=0.04,
        vertical_spacing=0.42 / len(models) ** 1.5,
    )


def lay_out(figure: go.Figure, rows: int, x_title: str, y_title: str) -> go.Figure:
    """Sizes and titles: x below the last row, y beside the first column."""
    figure.update_layout(
        template=None,
        height=_ROW_HEIGHT * rows + 90,
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0 + 0.12 / rows, "x": 0},
        hoverlabel={"namelength": -1},
    )
    figure.update_xaxes(zeroline=False, automargin=True)
    figure.update_yaxes(zeroline=False, automargin=True)
    columns = len(list(figure.select_xaxes())) // rows
    for index, axis in enumerate(figure.select_xaxes()):
        if index >= columns * (rows - 1):
            axis.title.text = x_title
    for index, axis in enumerate(figure.select_yaxes()):
        if index % columns == 0:
            axis.title.text = y_title
    return figure
