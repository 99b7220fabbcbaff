"""One training step of a given shape on random weights and tokens, through the real engine: what is measured is what trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from jmedlora.models.dropout import DropoutContext
from jmedlora.models.lora import attach_lora
from jmedlora.models.random_models import random_base
from jmedlora.training.engine import RunEngine
from jmedlora.training.loss import Collated
from jmedlora.training.process import Worker
from tests.bench.cases import Case


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
    settings = case.spec().settings
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
