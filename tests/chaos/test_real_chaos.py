"""Three seeds of `python -m tests.chaos.real`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.real import run_seed
from tests.faults import NAME
from tests.outcomes import outcome_of


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_sweep_comes_to_the_same_whatever_happens(seed: int, undisturbed: Path, sweep_cache: Path, tmp_path: Path) -> None:
    verdict = run_seed(seed, tmp_path / "sweep", sweep_cache, outcome_of(undisturbed, NAME))
    assert verdict.problems == [], str(verdict)
