"""Evaluating models in this process, one after the other: what `jmedlora evaluate` does without Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmedlora.config.digest import key_of
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.parts import EvaluationResources
from jmedlora.evaluation.making import make_evaluator
from jmedlora.evaluation.rescoring import is_stale, rescore
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
    plan: Plan,
    storage: Storage,
    sources: Path,
    offline: bool,
    adapter: Path | None = None,
    on_progress: Progress | None = None,
    resources: EvaluationResources | None = None,
) -> Iterator[tuple[str, BaseSpec, EvaluationSpec, dict[str, Any]]]:
    """Yields (system, base, evaluation, metrics) for every base of the plan and, where an adapter's folder is given, for the first
    base with the adapter; what storage holds already is not computed again, but scored anew where other settings are asked for.
    `resources` say which engine answers. Raises BadInput for an adapter that is damaged, does not fit, or changes nothing, and for
    one to a model behind an address.
    """
    if adapter is not None and plan.bases[0].precision == "api":
        raise _bad_adapter(f"{plan.bases[0].model.name} is behind an address, where no adapter can be put")
    for place, base in enumerate(plan.bases):
        systems = [(base.model.name, base.run_key, 0)]
        if adapter is not None and place == 0:
            systems.append((f"{base.model.name} + {adapter.name}", _adopted(adapter, base, storage), ADOPTED_STEP))
        evaluator: AnyEvaluator | None = None
        for name, run_key, step in systems:
            for evaluation in plan.asked_of(base):
                metrics = read_metrics(storage, run_key, step, evaluation)
                if metrics is None:
                    evaluator = evaluator or make_evaluator(base, sources, offline, resources)
                    with _adapters_told() if step else nullcontext():
                        metrics = evaluator.evaluate(run_key, step, evaluation, storage, _told(name, evaluation, on_progress))
                elif is_stale(evaluation, metrics):  # a foreign adapter is no run of the plan
                    metrics = rescore(storage, run_key, step, evaluation, metrics)
                yield name, base, evaluation, metrics


def _adopted(adapter: Path, base: BaseSpec, storage: Storage) -> str:
    """The run key of a foreign adapter, by its content and its base; its files are copied into storage."""
    from jmedlora.models.adapters import adopt_adapter  # imports torch, which models behind an address do without
    from jmedlora.plan.checksums import adapter_digest

    with tempfile.TemporaryDirectory() as folder, _adapters_told():
        aside = Path(folder) / "adapter"
        adopt_adapter(adapter, aside)
        run_key = key_of({"adapter": adapter_digest(aside), "base": base.run_key})
        if not storage.run(run_key).is_committed(ADOPTED_STEP):
            adopt_adapter(aside, storage.run(run_key).checkpoint(ADOPTED_STEP))
    return run_key


@contextmanager
def _adapters_told() -> Iterator[None]:
    """What is wrong with an adapter is the user's to know."""
    from jmedlora.evaluation.opening import AdapterDoesNotFit
    from jmedlora.evaluation.resident import AdapterHasNoEffect
    from jmedlora.plan.checksums import AdapterDamaged

    try:
        yield
    except (AdapterDamaged, AdapterDoesNotFit, AdapterHasNoEffect) as error:
        raise _bad_adapter(str(error)) from None


def _bad_adapter(problem: str) -> BadInput:
    return BadInput([Fault("command line", "--adapter", problem, "an adapter that was trained on this very model")])


def _told(name: str, evaluation: EvaluationSpec, on_progress: Progress | None) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    what = f"{name} {evaluation.benchmark.name} {evaluation.shots}-shot {evaluation.prompt.name} {evaluation.scoring}"
    return lambda done, total: on_progress(what, done, total)
