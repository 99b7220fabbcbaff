"""Whether a sweep fits the machines: a GPU's memory and the free disk, told before anything starts."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path

from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.locate import cache_dir
from jmedlora.config.parts import Architecture, ModelConfig
from jmedlora.config.sweep import SweepConfig
from jmedlora.plan.costs import row_tokens
from jmedlora.plan.estimates import estimate_trial
from jmedlora.plan.layout import Storage
from jmedlora.plan.memory import ESTIMATE_ERROR, GIGABYTE, advice, memory_of
from jmedlora.plan.naming import names_of
from jmedlora.plan.shapes import architecture_of, model_parameters
from jmedlora.plan.specs import Plan, RunSpec
from jmedlora.plan.weights import locate_weights


def shapes_of(config: SweepConfig) -> dict[str, Architecture]:
    """The architectures of a planned sweep's models, by name; of those whose family has shape facts."""
    found = {}
    for name, model in config.models.items():
        if model.family in ("api", "other"):
            continue
        faults: list[Fault] = []
        shape = architecture_of(model, locate_weights(model, config.sources_path, config.offline).folder, faults)
        assert shape is not None, faults
        found[name] = shape
    return found


def hints_of(plan: Plan, config: SweepConfig) -> dict[str, str]:
    """By run key, what would need less memory than the run does now."""
    shapes = shapes_of(config)
    return {
        run.run_key: advice(run, trial.workers, config.resources, shapes[run.model.name]) for trial in plan.trials for run in trial.runs
    }


def check_fit(plan: Plan, config: SweepConfig, storage: Storage) -> None:
    """Raises BadInput for runs that no GPU will hold, and for more bytes on disk than are free."""
    shapes = shapes_of(config)
    faults = [] if config.resources.memory_check == "allow" else _too_large(plan, config, shapes, storage)
    faults += _too_much(plan, config, shapes, storage)
    if faults:
        raise BadInput(config.located(faults))


def _too_large(plan: Plan, config: SweepConfig, shapes: dict[str, Architecture], storage: Storage) -> list[Fault]:
    """Unfinished runs that need more than a GPU has by more than the estimate's error, even with rows of mean length."""
    resources = config.resources
    if not resources.gpus_per_worker:
        return []
    faults, names = [], names_of(plan)
    for trial in plan.trials:
        for run in trial.runs:
            shape = shapes[run.model.name]
            needed = memory_of(run, trial.workers, shape, True, row_tokens(run), trial.pack).total / GIGABYTE
            if needed <= resources.gpu_memory_gb * (1 + ESTIMATE_ERROR) or _has_its_checkpoints(run, storage):
                continue
            beside = f", {trial.pack} at once," if trial.pack > 1 else ""
            told = f"{names[run.run_key]}{beside} needs about {needed:.0f} GB of a GPU with {resources.gpu_memory_gb:g} GB"
            would_fit = f"pack: auto, or less than {trial.pack}" if trial.pack > 1 else advice(run, trial.workers, resources, shape)
            faults.append(Fault(config.file, "resources.gpu_memory_gb", told, f"{would_fit}; or resources.memory_check: allow"))
    return faults


def _has_its_checkpoints(run: RunSpec, storage: Storage) -> bool:
    folder = storage.run(run.run_key)
    return all(folder.is_committed(step) for step in run.checkpoint_steps)


def _too_much(plan: Plan, config: SweepConfig, shapes: dict[str, Architecture], storage: Storage) -> list[Fault]:
    """File systems on which less is free than the rest of the sweep will write: adapters and state, and base models' weights."""
    needed: dict[int, float] = defaultdict(float)
    where: dict[int, tuple[str, Path]] = {}
    runs, weights = _rest_of_runs(plan, config, shapes, storage), _weights(config, shapes)
    for what, path, size in (("storage", storage.root, runs), ("the models' cache", cache_dir(), weights)):
        nearest = next(folder for folder in [path, *path.parents] if folder.exists())
        device = nearest.stat().st_dev
        needed[device] += size
        where.setdefault(device, (what, nearest))
    faults = []
    for device, size in needed.items():
        what, folder = where[device]
        free = shutil.disk_usage(folder).free
        if size > free:
            told = f"{size / GIGABYTE:.3g} GB are still to be written and {free / GIGABYTE:.3g} GB are free at {folder} ({what})"
            faults.append(Fault(config.file, "storage", told, "fewer checkpoints (evaluate.every), or a place with more room"))
    return faults


def _rest_of_runs(plan: Plan, config: SweepConfig, shapes: dict[str, Architecture], storage: Storage) -> float:
    """Bytes of adapters and state that are not there yet."""
    rest = 0.0
    for trial in plan.trials:
        planned = estimate_trial(trial, config.resources, shapes).disk_bytes
        there = sum(_size(storage.run(run.run_key).checkpoint(step)) for run in trial.runs for step in run.checkpoint_steps)
        rest += max(0.0, planned - there)
    return rest


def _weights(config: SweepConfig, shapes: dict[str, Architecture]) -> float:
    """Bytes of the base models that will be made in the cache: converted and random ones are stored in fp32."""
    to_be_made = [model for name, model in config.models.items() if name in shapes and _is_to_be_made(model)]
    return sum(4.0 * model_parameters(model.family, shapes[model.name]) for model in to_be_made)


def _is_to_be_made(model: ModelConfig) -> bool:
    if model.source.kind not in ("gguf", "random"):
        return False
    readable = "".join(character if character.isalnum() or character in "-._" else "-" for character in model.name)
    return not any((cache_dir() / "models").glob(f"{readable}-*"))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
