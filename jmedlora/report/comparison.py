"""Every run at its last evaluated step beside its base: what the terminal, table.md and the page all show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jmedlora.config.benchmark import ScoringWay
from jmedlora.evaluation.resampling import Interval
from jmedlora.plan.specs import EvaluationSpec
from jmedlora.report.collect import METRICS, Metric, Results, RunResult, Score
from jmedlora.report.doubts import Doubt, doubts_of
from jmedlora.report.significance import Statistics

METRIC_NAMES: dict[Metric, str] = {"accuracy": "accuracy", "exact_match": "exact match", "gestalt_score": "Gestalt score"}
INTERVALS = "95 % interval over the questions (BCa bootstrap; Wilson's where every answer scores the same)"
"""What the bounds beside a score are."""


@dataclass(frozen=True)
class Cell:
    """One score; `change` is against the run's own base, None for a base or where the base is not evaluated yet."""

    value: float
    interval: Interval | None
    """95 % bounds over the questions."""
    change: float | None
    p_holm: float | None
    """Of the change, after Holm's correction; None where it was not tested."""
    is_best: bool

    @property
    def mark(self) -> str:
        """`**` for p below 0.01, `*` below 0.05, else nothing."""
        return "" if self.p_holm is None or self.p_holm >= 0.05 else "**" if self.p_holm < 0.01 else "*"

    @property
    def direction(self) -> Literal["up", "down", ""]:
        """Of the change as it is written: nothing where it rounds to none."""
        if self.change is None or float(f"{self.change:.3f}") == 0:
            return ""
        return "up" if self.change > 0 else "down"


@dataclass(frozen=True)
class Line:
    """One run; `cells` has an entry per shots and metric, None where that is not evaluated at `step`."""

    result: RunResult
    step: int | None
    cells: dict[tuple[int, Metric], Cell | None]
    doubts: dict[int, list[Doubt]]
    """By shots: what to be warned of; beside the accuracy stand their signs."""

    def signs(self, shots: int, metric: Metric) -> str:
        """The signs of the warnings that belong beside a score."""
        return "".join(doubt.sign for doubt in self.doubts[shots]) if metric == METRICS[0] else ""

    @property
    def progress(self) -> str:
        """The step, told apart from the last one where the run is not there yet; or the state of a run without scores."""
        if self.step is None:
            return self.result.status
        return str(self.step) if self.step == self.result.last_step else f"{self.step} of {self.result.last_step}"


@dataclass(frozen=True)
class Comparison:
    """All runs on one benchmark with one prompt and one way of scoring; `shots` in ascending order."""

    benchmark: str
    prompt: str
    scoring: ScoringWay
    shots: list[int]
    lines: list[Line]

    @property
    def title(self) -> str:
        """Such as `igakuqa, prompt exam-ja, log-likelihood`."""
        return f"{self.benchmark}, prompt {self.prompt}" + (", log-likelihood" if self.scoring == "loglikelihood" else "")


def compare_runs(results: Results, statistics: Statistics | None = None) -> list[Comparison]:
    """A comparison per benchmark, prompt and way of scoring, in the plan's order; changes are tested where statistics are given."""
    groups = dict.fromkeys((item.benchmark.name, item.prompt.name, item.scoring) for item in results.plan.evaluations)
    return [_compare(results, statistics, *group) for group in groups]


def evaluations_of(results: Results, benchmark: str, prompt: str, scoring: ScoringWay) -> list[EvaluationSpec]:
    """The evaluations of one benchmark, prompt and way of scoring, by shots."""
    wanted = benchmark, prompt, scoring
    chosen = [item for item in results.plan.evaluations if (item.benchmark.name, item.prompt.name, item.scoring) == wanted]
    return sorted(chosen, key=lambda item: item.shots)


def last_score(result: RunResult, evaluation: EvaluationSpec) -> Score | None:
    """The score of the last step that is evaluated so far."""
    scores = result.scores_of(evaluation)
    return scores[-1] if scores else None


def _compare(results: Results, statistics: Statistics | None, benchmark: str, prompt: str, scoring: ScoringWay) -> Comparison:
    evaluations = evaluations_of(results, benchmark, prompt, scoring)
    asked = [result for result in results.runs if any(item in evaluations for item in results.plan.asked_of(result.spec))]
    final = {result.run_key: _final_scores(result, evaluations) for result in asked}
    best = {
        (item.shots, metric): max((scores[item.shots].value(metric) for scores in final.values() if item.shots in scores), default=0.0)
        for item in evaluations
        for metric in METRICS
    }
    lines = []
    for result in asked:
        own = final[result.run_key]
        base = results.base_of(result)
        before = final[base.run_key] if base else {}
        cells = {
            (shots, metric): _cell(result.run_key, own.get(shots), before.get(shots), metric, peak, statistics)
            for (shots, metric), peak in best.items()
        }
        doubts = {item.shots: doubts_of(own[item.shots]) if item.shots in own else [] for item in evaluations}
        lines.append(Line(result, max((score.step for score in own.values()), default=None), cells, doubts))
    return Comparison(benchmark, prompt, scoring, [item.shots for item in evaluations], lines)


def _final_scores(result: RunResult, evaluations: list[EvaluationSpec]) -> dict[int, Score]:
    """Scores by shots, all of the last step at which any of these evaluations is done."""
    scores = [score for item in evaluations for score in result.scores_of(item)]
    last = max((score.step for score in scores), default=None)
    return {score.evaluation.shots: score for score in scores if score.step == last}


def _cell(run_key: str, score: Score | None, base: Score | None, metric: Metric, best: float, statistics: Statistics | None) -> Cell | None:
    if score is None:
        return None
    value = score.value(metric)
    tested = statistics.row_of(run_key, score, metric) if statistics else None
    return Cell(
        value=value,
        interval=score.intervals.get(metric),
        change=None if base is None else value - base.value(metric),
        p_holm=tested.p_holm if tested else None,
        is_best=value == best > 0,
    )


def doubt_lines(comparisons: Sequence[Comparison], shown: int) -> list[str]:
    """A line per sign and what it means, with the `shown` systems that have most of it; nothing where there is nothing to warn of."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for comparison in comparisons:
        for line in comparison.lines:
            for shots, doubts in line.doubts.items():
                place = f"{comparison.title}, {shots}-shot" if len(comparisons) > 1 else f"{shots}-shot"
                for doubt in doubts:
                    told = f"{doubt.count} of {doubt.n} ({line.result.name}, {place})"
                    found.setdefault((doubt.sign, doubt.meaning), []).append((doubt.count / doubt.n, told))
    lines = []
    for (sign, meaning), all_told in sorted(found.items()):
        most = [told for _, told in sorted(all_told, key=lambda each: -each[0])]
        rest = [f"{len(most) - shown} more in table.csv"] if len(most) > shown else []
        lines.append(f"{sign} Many answers {meaning}: {'; '.join([*most[:shown], *rest])}.")
    return lines


def score_text(value: float) -> str:
    """Three decimals."""
    return f"{value:.3f}"


def change_text(change: float) -> str:
    """Three decimals with a sign, a true minus among them; `±0.000` where nothing changed."""
    text = f"{change:+.3f}"
    return "±0.000" if float(text) == 0 else text.replace("-", "−")
