"""Two hundred seeds of faults, in one process: whatever happens, a sweep ends as an undisturbed one does."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.verdict import Reference, problems_of

SEEDS = 200
TRACKED_BY_MLFLOW = range(1000, 1002)
"""Seeds with a real MLflow on sqlite in place of the simulated one."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    logging.disable(logging.WARNING)  # of which faults cause hundreds
    yield Reference(tmp_path_factory.mktemp("reference"))
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_disturbed_sweep_ends_as_an_undisturbed_one(seed: int, reference: Reference, tmp_path: Path) -> None:
    _check(seed, reference, tmp_path, with_mlflow=False)


@pytest.mark.parametrize("seed", TRACKED_BY_MLFLOW)
def test_the_same_with_a_real_mlflow(seed: int, reference: Reference, tmp_path: Path) -> None:
    _check(seed, reference, tmp_path, with_mlflow=True)


def _check(seed: int, reference: Reference, tmp_path: Path, with_mlflow: bool) -> None:
    problems, log, faults = problems_of(seed, tmp_path / "results", reference, with_mlflow)
    shutil.rmtree(tmp_path / "results")
    repeat = f"python -m tests.chaos.simulation --seed {seed}{' --mlflow' * with_mlflow}"
    assert not problems, "\n".join([repeat, ", ".join(faults), *problems, *log])
