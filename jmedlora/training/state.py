"""The resumable state of a run in storage: what a killed run goes on from, at any ZeRO stage and number of workers."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from jmedlora.config import clock
from jmedlora.data.atomic import appearing
from jmedlora.plan.layout import STATE_JSON, STATE_TENSORS, RunFolder

KEPT_WHILE_TRAINING = 2
"""The newest state and the one before it, in case the newest turns out to be damaged."""


@dataclass(frozen=True)
class SavedState:
    """A state that is whole: `step` optimizer steps were done."""

    step: int
    folder: Path

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments, as `PackEngine.state_tensors` gave them."""
        return load_file(self.folder / STATE_TENSORS)


def save_state(folder: RunFolder, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes the state after `step` steps, complete or not at all; older ones than the last two are removed."""
    with appearing(folder.state(step)) as aside:
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        (aside / STATE_TENSORS).write_bytes(content)
        files = {STATE_TENSORS: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}
        told = {"step": step, "time": clock.now(), **facts, "files": files}
        (aside / STATE_JSON).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    keep_newest(folder, KEPT_WHILE_TRAINING)


def keep_newest(folder: RunFolder, count: int) -> None:
    """Removes all states but the newest `count`."""
    for _, path in sorted(folder.states().items())[:-count]:
        shutil.rmtree(path, ignore_errors=True)


def states_of(folder: RunFolder, run_key: str) -> tuple[list[SavedState], list[str]]:
    """The states of a run that are whole, newest first; and those that are not, a line each."""
    whole, passed_over = [], []
    for step, path in sorted(folder.states().items(), reverse=True):
        if problem := _problem(path, run_key):
            passed_over.append(told_passed_over(path, problem))
        else:
            whole.append(SavedState(step, path))
    return whole, passed_over


def told_passed_over(state: Path, problem: str) -> str:
    """The line for a state that cannot be gone on from."""
    return f"{state.parent.name}/{state.name} is passed over: {problem}"


def _problem(path: Path, run_key: str) -> str:
    """Why a state is not whole, else empty."""
    try:
        told = json.loads((path / STATE_JSON).read_text(encoding="utf-8"))
        facts = told["files"][STATE_TENSORS]
        if told["run_key"] != run_key:
            return f"it belongs to {told['run_key']}"
        with (path / STATE_TENSORS).open("rb") as stream:
            whole = hashlib.file_digest(stream, "sha256").hexdigest() == facts["sha256"]
    except FileNotFoundError as missing:
        return f"{Path(missing.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE_JSON} cannot be read: {error}"
    return "" if whole else f"{STATE_TENSORS} differs from its checksum"
