"""Whole sweeps from the command to the last score, ours and B0's, with nothing warm or on a Ray and an MLflow that are up."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jmedlora.plan.layout import METRICS, Storage
from jmedlora.training.records import read_steps
from tests.bench.floor import arithmetic_floor
from tests.bench.measuring import Arm, Row, Taken, in_turns, row_of
from tests.bench.workload import EPOCHS, RANKS, Workload, shared_baseline, write_sweep

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Place:
    """Where sweeps run: on a Ray of their own, or at an address, with an MLflow that is up."""

    address: str | None = None
    variables: dict[str, str] = field(default_factory=dict)


ALONE = Place()


@contextmanager
def warm_place(folder: Path) -> Iterator[Place]:
    """A Ray cluster of this machine's size and an MLflow server; ended with all that they started."""
    from ray.cluster_utils import Cluster

    from tests.integration.mlflow_servers import Server

    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    head = {"num_cpus": os.cpu_count(), "resources": {"train_driver": 1}, "include_dashboard": False}
    server = Server(folder)
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        server.start()
        yield Place(cluster.address, {"MLFLOW_TRACKING_URI": server.uri})
    finally:
        server.kill()
        cluster.shutdown()


def sweep(workload: Workload, folder: Path, place: Place, **keys: Any) -> float:
    """Runs `jmedlora sweep` with its storage and its cache in `folder`; seconds from the command to its report. keys: of the sweep file."""
    file = write_sweep(workload, folder, **keys)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JMEDLORA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"} | place.variables
    where = ["--address", place.address] if place.address else []
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "jmedlora.cli", "sweep", str(file), f"storage={folder / 'results'}", *where],
        env=environment, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return time.perf_counter() - started


def ours(workload: Workload, place: Place = ALONE) -> Arm:
    """`jmedlora sweep`, a storage and a cache of its own each time."""

    def turn() -> Taken:
        with tempfile.TemporaryDirectory(dir=workload.folder) as folder:
            started = time.time()
            seconds = sweep(workload, Path(folder), place)
            return Taken(seconds, _told_of(Path(folder) / "results", started) | {"report": seconds})

    return turn


def ray_tune(workload: Workload, place: Place = ALONE) -> Arm:
    """B0, by the shared script."""
    script = shared_baseline()
    assert script is not None

    def turn() -> Taken:
        ranks, epochs = (",".join(map(str, values)) for values in (RANKS, EPOCHS))
        start = ["-m", "tests.bench.on_cluster", place.address] if place.address else []
        environment = {**os.environ, "PYTHONPATH": str(ROOT)} if place.address else None
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *start, str(script), "run", "--work", str(workload.folder), "--ranks", ranks, "--epochs", epochs],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        assert done.returncode == 0, done.stderr[-3000:]
        told = json.loads(done.stdout.splitlines()[-1])
        assert not told["errors"], done.stderr[-3000:]
        return Taken(seconds, {"gestalt": {f"{run['rank']} {run['epochs']}": run["gestalt"] for run in told["runs"]}})

    return turn


def _told_of(root: Path, started: float) -> dict[str, Any]:
    """What a sweep has left in storage: scores, tokens of answers, and when what had happened, in seconds since the command."""
    storage = Storage(root)
    with (root / "sweeps/bench/report/table.csv").open(encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["method"] != "base"]
    folders = [storage.run(path.name) for path in sorted((root / "runs").iterdir())]
    runs = [json.loads(folder.run_json.read_text(encoding="utf-8")) for folder in folders if folder.run_json.is_file()]
    steps = [read_steps(folder) for folder in folders]
    metrics = [json.loads(path.read_text(encoding="utf-8")) for path in (root / "runs").glob(f"*/evaluations/*/*/{METRICS}")]
    trained = [run for run in runs if run.get("finished")]
    moments = {
        "Ray up": (root / "sweeps/bench/plan.json").stat().st_mtime,
        "workers up, base loaded": min(run["started"] for run in trained),
        "first step": min(own[0]["time"] for own in steps if own),
        "training over": max(run["finished"] for run in trained),
        "last score": max(each["time"] for each in metrics),
    }
    return {
        "gestalt": {f"{row['lora_rank']} {float(row['epochs']):g}": float(row["gestalt_score"]) for row in rows},
        "new_tokens": sum(each["new_tokens"] for each in metrics if "computed_for" not in each),
        "moments": {name: moment - started for name, moment in moments.items()},
    }


def same_scores(ours: dict[str, Any], others: dict[str, Any]) -> str:
    """How far the mean Gestalt scores of both arms are apart: their data orders and initial adapters differ, so they only resemble."""
    assert ours["gestalt"].keys() == others["gestalt"].keys()
    apart = max(abs(ours["gestalt"][key] - others["gestalt"][key]) for key in ours["gestalt"])
    return f"{len(ours['gestalt'])} runs; Gestalt scores at most {apart:.3f} apart (other data orders and initial adapters)"


def _row(name: str, workload: Workload, mine: list[Taken], others: list[Taken]) -> Row:
    found = mine[-1].found
    moments = ", ".join(f"{moment} {seconds:.0f} s" for moment, seconds in sorted(found["moments"].items(), key=lambda item: item[1]))
    floor = arithmetic_floor(workload, found["new_tokens"])
    shares = " and ".join(f"{floor / min(taken.amount for taken in arm):.0%}" for arm in (mine, others))
    notes = [f"{moments}, report {found['report']:.0f} s", f"arithmetic floor {floor:.1f} s: {shares} of the makespans, ours and theirs"]
    return row_of(name, "B0", mine, others, same_scores(found, others[-1].found), notes=notes)


def makespan(name: str, workload: Workload, pairs: int) -> list[Row]:
    """Nothing warm."""
    mine, others = in_turns([ours(workload), ray_tune(workload)], pairs)
    return [_row(name, workload, mine, others)]


def makespan_warm(name: str, workload: Workload, pairs: int) -> list[Row]:
    """On a Ray and an MLflow that are up, for both; a first turn of each is not counted."""
    with tempfile.TemporaryDirectory() as folder, warm_place(Path(folder)) as place:
        arms = [ours(workload, place), ray_tune(workload, place)]
        for arm in arms:
            arm()
        mine, others = in_turns(arms, pairs)
    return [_row(name, workload, mine, others)]
