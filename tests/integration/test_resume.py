"""A run that was killed goes on from its newest state, and ends as if nothing had happened: bit for bit on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jmedlora.plan.layout import ADAPTER_WEIGHTS, STATE_JSON, STATE_TENSORS, Storage
from jmedlora.plan.records import read_run
from jmedlora.training import loop
from jmedlora.training.records import RunRecords
from tests.integration.processes import run_training_workers
from tests.integration.training_runs import curve, digests, train
from tests.integration.training_worker import Silent
from tests.tiny import run_spec, trial_of

SETTINGS = {"schedule": "cosine", "warmup_steps": 1, "weight_decay": 0.1, "targets": "all-linear", "max_grad_norm": 0.5, "max_steps": 7}


pytestmark = pytest.mark.usefixtures("training_here")


@pytest.mark.parametrize(("precision", "compute"), [("fp32", "fp32"), ("nf4", "fp32"), ("bf16", "bf16")])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_killed_run_ends_as_an_undisturbed_one(stage: int, precision: Any, compute: str, data_file: Path, tmp_path: Path) -> None:
    family = "gpt_neox" if stage == 2 else "llama"
    spec = run_spec(data_file, family, precision, compute, stage, checkpoint_every=3, **SETTINGS)
    assert train(tmp_path / "whole", spec) == [1, 2, 3, 4, 5, 6, 7]
    assert train(tmp_path / "killed", spec, kill_at=5) == [1, 2, 3, 4, 5]
    assert train(tmp_path / "killed", spec, kill_at=4) == [4]
    assert train(tmp_path / "killed", spec) == [4, 5, 6, 7]
    assert digests(tmp_path / "killed", spec) == digests(tmp_path / "whole", spec)
    assert curve(tmp_path / "killed", spec) == curve(tmp_path / "whole", spec)
    told = read_run(Storage(tmp_path / "killed"), spec.run_key)
    assert told is not None
    assert told["status"] == "finished" and [each["step"] for each in told["resumed"]] == [3, 3]


@pytest.mark.parametrize(("before", "after"), [(0, 3), (3, 1), (2, 0)])
def test_another_stage_goes_on_with_the_state(before: int, after: int, data_file: Path, tmp_path: Path) -> None:
    """State belongs to the run, not to how it was sharded."""
    first = run_spec(data_file, zero_stage=before, checkpoint_every=3, **SETTINGS)
    second = first.model_copy(update={"deepspeed": run_spec(data_file, zero_stage=after).deepspeed})
    train(tmp_path / "whole", first)
    train(tmp_path / "moved", first, kill_at=4)
    assert train(tmp_path / "moved", second) == [4, 5, 6, 7]
    expected = curve(tmp_path / "whole", first)
    for found, wanted in zip(curve(tmp_path / "moved", second), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)


def test_another_number_of_workers_goes_on_with_the_state(data_file: Path, tmp_path: Path) -> None:
    """Alone until step 3, then two workers, whose shards do not come out even; within rounding of one worker throughout."""
    specs = {f"zero{stage}": run_spec(data_file, zero_stage=stage, checkpoint_every=3, **{**SETTINGS, "rank": 3}) for stage in (0, 2, 3)}
    for name, spec in specs.items():
        train(tmp_path / "whole", spec)
        train(tmp_path / name, spec, kill_at=4)
    trials = {name: trial_of(spec, workers=2).model_dump(mode="json") for name, spec in specs.items()}
    (tmp_path / "trials.json").write_text(json.dumps(trials), encoding="utf-8")
    run_training_workers(tmp_path)
    for name, spec in specs.items():
        told = read_run(Storage(tmp_path / name), spec.run_key)
        assert told is not None
        assert told["workers"] == 2 and [each["step"] for each in told["resumed"]] == [3]
        for found, wanted in zip(curve(tmp_path / name, spec), curve(tmp_path / "whole", spec), strict=True):
            assert found == pytest.approx(wanted, abs=1e-5)


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    elif how == "truncated":
        content = content[: len(content) // 2]
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((STATE_TENSORS, how) for how in ("flipped", "truncated", "missing")),
        *((STATE_JSON, how) for how in ("truncated", "missing")),  # a flipped bit in a date need not matter
    ],
)
def test_of_a_damaged_state_the_one_before_is_used_and_told(name: str, how: str, data_file: Path, tmp_path: Path) -> None:
    spec = run_spec(data_file, checkpoint_every=2, **SETTINGS)
    train(tmp_path / "whole", spec)
    train(tmp_path / "killed", spec, kill_at=5)
    folder = Storage(tmp_path / "killed").run(spec.run_key)
    assert sorted(folder.states()) == [2, 4]
    damage(folder.state(4) / name, how)
    assert train(tmp_path / "killed", spec) == [3, 4, 5, 6, 7]
    told = read_run(Storage(tmp_path / "killed"), spec.run_key)
    assert told is not None
    assert len(told["notes"]) == 1 and "state/step-000004 is passed over" in told["notes"][0]
    assert digests(tmp_path / "killed", spec) == digests(tmp_path / "whole", spec)


def test_a_damaged_checkpoint_comes_again(data_file: Path, tmp_path: Path) -> None:
    spec = run_spec(data_file, checkpoint_every=2, **SETTINGS)
    train(tmp_path / "whole", spec)
    train(tmp_path / "killed", spec, kill_at=5)
    damage(Storage(tmp_path / "killed").run(spec.run_key).checkpoint(4) / ADAPTER_WEIGHTS, "flipped")
    assert train(tmp_path / "killed", spec) == [3, 4, 5, 6, 7]
    told = read_run(Storage(tmp_path / "killed"), spec.run_key)
    assert told is not None
    assert "checkpoint of step 4 before it is not whole" in told["notes"][0]
    assert digests(tmp_path / "killed", spec) == digests(tmp_path / "whole", spec)


def test_a_state_is_written_by_time_between_checkpoints(data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = run_spec(data_file, **SETTINGS)
    monkeypatch.setattr(loop, "STATE_EVERY_S", 0.0)
    train(tmp_path, spec, kill_at=5)
    folder = Storage(tmp_path).run(spec.run_key)
    assert sorted(folder.states()) == [3, 4]
    assert not any(folder.is_committed(step) for step in range(1, 8))
    assert train(tmp_path, spec) == [5, 6, 7]


def test_only_adapters_and_the_newest_state_are_kept(data_file: Path, tmp_path: Path) -> None:
    spec = run_spec(data_file, checkpoint_every=2, **SETTINGS)
    train(tmp_path, spec)
    folder = Storage(tmp_path).run(spec.run_key)
    assert sorted(folder.states()) == [7]
    adapter = sum(file.stat().st_size for file in folder.checkpoint(7).iterdir())
    state = sum(file.stat().st_size for file in folder.state(7).iterdir())
    whole = sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file())
    weights = (folder.checkpoint(7) / ADAPTER_WEIGHTS).stat().st_size
    assert weights < adapter < weights + 4096
    assert state < 3 * weights + 8192  # weights and two moments, all in fp32
    assert whole < len(spec.checkpoint_steps) * adapter + state + 16384


def test_the_curve_of_a_run_whose_writer_was_killed_in_the_middle_of_a_line(data_file: Path, tmp_path: Path) -> None:
    spec = run_spec(data_file, checkpoint_every=3, **SETTINGS)
    train(tmp_path / "whole", spec)
    train(tmp_path / "killed", spec, kill_at=5)
    with Storage(tmp_path / "killed").run(spec.run_key).train_jsonl.open("a") as lines:
        lines.write('{"step": 6, "lo')
    train(tmp_path / "killed", spec)
    assert curve(tmp_path / "killed", spec) == curve(tmp_path / "whole", spec)


def test_the_state_of_another_run_is_not_taken(data_file: Path, tmp_path: Path) -> None:
    spec = run_spec(data_file, checkpoint_every=3, **SETTINGS)
    other = run_spec(data_file, checkpoint_every=3, **{**SETTINGS, "seed": 5})
    train(tmp_path, spec, kill_at=5)
    storage = Storage(tmp_path)
    storage.run(spec.run_key).path.rename(storage.run(other.run_key).path)
    assert train(tmp_path, other) == [1, 2, 3, 4, 5, 6, 7]


def test_records_of_a_fresh_start_remove_what_was_there(data_file: Path, tmp_path: Path) -> None:
    spec = run_spec(data_file, checkpoint_every=3, **SETTINGS)
    train(tmp_path, spec, kill_at=5)
    folder = Storage(tmp_path).run(spec.run_key)
    RunRecords(folder, spec, 1, "cpu", Silent())
    assert not folder.states() and not list(folder.checkpoints.glob("*")) and not folder.train_jsonl.exists()


def test_sweeps_that_share_a_run_and_ask_for_other_checkpoints_keep_each_others(data_file: Path, tmp_path: Path) -> None:
    spec = run_spec(data_file, checkpoint_every=3, **SETTINGS)
    other = spec.model_copy(update={"checkpoint_steps": [2, 4, 7]})
    train(tmp_path, spec)
    before = digests(tmp_path, spec)
    assert train(tmp_path, other) == [1, 2, 3, 4, 5, 6, 7]
    assert Storage(tmp_path).run(spec.run_key).committed_steps() == [2, 3, 4, 6, 7]
    assert digests(tmp_path, spec) == before
    assert train(tmp_path, spec) == train(tmp_path, other) == []
