"""Trials of two workers under Ray: ZeRO 2 and 3, both model families, LoRA and QLoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.processes import run_jmedlora


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_workers_train_every_family_and_method(tmp_path: Path, stage: int) -> None:
    done = run_jmedlora(
        "sweep",
        "smoke",
        "grid={model: [tiny-llama, tiny-gpt-neox], method: [lora, qlora], rank: [4]}",
        "training.max_steps=3",
        "extra=[]",
        "shots=[0]",
        f"deepspeed=zero{stage}",
        "resources.workers_per_trial=2",
        cwd=tmp_path,
        timeout_s=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads((tmp_path / "results/sweeps/smoke/plan.json").read_text())
    trained = set()
    for run in plan["runs"]:
        folder = tmp_path / "results/runs" / run["run_key"]
        state = json.loads((folder / "run.json").read_text())
        assert (state["status"], state["workers"], state["zero_stage"]) == ("finished", 2, stage)
        losses = [json.loads(line)["loss"] for line in (folder / "train.jsonl").read_text().splitlines()]
        assert len(losses) == 3
        assert losses[-1] < losses[0]
        trained.add((run["model"]["name"], run["method"]["name"]))
    assert trained == {(model, method) for model in ("tiny-llama", "tiny-gpt-neox") for method in ("lora", "qlora")}
