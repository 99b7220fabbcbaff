"""A sweep as runs, base runs, evaluations and trials."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jmedlora.config.benchmark import BenchmarkConfig, PromptConfig
from jmedlora.config.compose import load_sweep
from jmedlora.config.data import DataConfig
from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.parts import Architecture, MethodConfig, ModelConfig, Precision
from jmedlora.config.run import RunSettings
from jmedlora.config.sweep import SweepConfig, SweepFile
from jmedlora.data.benchmarks import load_benchmark
from jmedlora.data.files import NotHereYet
from jmedlora.data.instructions import load_instructions
from jmedlora.data.prompts import render_prompt
from jmedlora.data.rows import Instruction
from jmedlora.plan.checks import check_chat, check_engine, check_prompt, check_reference, check_room, check_run, check_storage, step_counts
from jmedlora.plan.evaluations import plan_evaluations
from jmedlora.plan.expand import expand_runs
from jmedlora.plan.identity import base_key, model_identity, run_key, trajectory_key
from jmedlora.plan.layout import Storage
from jmedlora.plan.packing import evaluated_together, make_trials, notes_on_sharing
from jmedlora.plan.retention import notes_on_keeping
from jmedlora.plan.shapes import architecture_of, model_parameters
from jmedlora.plan.specs import BaseSpec, EvaluationSpec, KeepRule, Plan, RunSpec
from jmedlora.plan.weights import WeightsFolder, locate_weights

SAMPLE_ROWS = 200
"""Rows that are looked at for mean lengths."""
MAX_CHECKPOINTS = 10_000
UNKNOWN_ROW_CHARACTERS = 250.0
"""Assumed length of a row that is not here yet."""


def open_sweep(sweep: str, overrides: list[str] | None = None) -> tuple[SweepConfig, Plan]:
    """Reads, checks and plans a sweep by name or path; raises BadInput with every fault of configuration and data at once."""
    config = load_sweep(sweep, overrides, inspect=_faults_inside)
    return config, make_plan(config)


def _faults_inside(part: DataConfig | BenchmarkConfig, file: SweepFile) -> list[Fault]:
    try:
        sources = Path(file.sources)
        _ = load_instructions(part, sources) if isinstance(part, DataConfig) else load_benchmark(part, sources)
    except NotHereYet:
        pass
    except BadInput as bad:
        return bad.faults
    return []


def make_plan(config: SweepConfig) -> Plan:
    """Checks everything that can be checked without GPU, Ray or network, and lays the sweep out.

    Raises BadInput with every fault found. Named sources that are not here are listed in `missing`.
    """
    return _Planner(config).plan()


@dataclass(frozen=True)
class _Model:
    config: ModelConfig
    identity: dict[str, object]
    architecture: Architecture | None
    parameters: int
    folder: Path | None
    is_here: bool


@dataclass(frozen=True)
class _Data:
    config: DataConfig
    digest: str
    rows: list[Instruction]
    size: int
    is_here: bool

    @property
    def known_rows(self) -> int | None:
        return len(self.rows) or self.config.declared_rows


@dataclass
class _Planner:
    config: SweepConfig
    faults: list[Fault] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    row_characters: dict[tuple[str, str], float] = field(default_factory=dict)
    base_keys: dict[tuple[str, Precision, bool], str] = field(default_factory=dict)

    def plan(self) -> Plan:
        config = self.config
        check_storage(config, self.faults)
        before = len(self.faults)
        for prompt in config.prompts.values():
            check_prompt(prompt, self.faults)
        evaluations = plan_evaluations(config, self.faults, self.missing) if len(self.faults) == before else []
        models = {name: self._model(model) for name, model in config.models.items()}
        data = {name: self._data(part) for name, part in config.data.items()}
        settings = expand_runs(config, self.faults)
        for name in config.references:
            check_reference(config.models[name], config, self.faults)
        for model in models.values():
            check_chat(model.config, model.folder, config, self.faults)
            check_room(model.config, model.architecture, config, self.faults)
        check_engine(config, settings, self.faults)
        for run in settings:
            check_run(run, config, models[run.model].architecture, data[run.data].known_rows, self.faults)
            self._check_checkpoints(run, data[run.data])
        if self.faults:
            raise BadInput(config.located(self.faults))
        # settings that spell the same adapter (`alpha: 8` and `2r` at rank 4) are one run
        by_key: dict[str, RunSpec] = {}
        for each in settings:
            spec = self._run(each, models[each.model], data[each.data])
            by_key.setdefault(spec.run_key, spec)
        runs = list(by_key.values())
        plan = Plan(
            sweep=config.name,
            bases=list({base.run_key: base for base in [*self._bases(runs, models), *self._references(models)]}.values()),
            runs=runs,
            evaluations=evaluations,
            trials=make_trials(runs, config.resources, self._shapes(models), config.pack, config.share_prefixes),
            default_prompt=config.evaluation_prompts[0],
            keep=self._keep(evaluations),
            missing=self.missing,
            notes=[*_notes_on_repeats(len(settings), len(runs)), *notes_on_sharing(runs, config.share_prefixes)],
            note=config.note,
        )
        together = evaluated_together(plan, config.resources, self._shapes(models), config.pack)
        notes = [*plan.notes, *notes_on_keeping(plan, Storage(config.storage_path))]
        return plan.model_copy(update={"notes": notes, "evaluated_together": together})

    # -- sources

    def _model(self, model: ModelConfig) -> _Model:
        if model.is_api:
            return _Model(model, model_identity(model), None, 0, None, is_here=True)
        weights = locate_weights(model, self.config.sources_path, self.config.offline)
        if weights.fault:
            self.faults.append(weights.fault)
        if weights.missing:
            self.missing.append(weights.missing)
        architecture = None if model.family == "other" else architecture_of(model, weights.folder, self.faults)
        parameters = model_parameters(model.family, architecture) if architecture else 0
        return _Model(model, self._identity(model, weights), architecture, parameters, weights.folder, is_here=not weights.missing)

    def _identity(self, model: ModelConfig, weights: WeightsFolder) -> dict[str, object]:
        identity = model_identity(model, weights.folder)
        return {**identity, "revision": weights.revision} if weights.revision else identity

    def _data(self, part: DataConfig) -> _Data:
        try:
            loaded = load_instructions(part, self.config.sources_path)
            return _Data(part, loaded.digest, loaded.rows, len(loaded.rows), is_here=True)
        except NotHereYet as absent:
            self.missing.append(str(absent))
            if part.declared_rows is None:
                self.faults.append(
                    Fault(f"data {part.name}", "declared_rows", "missing for data that is not here yet", "the number of rows it will have")
                )
            return _Data(part, f"not here yet: {part.name}", [], part.declared_rows or 1, is_here=False)
        except BadInput as bad:
            self.faults.extend(bad.faults)
            return _Data(part, "", [], 1, is_here=False)

    # -- runs

    def _run(self, settings: RunSettings, model: _Model, data: _Data) -> RunSpec:
        method = self.config.methods[settings.method]
        prompt = self.config.prompts[settings.prompt]
        precision, compute = self._precisions(method)
        steps_per_epoch, total = step_counts(settings, data.size)
        identity = (settings, model.identity, method, precision, data.digest, prompt, total)
        return RunSpec(
            run_key=run_key(*identity),
            trajectory_key=trajectory_key(*identity),
            settings=settings,
            model=model.config,
            method=method,
            precision=precision,
            compute_precision=compute,
            data=data.config,
            data_digest=data.digest,
            rows=data.size,
            prompt=prompt,
            deepspeed=self.config.deepspeeds[settings.deepspeed],
            steps_per_epoch=steps_per_epoch,
            total_steps=total,
            checkpoint_steps=checkpoint_steps(self.config.evaluate.every, steps_per_epoch, total),
            base_key=self._base_key(model, precision, method.double_quantisation),
            model_parameters=model.parameters,
            row_characters=self._row_characters(data, prompt),
            provisional=not (model.is_here and data.is_here),
        )

    def _base_key(self, model: _Model, precision: Precision, double_quantisation: bool) -> str:
        asked = (model.config.name, precision, double_quantisation)
        if asked not in self.base_keys:
            self.base_keys[asked] = base_key(model.identity, precision, double_quantisation)
        return self.base_keys[asked]

    def _check_checkpoints(self, settings: RunSettings, data: _Data) -> None:
        steps_per_epoch, total = step_counts(settings, data.size)
        every = self.config.evaluate.every
        count = 1 if every == "end" else total // (steps_per_epoch if every == "epoch" else int(every))
        if count > MAX_CHECKPOINTS:
            told = f"{every} would write {count} checkpoints of a run of {total} steps"
            self.faults.append(Fault(self.config.file, "evaluate.every", told, f"at most {MAX_CHECKPOINTS} checkpoints a run"))

    def _row_characters(self, data: _Data, prompt: PromptConfig) -> float:
        key = (data.config.name, prompt.name)
        if key not in self.row_characters:
            sample = data.rows[:: max(1, len(data.rows) // SAMPLE_ROWS)]
            lengths = [len(render_prompt(prompt, row)) + len(row.output) for row in sample]
            self.row_characters[key] = sum(lengths) / len(lengths) if lengths else UNKNOWN_ROW_CHARACTERS
        return self.row_characters[key]

    def _precisions(self, method: MethodConfig) -> tuple[Precision, Literal["fp32", "bf16"]]:
        """bf16 on GPUs, fp32 on CPUs; NF4 weights are computed with in the same format."""
        compute: Literal["fp32", "bf16"] = "bf16" if self.config.resources.gpus_per_worker else "fp32"
        return ("nf4" if method.quantisation == "nf4" else compute), compute

    def _bases(self, runs: list[RunSpec], models: dict[str, _Model]) -> list[BaseSpec]:
        bases: dict[str, BaseSpec] = {}
        for run in runs:
            if run.base_key not in bases:
                bases[run.base_key] = BaseSpec(
                    run_key=run.base_key,
                    model=run.model,
                    precision=run.precision,
                    compute_precision=run.compute_precision,
                    double_quantisation=run.method.double_quantisation,
                    model_parameters=run.model_parameters,
                    provisional=not models[run.model.name].is_here,
                )
        return list(bases.values())

    def _references(self, models: dict[str, _Model]) -> list[BaseSpec]:
        """The models that are evaluated as they are: in the number format that the sweep asks for, or through their address."""
        specs = []
        asked = self.config.evaluate.precision
        usual: Literal["fp32", "bf16"] = "bf16" if self.config.resources.gpus_per_worker else "fp32"
        compute: Literal["fp32", "bf16"] = asked if asked in ("fp32", "bf16") else usual
        for model in (models[name] for name in self.config.references):
            precision: Precision = "api" if model.config.is_api else "nf4" if asked == "nf4" else compute
            specs.append(
                BaseSpec(
                    run_key=base_key(model.identity, precision, double_quantisation=True),
                    model=model.config,
                    precision=precision,
                    compute_precision=compute,
                    model_parameters=model.parameters,
                    provisional=not model.is_here,
                )
            )
        return specs

    def _keep(self, evaluations: list[EvaluationSpec]) -> KeepRule:
        """The keep rule, with the evaluation that decides what is best."""
        keep, by = self.config.keep, self.config.keep.by
        asked = {
            "benchmark": by.benchmark or self.config.benchmarks[0].name,
            "shots": self.config.shots[0] if by.shots is None else by.shots,
            "prompt": self.config.prompts[by.prompt or self.config.evaluation_prompts[0]].name,
            "scoring": by.scoring or self.config.evaluate.scoring[0],
        }
        found = [
            spec.folder
            for spec in evaluations
            if {"benchmark": spec.benchmark.name, "shots": spec.shots, "prompt": spec.prompt.name, "scoring": spec.scoring} == asked
        ]
        return KeepRule(checkpoints=keep.checkpoints, metric=by.metric, evaluation=found[0], state=keep.state)

    @staticmethod
    def _shapes(models: dict[str, _Model]) -> dict[str, Architecture]:
        return {name: model.architecture for name, model in models.items() if model.architecture}


def _notes_on_repeats(combinations: int, runs: int) -> list[str]:
    repeats = combinations - runs
    if not repeats:
        return []
    verb = "is" if repeats == 1 else "are"
    unchanged = "names, spelling, deepspeed, micro_batch_size and gradient_checkpointing do not change it"
    return [f"{repeats} of {combinations} combinations {verb} the same adapter as another ({unchanged})"]


def checkpoint_steps(every: str | int, steps_per_epoch: int, total_steps: int) -> list[int]:
    """Optimizer steps after which an adapter is written: at epoch ends, every so many steps, or only at the end."""
    if every == "end":
        return [total_steps]
    stride = steps_per_epoch if every == "epoch" else int(every)
    return sorted({*range(stride, total_steps, stride), total_steps})
