"""Evaluating models in this process, one after the other: what `jmedlora evaluate` does without Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmedlora.config.digest import key_of
from jmedlora.evaluation.making import make_evaluator
from jmedlora.plan.layout import Storage
from jmedlora.plan.records import read_metrics
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, Plan

if TYPE_CHECKING:
    from jmedlora.evaluation.making import AnyEvaluator

ADOPTED_STEP = 1
"""Step under which a foreign adapter is kept: how long it was trained is not known."""

Progress = Callable[[str, int, int], None]
"""Called with what is evaluated, the questions done and their number."""


def evaluate_systems(
    plan: Plan, storage: Storage, sources: Path, offline: bool, adapter: Path | None = None, on_progress: Progress | None = None
) -> Iterator[tuple[str, BaseSpec, EvaluationSpec, dict[str, Any]]]:
    """Yields (system, base, evaluation, metrics) for every base of the plan and, where an adapter's folder is given, for the first
    base with the adapter; what storage holds already is not computed again.
    """
    for place, base in enumerate(plan.bases):
        systems = [(base.model.name, base.run_key, 0)]
        if adapter is not None and place == 0:
            systems.append((f"{base.model.name} + {adapter.name}", _adopted(adapter, base, storage), ADOPTED_STEP))
        evaluator: AnyEvaluator | None = None
        for name, run_key, step in systems:
            for evaluation in plan.asked_of(base):
                metrics = read_metrics(storage, run_key, step, evaluation)
                if metrics is None:
                    evaluator = evaluator or make_evaluator(base, sources, offline)
                    metrics = evaluator.evaluate(run_key, step, evaluation, storage, _told(name, evaluation, on_progress))
                yield name, base, evaluation, metrics


def _adopted(adapter: Path, base: BaseSpec, storage: Storage) -> str:
    """The run key of a foreign adapter, by its content and its base; its files are copied into storage."""
    from jmedlora.models.adapters import adapter_digest, adopt_adapter  # imports torch, which models behind an address do without

    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder) / "adapter"
        adopt_adapter(adapter, aside)
        run_key = key_of({"adapter": adapter_digest(aside), "base": base.run_key})
        if not storage.run(run_key).is_committed(ADOPTED_STEP):
            adopt_adapter(aside, storage.run(run_key).checkpoint(ADOPTED_STEP))
    return run_key


def _told(name: str, evaluation: EvaluationSpec, on_progress: Progress | None) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    what = f"{name} {evaluation.benchmark.name} {evaluation.shots}-shot {evaluation.prompt.name} {evaluation.scoring}"
    return lambda done, total: on_progress(what, done, total)
