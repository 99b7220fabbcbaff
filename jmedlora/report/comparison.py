"""Every run at its last evaluated step beside its base: what the terminal, table.md and the page all show."""

from __future__ import annotations

from dataclasses import dataclass

from jmedlora.config.benchmark import ScoringWay
from jmedlora.evaluation.resampling import Interval
from jmedlora.plan.specs import EvaluationSpec
from jmedlora.report.collect import METRICS, Metric, Results, RunResult, Score
from jmedlora.report.significance import Statistics

METRIC_NAMES: dict[Metric, str] = {"accuracy": "accuracy", "exact_match": "exact match", "gestalt_score": "Gestalt score"}


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


@dataclass(frozen=True)
class Line:
    """One run; `cells` has an entry per shots and metric, None where that is not evaluated at `step`."""

    result: RunResult
    step: int | None
    cells: dict[tuple[int, Metric], Cell | None]

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
        lines.append(Line(result, max((score.step for score in own.values()), default=None), cells))
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


def score_text(value: float) -> str:
    """Three decimals."""
    return f"{value:.3f}"


def change_text(change: float) -> str:
    """Three decimals with a sign, a true minus among them; `±0.000` where nothing changed."""
    text = f"{change:+.3f}"
    return "±0.000" if float(text) == 0 else text.replace("-", "−")
