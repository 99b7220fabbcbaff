"""Two workers against one: the same losses and adapters at every ZeRO stage, whatever the micro-batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jmedlora.plan.layout import ADAPTER_WEIGHTS, Storage
from jmedlora.plan.records import read_run, read_training
from jmedlora.plan.specs import RunSpec
from jmedlora.training.loop import train_trial
from jmedlora.training.process import ensure_process_group
from tests.integration.processes import run_training_workers
from tests.integration.training_worker import Silent
from tests.tiny import ROWS, run_spec, trial_of, write_rows

_CASES = [(family, precision, stage) for family in ("llama", "gpt_neox") for precision in ("fp32", "nf4") for stage in (0, 1, 2, 3)]


def _name(family: str, precision: str, stage: int) -> str:
    return f"{family}-{precision}-zero{stage}"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of every case on two workers, which are started once for all cases."""
    folder = tmp_path_factory.mktemp("workers")
    data_file = write_rows(folder, ROWS[:11])  # mini-batches of 5, 5 and 1: in the last, a worker has nothing of its own
    specs = {_name(*case): _spec(data_file, *case) for case in _CASES}
    specs["checkpointing"] = _spec(data_file, "llama", "fp32", 3, gradient_checkpointing=True)
    trials = {name: trial_of(spec, workers=2).model_dump(mode="json") for name, spec in specs.items()}
    queue = [_spec(data_file, "llama", "fp32", 3, learning_rate=1e30, max_grad_norm=None), specs[_name("llama", "fp32", 3)]]
    trials["queue"] = trial_of(*queue, workers=2).model_dump(mode="json")
    (folder / "trials.json").write_text(json.dumps(trials), encoding="utf-8")
    run_training_workers(folder)
    return folder


def _spec(data_file: Path, family: str, precision: str, stage: int, **chosen: object) -> RunSpec:
    settings = {"micro_batch_size": 2, "targets": "all-linear", "max_grad_norm": 0.3, **chosen}
    return run_spec(data_file, family, precision, zero_stage=stage, **settings)  # type: ignore[arg-type]


def _curve(storage: Storage, spec: RunSpec, value: str) -> list[float]:
    return [record[value] for record in read_training(storage, spec.run_key)]


@pytest.mark.parametrize("case", [*(_name(*case) for case in _CASES), "checkpointing"])
def test_two_workers_train_as_one(case: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JMEDLORA_CACHE", str(work / "cache"))
    torch.set_num_threads(1)
    ensure_process_group()
    family, precision = ("llama", "fp32") if case == "checkpointing" else case.split("-")[:2]
    stage = 3 if case == "checkpointing" else int(case[-1])
    alone = _spec(work / "rows.jsonl", family, precision, 0, micro_batch_size=None)
    train_trial(trial_of(alone), Storage(tmp_path), tmp_path, True, Silent())
    chosen = {"gradient_checkpointing": True} if case == "checkpointing" else {}
    together = _spec(work / "rows.jsonl", family, precision, stage, **chosen)
    recorded = read_run(Storage(work / case), together.run_key)
    assert recorded is not None
    assert (recorded["status"], recorded["workers"], recorded["zero_stage"]) == ("finished", 2, stage)
    for value in ("loss", "grad_norm", "tokens"):
        assert _curve(Storage(work / case), together, value) == pytest.approx(_curve(Storage(tmp_path), alone, value), rel=1e-5)
    weights = load_file(Storage(work / case).run(together.run_key).checkpoint(6) / ADAPTER_WEIGHTS)
    expected = load_file(Storage(tmp_path).run(alone.run_key).checkpoint(6) / ADAPTER_WEIGHTS)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5)


def test_after_a_run_that_diverged_the_workers_go_on(work: Path) -> None:
    good = _spec(work / "rows.jsonl", "llama", "fp32", 3)
    wild = _spec(work / "rows.jsonl", "llama", "fp32", 3, learning_rate=1e30, max_grad_norm=None)
    recorded = read_run(Storage(work / "queue"), wild.run_key)
    assert recorded is not None
    assert recorded["status"] == "failed"
    assert "step 2" in recorded["error"]
    alone = Storage(work / _name("llama", "fp32", 3)).run(good.run_key).checkpoint(6) / ADAPTER_WEIGHTS
    queued = Storage(work / "queue").run(good.run_key).checkpoint(6) / ADAPTER_WEIGHTS
    assert alone.read_bytes() == queued.read_bytes()
