"""What of a trial is handed to its workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from jmedlora.orchestrator.scheduling import trial_of_what_is_left
from jmedlora.plan.specs import RunSpec
from tests.tiny import run_spec, trial_of, write_rows


@pytest.fixture
def runs(tmp_path: Path) -> list[RunSpec]:
    """One, two and three epochs at one rank, two and three at another."""
    data_file = write_rows(tmp_path)
    return [run_spec(data_file, rank=rank, max_steps=None, epochs=epochs) for rank, epochs in ((4, 1), (4, 2), (4, 3), (8, 2), (8, 3))]


def test_runs_that_are_done_come_along_where_others_may_be_taken_from_them(runs: list[RunSpec]) -> None:
    one, two, three, *others = runs
    trial = trial_of(*runs, pack=2, share_prefixes=True)
    for left in ([one], [three], [one, three]):
        found = trial_of_what_is_left(trial, left, failed=set())
        assert found == trial.model_copy(update={"runs": [one, two, three]})
    assert trial_of_what_is_left(trial, [one, *others], failed=set()).runs == runs
    assert trial_of_what_is_left(trial, [one], failed={two.run_key}).runs == [one, three], "what has failed is not begun again"


def test_where_nothing_is_shared_only_what_is_left_is_handed_over(runs: list[RunSpec]) -> None:
    trial = trial_of(*runs, pack=2)
    assert trial_of_what_is_left(trial, runs[1:4], failed=set()) == trial.model_copy(update={"runs": runs[1:4]})
