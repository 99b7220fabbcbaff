"""Evaluations that are killed go on from where they were, and come to the same results."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jmedlora.config.benchmark import ScoringWay
from jmedlora.evaluation import generation, journal, likelihood
from jmedlora.evaluation.evaluator import Evaluator
from jmedlora.evaluation.generation import EncodedPrompts
from jmedlora.evaluation.journal import Journal, journal_progress
from jmedlora.evaluation.reuse import adopt_evaluation
from jmedlora.plan.layout import METRICS, PREDICTIONS, Storage
from jmedlora.plan.records import read_predictions
from jmedlora.plan.specs import EvaluationSpec
from tests.integration.processes import ROOT
from tests.integration.test_evaluator import BENCHMARK, RUN, Case, evaluation
from tests.tiny import tiny_model

STEP = 100
QUESTIONS = 14
WORKER = ROOT / "tests/integration/evaluation_worker.py"
WAYS: tuple[ScoringWay, ...] = ("generate", "loglikelihood")


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """One resident base and storage with an adapter, in which nothing is evaluated."""
    folder = tmp_path_factory.mktemp("journal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMEDLORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        model = tiny_model("llama")
        case = Case("llama", "fp32", model, Evaluator(model, "fp32", "fp32", True, folder, True, "cpu"), Storage(folder / "first"), folder)
        case.write_adapter(STEP, 6.0)
        yield case


@pytest.fixture
def case(resident: Case, tmp_path: Path) -> Case:
    """The same, with storage of its own."""
    return elsewhere(resident, tmp_path / "results")


def elsewhere(case: Case, root: Path) -> Case:
    """The same model and adapter in other storage, in which nothing is evaluated."""
    storage = Storage(root)
    shutil.copytree(case.storage.run(RUN).checkpoints, storage.run(RUN).checkpoints)
    return Case(case.family, case.precision, case.model, case.evaluator, storage, case.sources)


@pytest.fixture(autouse=True)
def every_batch_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "WRITE_EVERY_S", 0)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of prompts of all batches that are computed."""
    sizes: list[int] = []

    def counted(compute: Callable[..., Any], prompts: int) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            sizes.append(len(arguments[prompts]))
            return compute(*arguments)

        return count

    monkeypatch.setattr(generation, "_decode_batch", counted(generation._decode_batch, 1))
    monkeypatch.setattr(likelihood, "_weigh_batch", counted(likelihood._weigh_batch, 2))
    return sizes


def asked(scoring: ScoringWay = "generate", questions: int = QUESTIONS, **other: Any) -> EvaluationSpec:
    """One example is shown, so that all prompts begin alike."""
    benchmark = BENCHMARK.model_copy(update={"filters": BENCHMARK.filters.model_copy(update={"first": questions})})
    batch_size = 2 if scoring == "generate" else 10  # a batch of choices holds those of two questions
    fields = {"batch_size": batch_size, **other}
    return evaluation(1, benchmark=benchmark, scoring=scoring, questions=questions, evaluation_key=f"{scoring}-{questions}", **fields)


def evaluate(case: Case, spec: EvaluationSpec, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    return case.evaluator.evaluate(RUN, STEP, spec, case.storage, on_progress)


def progress(case: Case, spec: EvaluationSpec) -> int:
    return journal_progress(case.storage, RUN, STEP, spec)


def files(case: Case, spec: EvaluationSpec) -> list[Path]:
    """All that lies beside the results."""
    results = case.storage.run(RUN).evaluation(spec.folder, STEP)
    return sorted(path for path in results.parent.iterdir() if path != results)


class Interrupted(BaseException):
    pass


def interrupt(case: Case, spec: EvaluationSpec, after: int) -> None:
    """Begins, or goes on, and breaks off once `after` questions are answered."""

    def stop(done: int, total: int) -> None:
        if done >= after:
            raise Interrupted

    with pytest.raises(Interrupted):
        evaluate(case, spec, stop)


def results_of(case: Case, spec: EvaluationSpec) -> tuple[bytes, dict[str, Any]]:
    """Predictions, and the metrics but for times."""
    folder = case.storage.run(RUN).evaluation(spec.folder, STEP)
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    return (folder / PREDICTIONS).read_bytes(), {key: value for key, value in metrics.items() if key not in ("seconds", "time")}


def undisturbed(case: Case, spec: EvaluationSpec) -> tuple[bytes, dict[str, Any]]:
    """The results of an evaluation in one go; what there is of it now stays."""
    apart = elsewhere(case, Path(tempfile.mkdtemp(dir=case.storage.root)))
    evaluate(apart, spec)
    return results_of(apart, spec)


def start_worker(case: Case, spec: EvaluationSpec, *before: str, pause_s: float = 0.0, fills_the_disk: bool = False) -> subprocess.Popen:
    order = {
        "work": str(case.sources), "results": str(case.storage.root), "model": case.model.model_dump(mode="json"), "run_key": RUN,
        "step": STEP, "evaluation": spec.model_dump(mode="json"), "threads": torch.get_num_threads(), "pause_s": pause_s,
        "fills_the_disk": fills_the_disk,
    }  # fmt: skip
    command = [*before, sys.executable, str(WORKER), json.dumps(order)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("scoring", WAYS)
def test_killed_in_mid_decode_and_begun_again(case: Case, batches: list[int], scoring: ScoringWay) -> None:
    spec = asked(scoring)
    worker = start_worker(case, spec, pause_s=0.05 if scoring == "generate" else 0.2)
    try:
        while progress(case, spec) < 4:
            assert worker.poll() is None, worker.communicate()
            time.sleep(0.02)
    finally:
        worker.kill()
        worker.communicate()
    kept = progress(case, spec)
    assert 4 <= kept < QUESTIONS
    assert not case.storage.run(RUN).is_evaluated(spec.folder, STEP)
    evaluate(case, spec)
    assert sum(batches) == QUESTIONS - kept
    assert files(case, spec) == []
    assert results_of(case, spec) == undisturbed(case, spec)


@pytest.mark.parametrize("scoring", WAYS)
def test_broken_off_after_each_batch(case: Case, batches: list[int], scoring: ScoringWay) -> None:
    spec = asked(scoring)
    expected = undisturbed(case, spec)
    in_one_go = batches.copy()
    assert len(in_one_go) >= 6
    batches.clear()
    for done in range(len(in_one_go)):
        interrupt(case, spec, sum(in_one_go[: done + 1]))
        assert progress(case, spec) == sum(in_one_go[: done + 1])
    told: list[tuple[int, int]] = []
    metrics = evaluate(case, spec, lambda *numbers: told.append(numbers))
    assert batches == in_one_go, "every batch is computed once, and is the batch that it would have been"
    assert told == [(QUESTIONS, QUESTIONS)]
    assert results_of(case, spec) == expected
    assert files(case, spec) == []
    assert metrics["new_tokens"] > QUESTIONS


def test_seconds_are_those_of_all_starts(case: Case) -> None:
    spec = asked()
    interrupt(case, spec, 6)
    [file] = files(case, spec)
    head, *lines = file.read_text(encoding="utf-8").splitlines()
    edit(file, [head, *(with_content(line, seconds=1000.0) for line in lines)])
    assert 3000 < evaluate(case, spec)["seconds"] < 4000


def test_what_was_answered_within_a_moment_is_written_when_the_evaluation_is_broken_off(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "WRITE_EVERY_S", 1000)
    spec = asked()
    interrupt(case, spec, 6)
    assert progress(case, spec) == 6
    expected = undisturbed(case, spec)
    evaluate(case, spec, lambda done, total: None if done == total else files(case, spec)[0].stat())
    assert results_of(case, spec) == expected


# ---------------------------------------------------------------- damaged and foreign journals


def edit(file: Path, lines: list[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def with_content(line: str, **changes: Any) -> str:
    content = json.loads(line)["content"] | changes
    return journal._line(content).decode().rstrip()


def flip(line: str) -> str:
    """Another digit in the first answer, with the checksum of before."""
    place = line.index('"answers": [[') + len('"answers": [[')
    return line[:place] + str((int(line[place]) + 1) % 10) + line[place + 1 :]


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda lines: [*lines[:-1], lines[-1][:-9]], 4),
        (lambda lines: [*lines[:2], flip(lines[2]), lines[3]], 2),
        (lambda lines: [*lines[:2], "\x00" * 40, lines[3]], 2),
        (lambda lines: [*lines[:3], "[]"], 4),
        (lambda lines: [*lines[:3], lines[3] + " "], 4),
        (lambda lines: lines[1:], 0),
        (lambda lines: [], 0),
    ],
    ids=["truncated", "flipped", "zeros", "other JSON", "longer", "without a beginning", "empty"],
)
def test_a_damaged_line_and_what_follows_it_is_answered_again(
    case: Case, batches: list[int], damage: Callable[[list[str]], list[str]], kept: int
) -> None:
    spec = asked()
    interrupt(case, spec, 6)
    [file] = files(case, spec)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4, "what is asked, and three batches"
    edit(file, damage(lines))
    batches.clear()
    evaluate(case, spec)
    assert sum(batches) == QUESTIONS - kept
    assert results_of(case, spec) == undisturbed(case, spec)
    assert files(case, spec) == []


def poison(case: Case, spec: EvaluationSpec) -> None:
    """Puts `HH` in place of every answer that is kept, with the right checksums."""
    [file] = files(case, spec)
    head, *lines = file.read_text(encoding="utf-8").splitlines()
    edit(file, [head, *(with_content(line, answers=[[39, 39] for _ in json.loads(line)["content"]["rows"]]) for line in lines)])


def test_only_answers_to_the_very_same_are_taken(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = asked()
    interrupt(case, spec, 6)
    poison(case, spec)
    interrupt(case, spec, 8)
    evaluate(case, spec)
    assert sum(row["prediction"] == "HH" for row in case.predictions(STEP, spec)) == 6, "what is asked is the same: they are taken"

    other = asked(batch_size=3)
    interrupt(case, spec, 6)
    poison(case, spec)
    interrupt(case, other, 3)
    assert 3 <= progress(case, other) <= 4, "the six are gone"
    evaluate(case, other)
    assert results_of(case, other) == undisturbed(case, other)

    task = case.evaluator._tasks[spec.evaluation_key]
    longer = replace(task, prompts=EncodedPrompts([[*ids, 39] for ids in task.prompts.token_ids], 0))
    interrupt(case, spec, 6)
    poison(case, spec)
    with monkeypatch.context() as patch:
        patch.setitem(case.evaluator._tasks, spec.evaluation_key, longer)
        evaluate(case, spec)
    assert b'"HH"' not in results_of(case, spec)[0], "other prompts"

    facts = case.evaluator._base_facts
    for changed in (
        {"device": "NVIDIA H100"},
        {"precision": ["nf4", "fp32", True]},
        {"versions": {}},
        {"model": {}},
        {"folder": "x"},
        {"engine": "vllm"},
    ):
        interrupt(case, spec, 6)
        poison(case, spec)
        with monkeypatch.context() as patch:
            patch.setattr(case.evaluator, "_base_facts", {**facts, **changed})
            evaluate(case, spec)
        assert b'"HH"' not in results_of(case, spec)[0], changed


def test_another_adapter_under_the_same_name(case: Case) -> None:
    spec = asked()
    interrupt(case, spec, 6)
    case.write_adapter(STEP, 3.0)
    expected = undisturbed(case, spec)
    evaluate(case, spec)
    assert results_of(case, spec) == expected


# ---------------------------------------------------------------- two at once, results from elsewhere


def test_one_that_was_taken_for_dead_does_no_harm(case: Case) -> None:
    spec = asked()
    place = (case.storage, RUN, STEP, spec, {"adapter": None}, time.perf_counter())
    zombie = Journal(*place)
    zombie.add({0: [1], 1: [2]})
    successor = Journal(*place)
    assert successor.answers == {0: [1], 1: [2]}
    successor.add({2: [3]})
    zombie.add({3: [4]})
    assert len(files(case, spec)) == 2, "each writes a file of its own"
    assert progress(case, spec) == 4
    with Journal(*place) as last:
        assert last.answers == {0: [1], 1: [2], 2: [3], 3: [4]}
        last.add({4: [5]})
        zombie.add({2: [3]})
    assert files(case, spec) == []
    zombie.add({5: [6]})
    zombie.__exit__(Interrupted, Interrupted(), None)
    successor.__exit__(None, None, None)
    assert files(case, spec) == [], "what the others are done with does not come back"


def test_results_from_elsewhere_end_the_journal_too(case: Case) -> None:
    spec = asked()
    evaluate(case, spec)
    Journal(case.storage, RUN, 200, spec, {}, time.perf_counter()).add({0: [1]})
    assert len(files(case, spec)) == 1
    adopt_evaluation(case.storage, spec, (RUN, STEP), (RUN, 200))
    assert files(case, spec) == [case.storage.run(RUN).evaluation(spec.folder, 200)]


# ---------------------------------------------------------------- no room on disk or in memory


def test_a_full_disk_stops_the_journal_and_not_the_evaluation(case: Case, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    spec, disk = asked(), tmp_path / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=256k none "$0" && cp -r "$1"/. "$0" && kept="$1" && shift && "$@" && cp -r "$0"/. "$kept"'
    small = Case(case.family, case.precision, case.model, case.evaluator, Storage(disk), case.sources)
    worker = start_worker(small, spec, "unshare", "-rm", "sh", "-c", script, str(disk), str(case.storage.root), fills_the_disk=True)
    out, told = worker.communicate(timeout=200)
    assert worker.returncode == 0, told
    assert results_of(case, spec) == undisturbed(case, spec)
    assert out == f"OSError {errno.ENOSPC}\n", "results that cannot be written are an error"
    assert told.count("No space left on device; what is answered") == 2, "once for each of the two evaluations"


def out_of_memory_above(model: torch.nn.Module, rows: int) -> torch.utils.hooks.RemovableHandle:
    """Makes every forward pass of more rows fail as a GPU would."""

    def refuse(_: torch.nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        if len(keywords["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return model.register_forward_pre_hook(refuse, with_kwargs=True)


@pytest.mark.parametrize(("scoring", "rows", "used"), [("generate", 3, 2), ("loglikelihood", 11, 10)])
def test_out_of_memory_halves_the_batch_and_that_is_told_and_kept(
    case: Case, batches: list[int], scoring: ScoringWay, rows: int, used: int
) -> None:
    spec = asked(scoring, questions=12, batch_size=8 if scoring == "generate" else 40)
    plain, _ = undisturbed(case, spec)
    batches.clear()
    hook = out_of_memory_above(case.evaluator._base, rows)
    try:
        interrupt(case, spec, 4)
        assert batches[-2:] == [2, 2] and max(batches[:-2]) > 2
        batches.clear()
        metrics = evaluate(case, spec)
    finally:
        hook.remove()
    assert set(batches) == {2}, "a restart knows how much fits"
    assert metrics["batch_size"] == used
    rows_of = [[json.loads(line) for line in text.splitlines()] for text in (plain, results_of(case, spec)[0])]
    assert [row["prediction"] for row in rows_of[1]] == [row["prediction"] for row in rows_of[0]]
    for before, after in zip(*rows_of, strict=True):
        assert after.get("loglikelihoods", []) == pytest.approx(before.get("loglikelihoods", []), abs=1e-4)
        assert after["chosen"] == before["chosen"]


def test_out_of_memory_with_a_single_question_is_an_error_and_keeps_what_there_is(case: Case) -> None:
    spec = asked()
    interrupt(case, spec, 4)
    hook = out_of_memory_above(case.evaluator._base, 0)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            evaluate(case, spec)
    finally:
        hook.remove()
    assert progress(case, spec) == 4
    evaluate(case, spec)
    assert results_of(case, spec) == undisturbed(case, spec)


@pytest.mark.gpu
def test_a_gpu_without_room_for_the_batch(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.setenv("JMEDLORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    shape = tiny_model("llama").architecture
    assert shape is not None
    wide = shape.model_copy(update={"hidden_size": 1024, "intermediate_size": 8192, "heads": 16, "kv_heads": 16, "layers": 4})
    model = tiny_model("llama").model_copy(update={"name": "wide", "architecture": wide})
    evaluator, storage = Evaluator(model, "fp32", "fp32", True, tmp_path, True, "cuda"), Storage(tmp_path / "results")
    for scoring, batch_size in (("generate", 32), ("loglikelihood", 160)):
        spec = asked(scoring, questions=40, batch_size=batch_size)
        torch.cuda.empty_cache()
        assert evaluator.evaluate(RUN, 0, spec, Storage(tmp_path / "roomy"))["batch_size"] == batch_size
        torch.cuda.empty_cache()
        room = torch.cuda.memory_reserved() + 300 * 2**20
        torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
        try:
            metrics = evaluator.evaluate(RUN, 0, spec, storage)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert 0 < metrics["batch_size"] < batch_size and metrics["n"] == 40
        roomy, narrow = (read_predictions(each, RUN, 0, spec) for each in (Storage(tmp_path / "roomy"), storage))
        for one, other in zip(roomy, narrow, strict=True):
            assert other.get("loglikelihoods", []) == pytest.approx(one.get("loglikelihoods", []), abs=1e-3)
