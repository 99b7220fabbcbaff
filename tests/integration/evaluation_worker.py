"""One evaluation in a process of its own, as an actor would run it, slowly enough to be hit in its middle."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from jmedlora.config.parts import ModelConfig
from jmedlora.data import patience
from jmedlora.evaluation import journal
from jmedlora.evaluation.evaluator import Evaluator
from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import EvaluationSpec


def main() -> None:
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    journal.WRITE_EVERY_S = 0  # each of the tiny batches
    work, ballast = Path(order["work"]), Path(order["results"]) / "ballast"
    evaluator = Evaluator(ModelConfig.model_validate(order["model"]), "fp32", "fp32", True, work, True, "cpu")
    evaluator._base.register_forward_pre_hook(lambda *_: time.sleep(order["pause_s"]))
    spec, storage = EvaluationSpec.model_validate(order["evaluation"]), Storage(Path(order["results"]))

    def evaluate(on_progress: Any = None) -> None:
        evaluator.evaluate(order["run_key"], order["step"], spec, storage, on_progress)

    if not order["fills_the_disk"]:
        evaluate()
        return
    fill(ballast)
    patience.WAIT_FOR_SPACE_S = 0.0
    try:
        evaluate()
    except OSError as error:
        print(f"{type(error).__name__} {error.errno}", flush=True)
    evaluate(lambda done, total: ballast.unlink() if done == total else None)


def fill(file: Path) -> None:
    """Writes until nothing fits any more."""
    with file.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"x" * 4096)
        except OSError:
            pass


if __name__ == "__main__":
    main()
