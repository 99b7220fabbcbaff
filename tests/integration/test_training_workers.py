"""Two workers against one: the same losses and adapters at every ZeRO stage, whatever the micro-batches, alone and in packs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
_STAGES_OF_PACKS = (0, 3)
# Mixed ranks, mini-batches, data orders and durations: in the last micro-batches of some steps a worker has rows of one adapter alone.
_PACK: list[dict[str, Any]] = [
    {"rank": 2, "seed": 1, "dropout": 0.2, "max_steps": 4},
    {"rank": 8, "seed": 6, "batch_size": 3, "dropout": 0.0, "schedule": "cosine"},  # no element whose gradient is of the size of rounding
    {"rank": 4, "seed": 2, "batch_size": 7, "max_grad_norm": None, "max_steps": 5},
]
_WILD: dict[str, Any] = {"learning_rate": 1e30, "max_grad_norm": None}


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
    for stage in _STAGES_OF_PACKS:
        for name, pack in (("pack", _PACK), ("wild", [_PACK[0], _WILD, _PACK[2]])):
            runs = [_spec(data_file, "llama", "fp32", stage, **chosen) for chosen in pack]
            trials[f"{name}-{stage}"] = trial_of(*runs, workers=2, pack=3).model_dump(mode="json")
    queue = [_spec(data_file, "llama", "fp32", 3, **_WILD), specs[_name("llama", "fp32", 3)]]
    trials["queue"] = trial_of(*queue, workers=2).model_dump(mode="json")
    (folder / "trials.json").write_text(json.dumps(trials), encoding="utf-8")
    run_training_workers(folder)
    return folder


def _spec(data_file: Path, family: str, precision: str, stage: int, **chosen: Any) -> RunSpec:
    settings = {"micro_batch_size": 2, "targets": "all-linear", "max_grad_norm": 0.3, **chosen}
    return run_spec(data_file, family, precision, zero_stage=stage, **settings)  # type: ignore[arg-type]


@pytest.fixture
def one_worker(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains in this process, with the models that the workers have made."""
    monkeypatch.setenv("JMEDLORA_CACHE", str(work / "cache"))
    torch.set_num_threads(1)
    ensure_process_group()


def _curve(storage: Storage, spec: RunSpec, value: str) -> list[float]:
    return [record[value] for record in read_training(storage, spec.run_key)]


@pytest.mark.parametrize("case", [*(_name(*case) for case in _CASES), "checkpointing"])
@pytest.mark.usefixtures("one_worker")
def test_two_workers_train_as_one(case: str, work: Path, tmp_path: Path) -> None:
    family, precision = ("llama", "fp32") if case == "checkpointing" else case.split("-")[:2]
    stage = 3 if case == "checkpointing" else int(case[-1])
    alone = _spec(work / "rows.jsonl", family, precision, 0, micro_batch_size=None)
    train_trial(trial_of(alone), Storage(tmp_path), tmp_path, True, Silent())
    chosen = {"gradient_checkpointing": True} if case == "checkpointing" else {}
    together = _spec(work / "rows.jsonl", family, precision, stage, **chosen)
    recorded = read_run(Storage(work / case), together.run_key)
    assert recorded is not None
    assert (recorded["status"], recorded["workers"], recorded["zero_stage"]) == ("finished", 2, stage)
    _assert_agree(work / case, together, tmp_path, alone)


@pytest.mark.usefixtures("one_worker")
@pytest.mark.parametrize("stage", _STAGES_OF_PACKS)
@pytest.mark.parametrize(("name", "chosen"), [("pack", _PACK), ("wild", [_PACK[0], _PACK[2]])])
def test_a_pack_on_two_workers_trains_as_each_alone_on_one(
    name: str, stage: int, chosen: list[dict[str, Any]], work: Path, tmp_path: Path
) -> None:
    """Also beside a run that diverges, of which the others notice nothing."""
    for each in chosen:
        alone = _spec(work / "rows.jsonl", "llama", "fp32", 0, **each)
        train_trial(trial_of(alone), Storage(tmp_path), tmp_path, True, Silent())
        packed = _spec(work / "rows.jsonl", "llama", "fp32", stage, **each)
        recorded = read_run(Storage(work / f"{name}-{stage}"), packed.run_key)
        assert recorded is not None
        assert (recorded["status"], recorded["workers"], recorded["zero_stage"]) == ("finished", 2, stage)
        assert recorded["notes"] == [] and recorded["resumed"] == [], "the pack did not break"
        _assert_agree(work / f"{name}-{stage}", packed, tmp_path, alone)


@pytest.mark.parametrize("stage", _STAGES_OF_PACKS)
def test_a_run_that_diverges_in_a_pack_fails_by_itself(stage: int, work: Path) -> None:
    recorded = read_run(Storage(work / f"wild-{stage}"), _spec(work / "rows.jsonl", "llama", "fp32", stage, **_WILD).run_key)
    assert recorded is not None
    assert recorded["status"] == "failed" and recorded["error"].startswith("step 2: the loss is")


def _assert_agree(folder: Path, spec: RunSpec, alone_folder: Path, alone: RunSpec) -> None:
    """Curves and final weights of a run on two workers and of one that is the same but for how it is trained."""
    found, expected = Storage(folder), Storage(alone_folder)
    for value in ("loss", "grad_norm", "tokens"):
        assert _curve(found, spec, value) == pytest.approx(_curve(expected, alone, value), rel=1e-5)
    weights = load_file(found.run(spec.run_key).checkpoint(spec.total_steps) / ADAPTER_WEIGHTS)
    wanted = load_file(expected.run(alone.run_key).checkpoint(spec.total_steps) / ADAPTER_WEIGHTS)
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5)


def test_after_a_run_that_diverged_the_workers_go_on(work: Path) -> None:
    good = _spec(work / "rows.jsonl", "llama", "fp32", 3)
    wild = _spec(work / "rows.jsonl", "llama", "fp32", 3, **_WILD)
    recorded = read_run(Storage(work / "queue"), wild.run_key)
    assert recorded is not None
    assert recorded["status"] == "failed"
    assert "step 2" in recorded["error"]
    alone = Storage(work / _name("llama", "fp32", 3)).run(good.run_key).checkpoint(6) / ADAPTER_WEIGHTS
    queued = Storage(work / "queue").run(good.run_key).checkpoint(6) / ADAPTER_WEIGHTS
    assert alone.read_bytes() == queued.read_bytes()
