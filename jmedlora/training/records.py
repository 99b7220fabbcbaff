"""What training tells about a run: run.json, train.jsonl, and calls of a listener."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Protocol

from jmedlora.config import clock
from jmedlora.data.atomic import write_json, write_json_lines
from jmedlora.data.patience import when_there_is_room
from jmedlora.plan.layout import RunFolder
from jmedlora.plan.specs import RunSpec

_LIBRARIES = ("jmedlora", "torch", "transformers", "peft", "bitsandbytes", "deepspeed", "datasets")


Status = Literal["finished", "failed", "interrupted"]
"""`interrupted`: stopped with its state saved; it goes on from there."""


class Listener(Protocol):
    """Told about a trial's runs as they go, on the leading worker only, after the same has been written to storage."""

    def on_run_start(self, run_key: str, total_steps: int) -> None: ...

    def on_step(self, run_key: str, record: dict[str, Any]) -> None: ...

    def on_checkpoint(self, run_key: str, step: int) -> None: ...

    def on_run_end(self, run_key: str, status: Status, error: str | None) -> None: ...


class RunRecords:
    """The records of one run, kept by the leading worker; of an earlier, unfinished start the first `start` steps are kept."""

    def __init__(
        self, folder: RunFolder, spec: RunSpec, workers: int, device: str, listener: Listener, start: int = 0, notes: Sequence[str] = ()
    ):
        """start: optimizer steps that are done and gone on from; notes: what there is to tell about that."""
        folder.path.mkdir(parents=True, exist_ok=True)
        earlier = _read_facts(folder) if start else {}
        _remove_after(start, folder)
        self._folder = folder
        self._run_key = spec.run_key
        self._listener = listener
        self._facts: dict[str, Any] = {
            "run_key": spec.run_key,
            "status": "running",
            "settings": spec.settings.model_dump(mode="json"),
            "model": spec.model.model_dump(mode="json"),
            "method": spec.method.name,
            "precision": spec.precision,
            "compute_precision": spec.compute_precision,
            "data_digest": spec.data_digest,
            "rows": spec.rows,
            "total_steps": spec.total_steps,
            "workers": workers,
            "zero_stage": spec.deepspeed.zero_stage,
            "device": device,
            "versions": library_versions(),
            "started": earlier.get("started", clock.now()),
            "resumed": [*earlier.get("resumed", []), *([{"step": start, "time": clock.now()}] if start else [])],
            "notes": [*earlier.get("notes", []), *notes],
            "finished": None,
            "error": None,
        }
        self._write()
        listener.on_run_start(spec.run_key, spec.total_steps)

    def tell(self, **facts: Any) -> None:
        """Adds facts to run.json."""
        self._facts.update(facts)
        self._write()

    def add_step(self, record: dict[str, Any]) -> None:
        """Adds a line to train.jsonl."""
        line = (json.dumps(record) + "\n").encode()
        when_there_is_room(lambda: _append(self._folder.train_jsonl, line), f"record of step {record['step']}", self.add_note)
        self._listener.on_step(self._run_key, record)

    def add_note(self, note: str) -> None:
        """Adds a line to what there is to tell about the run."""
        self.tell(notes=[*self._facts["notes"], note])

    def sync(self) -> None:
        """Makes sure that train.jsonl is on disk as far as it is written: before a state that goes on from there."""
        with self._folder.train_jsonl.open("a") as lines:
            os.fsync(lines.fileno())

    def add_checkpoint(self, step: int) -> None:
        """Tells of a checkpoint that is committed."""
        self._listener.on_checkpoint(self._run_key, step)

    def end(self, status: Status, error: str | None) -> None:
        """Marks the run as finished, failed or interrupted."""
        self.tell(status=status, error=error, finished=clock.now())
        self._listener.on_run_end(self._run_key, status, error)

    def _write(self) -> None:
        when_there_is_room(lambda: write_json(self._folder.run_json, self._facts), "run.json", self._facts["notes"].append)


def _append(path: Path, line: bytes) -> None:
    """Adds a whole line or nothing, also where the disk fills up in the middle of it."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def _read_facts(folder: RunFolder) -> dict[str, Any]:
    try:
        facts = json.loads(folder.run_json.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _remove_after(step: int, folder: RunFolder) -> None:
    """Removes the checkpoints, states and records of later steps, which come again, and what a killed process left half written."""
    for path in [*folder.path.glob(".*"), *(folder.path / "state").glob(".*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    kept_steps = [at for at in folder.committed_steps() if at <= step]
    for path in folder.checkpoints.glob("*"):
        if path not in map(folder.checkpoint, kept_steps):
            shutil.rmtree(path, ignore_errors=True)
    for at, path in folder.states().items():
        if at > step:
            shutil.rmtree(path, ignore_errors=True)
    kept = [line for line in _lines(folder.train_jsonl) if line["step"] <= step]
    if kept:
        write_json_lines(folder.train_jsonl, kept)
    else:
        folder.train_jsonl.unlink(missing_ok=True)


def read_steps(folder: RunFolder) -> list[dict[str, Any]]:
    """The records of a run's steps, as far as they are whole."""
    return _lines(folder.train_jsonl)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a last one that was being written when its writer was killed is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict) and "step" in line]


@lru_cache(maxsize=1)
def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result may depend on beyond its run key."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a checkout that is not installed
            continue
    return versions
