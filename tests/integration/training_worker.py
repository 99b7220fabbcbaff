"""One of several workers: trains the trials of a JSON file, as torchrun would start it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import TrialSpec
from jmedlora.training import engine
from jmedlora.training.loop import train_trial
from jmedlora.training.process import ensure_process_group


class Silent:
    def on_run_start(self, run_key: str, total_steps: int) -> None: ...

    def on_step(self, run_key: str, record: dict[str, Any]) -> None: ...

    def on_checkpoint(self, run_key: str, step: int) -> None: ...

    def on_run_end(self, run_key: str, status: str, error: str | None) -> None: ...


def main() -> None:
    torch.set_num_threads(1)
    engine.PERSISTENT_ELEMENTS = 0  # tiny weights are sharded as large ones are
    ensure_process_group()
    work = Path(sys.argv[1])
    for name, trial in json.loads((work / "trials.json").read_text(encoding="utf-8")).items():
        train_trial(TrialSpec.model_validate(trial), Storage(work / name), work, True, Silent())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
