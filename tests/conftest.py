"""What tests of every kind share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real exam data; without JMEDLORA_SHARED_DATA the test is skipped, with it missing data is a failure."""
    place = os.environ.get("JMEDLORA_SHARED_DATA")
    if not place:
        pytest.skip("JMEDLORA_SHARED_DATA is not set")
    assert Path(place).is_dir(), f"JMEDLORA_SHARED_DATA={place} is not a folder"
    return Path(place).resolve()


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test writes into the user's cache or into a tracking server, or joins a cluster that happens to run."""
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JMEDLORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def sweep_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JMEDLORA_CACHE of sweeps in processes of their own."""
    return tmp_path_factory.getbasetemp() / "cache"


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, sweep_cache: Path) -> Path:
    """The results folder of the sweep that faults are injected into, without any: run once per session."""
    from tests.faults import DisturbedSweep

    sweep = DisturbedSweep(tmp_path_factory.mktemp("undisturbed"), sweep_cache)
    try:
        sweep.run_to_the_end()
        assert sweep.leftovers() == []
    finally:
        sweep.stop()
    return sweep.storage.root
