"""How far a run's scores depend on the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from jmedlora.config.benchmark import ScoringWay
from jmedlora.report.collect import METRICS, Metric, Results, RunResult, evaluation_order


@dataclass(frozen=True)
class Spread:
    """One metric over several prompts."""

    lowest: float
    lowest_prompt: str
    highest: float
    highest_prompt: str
    mean: float

    @property
    def range(self) -> float:
        return self.highest - self.lowest


@dataclass(frozen=True)
class PromptSpread:
    """A run or base after `step` steps, asked the same questions with the same number of examples in several prompts."""

    run_key: str
    benchmark: str
    shots: int
    scoring: ScoringWay
    step: int
    prompts: list[str]
    spreads: dict[Metric, Spread]


def prompt_spreads(results: Results) -> list[PromptSpread]:
    """By run and evaluation; a run is taken at the last step at which two prompts or more are evaluated."""
    return [spread for result in results.runs for spread in _of_run(results, result)]


def _of_run(results: Results, result: RunResult) -> list[PromptSpread]:
    groups: dict[tuple[str, ScoringWay, int], dict[int, dict[str, dict[Metric, float]]]] = {}
    for evaluation in sorted(results.plan.evaluations, key=evaluation_order):
        key = evaluation.benchmark.name, evaluation.scoring, evaluation.shots
        for score in result.scores_of(evaluation):
            values = {metric: score.value(metric) for metric in METRICS}
            groups.setdefault(key, {}).setdefault(score.step, {})[evaluation.prompt.name] = values
    spreads = []
    for (benchmark, scoring, shots), by_step in sorted(groups.items()):
        step = max((step for step, by_prompt in by_step.items() if len(by_prompt) > 1), default=None)
        if step is not None:
            by_prompt = by_step[step]
            found = {metric: _spread({prompt: values[metric] for prompt, values in by_prompt.items()}) for metric in METRICS}
            spreads.append(PromptSpread(result.run_key, benchmark, shots, scoring, step, list(by_prompt), found))
    return spreads


def _spread(values: dict[str, float]) -> Spread:
    lowest, highest = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return Spread(values[lowest], lowest, values[highest], highest, fmean(values.values()))
