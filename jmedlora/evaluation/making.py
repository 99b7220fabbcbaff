"""The evaluator that fits a base: one that holds its weights, or one that asks its address."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jmedlora.plan.specs import BaseSpec

if TYPE_CHECKING:
    from jmedlora.evaluation.api import ApiEvaluator
    from jmedlora.evaluation.evaluator import Evaluator

    AnyEvaluator = ApiEvaluator | Evaluator


def make_evaluator(base: BaseSpec, sources: Path, offline: bool) -> AnyEvaluator:
    """Loads the base's weights, or prepares to ask its address; each library is imported only where it is needed."""
    if base.precision == "api":
        from jmedlora.evaluation.api import ApiEvaluator

        return ApiEvaluator(base.model, sources)
    from jmedlora.evaluation.evaluator import Evaluator

    return Evaluator(base.model, base.precision, base.compute_precision, base.double_quantisation, sources, offline)
