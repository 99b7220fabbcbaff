"""An evaluation of an adapter that has been scored before, under another run or step, is copied and not computed again."""

from __future__ import annotations

import json
import shutil
from typing import Any

from jmedlora.data.atomic import appearing
from jmedlora.evaluation.journal import remove_journals
from jmedlora.plan.layout import METRICS, PREDICTIONS, Storage
from jmedlora.plan.specs import EvaluationSpec


def adopt_evaluation(storage: Storage, evaluation: EvaluationSpec, source: tuple[str, int], target: tuple[str, int]) -> dict[str, Any]:
    """Copies predictions and metrics from one (run_key, step) to another whose adapter is the same bit for bit.

    The copy's metrics say where they were computed (`computed_for`) and took no time of their own.
    """
    old = storage.run(source[0]).evaluation(evaluation.folder, source[1])
    new = storage.run(target[0]).evaluation(evaluation.folder, target[1])
    metrics = json.loads((old / METRICS).read_text(encoding="utf-8"))
    metrics |= {"run_key": target[0], "step": target[1], "seconds": 0.0, "computed_for": {"run_key": source[0], "step": source[1]}}
    if new.exists():  # what an interrupted evaluation left
        shutil.rmtree(new)
    with appearing(new) as aside:
        shutil.copyfile(old / PREDICTIONS, aside / PREDICTIONS)
        (aside / METRICS).write_text(json.dumps(metrics, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    remove_journals(storage, target[0], target[1], evaluation)
    return metrics
