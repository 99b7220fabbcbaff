"""A worker that runs out of memory in the middle of a run: told with what would fit, and the runs after it are not touched by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jmedlora.plan.layout import Storage
from jmedlora.plan.records import read_run
from jmedlora.training.loop import train_trial
from jmedlora.training.loss import AnswerLoss
from tests.integration.training_runs import Watching, curve, digests, train
from tests.tiny import run_spec, trial_of

pytestmark = pytest.mark.usefixtures("training_here")
HINT = "micro_batch_size 1 (now 5)"


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_memory_gives_out_inside_the_forward_pass(family: Any, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy, modest = (run_spec(data_file, family, seed=seed, checkpoint_every=2) for seed in (1, 2))
    train(tmp_path / "alone", greedy)
    train(tmp_path / "alone", modest)
    forward = AnswerLoss.forward
    watching = Watching()

    def short_of_memory(module: AnswerLoss, *arguments: Any) -> Any:
        """The model has gone through all its layers, and its hooks and graph hold all they hold then."""
        loss = forward(module, *arguments)
        if len(watching.taken) == 3:
            watching.taken.append(0)  # once
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(AnswerLoss, "forward", short_of_memory)
        outcomes = train_trial(
            trial_of(greedy, modest), Storage(tmp_path / "short"), tmp_path, True, watching, hints={greedy.run_key: HINT}
        )
    assert [outcome.status for outcome in outcomes] == ["failed", "finished"]
    told = read_run(Storage(tmp_path / "short"), greedy.run_key)
    assert told is not None and told["status"] == "failed"
    assert "out of memory" in told["error"] and HINT in told["error"]
    assert curve(tmp_path / "short", modest) == curve(tmp_path / "alone", modest)
    assert digests(tmp_path / "short", modest) == digests(tmp_path / "alone", modest)
    assert train(tmp_path / "short", greedy, modest) == [3, 4, 5, 6], "it goes on from its newest state once there is memory"
    assert digests(tmp_path / "short", greedy) == digests(tmp_path / "alone", greedy)


def test_memory_gives_out_under_a_pack(data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three needs too much, also alone: it fails, and the two others lose what their states do not hold, and no more."""
    specs = [run_spec(data_file, rank=rank, seed=rank, checkpoint_every=2) for rank in (2, 8, 4)]
    greedy, modest = specs[1], [specs[0], specs[2]]
    train(tmp_path / "alone", *specs)
    forward = AnswerLoss.forward

    def short_of_memory(module: AnswerLoss, *arguments: Any) -> Any:
        losses = forward(module, *arguments)
        if module.weights._pack.rank == greedy.settings.rank and len(curve(tmp_path / "short", greedy)) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return losses

    watching = Watching()
    with monkeypatch.context() as patch:
        patch.setattr(AnswerLoss, "forward", short_of_memory)
        storage, hints = Storage(tmp_path / "short"), {greedy.run_key: HINT}
        outcomes = train_trial(trial_of(*specs, pack=3), storage, tmp_path, True, watching, hints=hints)
    assert {outcome.run_key: outcome.status for outcome in outcomes} == {
        modest[0].run_key: "finished", greedy.run_key: "failed", modest[1].run_key: "finished",
    }  # fmt: skip
    assert watching.taken == [1, 1, 1, 2, 2, 2, 3, 3, 3, *(3, 4, 5, 6), 3, *(3, 4, 5, 6)]
    told = read_run(storage, greedy.run_key)
    assert told is not None and "out of memory" in told["error"] and HINT in told["error"]
    for spec in modest:
        for line, wanted in zip(curve(tmp_path / "short", spec), curve(tmp_path / "alone", spec), strict=True):
            assert line == pytest.approx(wanted, abs=1e-5)
    assert train(tmp_path / "short", *specs) == [3, 4, 5, 6], "it goes on from its newest state once there is memory"
