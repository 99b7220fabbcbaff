"""One training step of a given shape on random weights and tokens, through the real engine: what is measured is what trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from jmedlora.config.data import DataConfig
from jmedlora.config.parts import Architecture, DeepSpeedConfig, Family, MethodConfig, ModelConfig, Precision, RandomSource
from jmedlora.config.run import RunSettings
from jmedlora.models.dropout import DropoutContext
from jmedlora.models.lora import attach_lora
from jmedlora.models.random_models import random_base
from jmedlora.plan.shapes import model_parameters
from jmedlora.plan.specs import RunSpec
from jmedlora.training.engine import RunEngine
from jmedlora.training.loss import Collated
from jmedlora.training.process import Worker
from tests.tiny import PROMPT

Compute = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Case:
    """What is trained, and how; `accumulated` micro-batches of `rows` rows make a step."""

    name: str
    family: Family
    shape: Architecture
    precision: Precision = "fp32"
    compute: Compute = "fp32"
    rank: int = 8
    targets: str = "attention"
    dropout: float = 0.0
    checkpointing: bool = False
    rows: int = 2
    input_tokens: int = 64
    target_tokens: int = 64
    stage: int = 0
    accumulated: int = 2

    def __str__(self) -> str:
        kept = "checkpointing" if self.checkpointing else "no checkpointing"
        drop = f" dropout {self.dropout}" if self.dropout else ""
        low = "" if self.precision == self.compute else f" in {self.compute}"
        return f"{self.name} {self.precision}{low} r{self.rank} {self.targets}{drop} {kept} {self.rows} rows zero{self.stage}"

    def changed(self, **changes: object) -> Case:
        return replace(self, **changes)  # type: ignore[arg-type]

    def spec(self) -> RunSpec:
        """The run as the plan would describe it."""
        method = "qlora" if self.precision == "nf4" else "lora"
        settings = RunSettings(
            model=self.name,
            method=method,
            data="random",
            prompt=PROMPT.name,
            deepspeed=f"zero{self.stage}",
            rank=self.rank,
            targets=self.targets,  # type: ignore[arg-type]
            dropout=self.dropout,
            max_steps=10,
            batch_size=self.rows * self.accumulated,
            micro_batch_size=self.rows,
            max_input_tokens=self.input_tokens,
            max_target_tokens=self.target_tokens,
            gradient_checkpointing=self.checkpointing,
        )
        model = ModelConfig(name=self.name, source=RandomSource(kind="random"), family=self.family, architecture=self.shape)
        return RunSpec.model_validate(
            {
                "run_key": "0" * 12,
                "trajectory_key": "0" * 12,
                "settings": settings,
                "model": model,
                "method": MethodConfig(name=method, quantisation="nf4" if self.precision == "nf4" else "none"),
                "precision": self.precision,
                "compute_precision": self.compute,
                "data": DataConfig(name="random", path="unused"),
                "data_digest": "",
                "rows": 1000,
                "row_characters": float(self.input_tokens + self.target_tokens),
                "prompt": PROMPT,
                "deepspeed": DeepSpeedConfig.model_validate({"zero_stage": self.stage}),
                "steps_per_epoch": 10,
                "total_steps": 10,
                "checkpoint_steps": [10],
                "base_key": "0" * 12,
                "model_parameters": model_parameters(self.family, self.shape),
            }
        )


class Rig:
    """A case on a device, ready to step."""

    def __init__(self, case: Case, adapted: PeftModel, engine: RunEngine, dropout: DropoutContext, worker: Worker):
        self.case = case
        self.adapted = adapted
        self._engine = engine
        self._dropout = dropout
        self._worker = worker
        self._step = 0
        self.batch = self._batch()

    def step(self) -> float:
        """One optimizer step; returns the mean loss of its tokens."""
        self._step += 1
        labelled = len(self.batch.targets) * self.case.accumulated
        total = torch.zeros((), device=self._worker.device)
        for place in range(self.case.accumulated):
            self._dropout.enter(self._step, range(self.case.rows), self._worker.device)
            total += self._engine.backward(self.batch, 1.0, labelled, last=place + 1 == self.case.accumulated)
        self._engine.step(1e-4)
        return float(total) / labelled

    @property
    def tokens_per_step(self) -> int:
        return self.batch.input_ids.numel() * self.case.accumulated

    def _batch(self) -> Collated:
        case, device = self.case, self._worker.device
        width = case.input_tokens + case.target_tokens
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 256, (case.rows, width), generator=generator)
        places = torch.arange(case.input_tokens - 1, width - 1)
        positions = torch.cat([places + row * width for row in range(case.rows)])
        targets = ids[:, case.input_tokens :].flatten()
        return Collated(ids.to(device), positions.to(device), targets.to(device))


@contextmanager
def rig_of(case: Case, worker: Worker, base: PreTrainedModel | None = None) -> Iterator[Rig]:
    """Builds base (unless given), adapter and engine; takes adapter and engine apart afterwards."""
    settings, linear = case.spec().settings, torch.nn.functional.linear
    in_shards = case.stage == 3 and case.precision != "nf4"
    place = torch.device("cpu") if in_shards else worker.device
    base = base or random_base(case.family, case.shape, case.precision, case.compute, True, place)
    dropout = DropoutContext(0)
    adapted = attach_lora(base, settings, case.family, place, dropout)
    try:
        engine = RunEngine(adapted, settings, case.stage, case.compute, worker)
        try:
            yield Rig(case, adapted, engine, dropout, worker)
        finally:
            engine.close()
    finally:
        adapted.unload()
        torch.nn.functional.linear = linear  # ZeRO-3 puts its own in place, for the rest of the process
