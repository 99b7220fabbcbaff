"""Where things lie in storage: every file and folder name, in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
CHECKSUMS = "checksums.json"
REMOVED = "removed.json"
"""Of a checkpoint whose weights a keep rule has removed: when, and which rule."""
WEIGHTS_ON_THEIR_WAY_OUT = "removed.safetensors"
"""What the weights are renamed to before they go: the name alone says that they are given up."""
STATE_TENSORS = "state.safetensors"
STATE_JSON = "state.json"
METRICS = "metrics.json"
PREDICTIONS = "predictions.jsonl"


def step_name(step: int) -> str:
    """`step-000100` for step 100."""
    return f"step-{step:06d}"


def _is_file(folder: Path, *names: str) -> bool:
    """The same as by way of Path, a few times as fast: a large sweep asks a hundred thousand times."""
    return os.path.isfile("/".join((str(folder), *names)))  # noqa: PTH113


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run (or base run): `results/runs/<run_key>`."""

    path: Path

    @property
    def run_json(self) -> Path:
        """Status and settings."""
        return self.path / "run.json"

    @property
    def train_jsonl(self) -> Path:
        """A line per optimizer step: step, loss, learning_rate, grad_norm."""
        return self.path / "train.jsonl"

    @property
    def lease(self) -> Path:
        """Locked by the worker that trains the run."""
        return self.path / "lease.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Folder of the adapter after `step` optimizer steps."""
        return self.checkpoints / step_name(step)

    def committed_steps(self) -> list[int]:
        """The steps of all complete checkpoints, in ascending order."""
        found = (path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*"))
        return sorted(int(number) for number in found if number.isdigit() and self.is_committed(int(number)))

    def is_removed(self, step: int) -> bool:
        """True for a complete checkpoint whose weights a keep rule has removed: its adapter is known by the checksums, and gone."""
        return self.is_committed(step) and any(
            _is_file(self.path, "checkpoints", step_name(step), name) for name in (REMOVED, WEIGHTS_ON_THEIR_WAY_OUT)
        )

    def removed_steps(self) -> list[int]:
        """The steps of the checkpoints whose weights a keep rule has removed, in ascending order."""
        return [step for step in self.committed_steps() if self.is_removed(step)]

    def state(self, step: int) -> Path:
        """Folder of the resumable state after `step` optimizer steps."""
        return self.path / "state" / step_name(step)

    def states(self) -> dict[int, Path]:
        """The folders of states that there are, by step."""
        found = (self.path / "state").glob("step-*")
        return {int(path.name.removeprefix("step-")): path for path in found if path.name.removeprefix("step-").isdigit()}

    def is_committed(self, step: int) -> bool:
        """True once the checkpoint is complete: checksums are written last, and the folder is renamed into place."""
        return _is_file(self.path, "checkpoints", step_name(step), CHECKSUMS)

    def evaluation(self, evaluation_folder: str, step: int) -> Path:
        """Folder of metrics.json and predictions.jsonl; `evaluation_folder` is EvaluationSpec.folder."""
        return self.path / "evaluations" / evaluation_folder / step_name(step)

    def journal(self, evaluation_folder: str, step: int, start: str) -> Path:
        """Answers of one start of an evaluation that is not finished: hidden beside where its results will lie."""
        results = self.evaluation(evaluation_folder, step)
        return results.with_name(f".{results.name}.{start}.partial.jsonl")

    def is_evaluated(self, evaluation_folder: str, step: int) -> bool:
        """True once the evaluation is complete: metrics.json is written last."""
        return _is_file(self.path, "evaluations", evaluation_folder, step_name(step), METRICS)


@dataclass(frozen=True)
class SweepFolder:
    """The folder of one sweep: `results/sweeps/<sweep>`."""

    path: Path

    @property
    def sweep_yaml(self) -> Path:
        return self.path / "sweep.yaml"

    @property
    def plan_json(self) -> Path:
        return self.path / "plan.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    @property
    def closed(self) -> Path:
        """There while the last start of the driver has left nothing to do: all trained and evaluated, reported, and in MLflow."""
        return self.ledger / "closed"

    def stop_marker(self, attempt: str) -> Path:
        """There once a start of the driver, `attempt`, was asked to stop."""
        return self.ledger / f"stop-{attempt}"

    @property
    def ray(self) -> Path:
        """Ray's own files; may be deleted."""
        return self.path / "ray"

    @property
    def report(self) -> Path:
        return self.path / "report"


@dataclass(frozen=True)
class Storage:
    """The root of everything that a sweep writes."""

    root: Path

    def run(self, run_key: str) -> RunFolder:
        return RunFolder(self.root / "runs" / run_key)

    def sweep(self, name: str) -> SweepFolder:
        return SweepFolder(self.root / "sweeps" / name)

    @property
    def plans_lock(self) -> Path:
        """Locked while a plan is written, and while a keep rule removes what no plan needs."""
        return self.root / "sweeps" / ".plans.lock"

    @property
    def mlflow_database(self) -> Path:
        return self.root / "mlflow.db"
