"""A node that is taken away in the middle of a sweep, on a cluster of several nodes on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from jmedlora.plan.specs import RunSpec
from tests.faults import NAME, TITLES, DisturbedSweep
from tests.outcomes import differences, outcome_of, unclean

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, sweep_cache: Path) -> Iterator[Cluster]:
    """A head that only keeps house, and three nodes of one core each: one trains, one evaluates, one stands by."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("JMEDLORA_CACHE", str(sweep_cache))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


def worker_on(node: Any) -> psutil.Process | None:
    """The training worker on a node."""
    for raylet in node.all_processes.get("raylet", []):
        for process in psutil.Process(raylet.process.pid).children():
            if re.match(TITLES["training worker"], " ".join(process.cmdline())):
                return process
    return None


def told(sweep: DisturbedSweep, run: RunSpec) -> dict[str, Any]:
    """run.json"""
    content: dict[str, Any] = json.loads(sweep.storage.run(run.run_key).run_json.read_text(encoding="utf-8"))
    return content


@pytest.mark.timeout(1800)
def test_a_node_is_removed_and_another_takes_over(cluster: Cluster, tmp_path: Path, sweep_cache: Path, undisturbed: Path) -> None:
    folder = tmp_path / "sweep"
    one_at_a_time = "resources={preset: local, max_concurrent_trials: 1}"
    sweep = DisturbedSweep(folder, sweep_cache, one_at_a_time, "--address", cluster.address)
    sweep.environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/results/mlflow.db"
    try:
        sweep.start()
        run, _ = sweep.wait_for(lambda: sweep.in_training(from_step=20), "a run in training", within_s=600)
        node = next(node for node in cluster.worker_nodes if worker_on(node))
        worker, begun = worker_on(node), told(sweep, run)
        assert worker is not None and begun["status"] == "running"
        cluster.remove_node(node, allow_graceful=False)
        worker.wait(timeout=30)
        assert sweep.status(run) == "running", "the run was in the middle"
        assert sweep.finish(within_s=900) == 0, sweep.output()
    finally:
        sweep.stop()
    ended = told(sweep, run)
    assert ended["resumed"] or ended["started"] > begun["started"], "another worker took over"
    assert "Traceback" not in sweep.output()
    found = differences(outcome_of(sweep.storage.root, NAME), outcome_of(undisturbed, NAME))
    assert found == [], "\n".join(found)
    assert unclean(sweep.storage.root) == []
