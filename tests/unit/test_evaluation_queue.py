"""Which evaluation comes next, and which trial is begun again: from storage alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jmedlora.data.atomic import write_json, write_json_lines
from jmedlora.orchestrator.evaluation_lease import EvaluatedElsewhere, evaluation_lease
from jmedlora.orchestrator.evaluation_queue import MAX_ATTEMPTS, EvaluationQueue, job_id
from jmedlora.orchestrator.ledger import Job, all_jobs
from jmedlora.orchestrator.scheduling import Retries, progress_mark, remaining_trials
from jmedlora.plan.checksums import adapter_digest
from jmedlora.plan.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHECKSUMS, METRICS, PREDICTIONS, Storage
from jmedlora.plan.planner import open_sweep
from jmedlora.plan.records import Record
from jmedlora.plan.specs import Plan

SWEEP = """
grid: {model: [tiny-llama], method: [lora], rank: [4], epochs: [1, 2]}
data: sample
benchmarks: [{preset: sample, filters: {first: 4}}]
shots: [0, 1]
prompts: [alpaca-ja]
training: {batch_size: 16, gradient_checkpointing: false}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    file = tmp_path_factory.mktemp("sweep") / "twice.yaml"
    file.write_text(SWEEP, encoding="utf-8")
    return open_sweep(str(file), [])[1]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "results")


def commit(storage: Storage, run_key: str, step: int, weights: str) -> None:
    """A checkpoint as far as the queue looks at it: equal for equal `weights`."""
    folder = storage.run(run_key).checkpoint(step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = {ADAPTER_WEIGHTS: weights.encode(), ADAPTER_CONFIG: b"{}"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    facts = {name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)} for name, content in files.items()}
    write_json(folder / CHECKSUMS, {"files": facts})


def score(storage: Storage, job: Job) -> Record:
    """The results of an evaluation."""
    run = storage.run(job.run_key)
    digest = adapter_digest(run.checkpoint(job.step)) if job.step else None
    scores = dict.fromkeys(("n", "accuracy", "exact_match", "gestalt_score", "seconds", "time"), 1.0)
    metrics = {**scores, "adapter_digest": digest, "run_key": job.run_key, "step": job.step}
    folder = run.evaluation(job.evaluation.folder, job.step)
    write_json_lines(folder / PREDICTIONS, [{"problem_id": "1"}])
    write_json(folder / METRICS, metrics)
    return metrics


def looked(plan: Plan, storage: Storage) -> EvaluationQueue:
    queue = EvaluationQueue(all_jobs(plan), storage)
    queue.look()
    return queue


def take(queue: EvaluationQueue, resident: str = "", last_run: str = "") -> Job:
    [job] = queue.take(resident, last_run, behind_address=False)
    return job


def do_bases(queue: EvaluationQueue, storage: Storage) -> None:
    for _ in range(2):
        job = take(queue)
        assert job.step == 0
        queue.finished(job, score(storage, job))


def test_bases_are_ready_at_once_and_checkpoints_once_they_are_committed(plan: Plan, storage: Storage) -> None:
    queue = looked(plan, storage)
    do_bases(queue, storage)
    assert not queue.has_ready
    run = plan.runs[0]
    storage.run(run.run_key).checkpoint(4).mkdir(parents=True)  # without checksums: not committed
    queue.look()
    assert not queue.has_ready
    commit(storage, run.run_key, 4, "a")
    queue.look()
    jobs = [take(queue), take(queue)]
    assert [(job.run_key, job.step) for job in jobs] == [(run.run_key, 4)] * 2
    assert queue.take("", "", behind_address=False) == []
    assert queue.take("", "", behind_address=True) == []


def test_a_slot_keeps_its_base_and_its_run(plan: Plan, storage: Storage) -> None:
    queue = looked(plan, storage)
    do_bases(queue, storage)
    first, second = plan.runs
    for run in (first, second):
        commit(storage, run.run_key, 4, run.run_key)
    queue.look()
    assert take(queue, last_run=second.run_key).run_key == second.run_key
    assert take(queue, last_run=second.run_key).run_key == second.run_key
    assert take(queue, last_run=second.run_key).run_key == first.run_key


def test_equal_adapters_are_scored_once(plan: Plan, storage: Storage) -> None:
    queue = looked(plan, storage)
    do_bases(queue, storage)
    first, second = plan.runs
    for run in plan.runs:
        commit(storage, run.run_key, 4, "equal")
    queue.look()
    jobs = [take(queue), take(queue)]
    assert {job.run_key for job in jobs} == {first.run_key}
    assert not queue.has_ready  # the second run's wait for the result
    for job in jobs:
        queue.finished(job, score(storage, job))
    settled = queue.settled()
    assert [metrics["computed_for"]["run_key"] for metrics in settled] == [first.run_key] * 2
    assert all(storage.run(second.run_key).is_evaluated(item.folder, 4) for item in plan.evaluations)
    assert queue.settled() == []
    shutil.rmtree(storage.run(second.run_key).path / "evaluations")
    assert len(looked(plan, storage).settled()) == 2  # a later start knows the results too


def test_results_of_an_adapter_that_was_another_are_not_copied(plan: Plan, storage: Storage) -> None:
    first, second = plan.runs
    commit(storage, first.run_key, 4, "old")
    queue = looked(plan, storage)
    do_bases(queue, storage)
    for _ in plan.evaluations:
        job = take(queue)
        queue.finished(job, score(storage, job))
    commit(storage, first.run_key, 4, "new")  # its run has started over
    commit(storage, second.run_key, 4, "new")
    queue.look()
    assert take(queue).run_key == second.run_key
    assert take(looked(plan, storage)).run_key == second.run_key


def test_the_next_of_equal_ones_is_tried_where_the_first_fails(plan: Plan, storage: Storage) -> None:
    first, second = plan.runs
    for run in plan.runs:
        commit(storage, run.run_key, 4, "equal")
    queue = looked(plan, storage)
    do_bases(queue, storage)
    job = take(queue)
    assert job.run_key == first.run_key
    queue.failed(job, "ValueError: no")
    assert queue.failures == {job_id(job): "ValueError: no"}
    assert (again := take(queue, last_run=second.run_key)).run_key == second.run_key
    assert again.evaluation == job.evaluation


def test_deaths_count_only_where_nothing_was_gained(plan: Plan, storage: Storage) -> None:
    job = all_jobs(plan)[0]
    queue = EvaluationQueue([job], storage)
    queue.look()
    for progress in (3, 3, 5, 5, 9, 9):  # every second death is one after progress
        queue.died(take(queue), "killed", progress)
    assert queue.failures == {}
    queue.died(take(queue), "killed", 9)
    assert queue.failures == {job_id(job): f"given up after {MAX_ATTEMPTS} attempts: killed"}


def test_an_actor_that_dies_after_the_results_are_stored_has_done_its_work(plan: Plan, storage: Storage) -> None:
    queue = looked(plan, storage)
    job = take(queue)
    score(storage, job)
    queue.died(job, "killed", 0)
    assert [metrics["run_key"] for metrics in queue.settled()] == [job.run_key]
    assert take(queue).evaluation != job.evaluation


def test_a_checkpoint_that_is_taken_back_is_waited_for(plan: Plan, storage: Storage) -> None:
    run = plan.runs[0]
    commit(storage, run.run_key, 4, "a")
    queue = looked(plan, storage)
    do_bases(queue, storage)
    job = take(queue)
    shutil.rmtree(storage.run(run.run_key).checkpoint(4))
    queue.failed(job, "FileNotFoundError: gone")
    assert queue.failures == {}
    assert queue.take("", "", behind_address=False) == []
    commit(storage, run.run_key, 4, "a")
    queue.look()
    assert {take(queue).evaluation.shots, take(queue).evaluation.shots} == {0, 1}


def test_a_damaged_checkpoint_is_set_aside_and_told(plan: Plan, storage: Storage) -> None:
    run = plan.runs[0]
    commit(storage, run.run_key, 4, "a")
    queue = looked(plan, storage)
    do_bases(queue, storage)
    job = take(queue)
    queue.damaged(job, "AdapterDamaged: x")
    assert queue.failures == {}  # it was being written anew
    job = take(queue)
    (storage.run(run.run_key).checkpoint(4) / ADAPTER_WEIGHTS).write_bytes(b"b")
    queue.damaged(job, "AdapterDamaged: x")
    assert queue.failures == {job_id(job): "AdapterDamaged: x; it is set aside, and the next start of the sweep makes it again"}
    assert not storage.run(run.run_key).is_committed(4)
    assert queue.take("", "", behind_address=False) == []  # what else is asked of it waits for the new one


def test_no_result_is_copied_to_a_damaged_checkpoint(plan: Plan, storage: Storage) -> None:
    first, second = plan.runs
    for run in plan.runs:
        commit(storage, run.run_key, 4, "equal")
    (storage.run(second.run_key).checkpoint(4) / ADAPTER_WEIGHTS).write_bytes(b"other")
    queue = looked(plan, storage)
    do_bases(queue, storage)
    for _ in plan.evaluations:
        job = take(queue, last_run=first.run_key)
        queue.finished(job, score(storage, job))
    assert queue.settled() == []
    assert take(queue).run_key == second.run_key  # whoever opens it tells what is wrong


def test_unreadable_checksums_stop_nothing_else(plan: Plan, storage: Storage) -> None:
    for run in plan.runs:
        commit(storage, run.run_key, 4, "equal")
        (storage.run(run.run_key).checkpoint(4) / CHECKSUMS).write_text('{"fil')
    queue = looked(plan, storage)
    do_bases(queue, storage)
    assert len({job_id(take(queue)) for _ in range(4)}) == 4  # whoever opens one tells what is wrong; none counts as another's equal


def test_an_evaluation_is_in_one_pair_of_hands(plan: Plan, storage: Storage) -> None:
    queue = looked(plan, storage)
    job = take(queue)
    where = (storage, job.run_key, job.step, job.evaluation)
    with evaluation_lease(*where):
        with pytest.raises(EvaluatedElsewhere), evaluation_lease(*where):
            pass
        queue.postponed(job)
        assert take(queue).evaluation != job.evaluation
        queue.look()
        assert take(queue).evaluation == job.evaluation
    with evaluation_lease(*where):
        score(storage, job)
    assert [path.name for path in storage.run(job.run_key).evaluation(job.evaluation.folder, 0).parent.iterdir()] == ["step-000000"]


def take_together(queue: EvaluationQueue, pack: int = 8) -> list[Job]:
    return queue.take("", "", behind_address=False, pack=pack)


def ready(plan: Plan, storage: Storage, steps: tuple[int, ...] = (4,)) -> EvaluationQueue:
    """A queue whose bases are done, with checkpoints of both runs that are all different."""
    for run in plan.runs:
        for step in steps:
            commit(storage, run.run_key, step, f"{run.run_key} {step}")
    queue = looked(plan, storage)
    do_bases(queue, storage)
    return queue


def test_several_are_of_one_base_and_one_evaluation(plan: Plan, storage: Storage) -> None:
    queue = looked(plan, storage)
    assert [job.step for job in take_together(queue)] == [0], "a bare base is by itself"
    queue = ready(plan, storage)
    first = take_together(queue)
    assert [job.run_key for job in first] == [run.run_key for run in plan.runs]
    assert len({job.evaluation.evaluation_key for job in first}) == 1
    second = take_together(queue)
    assert [(job.run_key, job.step) for job in second] == [(job.run_key, job.step) for job in first], "what is resident stays"
    assert second[0].evaluation != first[0].evaluation
    assert take_together(queue) == []


def test_no_more_are_taken_than_wished_and_those_of_which_most_are_ready(plan: Plan, storage: Storage) -> None:
    queue = ready(plan, storage)
    [one] = take_together(queue, pack=1)
    [other, another] = take_together(queue)
    assert other.evaluation == another.evaluation != one.evaluation
    [rest] = take_together(queue)
    assert rest.evaluation == one.evaluation and rest.run_key != one.run_key


def test_each_of_several_has_an_end_of_its_own(plan: Plan, storage: Storage) -> None:
    queue = ready(plan, storage)
    done, failed = take_together(queue)
    queue.finished(done, score(storage, done))
    queue.failed(failed, "ValueError: no")
    assert queue.failures == {job_id(failed): "ValueError: no"}
    again = take_together(queue)
    assert len(again) == 2 and again[0].evaluation != done.evaluation


def test_what_dies_again_in_company_is_tried_by_itself(plan: Plan, storage: Storage) -> None:
    queue = ready(plan, storage)
    together = take_together(queue)
    for _ in range(2):
        for job in together:
            queue.died(job, "killed", 0, in_company=True)
        both = {job_id(job) for job in together}
        together = next(jobs for jobs in iter(lambda: take_together(queue), []) if job_id(jobs[0]) in both)
    [guilty] = together
    for attempt in range(MAX_ATTEMPTS):
        assert queue.failures == {}, f"attempt {attempt} of its own"
        queue.died(guilty, "killed", 0)
        [innocent] = take_together(queue)
        if attempt < MAX_ATTEMPTS - 1:
            queue.died(innocent, "killed", attempt + 1)  # gets further each time
            [guilty] = take_together(queue)
    assert queue.failures == {job_id(guilty): f"given up after {MAX_ATTEMPTS} attempts: killed"}
    assert job_id(innocent) in both - {job_id(guilty)}


def test_what_cannot_be_done_at_once_is_done_one_by_one(plan: Plan, storage: Storage) -> None:
    queue = ready(plan, storage)
    together = take_together(queue)
    queue.apart(together)
    assert sorted(len(take_together(queue)) for _ in range(3)) == [1, 1, 2]
    assert queue.failures == {}


def test_what_another_sweep_has_done_is_taken_over(plan: Plan, storage: Storage) -> None:
    queue = looked(plan, storage)
    job = take(queue)
    queue.postponed(job)
    score(storage, job)
    queue.look()
    assert [metrics["run_key"] for metrics in queue.settled()] == [job.run_key]
    assert job_id(take(queue)) != job_id(job)


def test_a_full_disk_or_a_damaged_record_is_told(plan: Plan, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in plan.runs:
        commit(storage, run.run_key, 4, "equal")
    queue = looked(plan, storage)
    do_bases(queue, storage)
    job = take(queue)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    metrics = score(storage, job)
    monkeypatch.setattr("jmedlora.orchestrator.evaluation_queue.adopt_evaluation", full)
    queue.finished(job, metrics)
    assert list(queue.failures.values()) == ["OSError: [Errno 28] No space left on device"]


def test_a_look_costs_as_much_as_there_are_running_runs(plan: Plan, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"{number:012x}" for number in range(500)]
    many = [Job(key, step, evaluation, plan.bases[0]) for key in keys for step in range(1, 11) for evaluation in plan.evaluations]
    for number in range(3):
        for step in range(1, 6):
            commit(storage, f"{number:012x}", step, f"{number} {step}")
    queue = EvaluationQueue(many, storage)
    queue.look()
    calls: list[str] = []
    for name in ("stat", "scandir"):
        monkeypatch.setattr(os, name, _counted(name, calls))
    queue.look()
    assert 3 < len(calls) < 20
    commit(storage, keys[2], 6, "late")
    queue.look()
    assert any(take(queue, last_run=keys[2]).step == 6 for _ in range(6 * len(plan.evaluations)))


def _counted(name: str, calls: list[str]) -> Callable[..., object]:
    real: Callable[..., object] = getattr(os, name)

    def counted(*arguments: object, **named: object) -> object:
        calls.append(name)
        return real(*arguments, **named)

    return counted


def test_progress_is_what_a_restart_finds(plan: Plan, storage: Storage) -> None:
    apart = [plan.trials[0].model_copy(update={"runs": [run]}) for run in plan.runs]
    plan = plan.model_copy(update={"trials": apart})
    trial, run = plan.trials[1], plan.runs[1]
    folder = storage.run(run.run_key)
    marks = [progress_mark(trial, storage)]
    commit(storage, run.run_key, 4, "a")
    marks.append(progress_mark(trial, storage))
    folder.state(4).mkdir(parents=True)
    marks.append(progress_mark(trial, storage))
    commit(storage, run.run_key, 8, "b")
    folder.run_json.write_text(json.dumps({"status": "finished"}))
    marks.append(progress_mark(trial, storage))
    assert marks == sorted(marks)
    assert len(set(marks)) == 4
    assert remaining_trials(plan, storage) == [plan.trials[0]]
    folder.run_json.write_text(json.dumps({"status": "failed"}))
    assert remaining_trials(plan, storage) == plan.trials


def test_a_group_is_begun_again_as_long_as_it_gets_further() -> None:
    retries = Retries(1, ((0, 0),))
    assert [retries.allows(((step, 0),)) for step in (0, 3, 3, 6, 9, 9)] == [True] * 6
    assert not retries.allows(((9, 0),))
    retries = Retries(1, ((9, 2), (0, 0)))
    assert retries.allows(((5, 1), (0, 0)))  # a damaged state: further back than before
    assert not retries.allows(((9, 2), (0, 0)))  # and again where it was
    assert retries.allows(((2, 2), (1, 0)))  # the other run got further
    assert not Retries(0, ((0, 0),)).allows(((0, 0),))
