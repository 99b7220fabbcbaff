"""The plan's memory estimates against what torch's allocator really hands out in a step; and what does not fit is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jmedlora.plan.memory import ESTIMATE_ERROR
from tests.bench.cases import QUICK_CASES


def test_estimates_are_within_their_stated_error_of_real_allocations(tmp_path: Path) -> None:
    """Precisions, checkpointing, ranks, micro-batches, dropout and ZeRO stages, both families; one worker."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.bench.allocations", "--quick", "--out", str(tmp_path / "rows.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == len(QUICK_CASES)
    for row in rows:
        assert row["estimate"] == pytest.approx(row["peak"], rel=ESTIMATE_ERROR), row


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["resources=gpu-1", "resources.gpu_memory_gb=1"],
            "tiny-llama lora r4 1ep needs about 2 GB of a GPU with 1 GB",
        ),
        (["evaluate.every=1", "training.max_steps=9000", "~grid.epochs", "extra=[]"], "are still to be written and "),
    ],
)
def test_a_sweep_that_does_not_fit_is_refused_before_it_starts(
    overrides: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jmedlora.config.faults import BadInput
    from jmedlora.plan import fitting
    from jmedlora.plan.layout import Storage
    from jmedlora.plan.planner import open_sweep

    storage = tmp_path / "results"
    config, plan = open_sweep("smoke", [*overrides, f"storage={storage}"])
    usage = fitting.shutil.disk_usage(tmp_path)
    if "GPU" not in told:
        monkeypatch.setattr(fitting.shutil, "disk_usage", lambda place: usage._replace(free=10_000_000))
    with pytest.raises(BadInput) as caught:
        fitting.check_fit(plan, config, Storage(storage))
    assert told in "\n".join(map(str, caught.value.faults))
    assert not storage.exists()
    allowed, plan = open_sweep(
        "smoke", [f"storage={storage}", "resources=gpu-1", "resources.memory_check=allow", "resources.gpu_memory_gb=1"]
    )
    monkeypatch.undo()
    fitting.check_fit(plan, allowed, Storage(storage))
