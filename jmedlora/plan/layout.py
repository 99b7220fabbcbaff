"""Where things lie in storage: every file and folder name, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
CHECKSUMS = "checksums.json"
STATE_TENSORS = "state.safetensors"
STATE_JSON = "state.json"
METRICS = "metrics.json"
PREDICTIONS = "predictions.jsonl"


def step_name(step: int) -> str:
    """`step-000100` for step 100."""
    return f"step-{step:06d}"


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
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Folder of the adapter after `step` optimizer steps."""
        return self.checkpoints / step_name(step)

    def committed_steps(self) -> list[int]:
        """The steps of all complete checkpoints, in ascending order."""
        found = (path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*"))
        return sorted(int(number) for number in found if number.isdigit() and self.is_committed(int(number)))

    def state(self, step: int) -> Path:
        """Folder of the resumable state after `step` optimizer steps."""
        return self.path / "state" / step_name(step)

    def states(self) -> dict[int, Path]:
        """The folders of states that there are, by step."""
        found = (self.path / "state").glob("step-*")
        return {int(path.name.removeprefix("step-")): path for path in found if path.name.removeprefix("step-").isdigit()}

    def is_committed(self, step: int) -> bool:
        """True once the checkpoint is complete: checksums are written last, and the folder is renamed into place."""
        return (self.checkpoint(step) / CHECKSUMS).is_file()

    def evaluation(self, evaluation_folder: str, step: int) -> Path:
        """Folder of metrics.json and predictions.jsonl; `evaluation_folder` is EvaluationSpec.folder."""
        return self.path / "evaluations" / evaluation_folder / step_name(step)

    def is_evaluated(self, evaluation_folder: str, step: int) -> bool:
        """True once the evaluation is complete: metrics.json is written last."""
        return (self.evaluation(evaluation_folder, step) / METRICS).is_file()


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
    def mlflow_database(self) -> Path:
        return self.root / "mlflow.db"
