"""Keep rules: what stays on disk, what protects it, and what is left of the rest."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jmedlora.config.faults import BadInput
from jmedlora.models.adapters import adopt_adapter
from jmedlora.orchestrator.keeping import KeepingToRule, settle_rule, told
from jmedlora.orchestrator.ledger import HeldByAnother, driver_lock, run_status, standing
from jmedlora.plan import retention
from jmedlora.plan.checksums import AdapterDamaged, adapter_digest, verify, verify_what_is_left
from jmedlora.plan.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHECKSUMS, METRICS, REMOVED, STATE_JSON, STATE_TENSORS, Storage
from jmedlora.plan.planner import make_plan, open_sweep
from jmedlora.plan.retention import apply_keep_rules, forget_removed, notes_on_keeping, removed_but_asked, rule_has_changed
from jmedlora.plan.specs import EvaluationSpec, KeepRule, Plan, RunSpec
from jmedlora.plan.writing import plans_lock, read_plan, write_plan
from tests.made_up import base_spec, evaluation_spec, plan_of, run_spec, write_evaluation, write_training

RUN = "lora16030000"
STEPS = [7, 14, 21, 28]
BEST = evaluation_spec(0).folder
Killed = type("Killed", (BaseException,), {})


def write_checkpoint(storage: Storage, run_key: str, step: int) -> Path:
    """A checkpoint as far as keep rules see it: weights, config and their checksums."""
    folder = storage.run(run_key).checkpoint(step)
    folder.mkdir(parents=True)
    files = {ADAPTER_WEIGHTS: f"weights of {step}".encode() * 100, ADAPTER_CONFIG: b"{}"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    facts = {name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)} for name, content in files.items()}
    (folder / CHECKSUMS).write_text(json.dumps({"files": facts}))
    return folder


def write_state(storage: Storage, run_key: str, step: int) -> None:
    folder = storage.run(run_key).state(step)
    folder.mkdir(parents=True)
    (folder / STATE_TENSORS).write_bytes(b"state" * 600)
    (folder / STATE_JSON).write_text("{}")


def write_score(storage: Storage, step: int, evaluation: EvaluationSpec, accuracy: float = 0.5) -> None:
    write_evaluation(storage, RUN, step, evaluation, 0.5)
    file = storage.run(RUN).evaluation(evaluation.folder, step) / METRICS
    file.write_text(json.dumps(json.loads(file.read_text()) | {"accuracy": accuracy}))


def sweep_of(name: str = "mine", evaluations: list[EvaluationSpec] | None = None, **rule: Any) -> Plan:
    """A sweep of one run with four checkpoints."""
    plan = plan_of([base_spec()], [run_spec(RUN, epochs=4)], evaluations or [evaluation_spec(0), evaluation_spec(1)], name)
    return plan.model_copy(update={"keep": KeepRule(evaluation=BEST, **rule)})


def store(plan: Plan, storage: Storage) -> None:
    file = storage.sweep(plan.sweep).plan_json
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(plan.model_dump_json())


def finished_run(storage: Storage, accuracies: list[float] | None = None) -> None:
    """The run of `sweep_of`, trained and evaluated."""
    write_training(storage, sweep_of().runs[0])
    write_state(storage, RUN, STEPS[-1])
    for step, accuracy in zip(STEPS, accuracies or [0.1, 0.3, 0.3, 0.2], strict=True):
        write_checkpoint(storage, RUN, step)
        write_score(storage, step, evaluation_spec(0), accuracy)
        write_score(storage, step, evaluation_spec(1))


def with_weights(storage: Storage) -> list[int]:
    folder = storage.run(RUN)
    return [step for step in folder.committed_steps() if (folder.checkpoint(step) / ADAPTER_WEIGHTS).is_file()]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


@pytest.mark.parametrize(
    ("checkpoints", "kept"), [("all", STEPS), ("last", [28]), ("best", [14, 28]), (1, [28]), (3, [14, 21, 28]), (9, STEPS)]
)
def test_what_a_rule_keeps(checkpoints: Any, kept: list[int], storage: Storage) -> None:
    finished_run(storage)
    plan = sweep_of(checkpoints=checkpoints)
    size = (storage.run(RUN).checkpoint(7) / ADAPTER_WEIGHTS).stat().st_size
    removed = apply_keep_rules(plan, storage)
    assert with_weights(storage) == kept
    assert len(kept) <= plan.keep.at_most(len(STEPS)) <= len(STEPS)
    assert [(each.run_key, each.what, each.step) for each in removed] == [(RUN, "checkpoint", step) for step in STEPS if step not in kept]
    assert not removed or removed[0].bytes == size
    assert sorted(storage.run(RUN).states()) == [28]


def test_the_best_is_of_the_metric_and_the_evaluation_that_are_named(storage: Storage) -> None:
    finished_run(storage)
    for step, score in zip(STEPS, [0.1, 0.2, 0.9, 0.3], strict=True):
        file = storage.run(RUN).evaluation(evaluation_spec(1).folder, step) / METRICS
        file.write_text(json.dumps(json.loads(file.read_text()) | {"gestalt_score": score}))
    plan = sweep_of().model_copy(
        update={"keep": KeepRule(checkpoints="best", metric="gestalt_score", evaluation=evaluation_spec(1).folder)}
    )
    apply_keep_rules(plan, storage)
    assert with_weights(storage) == [21, 28]


def test_the_rule_goes_along_while_a_run_trains(storage: Storage) -> None:
    """At each moment the newest and what is still to be evaluated stay; the best so far is never given up."""
    plan = sweep_of(checkpoints="best", state="drop")
    write_training(storage, plan.runs[0], steps=20)
    seen = []
    for step, accuracy in zip(STEPS, [0.3, 0.2, 0.1, 0.2], strict=True):
        write_checkpoint(storage, RUN, step)
        write_state(storage, RUN, step)
        write_score(storage, step, evaluation_spec(0), accuracy)
        apply_keep_rules(plan, storage)
        before = with_weights(storage)
        write_score(storage, step, evaluation_spec(1))
        apply_keep_rules(plan, storage)
        seen.append((before, with_weights(storage)))
    assert seen == [([7], [7]), ([7, 14], [7, 14]), ([7, 21], [7, 21]), ([7, 28], [7, 28])]
    assert sorted(storage.run(RUN).states()) == STEPS  # not finished


def test_what_is_still_to_be_evaluated_stays(storage: Storage) -> None:
    finished_run(storage)
    missing = storage.run(RUN).evaluation(evaluation_spec(1).folder, 14)
    (missing / METRICS).rename(missing / "aside")
    apply_keep_rules(sweep_of(checkpoints="last"), storage)
    assert with_weights(storage) == [14, 28]
    (missing / "aside").rename(missing / METRICS)
    apply_keep_rules(sweep_of(checkpoints="last"), storage)
    assert with_weights(storage) == [28]


def test_other_sweeps_of_the_storage_protect_what_they_keep_or_have_yet_to_evaluate(storage: Storage) -> None:
    finished_run(storage)
    mine = sweep_of(checkpoints="last", state="drop")
    more = evaluation_spec(2)
    store(sweep_of("other", checkpoints="all"), storage)
    assert apply_keep_rules(mine, storage) == []
    store(sweep_of("other", checkpoints=2), storage)
    assert [each.step for each in apply_keep_rules(mine, storage)] == [7, 14]
    store(sweep_of("other", [evaluation_spec(0), more], checkpoints="last", state="drop"), storage)
    assert [each.what for each in apply_keep_rules(mine, storage)] == ["state"]
    assert with_weights(storage) == [21, 28]
    write_score(storage, 21, more)
    assert [each.step for each in apply_keep_rules(mine, storage)] == [21]


def test_a_plan_of_its_own_in_storage_is_of_an_earlier_start_and_protects_nothing(storage: Storage) -> None:
    finished_run(storage)
    store(sweep_of(checkpoints="all"), storage)
    mine = sweep_of(checkpoints="last")
    assert rule_has_changed(mine, storage)
    apply_keep_rules(mine, storage)
    assert with_weights(storage) == [28]
    store(mine, storage)
    assert not rule_has_changed(mine, storage)


def test_nothing_is_removed_while_another_plan_cannot_be_read(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    finished_run(storage)
    file = storage.sweep("other").plan_json
    file.parent.mkdir(parents=True)
    file.write_text("{")
    assert apply_keep_rules(sweep_of(checkpoints="last", state="drop"), storage) == []
    assert str(file) in caplog.text


def test_a_damaged_result_protects_its_run_and_is_told(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    finished_run(storage)
    file = storage.run(RUN).evaluation(evaluation_spec(1).folder, 14) / METRICS
    file.write_text("{")
    apply_keep_rules(sweep_of(checkpoints="last"), storage)
    assert 14 in with_weights(storage)
    assert str(file) in caplog.text


def test_what_is_left_of_a_checkpoint_is_known_and_told(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished_run(storage)
    folder = storage.run(RUN)
    digest = adapter_digest(folder.checkpoint(7))
    monkeypatch.setattr(retention, "now", lambda: 1_770_000_000.0)
    plan = sweep_of(checkpoints="best")
    apply_keep_rules(plan, storage)
    left = folder.checkpoint(7)
    assert {path.name for path in left.iterdir()} == {ADAPTER_CONFIG, CHECKSUMS, REMOVED}
    rule = "best by accuracy on sample.0shot.alpaca-ja, and last"
    assert json.loads((left / REMOVED).read_text()) == {"time": 1_770_000_000.0, "rule": rule, "sweep": "mine"}
    assert adapter_digest(left) == digest
    assert folder.removed_steps() == [7, 21]
    assert run_status(plan.runs[0], storage) == "finished"
    verify_what_is_left(left)
    with pytest.raises(AdapterDamaged, match="its weights were removed by a keep rule"):
        verify(left)
    with pytest.raises(BadInput, match="its weights were removed by a keep rule"):
        adopt_adapter(left, tmp_path / "adopted")
    (left / ADAPTER_CONFIG).write_text("{ }")
    with pytest.raises(AdapterDamaged):
        verify_what_is_left(left)
    (folder.checkpoint(28) / ADAPTER_WEIGHTS).unlink()  # by whatever else
    with pytest.raises(AdapterDamaged, match=r"missing$"):
        verify_what_is_left(folder.checkpoint(28))


def test_a_second_time_changes_nothing_and_needs_no_other_plans(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    finished_run(storage)
    plan = sweep_of(checkpoints="best", state="drop")
    assert len(apply_keep_rules(plan, storage)) == 3
    before = {path: path.stat().st_mtime_ns for path in storage.root.rglob("*")}
    monkeypatch.setattr(retention, "read_plan", lambda *_: pytest.fail("other plans were read"))
    assert apply_keep_rules(plan, storage) == []
    assert {path: path.stat().st_mtime_ns for path in storage.root.rglob("*")} == before


def test_only_the_runs_that_are_named_are_looked_at(storage: Storage) -> None:
    finished_run(storage)
    plan = sweep_of(checkpoints="last")
    assert apply_keep_rules(plan, storage, {"another"}) == []
    assert len(apply_keep_rules(plan, storage, {RUN})) == 3


@pytest.mark.parametrize("status", ["running", "interrupted", "failed", "finished"])
def test_a_state_is_dropped_of_finished_runs_alone(status: str, storage: Storage) -> None:
    finished_run(storage)
    plan = sweep_of(state="drop")
    file = storage.run(RUN).run_json
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": status}))
    apply_keep_rules(plan, storage)
    assert bool(storage.run(RUN).states()) == (status != "finished")
    assert with_weights(storage) == STEPS


def test_a_state_stays_while_a_checkpoint_is_missing(storage: Storage) -> None:
    finished_run(storage)
    shutil.rmtree(storage.run(RUN).checkpoint(14))
    assert apply_keep_rules(sweep_of(state="drop"), storage) == []


# -- faults


OPERATIONS = [(os, "replace"), (os, "rename"), (os, "truncate"), (os, "unlink"), (os, "fsync"), (os, "rmdir"), (os, "mkdir")]


def counted(patch: pytest.MonkeyPatch, kill_at: int, after: bool) -> Callable[[], int]:
    """Raises Killed before or after the `kill_at`-th operation that changes the file system; returns how many there were."""
    done = 0

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done >= kill_at and not after:
                raise Killed
            result = real(*args, **options)
            if done >= kill_at:
                raise Killed
            return result

        return operation

    for module, name in OPERATIONS:
        patch.setattr(module, name, wrapped(getattr(module, name)))
    return lambda: done


@pytest.mark.parametrize("after", [False, True])
def test_killed_between_any_two_operations(after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is always understood, nothing that has to stay goes, and the next time ends as if nothing had happened."""
    plan = sweep_of(checkpoints="best", state="drop")
    undisturbed = Storage(tmp_path / "undisturbed")
    finished_run(undisturbed)
    with monkeypatch.context() as patch:
        operations = counted(patch, kill_at=1_000_000, after=after)
        apply_keep_rules(plan, undisturbed)
        total = operations()
    assert total >= 12
    expected = sorted(path.relative_to(undisturbed.root) for path in undisturbed.root.rglob("*"))
    for kill_at in range(1, total + 1):
        storage = Storage(tmp_path / str(kill_at))
        finished_run(storage)
        with monkeypatch.context() as patch:
            counted(patch, kill_at, after)
            with pytest.raises(Killed):
                apply_keep_rules(plan, storage)
        folder = storage.run(RUN)
        assert run_status(plan.runs[0], storage) == "finished" and folder.committed_steps() == STEPS
        for step in STEPS:
            verify_what_is_left(folder.checkpoint(step))
            if not folder.is_removed(step):
                verify(folder.checkpoint(step))
        assert {14, 28} <= set(with_weights(storage))
        assert all((path / STATE_TENSORS).is_file() and (path / STATE_JSON).is_file() for path in folder.states().values())
        apply_keep_rules(plan, storage)
        left = sorted(path.relative_to(storage.root) for path in storage.root.rglob("*") if not path.name.startswith(f".{REMOVED}."))
        assert left == expected, kill_at


def test_a_full_disk_is_relieved_and_the_record_written_later(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    finished_run(storage)
    plan, folder = sweep_of(checkpoints="last"), storage.run(RUN)
    before = sum(file.stat().st_size for file in folder.checkpoint(7).iterdir())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(retention, "write_json", full)
        apply_keep_rules(plan, storage)
        assert folder.is_removed(7) and sum(file.stat().st_size for file in folder.checkpoint(7).iterdir()) < before / 2
    apply_keep_rules(plan, storage)
    assert {path.name for path in folder.checkpoint(7).iterdir()} == {ADAPTER_CONFIG, CHECKSUMS, REMOVED}
    assert with_weights(storage) == [28]


REMOVE = """
import sys
from pathlib import Path
from jmedlora.plan.layout import Storage
from jmedlora.plan.retention import apply_keep_rules
from jmedlora.plan.writing import read_plan
storage = Storage(Path(sys.argv[1]))
plan = read_plan(storage, "mine")
print("begins", flush=True)
apply_keep_rules(plan, storage)
"""


def test_killed_for_real_in_the_middle(storage: Storage) -> None:
    runs = [run_spec(f"run{number:09d}", epochs=4) for number in range(100)]
    plan = sweep_of(checkpoints="last").model_copy(update={"runs": runs, "evaluations": []})
    store(plan, storage)
    for run in runs:
        for step in STEPS:
            write_checkpoint(storage, run.run_key, step)
    process = subprocess.Popen(
        [sys.executable, "-c", REMOVE, str(storage.root)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None and process.stdout.readline() == "begins\n"
    while not storage.run(runs[5].run_key).is_removed(7):
        assert process.poll() is None
    process.kill()
    process.wait()
    removed = [storage.run(run.run_key).removed_steps() for run in runs]
    assert 15 < sum(map(len, removed)) < 300
    for run, steps in zip(runs, removed, strict=True):
        folder = storage.run(run.run_key)
        assert folder.committed_steps() == STEPS and 28 not in steps
        for step in STEPS:
            (verify_what_is_left if step in steps else verify)(folder.checkpoint(step))
    apply_keep_rules(plan, storage)  # the lock went with the process
    assert all(storage.run(run.run_key).removed_steps() == STEPS[:-1] for run in runs)
    names = {path.name for path in (storage.root / "runs").rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert names == {ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHECKSUMS, REMOVED}


def test_no_plan_is_written_while_something_is_removed(storage: Storage) -> None:
    config, plan = open_sweep("smoke", [f"storage={storage.root}"])
    writer = threading.Thread(target=write_plan, args=(config, plan, storage))
    with plans_lock(storage):
        writer.start()
        writer.join(0.5)
        assert read_plan(storage, plan.sweep) is None
    writer.join(30)
    assert read_plan(storage, plan.sweep) == plan


# -- what is asked again


@pytest.fixture
def asked_again(storage: Storage) -> tuple[Plan, Storage]:
    """A sweep that has got one evaluation more since its rule left the last checkpoint alone."""
    finished_run(storage)
    for evaluation in (evaluation_spec(0), evaluation_spec(1)):
        write_evaluation(storage, base_spec().run_key, 0, evaluation, 0.1)
    apply_keep_rules(sweep_of(checkpoints="last"), storage)
    assert standing(sweep_of(), storage).is_complete
    return sweep_of(evaluations=[evaluation_spec(0), evaluation_spec(1), evaluation_spec(2)], checkpoints="last"), storage


def test_a_removed_checkpoint_that_is_asked_again_is_told(asked_again: tuple[Plan, Storage]) -> None:
    plan, storage = asked_again
    assert removed_but_asked(plan, storage) == {RUN: [7, 14, 21]}
    assert notes_on_keeping(plan, storage)[-1] == (
        "3 checkpoints were removed by a keep rule and not evaluated on everything that is asked now: their run is trained again"
    )
    state = standing(plan, storage)
    assert state.runs["waiting"] == [RUN] and not state.is_complete
    assert (state.checkpoints, state.checkpoints_removed) == (4, 3)
    assert json.loads(state.as_json())["checkpoints_removed"] == 3
    before = sweep_of(checkpoints="last")
    assert removed_but_asked(before, storage) == {}
    assert notes_on_keeping(before, storage) == ["checkpoints whose weights are kept once all is evaluated: last"]


def test_the_run_of_a_removed_checkpoint_that_is_asked_again_waits_for_training(asked_again: tuple[Plan, Storage]) -> None:
    plan, storage = asked_again
    run: RunSpec = plan.runs[0]
    assert forget_removed(sweep_of(), storage) == [] and run_status(run, storage) == "finished"
    write_score(storage, 7, evaluation_spec(2))
    assert forget_removed(plan, storage) == [RUN]
    assert run_status(run, storage) == "waiting"
    assert storage.run(RUN).committed_steps() == [7, 28]  # of 7 there is nothing to ask any more
    assert forget_removed(plan, storage) == []


# -- configuration


def test_keep_rules_change_no_identity() -> None:
    def keys(*overrides: str) -> tuple[list[str], list[str], list[str]]:
        _, plan = open_sweep("smoke", list(overrides))
        return (
            [run.run_key for run in plan.runs],
            [run.trajectory_key for run in plan.runs],
            [evaluation.evaluation_key for evaluation in plan.evaluations],
        )

    rules = ["keep.checkpoints=best", "keep.by={metric: gestalt_score, shots: 1}", "keep.state=drop"]
    assert keys(*rules) == keys()
    assert keys("training.seed=1", *rules) != keys()


def test_what_best_means_is_resolved_from_what_the_sweep_asks() -> None:
    config, plan = open_sweep("smoke", ["keep.checkpoints=best"])
    assert plan.keep == KeepRule(checkpoints="best", evaluation=plan.evaluations[0].folder)
    _, plan = open_sweep("smoke", ["keep.checkpoints=best", "keep.by={metric: exact_match, shots: 1}"])
    assert (plan.keep.metric, plan.keep.evaluation) == ("exact_match", plan.evaluations[1].folder)
    assert plan.evaluations[1].shots == 1
    assert make_plan(config).keep.removes_nothing is False
    assert open_sweep("smoke")[1].keep.removes_nothing
    with pytest.raises(BadInput) as caught:
        open_sweep("smoke", ["keep.checkpoints=0", "keep.by={shots: 7, benchmark: x}"])
    assert [str(fault).removeprefix("command line: ") for fault in caught.value.faults] == [
        "keep.checkpoints: 0 is not allowed; allowed: 'all', 'last' or 'best' or at least 1"
    ]
    with pytest.raises(BadInput) as caught:
        open_sweep("smoke", ["keep.by={shots: 7, benchmark: x}"])
    assert [str(fault).removeprefix("command line: ") for fault in caught.value.faults] == [
        "keep.by.benchmark: 'x' is not among the sweep's; allowed: one of sample",
        "keep.by.shots: 7 is not among the sweep's; allowed: one of 0, 1",
    ]


# -- while a sweep runs


def test_the_rule_is_applied_while_a_sweep_runs_and_at_its_end(storage: Storage) -> None:
    finished_run(storage)
    last = storage.run(RUN).evaluation(evaluation_spec(1).folder, 21)
    (last / METRICS).rename(last / "aside")
    with KeepingToRule(sweep_of(checkpoints="last"), storage, every_s=0.01) as keeping:
        deadline = time.monotonic() + 60
        while with_weights(storage) != [21, 28]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (last / "aside").rename(last / METRICS)
    assert with_weights(storage) == [28]
    assert sorted(each.step for each in keeping.removed) == [7, 14, 21]
    assert told(keeping.removed) == "keep rule: weights of 3 checkpoints and 0 states removed, 0.0 MB"


def test_a_rule_that_a_complete_sweep_is_given_is_stored_and_applied(storage: Storage) -> None:
    config, plan = open_sweep("smoke", [f"storage={storage.root}", "evaluate.every=1"])
    write_plan(config, plan, storage)
    run = plan.runs[0]
    folder = storage.run(run.run_key)
    for step in run.checkpoint_steps:
        write_checkpoint(storage, run.run_key, step)
        for evaluation in plan.evaluations:
            write_evaluation(storage, run.run_key, step, evaluation, 0.5)
    before = {path: path.stat().st_mtime_ns for path in storage.root.rglob("*")}
    assert settle_rule(config, plan, storage) == []
    assert {path: path.stat().st_mtime_ns for path in storage.root.rglob("*")} == before
    config, ruled = open_sweep("smoke", [f"storage={storage.root}", "evaluate.every=1", "keep.checkpoints=2"])
    removed = settle_rule(config, ruled, storage)
    assert [each.step for each in removed] == run.checkpoint_steps[:-2] == folder.removed_steps()
    assert read_plan(storage, "smoke") == ruled
    with driver_lock(storage.sweep("smoke")), pytest.raises(HeldByAnother):
        settle_rule(config, ruled, storage)
