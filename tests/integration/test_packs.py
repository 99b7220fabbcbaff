"""Runs that train together against the same runs alone: the same losses at every step, the same adapters, whatever their neighbours do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from jmedlora.plan.checksums import verify
from jmedlora.plan.layout import ADAPTER_WEIGHTS, Storage
from jmedlora.plan.records import read_run, read_training
from jmedlora.plan.specs import RunSpec
from jmedlora.training import loop
from jmedlora.training.engine import PackEngine
from jmedlora.training.loop import RunOutcome, train_trial
from tests.integration.training_runs import Killed, Watching, digests
from tests.tiny import run_spec, trial_of

pytestmark = pytest.mark.usefixtures("training_here")

STAGES = (0, 1, 2, 3)
# Mixed ranks, alphas, dropouts, seeds (hence data orders), rates, schedules, decay, clipping, durations and mini-batches.
MIXED: list[dict[str, Any]] = [
    {"rank": 2, "alpha": 16, "dropout": 0.2, "seed": 1, "schedule": "cosine", "warmup_steps": 2, "max_steps": 7},
    {"rank": 8, "alpha": "2r", "dropout": 0.0, "learning_rate": 3e-3, "max_grad_norm": 0.2, "weight_decay": 0.1, "max_steps": 4},
    {"rank": 4, "dropout": 0.1, "seed": 2, "max_grad_norm": None, "batch_size": 3, "max_steps": 9},
    {"rank": 4, "dropout": 0.5, "schedule": "linear", "max_steps": 3},
    {"rank": 1, "dropout": 0.1, "batch_size": 7, "max_steps": 5},
]


def mixed(data_file: Path, family: Any = "llama", precision: Any = "fp32", **chosen: Any) -> list[RunSpec]:
    """The runs above; further arguments are settings of all of them."""
    return [run_spec(data_file, family, precision, **{"targets": "all-linear", "micro_batch_size": 2, **each, **chosen}) for each in MIXED]


def train(folder: Path, *specs: RunSpec, pack: int = 1, share: bool = False, watching: Watching | None = None) -> list[RunOutcome]:
    trial = trial_of(*specs, pack=pack, share_prefixes=share)
    return train_trial(trial, Storage(folder), folder, True, watching or Watching())


def curve(folder: Path, spec: RunSpec, value: str = "loss") -> list[float]:
    return [record[value] for record in read_training(Storage(folder), spec.run_key)]


def adapter_of(folder: Path, spec: RunSpec) -> dict[str, Tensor]:
    checkpoint = Storage(folder).run(spec.run_key).checkpoint(spec.total_steps)
    verify(checkpoint)
    return load_file(checkpoint / ADAPTER_WEIGHTS)


def assert_agree(found: Path, expected: Path, specs: list[RunSpec], tolerance: float = 1e-5, may_break: bool = False) -> None:
    """Losses at every step and final weights; and that packs did not break."""
    for spec in specs:
        told = read_run(Storage(found), spec.run_key)
        assert (told is not None and not any("without others" in note for note in told["notes"])) or may_break
        assert len(curve(found, spec)) == spec.total_steps
        assert curve(found, spec) == pytest.approx(curve(expected, spec), abs=tolerance, rel=0)
        assert curve(found, spec, "grad_norm") == pytest.approx(curve(expected, spec, "grad_norm"), rel=1e3 * tolerance)
        assert curve(found, spec, "learning_rate") == curve(expected, spec, "learning_rate")
        weights, alone = adapter_of(found, spec), adapter_of(expected, spec)
        assert weights.keys() == alone.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, alone[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("family", "precision", "stage"),
    [(family, precision, stage) for family in ("llama", "gpt_neox") for precision in ("fp32", "nf4") for stage in (0, 2)]
    + [("llama", "fp32", 1), ("llama", "fp32", 3), ("gpt_neox", "nf4", 3)],
)
def test_packed_and_alone_agree(family: Any, precision: Any, stage: int, data_file: Path, tmp_path: Path) -> None:
    """Three places for five runs: they leave at different steps, and others join."""
    specs = mixed(data_file, family, precision, zero_stage=stage)
    assert {outcome.status for outcome in train(tmp_path / "packed", *specs, pack=3)} == {"finished"}
    train(tmp_path / "alone", *specs)
    assert_agree(tmp_path / "packed", tmp_path / "alone", specs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_double_precision_packed_and_alone_agree_to_ten_digits(
    checkpointing: bool, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base in fp64, its norms computed in fp64 as well, which transformers would do in fp32."""
    inner = loop.load_base

    def in_double(*arguments: Any) -> Any:
        return inner(*arguments).double()

    def norm(self: LlamaRMSNorm, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(loop, "load_base", in_double)
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    specs = mixed(data_file, gradient_checkpointing=checkpointing)
    train(tmp_path / "packed", *specs, pack=4)
    train(tmp_path / "alone", *specs)
    assert all(weight.dtype == torch.float64 for weight in adapter_of(tmp_path / "packed", specs[0]).values())
    assert_agree(tmp_path / "packed", tmp_path / "alone", specs, tolerance=1e-10)


def test_the_same_rows_for_all_and_whole_mini_batches(data_file: Path, tmp_path: Path) -> None:
    """The ordinary grid: one data order and one dropout for all ranks, whose masks are then computed once."""
    specs = [run_spec(data_file, rank=rank, targets="all-linear", dropout=0.3) for rank in (1, 2, 8)]
    train(tmp_path / "packed", *specs, pack=3)
    train(tmp_path / "alone", *specs)
    assert_agree(tmp_path / "packed", tmp_path / "alone", specs)


def test_unused_ranks_stay_zero(data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [run_spec(data_file, rank=rank, weight_decay=0.1, targets="all-linear") for rank in (2, 8)]
    left: list[float] = []
    inner = PackEngine.close

    def look(self: PackEngine) -> None:
        assert self._pack.batch.weights.shape[:2] == (2, 8)
        left.append(float(self._pack.batch.weights[0, 2:].abs().max()))
        inner(self)

    monkeypatch.setattr(PackEngine, "close", look)
    train(tmp_path, *specs, pack=2)
    assert left and set(left) == {0.0}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_diverges_is_not_noticed_by_its_neighbours(stage: int, data_file: Path, tmp_path: Path) -> None:
    wild = run_spec(data_file, zero_stage=stage, learning_rate=1e30, max_grad_norm=None)
    tame = [run_spec(data_file, zero_stage=stage, seed=seed) for seed in (0, 1)]
    outcomes = train(tmp_path / "packed", tame[0], wild, tame[1], pack=3)
    assert {outcome.run_key: outcome.status for outcome in outcomes} == {
        tame[0].run_key: "finished", wild.run_key: "failed", tame[1].run_key: "finished",
    }  # fmt: skip
    told = read_run(Storage(tmp_path / "packed"), wild.run_key)
    assert told is not None and told["error"].startswith("step 2: the loss is")
    assert curve(tmp_path / "packed", wild) == pytest.approx(curve(tmp_path / "packed", tame[0])[:1], abs=1e-5), "the step before counts"
    train(tmp_path / "alone", *tame)
    assert_agree(tmp_path / "packed", tmp_path / "alone", tame)


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_harms_nobody_else(
    stage: int, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite, its gradient is not: with ZeRO, DeepSpeed then drops the step of all, and they go on one by one."""
    spoilt = run_spec(data_file, zero_stage=stage, seed=7)
    good = [run_spec(data_file, zero_stage=stage, seed=seed) for seed in (0, 1)]
    inner = PackEngine.backward

    def overflowing(self: PackEngine, batch: Any, labelled: Any, last: bool) -> Tensor:
        seeds = [shape.chances.seed for shape in self._pack.shapes]
        counted = [1e-45 if seed == 7 else count for seed, count in zip(seeds, labelled, strict=True)]
        return inner(self, batch, counted, last)

    with monkeypatch.context() as patch:
        patch.setattr(PackEngine, "backward", overflowing)
        outcomes = train(tmp_path / "packed", good[0], spoilt, good[1], pack=3)
    assert {outcome.run_key: outcome.error for outcome in outcomes} == {
        good[0].run_key: None, spoilt.run_key: "step 1: the gradient is not finite", good[1].run_key: None,
    }  # fmt: skip
    train(tmp_path / "alone", *good)
    assert_agree(tmp_path / "packed", tmp_path / "alone", good, may_break=stage > 0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_killed_pack_goes_on_bit_for_bit(stage: int, data_file: Path, tmp_path: Path) -> None:
    specs = [run_spec(data_file, zero_stage=stage, rank=rank, seed=rank, checkpoint_every=2) for rank in (2, 4, 8)]
    train(tmp_path / "undisturbed", *specs, pack=3)
    assert train_killed(tmp_path / "resumed", specs, at=5) == 5
    watching = Watching()
    train(tmp_path / "resumed", *specs, pack=3, watching=watching)
    assert watching.taken == [step for step in (5, 6) for _ in specs]
    for spec in specs:
        assert digests(tmp_path / "resumed", spec) == digests(tmp_path / "undisturbed", spec)
        assert curve(tmp_path / "resumed", spec) == curve(tmp_path / "undisturbed", spec)


def test_states_go_from_pack_to_pack(data_file: Path, tmp_path: Path) -> None:
    """What was begun in one pack is gone on with in another, or alone, and in places of other ranks."""
    specs = mixed(data_file, checkpoint_every=1)
    train_killed(tmp_path / "moved", specs, at=2, pack=3)
    train_killed(tmp_path / "moved", specs[::-1], at=4, pack=2)
    train(tmp_path / "moved", *specs, pack=1)
    train(tmp_path / "alone", *specs)
    assert_agree(tmp_path / "moved", tmp_path / "alone", specs)


def train_killed(folder: Path, specs: list[RunSpec], at: int, pack: int = 3) -> int:
    """Trains, and dies right after the first run has recorded step `at`; returns the last step that was taken."""
    steps: list[int] = []

    def die(step: int) -> None:
        steps.append(step)
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        train(folder, *specs, pack=pack, watching=Watching(die))
    return steps[-1]


def test_a_pack_that_breaks_is_trained_one_by_one(data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As out of memory, which may well be because there are several."""
    inner: Callable[..., Any] = PackEngine.backward
    specs = [run_spec(data_file, rank=rank, checkpoint_every=2) for rank in (2, 4, 8)]

    def too_much(self: PackEngine, *arguments: Any, **named: Any) -> Tensor:
        if len(self._pack) > 1 and len(curve(tmp_path / "packed", specs[0])) == 3:
            raise torch.OutOfMemoryError("allocating 3 GB")
        return inner(self, *arguments, **named)  # type: ignore[no-any-return]

    monkeypatch.setattr(PackEngine, "backward", too_much)
    assert [outcome.status for outcome in train(tmp_path / "packed", *specs, pack=3)] == ["finished"] * 3
    told = read_run(Storage(tmp_path / "packed"), specs[1].run_key)
    assert told is not None
    assert told["notes"] == ["trained without others from here on: allocating 3 GB"]
    assert [each["step"] for each in told["resumed"]] == [2]
    train(tmp_path / "alone", *specs)
    assert_agree(tmp_path / "packed", tmp_path / "alone", specs, may_break=True)
