"""The checkpoint diet over real training: bytes on disk, going on beside removed checkpoints, and training again for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from jmedlora.config.parts import ResourcesConfig
from jmedlora.orchestrator.ledger import run_status
from jmedlora.plan.estimates import estimate_trial
from jmedlora.plan.layout import ADAPTER_WEIGHTS, STATE_TENSORS, Storage
from jmedlora.plan.records import read_run
from jmedlora.plan.retention import apply_keep_rules, forget_removed
from jmedlora.plan.shapes import lora_parameters
from jmedlora.plan.specs import KeepRule, Plan, RunSpec
from tests.integration.training_runs import curve, digests, train
from tests.made_up import base_spec, evaluation_spec, plan_of, write_evaluation
from tests.tiny import run_spec, trial_of

pytestmark = pytest.mark.usefixtures("training_here")

SETTINGS: dict[str, Any] = {"targets": "all-linear", "rank": 32, "max_steps": 7, "schedule": "cosine"}
ASKED = [evaluation_spec(0)]


def swept(spec: RunSpec, **rule: Any) -> Plan:
    """A sweep of that run."""
    plan = plan_of([base_spec(spec.base_key)], [spec], ASKED)
    return plan.model_copy(update={"keep": KeepRule(evaluation=ASKED[0].folder, **rule)})


def evaluate(folder: Path, spec: RunSpec, *steps: int) -> None:
    for step in steps:
        write_evaluation(Storage(folder), spec.run_key, step, ASKED[0], 0.5)


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def elements_in(file: Path) -> dict[str, int]:
    """Elements of every tensor of a safetensors file."""
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name).numel() for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("precision", "compute"), [("fp32", "fp32"), ("bf16", "bf16"), ("nf4", "bf16")])
def test_a_run_takes_what_its_adapters_take_and_what_the_plan_says(precision: Any, compute: str, data_file: Path, tmp_path: Path) -> None:
    """Adapters and one state, never base weights; then, by the rule, one adapter alone."""
    spec = run_spec(data_file, "llama", precision, compute, checkpoint_every=2, **{**SETTINGS, "rank": 128})
    assert spec.model.architecture is not None
    shape = spec.model.architecture.model_copy(update={"hidden_size": 128, "intermediate_size": 160})  # names weigh little beside that
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"architecture": shape})})
    train(tmp_path, spec)
    folder = Storage(tmp_path).run(spec.run_key)
    parameters = lora_parameters("llama", shape, spec.settings.rank, spec.settings.targets)
    adapter = elements_in(folder.checkpoint(7) / ADAPTER_WEIGHTS)
    state = elements_in(folder.state(7) / STATE_TENSORS)
    assert all(".lora_A." in name or ".lora_B." in name for name in [*adapter, *state])
    assert sum(adapter.values()) == parameters and sum(state.values()) == 3 * parameters
    assert (len(folder.committed_steps()), sorted(folder.states())) == (4, [7])
    weights = (folder.checkpoint(7) / ADAPTER_WEIGHTS).stat().st_size
    checkpoints, states = bytes_in(folder.checkpoints), bytes_in(folder.path / "state")
    assert 4 * weights < checkpoints < 4 * (weights + 4096)
    assert bytes_in(folder.path) < checkpoints + states + 16384
    estimate = estimate_trial(trial_of(spec), ResourcesConfig(), {spec.model.name: shape}).disk_bytes
    assert checkpoints + states == pytest.approx(estimate, rel=0.03)
    evaluate(tmp_path, spec, *spec.checkpoint_steps)
    removed = apply_keep_rules(swept(spec, checkpoints="last", state="drop"), Storage(tmp_path))
    assert [(each.what, each.step) for each in removed] == [("checkpoint", 2), ("checkpoint", 4), ("checkpoint", 6), ("state", 7)]
    assert checkpoints + states - bytes_in(folder.checkpoints) - bytes_in(folder.path / "state") == pytest.approx(
        sum(each.bytes for each in removed), abs=1024
    )
    assert weights < bytes_in(folder.checkpoints) < weights + 4 * 4096


def test_a_killed_run_goes_on_beside_checkpoints_that_a_rule_has_removed(data_file: Path, tmp_path: Path) -> None:
    spec = run_spec(data_file, checkpoint_every=2, **SETTINGS)
    train(tmp_path / "whole", spec)
    train(tmp_path / "killed", spec, kill_at=5)
    storage = Storage(tmp_path / "killed")
    folder = storage.run(spec.run_key)
    evaluate(tmp_path / "killed", spec, 2, 4)
    apply_keep_rules(swept(spec, checkpoints="last", state="drop"), storage)
    assert folder.removed_steps() == [2] and sorted(folder.states()) == [2, 4]
    assert train(tmp_path / "killed", spec) == [5, 6, 7]
    told = read_run(storage, spec.run_key)
    assert told is not None and told["notes"] == []
    assert folder.removed_steps() == [2]
    assert run_status(spec, storage) == "finished" and train(tmp_path / "killed", spec) == []
    assert curve(tmp_path / "killed", spec) == curve(tmp_path / "whole", spec)
    kept = spec.model_copy(update={"checkpoint_steps": [4, 6, 7]})
    assert digests(tmp_path / "killed", kept) == digests(tmp_path / "whole", kept)


def test_what_is_asked_of_a_removed_checkpoint_is_trained_again(data_file: Path, tmp_path: Path) -> None:
    """Bit for bit as it was; and the rule takes it away once more."""
    spec = run_spec(data_file, checkpoint_every=3, **SETTINGS)
    storage, folder = Storage(tmp_path), Storage(tmp_path).run(spec.run_key)
    train(tmp_path, spec)
    before = digests(tmp_path, spec)
    evaluate(tmp_path, spec, *spec.checkpoint_steps)
    plan = swept(spec, checkpoints="last")
    apply_keep_rules(plan, storage)
    assert forget_removed(plan, storage) == [] and train(tmp_path, spec) == []
    more = plan.model_copy(update={"evaluations": [*ASKED, evaluation_spec(1)]})
    assert forget_removed(more, storage) == [spec.run_key]
    assert train(tmp_path, spec, kill_at=4) == [1, 2, 3, 4]
    assert train(tmp_path, spec) == [4, 5, 6, 7]
    assert digests(tmp_path, spec) == before
    assert apply_keep_rules(more, storage) == []  # it waits for the new evaluation
    for step in spec.checkpoint_steps:
        write_evaluation(storage, spec.run_key, step, evaluation_spec(1), 0.5)
    assert [each.step for each in apply_keep_rules(more, storage)] == [3, 6]
    assert folder.removed_steps() == [3, 6]
