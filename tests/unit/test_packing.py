"""Which runs train together: trajectories, packs, trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jmedlora.config.parts import Architecture, EvaluationResources, ResourcesConfig
from jmedlora.plan.packing import Trajectory, evaluated_together, make_trials, notes_on_sharing, packed_seconds, trajectories_of
from jmedlora.plan.specs import RunSpec, TrialSpec
from tests import made_up
from tests.tiny import run_spec, write_rows

GPUS = ResourcesConfig(gpus_per_worker=1, max_gpus=4, evaluation=EvaluationResources(gpus=0))
TINY = {"tiny-llama": Architecture(layers=2, hidden_size=32, intermediate_size=40, heads=4, kv_heads=2, vocabulary=272, max_positions=256)}
LARGE = {
    "tiny-llama": Architecture(
        layers=80, hidden_size=8192, intermediate_size=28672, heads=64, kv_heads=8, vocabulary=32000, max_positions=4096
    )
}


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"))


def one_core(**chosen: Any) -> ResourcesConfig:
    """Machines on which one trial runs at a time."""
    return ResourcesConfig(max_concurrent_trials=1, **chosen)


def large(run: RunSpec, parameters: int = 70_000_000_000) -> RunSpec:
    """The same over a model whose steps are all arithmetic."""
    return run.model_copy(update={"model_parameters": parameters, "row_characters": 1000.0})


def trained(trials: list[TrialSpec]) -> list[str]:
    return sorted(run.run_key for trial in trials for run in trial.runs)


def test_runs_that_differ_in_duration_alone_are_one_trajectory(data_file: Path) -> None:
    durations = [run_spec(data_file, rank=rank, max_steps=steps) for steps in (30, 3, 9) for rank in (4, 8)]
    found = trajectories_of(durations, share_prefixes=True)
    assert [[run.total_steps for run in group] for group in found] == [[3, 9, 30], [3, 9, 30]]
    assert len(trajectories_of(durations, share_prefixes=False)) == 6
    bound = [run_spec(data_file, schedule="cosine", max_steps=steps) for steps in (3, 9)]
    assert len(trajectories_of(bound, share_prefixes=True)) == 2


def test_small_runs_of_one_base_are_one_trial_and_one_pack(data_file: Path) -> None:
    runs = [run_spec(data_file, rank=rank, seed=seed) for rank in (4, 8) for seed in range(3)]
    (trial,) = make_trials(runs, one_core(), TINY, "auto", share_prefixes=True)
    assert (trial.pack, trial.share_prefixes, len(trial.runs)) == (6, True, 6)
    (trial,) = make_trials(runs, one_core(), TINY, 4, share_prefixes=True)
    assert trial.pack == 4
    (trial,) = make_trials(runs, one_core(), TINY, 1, share_prefixes=False)
    assert (trial.pack, trial.share_prefixes) == (1, False)


def test_packs_stop_where_they_do_not_pay(data_file: Path) -> None:
    """A step that is all arithmetic has nothing to share."""
    runs = [large(run_spec(data_file, seed=seed), parameters) for seed in range(6) for parameters in (70_000_000_000,)]
    assert {trial.pack for trial in make_trials(runs, one_core(), LARGE, "auto", share_prefixes=True)} == {1}


def test_packs_stop_where_memory_does(data_file: Path) -> None:
    short = {"compute_precision": "bf16", "precision": "bf16", "row_characters": 8.0}
    runs = [run_spec(data_file, seed=seed).model_copy(update=short) for seed in range(8)]
    packs = [
        max(trial.pack for trial in make_trials(runs, GPUS.model_copy(update={"gpu_memory_gb": size, "max_gpus": 1}), LARGE, "auto", True))
        for size in (80, 160, 320, 1000)
    ]
    assert packs[0] == 1 and packs == sorted(packs) and packs[-1] == 8


def test_what_cannot_train_together_is_kept_apart(data_file: Path) -> None:
    other = run_spec(data_file, targets="all-linear")
    runs = [
        run_spec(data_file), run_spec(data_file, seed=1), other, run_spec(data_file, micro_batch_size=2), run_spec(data_file, zero_stage=2),
        run_spec(data_file, precision="nf4"), run_spec(data_file, gradient_checkpointing=True),
    ]  # fmt: skip
    runs = [run.model_copy(update={"base_key": run.precision}) for run in runs]
    trials = make_trials(runs, one_core(), TINY, "auto", share_prefixes=True)
    assert trained(trials) == sorted(run.run_key for run in runs)
    assert sorted(len(trial.runs) for trial in trials) == [1, 1, 1, 1, 1, 2]


def test_all_gpus_get_work_and_the_longest_begins_first(data_file: Path) -> None:
    runs = [large(run_spec(data_file, seed=seed, max_steps=steps)) for seed, steps in enumerate((9000, 1000, 2000, 3000, 4000, 4000, 1000))]
    trials = make_trials(runs, GPUS, LARGE, "auto", share_prefixes=True)
    assert trained(trials) == sorted(run.run_key for run in runs)
    assert len(trials) >= 4
    work = [sum(run.total_steps for run in trial.runs) for trial in trials]
    assert work == sorted(work, reverse=True)
    assert work[0] == 9000, "nothing is behind the longest"


def test_a_trial_is_worth_its_start(data_file: Path) -> None:
    """Runs of a second on four GPUs: as many trials would take longer than one."""
    runs = [run_spec(data_file, seed=seed) for seed in range(8)]
    assert len(make_trials(runs, GPUS, TINY, "auto", share_prefixes=True)) == 1


def test_a_pack_pays_a_steps_overhead_once() -> None:
    def cost(arithmetic: float, overhead: float) -> Trajectory:
        return Trajectory([], arithmetic, overhead)

    four = [cost(1.0, 10.0)] * 4
    assert packed_seconds(four, 1) == 44
    assert packed_seconds(four, 2) == 24
    assert packed_seconds(four, 4) == 14
    assert packed_seconds([cost(1, 30), cost(1, 5), cost(1, 5)], 3) == 33, "the longest goes on alone"


def test_notes_tell_what_is_shared_and_what_cannot_be(data_file: Path) -> None:
    shared = [run_spec(data_file, max_steps=steps) for steps in (3, 9)]
    assert notes_on_sharing(shared, True) == [
        "1 of 2 runs is the beginning of another and is trained with it (share_prefixes: false trains each by itself)"
    ]
    assert notes_on_sharing(shared, False) == []
    bound = [run_spec(data_file, schedule=schedule, max_steps=steps) for steps in (3, 9) for schedule in ("cosine", "linear")]
    (note,) = notes_on_sharing(bound, True)
    assert "(cosine, linear)" in note and "schedule: constant would share" in note
    assert notes_on_sharing(bound[:2], True) == []


def test_as_many_adapters_are_evaluated_at_once_as_fit(data_file: Path) -> None:
    """Of a shape of 70 B parameters with prompts of some hundred tokens; and as the sweep says, whatever that takes."""
    base = made_up.base_spec()
    plan = made_up.plan_of([base], [made_up.run_spec("run", rank=64)])
    shapes = {base.model.name: LARGE["tiny-llama"]}
    found = [evaluated_together(plan, GPUS.model_copy(update={"gpu_memory_gb": size}), shapes, "auto") for size in (1, 320, 640, 2000)]
    assert found[0] == 1 and found == sorted(found) and found[-1] == 8
    assert evaluated_together(plan, GPUS.model_copy(update={"gpu_memory_gb": 1}), shapes, 3) == 3
    assert evaluated_together(plan, GPUS, {}, "auto") == 8, "nothing is known of the model"
