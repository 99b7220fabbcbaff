"""From a sweep's name or file and overrides to a checked SweepConfig."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from jmedlora.config.benchmark import BenchmarkConfig, PromptConfig
from jmedlora.config.composition import compose_sweep, find_secrets, find_sweep
from jmedlora.config.data import DataConfig
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.locate import absolute, is_remote
from jmedlora.config.origin import COMMAND_LINE, Origin
from jmedlora.config.parts import DeepSpeedConfig, MethodConfig, ModelConfig, ResourcesConfig
from jmedlora.config.presets import PartReader
from jmedlora.config.run import RunSettings
from jmedlora.config.sweep import SweepConfig, SweepFile
from jmedlora.config.validate import check_field, faults_of, unknown_name

IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the entry process of a job."""

Inspect = Callable[[DataConfig | BenchmarkConfig, SweepFile], list[Fault]]

_KINDS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "method": MethodConfig,
    "data": DataConfig,
    "prompt": PromptConfig,
    "deepspeed": DeepSpeedConfig,
}
"""Run settings that name a part."""


def load_sweep(sweep: str, overrides: list[str] | None = None, cwd: Path | None = None, inspect: Inspect | None = None) -> SweepConfig:
    """Reads a shipped sweep by name or a user's YAML file by path, with Hydra-style overrides.

    Raises BadInput with every fault that can be found without opening data files; where there is one, `inspect` is
    asked for the faults inside each data file and benchmark as well, so that all are told at once.
    """
    cwd = cwd or Path.cwd()
    return _SweepReader(Origin(find_sweep(sweep, cwd), tuple(overrides or ()), cwd)).read(inspect)


class _SweepReader:
    """Reads one sweep; collects faults, so that all are told at once."""

    def __init__(self, origin: Origin):
        self.origin = origin
        self.reader = PartReader(origin)
        self.faults = self.reader.faults
        self.parts: dict[str, dict[str, Any]] = {group: {} for group in _KINDS}
        self.benchmarks: list[BenchmarkConfig] = []
        self.left_out: set[str] = set()

    def read(self, inspect: Inspect | None) -> SweepConfig:
        raw = compose_sweep(self.origin)
        self.faults += find_secrets(raw, self.origin.of)
        file = self._valid_keys(raw)
        config = self._assembled(file)
        if config is None:
            for part in [*self.parts["data"].values(), *self.benchmarks] if inspect else []:
                self.faults += inspect(part, file)  # type: ignore[misc]
            raise BadInput(self.origin.located(self.faults))
        return config

    def _valid_keys(self, raw: dict[str, Any]) -> SweepFile:
        """The valid keys; each other one becomes a fault and counts as left out, so that the rest is checked too."""
        known = {key: value for key, value in raw.items() if key in SweepFile.model_fields}
        for key in raw.keys() - known.keys():
            typed = any(name.split(".")[0] == key for name in self.origin.overridden)
            where = COMMAND_LINE if typed else self.origin.where
            self.faults.append(Fault(where, key, "unknown key", unknown_name(key, SweepFile.model_fields)))
        try:
            return SweepFile.model_validate(known)
        except ValidationError as error:
            self.faults += faults_of(error, SweepFile, self.origin.where)
            self.left_out = {str(detail["loc"][0]) for detail in error.errors()}
            return SweepFile.model_validate({key: value for key, value in known.items() if key not in self.left_out})

    def _assembled(self, file: SweepFile) -> SweepConfig | None:
        base = {"data": self._named("data", file.data, "data"), "deepspeed": self._named("deepspeed", file.deepspeed, "deepspeed")}
        prompts = [self._named("prompt", entry, f"prompts[{i}]") for i, entry in enumerate(file.prompts)]
        training = {**base, "prompt": prompts[0], **self._settings(file.training, "training")}
        several = isinstance(file.grid, list)
        raw_grids = [grid for grid in (file.grid if isinstance(file.grid, list) else [file.grid]) if grid]
        grids = {(f"grid[{i}]" if several else "grid"): grid for i, grid in enumerate(raw_grids)}
        checked_grids = {key: self._axes(grid, key) for key, grid in grids.items()}
        extra = {f"extra[{i}]": self._settings(run, f"extra[{i}]") for i, run in enumerate(file.extra)}
        references = [self._named("model", entry, f"references[{i}]") for i, entry in enumerate(file.references)]
        self._check_runs({**checked_grids, **extra}, training, references)
        benchmarks = [self.reader.read("benchmark", BenchmarkConfig, entry, f"benchmarks[{i}]") for i, entry in enumerate(file.benchmarks)]
        self.benchmarks = [part for part in benchmarks if part]
        self._refuse_repeats([part.name for part in self.benchmarks], "benchmarks")
        self._refuse_repeats([str(count) for count in file.shots], "shots")
        self._refuse_repeats(prompts, "prompts")
        self._refuse_repeats(references, "references")
        self._refuse_repeats(list(file.evaluate.scoring), "evaluate.scoring")
        self._check_keep(file, prompts)
        self._check_storage(file)
        resources = self.reader.read("resources", ResourcesConfig, file.resources, "resources")
        if resources:
            self._check_resources(resources)
        if self.faults:
            return None
        assert resources is not None
        return SweepConfig(
            name=self.origin.path.stem,
            file=self.origin.where,
            grids=list(checked_grids.values()),
            extra=list(extra.values()),
            references=references,
            training=training,
            models=self.parts["model"],
            methods=self.parts["method"],
            data=self.parts["data"],
            prompts=self.parts["prompt"],
            deepspeeds=self.parts["deepspeed"],
            benchmarks=self.benchmarks,
            shots=file.shots,
            evaluation_prompts=prompts,
            evaluate=file.evaluate,
            keep=file.keep,
            pack=file.pack,
            share_prefixes=file.share_prefixes,
            resources=resources,
            storage=absolute(file.storage, self.origin.base("storage")),
            sources=absolute(file.sources, self.origin.base("sources")),
            offline=file.offline,
            leaks=file.leaks,
            note=file.note,
            overridden=sorted(self.origin.overridden),
        )

    # -- run settings

    def _axes(self, grid: dict[str, list[Any]], prefix: str) -> dict[str, list[Any]]:
        result: dict[str, list[Any]] = {}
        for axis, values in grid.items():
            key = f"{prefix}.{axis}"
            if not values:
                self._fault(key, "empty list", "at least one value")
            if axis not in RunSettings.model_fields:
                self._fault(key, "unknown run setting", unknown_name(axis, RunSettings.model_fields))
                continue
            result[axis] = [self._setting(axis, value, f"{key}[{i}]") for i, value in enumerate(values)]
            self._refuse_repeats([str(value) for value in result[axis]], key)
        return result

    def _settings(self, settings: dict[str, Any], prefix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in settings.items():
            if name in RunSettings.model_fields:
                result[name] = self._setting(name, value, f"{prefix}.{name}")
            else:
                self._fault(f"{prefix}.{name}", "unknown run setting", unknown_name(name, RunSettings.model_fields))
        return result

    def _setting(self, name: str, value: Any, key: str) -> Any:
        """One value, checked; a part is replaced by its name."""
        if name in _KINDS:
            return self._named(name, value, key)
        self.faults += check_field(RunSettings, name, value, self.origin.where, key)
        return value

    def _named(self, group: str, entry: Any, key: str) -> str:
        """Reads a part and keeps it under its name, which is returned."""
        if not isinstance(entry, str | dict) or not entry:
            self._fault(key, f"{entry!r} is not allowed", f"a {group}'s name or a mapping")
            return str(entry)
        part = self.reader.read(group, _KINDS[group], entry, key)
        names = [entry] if isinstance(entry, str) else [getattr(part, "name", None), entry.get("name"), entry.get("preset"), group]
        name = str(next(filter(None, names)))
        if part is None:
            return name
        if isinstance(part, MethodConfig):
            self._check_defaults(part)
        if self.parts[group].setdefault(name, part) != part:
            self._fault(key, f"a second, different {group} named {name!r}", "one definition per name")
        return name

    def _check_defaults(self, method: MethodConfig) -> None:
        for name, value in method.defaults.items():
            where, key = f"method {method.name}", f"defaults.{name}"
            if name not in RunSettings.model_fields or name in _KINDS:
                self.faults.append(Fault(where, key, "unknown run setting", unknown_name(name, RunSettings.model_fields)))
            else:
                self.faults += check_field(RunSettings, name, value, where, key)

    # -- checks across keys

    def _check_runs(self, runs: dict[str, dict[str, Any]], training: dict[str, Any], references: list[str]) -> None:
        if not runs and not references and not self.left_out & {"grid", "extra", "references"}:
            self._fault("grid", "no runs", "a grid with at least a model, a method and epochs, or extra, or references")
        for key, own in runs.items():
            durations = [name for name in ("epochs", "max_steps") if name in own or name in training]
            if len(durations) != 1:
                told = f"{' and '.join(durations) or 'neither epochs nor max_steps'} given"
                self._fault(f"{key}.epochs", told, "exactly one of epochs and max_steps")
            for name in ("model", "method"):
                if name not in own and name not in training:
                    self._fault(f"{key}.{name}", "missing", f"at least one {name}")

    def _check_keep(self, file: SweepFile, prompts: list[str]) -> None:
        """The score that `best` is about must be one that the sweep has."""
        by = file.keep.by
        known: list[tuple[str, object, list[object]]] = [
            ("benchmark", by.benchmark, [part.name for part in self.benchmarks]),
            ("shots", by.shots, [*file.shots]),
            ("prompt", by.prompt, [*prompts]),
            ("scoring", by.scoring, [*file.evaluate.scoring]),
        ]
        for name, value, values in known:
            if value is not None and values and value not in values:
                self._fault(f"keep.by.{name}", f"{value!r} is not among the sweep's", unknown_name(str(value), map(str, values)))

    def _check_storage(self, file: SweepFile) -> None:
        if IN_RAY_JOB in os.environ and not is_remote(file.storage) and not Path(file.storage).is_absolute():
            self._fault("storage", f"{file.storage!r} would lie in Ray's temporary copy of the working directory", "an absolute path")

    def _check_resources(self, resources: ResourcesConfig) -> None:
        workers, gpus, most = resources.workers_per_trial, resources.gpus_per_worker, resources.max_gpus
        evaluation = resources.evaluation.gpus * resources.evaluation.actors
        if workers * gpus > most:
            told = f"a trial needs {workers * gpus} GPUs ({workers} workers x {gpus}), the cluster has at most max_gpus={most}"
            self._fault("resources.gpus_per_worker", told, f"workers_per_trial x gpus_per_worker of at most {most}")
        elif evaluation > most:
            told = f"evaluation needs {evaluation:g} GPUs, the cluster has at most max_gpus={most}"
            self._fault("resources.evaluation.gpus", told, f"actors x gpus of at most {most}")

    def _refuse_repeats(self, values: list[str], key: str) -> None:
        for value in sorted({value for value in values if values.count(value) > 1}):
            self._fault(key, f"{value} twice", "each value once")

    def _fault(self, key: str, problem: str, allowed: str) -> None:
        self.faults.append(Fault(self.origin.where, key, problem, allowed))
