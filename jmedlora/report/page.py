"""One self-contained HTML page: tables, figures and examples, without a single request to anywhere."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import RunSpec
from jmedlora.report.claims import Study, is_synthetic
from jmedlora.report.collect import METRICS, Results
from jmedlora.report.comparison import (
    INTERVALS,
    METRIC_NAMES,
    Comparison,
    change_text,
    compare_runs,
    doubt_lines,
    evaluations_of,
    score_text,
)
from jmedlora.report.evidence import points
from jmedlora.report.examples import choose_examples
from jmedlora.report.exams import exam_tables
from jmedlora.report.figures import PageFigure, draw_losses, draw_scores
from jmedlora.report.measuring import Measuring
from jmedlora.report.ranks import Estimate
from jmedlora.report.significance import Statistics
from jmedlora.report.summary import summarise
from jmedlora.report.table import cost_rows

_TEMPLATE = "template.html.j2"
PAIRS_SHOWN, ROWS_SHOWN, LINES_OPEN, DOUBTS_TOLD = 60, 40, 12, 6
"""Lines of long tables, whose rest is in the files beside the page; lines of a table that is not folded; systems that a warning names."""


def page_html(results: Results, storage: Storage, statistics: Statistics, study: Study, measuring: Measuring) -> str:
    """The report as one HTML text, plotly.js included."""
    environment = Environment(
        loader=PackageLoader("jmedlora.report", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "score": score_text,
        "change": change_text,
        "points": points,
        "percent": _percent,
        "p_value": _p_value,
        "estimate": _estimate,
        "day": _day,
        "duration": _duration,
    }
    comparisons = compare_runs(results, statistics)
    sections = [_section(results, storage, statistics, comparison) for comparison in comparisons]
    losses = draw_losses(results)
    figures = [figure for section in sections for figure in section["figures"]] + losses
    return environment.get_template(_TEMPLATE).render(
        plan=results.plan,
        results=results,
        facts=_facts(results),
        summary=summarise(results, comparisons),
        sections=sections,
        losses=losses,
        examples=choose_examples(results, storage),
        costs=cost_rows(results),
        statistics=statistics,
        study=study,
        measuring=measuring,
        metrics=METRICS,
        metric_names=METRIC_NAMES,
        intervals=INTERVALS,
        scoring_names={"generate": "written answers", "loglikelihood": "log-likelihood"},
        effect_names={"odds_ratio": "odds ratio", "cohens_dz": "d"},
        verdict_signs={"supported": "✓", "contradicted": "✗", "undecided": "?"},
        rows_shown=ROWS_SHOWN,
        lines_open=LINES_OPEN,
        figures_json=_script_json([_figure_json(figure) for figure in figures]),
        plotly=Markup(get_plotlyjs()) if figures else "",
    )


def _section(results: Results, storage: Storage, statistics: Statistics, comparison: Comparison) -> dict[str, Any]:
    """What is shown of one benchmark, prompt and way of scoring."""
    place = comparison.benchmark, comparison.prompt, comparison.scoring
    pairs = [row for row in statistics.between_runs if (row.benchmark, row.prompt, row.scoring) == place]
    certain = sorted(pairs, key=lambda row: (row.p_holm, row.p))[:PAIRS_SHOWN]
    return {
        "comparison": comparison,
        "doubts": doubt_lines([comparison], DOUBTS_TOLD),
        "figures": draw_scores(results, *place),
        "pairs": {"rows": certain, "total": len(pairs)},
        "replicates": [row for row in statistics.replicates if (row.benchmark, row.prompt, row.scoring) == place],
        "exam": exam_tables(results, storage, evaluations_of(results, *place)),
    }


def _figure_json(figure: PageFigure) -> dict[str, Any]:
    return {metric: json.loads(drawn.to_json()) for metric, drawn in figure.figures.items()}


def _script_json(value: Any) -> Markup:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _facts(results: Results) -> dict[str, Any]:
    """What the page's head tells of the sweep."""
    runs = [result.spec for result in results.tuned if isinstance(result.spec, RunSpec)]
    data = list({run.data_digest or run.data.name: (run.data, run.rows) for run in runs}.values())
    benchmarks = list({item.benchmark.name: (item.benchmark, item.questions) for item in results.plan.evaluations}.values())
    times = [score.time for result in results.runs for score in result.scores]
    times += [time for result in results.tuned for time in (result.started, result.finished) if time is not None]
    specs = [(run, len(run.checkpoint_steps)) for run in runs] + [(base.spec, 1) for base in results.bases]
    wanted = sum(count * len(results.plan.asked_of(spec)) for spec, count in specs)
    return {
        "data": data,
        "benchmarks": benchmarks,
        "is_synthetic": is_synthetic(results),
        "begun": min(times, default=None),
        "ended": max(times, default=None),
        "counts": {
            state: sum(result.status == state for result in results.tuned) for state in ("finished", "running", "waiting", "failed")
        },
        "failed": [result for result in results.tuned if result.status == "failed"],
        "evaluations_done": sum(len(result.scores) for result in results.runs),
        "evaluations_wanted": wanted,
    }


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _estimate(estimate: Estimate) -> str:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "all tied"
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})".replace("-", "−")


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s" if rest >= 60 else f"{rest} s"
