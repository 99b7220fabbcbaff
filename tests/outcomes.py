"""What a sweep has come to, and how two that should be the same differ."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

TIMES = ("seconds", "time", "started", "finished", "answered")
"""Keys of metrics.json that hold times."""
_TIMED_POINTS = ("train/tokens_per_s",)
_TIMED_TAGS = ("mlflow.user", "mlflow.source", "mlflow.log-model", "mlflow.parentRunId", "mlflow.runName")


@dataclass(frozen=True)
class Outcome:
    """A results folder without its times."""

    adapters: Mapping[str, str]
    """SHA-256 of every file of every checkpoint."""
    table: str
    """table.csv of the sweep's report."""
    metrics: Mapping[str, Any]
    predictions: Mapping[str, str]
    """SHA-256 of every predictions.jsonl."""
    curves: Mapping[str, Any]
    """Per run: step, loss, learning rate and gradient norm of every line of train.jsonl."""
    runs: Mapping[str, Any]
    """Per run: the status, and the steps of the states that are kept."""
    tracked: Mapping[str, Any]
    """What MLflow holds of every child and of the parent."""


def outcome_of(results: Path, sweep: str) -> Outcome:
    """Reads a results folder; raises AssertionError where MLflow holds something twice or has something open."""
    runs = results / "runs"
    return Outcome(
        adapters={_name(path, runs): _digest(path) for path in sorted(runs.glob("*/checkpoints/*/*"))},
        table=(results / "sweeps" / sweep / "report" / "table.csv").read_text(encoding="utf-8"),
        metrics={
            _name(path, runs): {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key not in TIMES}
            for path in sorted(runs.glob("*/evaluations/*/*/metrics.json"))
        },
        predictions={_name(path, runs): _digest(path) for path in sorted(runs.glob("*/evaluations/*/*/predictions.jsonl"))},
        curves={_name(path, runs): _curve(path) for path in sorted(runs.glob("*/train.jsonl"))},
        runs={
            _name(path, runs): (
                json.loads(path.read_text(encoding="utf-8"))["status"],
                sorted(at.name for at in path.parent.glob("state/*")),
            )
            for path in sorted(runs.glob("*/run.json"))
        },
        tracked=tracked_in(results / "mlflow.db", sweep),
    )


def differences(found: Outcome, expected: Outcome) -> list[str]:
    """A line per thing that differs; none where both are the same."""
    lines = []
    for field in fields(Outcome):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(one, str):
            lines += [field.name] if one != other else []
            continue
        for key in sorted({*one, *other}):
            if one.get(key) != other.get(key):
                lines.append(f"{field.name} {key}: {_short(one.get(key), other.get(key))}")
    return lines


def unclean(results: Path) -> list[str]:
    """Files that an atomic write has left behind half done."""
    return [_name(path, results) for path in results.glob("runs/**/.*")]


def _copy(database: Path, folder: Path) -> Path:
    """A copy beside its journal: sqlite itself finds no way into another process's file systems."""
    for path in database.parent.glob(f"{database.name}*"):
        shutil.copyfile(path, folder / path.name)
    return folder / database.name


def tracked_in(database: Path, sweep: str) -> dict[str, Any]:
    """Status, parameters, tags and points of the sweep's living MLflow runs, read from the database itself.

    Raises AssertionError where a run has two children or two parents, a point is there twice, or a run is open.
    """
    with tempfile.TemporaryDirectory() as folder, closing(sqlite3.connect(_copy(database, Path(folder)))) as opened:
        ids = opened.execute(
            "SELECT r.run_uuid, r.status, r.end_time FROM runs r JOIN experiments e ON r.experiment_id = e.experiment_id "
            "WHERE e.name = ? AND r.lifecycle_stage = 'active'",
            (sweep,),
        ).fetchall()
        found: list[tuple[str, dict[str, Any]]] = []
        for run_id, status, end_time in ids:
            tags = dict(opened.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (run_id,)))
            points = opened.execute("SELECT key, step, value FROM metrics WHERE run_uuid = ?", (run_id,)).fetchall()
            twice = [key for key, count in Counter((key, step) for key, step, _ in points).items() if count > 1]
            name = tags.get("jmedlora.run_key", "parent")
            assert not twice, f"MLflow holds points of {name} twice: {twice[:5]}"
            assert status != "RUNNING", f"MLflow run {name} is still running"
            facts = {
                "status": (status, end_time is not None),
                "parameters": dict(opened.execute("SELECT key, value FROM params WHERE run_uuid = ?", (run_id,))),
                "tags": {key: value for key, value in tags.items() if not key.startswith(_TIMED_TAGS)},
                "points": {f"{key} {step}": None if key in _TIMED_POINTS else value for key, step, value in points},
            }
            found.append((name, facts))
    counts = Counter(name for name, _ in found)
    assert all(count == 1 for count in counts.values()), f"MLflow runs: {counts}"
    return dict(found)


def _name(path: Path, root: Path) -> str:
    return str(path.relative_to(root))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _status(path: Path) -> str:
    return str(json.loads(path.read_text(encoding="utf-8"))["status"])


def _curve(path: Path) -> list[tuple[Any, ...]]:
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(line["step"], line["loss"], line["learning_rate"], line["grad_norm"], line["tokens"]) for line in lines]


def _short(one: Any, other: Any) -> str:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        return "; ".join(f"{key}: {_short(one.get(key), other.get(key))}" for key in keys[:4])
    if isinstance(one, list) and isinstance(other, list):
        at = next((place for place, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))
        return f"{len(one)} and {len(other)} items, the first that differs at {at}: {one[at : at + 1]} and {other[at : at + 1]}"
    return f"{str(one)[:100]} instead of {str(other)[:100]}"
