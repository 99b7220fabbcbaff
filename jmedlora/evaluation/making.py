"""The evaluator that fits a base: one that holds its weights, in transformers or in vLLM, or one that asks its address."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jmedlora.config.parts import EvaluationResources
from jmedlora.plan.specs import BaseSpec

if TYPE_CHECKING:
    from jmedlora.evaluation.api import ApiEvaluator
    from jmedlora.evaluation.evaluator import Evaluator
    from jmedlora.evaluation.vllm_evaluator import VllmEvaluator

    AnyEvaluator = ApiEvaluator | Evaluator | VllmEvaluator


def make_evaluator(
    base: BaseSpec, sources: Path, offline: bool, resources: EvaluationResources | None = None, adapters_at_once: int = 1
) -> AnyEvaluator:
    """Loads the base's weights, or prepares to ask its address; each library is imported only where it is needed.

    resources: which engine answers, with which share of a GPU; adapters_at_once: those that it should have room for.
    """
    if base.precision == "api":
        from jmedlora.evaluation.api import ApiEvaluator

        return ApiEvaluator(base.model, sources)
    held = (base.model, base.precision, base.compute_precision, base.double_quantisation, sources, offline)
    resources = resources or EvaluationResources()
    if resources.engine == "vllm":
        from jmedlora.evaluation.vllm_evaluator import VllmEvaluator

        return VllmEvaluator(*held, adapters_at_once=adapters_at_once, gpu_share=resources.gpus if 0 < resources.gpus < 1 else 1.0)
    from jmedlora.evaluation.evaluator import Evaluator

    return Evaluator(*held)
