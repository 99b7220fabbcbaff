"""Plotly figures: scores by step, 0-shot against few-shot, final scores by rank and epochs, loss.

Figures of scores are drawn once per metric, so that the page can switch between them.
Colours are legible on white and on near-black; background, text and grid colours are the page's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import plotly.graph_objects as go

from jmedlora.config.benchmark import ScoringWay
from jmedlora.plan.naming import number
from jmedlora.plan.specs import EvaluationSpec
from jmedlora.report.axes import Label, place_labels, score_range
from jmedlora.report.collect import METRICS, Metric, Results, RunResult, Score
from jmedlora.report.comparison import METRIC_NAMES, evaluations_of, last_score
from jmedlora.report.drawing import BASE_COLOUR, COLOURS, Styles, axes_grid, lay_out

DRAWN_RUNS = 40
"""More lines than this cannot be told apart; the best runs are drawn then, and the caption says so."""
_LABELLED_RUNS = 12  # of more, most labels had to be left out
_LOSS_POINTS = 300
_HOVER = "step %{x}: %{y:.3f}<extra>%{meta}</extra>"


@dataclass(frozen=True)
class PageFigure:
    """A figure with its words; `figures` has one per metric, or a single one under `loss`."""

    title: str
    caption: str
    figures: dict[str, go.Figure]


def draw_scores(results: Results, benchmark: str, prompt: str, scoring: ScoringWay = "generate") -> list[PageFigure]:
    """The figures of one benchmark, prompt and way of scoring; none where nothing is evaluated yet."""
    evaluations = evaluations_of(results, benchmark, prompt, scoring)
    if not any(result.scores_of(item) for result in results.runs for item in evaluations):
        return []
    drawn, told = _limited(results, [result for result in results.tuned if result.scores])
    figures = []
    if results.tuned:
        by_step = PageFigure(
            "Scores by training step",
            f"Step 0 is the base model in the run's own precision. Colours tell method and rank, markers the number of epochs.{told}",
            {metric: _scores_by_step(results, drawn or results.bases, evaluations, metric) for metric in METRICS},
        )
        figures.append(by_step)
    if len(evaluations) > 1:
        first, second = evaluations[:2]
        across = PageFigure(
            f"{first.shots}-shot against {second.shots}-shot",
            f"Dotted lines lead from the base to the tuned model. Above the diagonal, the solved examples in the prompt help.{told}",
            {metric: _shots_against_shots(results, drawn, first, second, metric) for metric in METRICS},
        )
        figures.append(across)
    if results.tuned:
        final = PageFigure(
            "Final scores by rank and epochs",
            "Each run at its last evaluated step, with its 95 % interval over the questions. Where runs differ in anything else (a seed), "
            "their mean, with the range of their scores.",
            {metric: _final_scores(results, evaluations, metric) for metric in METRICS},
        )
        figures.append(final)
    return figures


def draw_losses(results: Results) -> list[PageFigure]:
    """The training loss by optimizer step, with a row of axes per model; none where nothing is trained yet."""
    drawn, told = _limited(results, [result for result in results.tuned if result.training.steps])
    if not drawn:
        return []
    models = list(dict.fromkeys(result.model for result in drawn))
    figure = axes_grid(models, [""], shared_yaxes="rows")
    style = Styles(results)
    for result in drawn:
        steps, losses = _thinned(result.training.steps, result.training.losses)
        trace = go.Scatter(x=steps, y=losses, mode="lines", **style.line(result), hovertemplate=_HOVER)
        figure.add_trace(trace, row=models.index(result.model) + 1, col=1)
    lay_out(figure, len(models), "optimizer step", "training loss")
    return [PageFigure("Training loss", f"Mean loss per answer token of each mini-batch.{told}", {"loss": figure})]


# ---------------------------------------------------------------- the figures


def _scores_by_step(results: Results, drawn: list[RunResult], evaluations: list[EvaluationSpec], metric: Metric) -> go.Figure:
    models = list(dict.fromkeys(result.model for result in drawn))
    figure = axes_grid(models, [f"{item.shots}-shot" for item in evaluations], shared_yaxes="rows")
    style = Styles(results)
    drawn_values: dict[str, list[float]] = {model: [] for model in models}
    for column, evaluation in enumerate(evaluations, start=1):
        for result in drawn:
            base = results.base_of(result)
            scores = [*(base.scores_of(evaluation) if base else []), *result.scores_of(evaluation)]
            steps, values = [score.step for score in scores], [_rounded(score.value(metric)) for score in scores]
            trace = go.Scatter(x=steps, y=values, mode="lines+markers", **style.line(result), hovertemplate=_HOVER)
            figure.add_trace(trace, row=models.index(result.model) + 1, col=column)
            drawn_values[result.model] += values
    for row, values in enumerate(drawn_values.values(), start=1):
        figure.update_yaxes(range=score_range(values), row=row)
    return lay_out(figure, len(models), "optimizer step", METRIC_NAMES[metric])


def _shots_against_shots(
    results: Results, drawn: list[RunResult], first: EvaluationSpec, second: EvaluationSpec, metric: Metric
) -> go.Figure:
    models = list(dict.fromkeys(result.model for result in drawn)) or results.models
    figure = axes_grid(models, [""], shared_yaxes="rows")
    style = Styles(results)
    hover = f"{first.shots}-shot %{{x:.3f}}, {second.shots}-shot %{{y:.3f}}<extra>%{{meta}}</extra>"
    corners: dict[str, list[tuple[float, float]]] = {model: [] for model in models}
    labels: dict[str, list[Label]] = {model: [] for model in models}
    for result in [*(base for base in results.bases if base.model in models), *drawn]:
        point, base = _pair(result, first, second, metric), results.base_of(result)
        if point is None:
            continue
        before = _pair(base, first, second, metric) if base else None
        path = [before, point] if before else [point]
        look = style.line(result)
        look["line"] = look["line"] | {"width": 1.5, "dash": "dot"}
        look["marker"] = look["marker"] | {"size": [*[0] * (len(path) - 1), 12]}
        line = go.Scatter(
            x=[x for x, _ in path], y=[y for _, y in path], mode="lines+markers+text", cliponaxis=False, **look, hovertemplate=hover
        )
        figure.add_trace(line, row=models.index(result.model) + 1, col=1)
        corners[result.model].append(point)
        labels[result.model].append(Label(figure.data[-1], point, result.name.removeprefix(f"{result.model} ")))
    for row, model in enumerate(models, start=1):
        limits = score_range([value for point in corners[model] for value in point])
        figure.update_xaxes(range=limits, row=row)
        figure.update_yaxes(range=limits, row=row)
        diagonal = {"color": BASE_COLOUR, "width": 1, "dash": "dash"}
        figure.add_shape(type="line", x0=limits[0], y0=limits[0], x1=limits[1], y1=limits[1], line=diagonal, row=row, col=1)
        if len(drawn) <= _LABELLED_RUNS:
            place_labels(labels[model], limits)
    name = METRIC_NAMES[metric]
    return lay_out(figure, len(models), f"{first.shots}-shot {name}", f"{second.shots}-shot {name}")


def _pair(result: RunResult, first: EvaluationSpec, second: EvaluationSpec, metric: Metric) -> tuple[float, float] | None:
    """Both scores of the run's last step, None where one of them is missing."""
    one, two = last_score(result, first), last_score(result, second)
    return (_rounded(one.value(metric)), _rounded(two.value(metric))) if one and two and one.step == two.step else None


def _final_scores(results: Results, evaluations: list[EvaluationSpec], metric: Metric) -> go.Figure:
    models = list(dict.fromkeys(result.model for result in results.tuned)) or results.models
    figure = axes_grid(models, [f"{item.shots}-shot" for item in evaluations], shared_yaxes="all")
    epochs = sorted({result.epochs for result in results.tuned})
    highest = [0.0]
    for column, evaluation in enumerate(evaluations, start=1):
        for row, model in enumerate(models, start=1):
            tuned = [result for result in results.tuned if result.model == model and result.scores_of(evaluation)]
            places = list(dict.fromkeys((result.method, result.rank) for result in tuned))
            axis = [[method for method, _ in places], [f"rank {rank}" for _, rank in places]]
            first = (row, column) == (1, 1)
            for duration, colour in zip(epochs, cycle(COLOURS)):
                groups = [[r for r in tuned if (r.method, r.rank, r.epochs) == (*place, duration)] for place in places]
                name = f"{number(duration)} epoch{'' if duration == 1 else 's'}"
                bar = go.Bar(
                    x=axis,
                    y=[_mean_score(group, evaluation, metric) for group in groups],
                    error_y=_error_bars(groups, evaluation, metric),
                    name=name,
                    legendgroup=name,
                    showlegend=first,
                    marker={"color": colour},
                    customdata=[len(group) for group in groups],
                    hovertemplate="%{y:.3f}, runs: %{customdata}<extra>%{fullData.name}</extra>",
                )
                figure.add_trace(bar, row=row, col=column)
                highest += [_highest(group, evaluation, metric) for group in groups]
            bases = [
                {base.run_key: base for r in tuned if (r.method, r.rank) == place and (base := results.base_of(r))} for place in places
            ]
            ticks = go.Scatter(
                x=axis,
                y=[_mean_score(list(group.values()), evaluation, metric) for group in bases],
                mode="markers",
                name="base",
                legendgroup="base",
                showlegend=first,
                marker={"symbol": "line-ew-open", "size": 44, "line": {"width": 2, "color": BASE_COLOUR}, "color": BASE_COLOUR},
                hovertemplate="%{y:.3f}<extra>base</extra>",
            )
            figure.add_trace(ticks, row=row, col=column)
            highest += [value for value in ticks.y if value is not None]
    figure.update_layout(barmode="group", bargap=0.3)
    figure.update_yaxes(range=(0, score_range(highest)[1]))
    return lay_out(figure, len(models), "", METRIC_NAMES[metric])


# ---------------------------------------------------------------- parts of figures


def _limited(results: Results, runs: list[RunResult]) -> tuple[list[RunResult], str]:
    """The runs to draw, and the sentence that tells of those left out."""
    if len(runs) <= DRAWN_RUNS:
        return runs, ""
    evaluation = results.plan.evaluations[0]

    def merit(result: RunResult) -> float:
        score = last_score(result, evaluation)
        return score.gestalt_score if score else -1.0

    best = {result.run_key for result in sorted(runs, key=merit, reverse=True)[:DRAWN_RUNS]}
    return [
        result for result in runs if result.run_key in best
    ], f" The {DRAWN_RUNS} best of {len(runs)} runs are drawn; table.csv has all."


def _mean_score(group: list[RunResult], evaluation: EvaluationSpec, metric: Metric) -> float | None:
    scores = [score for result in group if (score := last_score(result, evaluation))]
    return _mean([score.value(metric) for score in scores])


def _error_bars(groups: list[list[RunResult]], evaluation: EvaluationSpec, metric: Metric) -> dict[str, Any]:
    """Above and below each bar: the interval of a run; of several runs the range of their scores."""
    bounds = [_bounds([score for result in group if (score := last_score(result, evaluation))], metric) for group in groups]
    means = [_mean_score(group, evaluation, metric) or 0.0 for group in groups]
    return {
        "type": "data",
        "symmetric": False,
        "array": [_rounded(high - mean) if high is not None else None for (_, high), mean in zip(bounds, means, strict=True)],
        "arrayminus": [_rounded(mean - low) if low is not None else None for (low, _), mean in zip(bounds, means, strict=True)],
        "color": BASE_COLOUR,
        "thickness": 1.3,
        "width": 4,
    }


def _bounds(scores: list[Score], metric: Metric) -> tuple[float, float] | tuple[None, None]:
    if len(scores) > 1:
        values = [score.value(metric) for score in scores]
        return min(values), max(values)
    interval = scores[0].intervals.get(metric) if scores else None
    return (interval.low, interval.high) if interval else (None, None)


def _highest(group: list[RunResult], evaluation: EvaluationSpec, metric: Metric) -> float:
    """Where a bar with its error bar ends."""
    _, high = _bounds([score for result in group if (score := last_score(result, evaluation))], metric)
    return high or _mean_score(group, evaluation, metric) or 0.0


def _rounded(value: float) -> float:
    return round(value, 5)


def _thinned(steps: list[int], losses: list[float | None]) -> tuple[list[float], list[float | None]]:
    """At most `_LOSS_POINTS` points: neighbouring steps are averaged."""
    width = -(-len(steps) // _LOSS_POINTS)
    chunks = [slice(first, first + width) for first in range(0, len(steps), width)]
    return [_mean(steps[chunk]) or 0.0 for chunk in chunks], [_mean(losses[chunk]) for chunk in chunks]


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return _rounded(sum(finite) / len(finite)) if finite else None
