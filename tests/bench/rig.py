"""One training step of a given shape on random weights and tokens, through the real engine: what is measured is what trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from jmedlora.models.dropout import RowsOfAdapter
from jmedlora.models.lora import AdapterPack, Shape, target_modules
from jmedlora.models.random_models import random_base
from jmedlora.training.engine import PackEngine
from jmedlora.training.loss import Collated
from jmedlora.training.process import Worker
from tests.bench.cases import Case


class Rig:
    """A case on a device, ready to step; each of its adapters has rows of its own."""

    def __init__(self, case: Case, pack: AdapterPack, engine: PackEngine, worker: Worker):
        self.case = case
        self._pack = pack
        self._engine = engine
        self._worker = worker
        self._step = 0
        self.batch = self._batch()

    def step(self) -> float:
        """One optimizer step of every adapter; returns the mean loss of all tokens."""
        self._step += 1
        count = self.case.adapters
        labelled = len(self.batch.targets) // count * self.case.accumulated
        total = torch.zeros((), device=self._worker.device)
        for place in range(self.case.accumulated):
            self._pack.enter(
                [RowsOfAdapter(range(each * self.case.rows, (each + 1) * self.case.rows), self._step) for each in range(count)]
            )
            total += self._engine.backward(self.batch, [labelled] * count, last=place + 1 == self.case.accumulated).sum()
        self._engine.step([1e-4] * count)
        return float(total) / (labelled * count)

    @property
    def tokens_per_step(self) -> int:
        """Of all adapters."""
        return self.batch.input_ids.numel() * self.case.accumulated

    def _batch(self) -> Collated:
        case, device = self.case, self._worker.device
        rows, width = case.rows * case.adapters, case.input_tokens + case.target_tokens
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 256, (rows, width), generator=generator)
        places = torch.arange(case.input_tokens - 1, width - 1)
        positions = torch.cat([places + row * width for row in range(rows)])
        targets = ids[:, case.input_tokens :].flatten()
        adapters = torch.arange(case.adapters).repeat_interleave(case.rows * case.target_tokens)
        return Collated(*(each.to(device) for each in (ids, positions, targets, adapters)))


@contextmanager
def rig_of(case: Case, worker: Worker, base: PreTrainedModel | None = None) -> Iterator[Rig]:
    """Builds base (unless given), adapters and engine; takes adapters and engine apart afterwards."""
    settings = case.spec().settings
    in_shards = case.stage == 3 and case.precision != "nf4"
    place = torch.device("cpu") if in_shards else worker.device
    base = base or random_base(case.family, case.shape, case.precision, case.compute, True, place)
    targets = target_modules(base, settings, case.family)
    pack = AdapterPack(base, targets, [Shape.of(settings)] * case.adapters, place)
    try:
        engine = PackEngine(pack, [settings] * case.adapters, case.stage, case.compute, worker)
        try:
            yield Rig(case, pack, engine, worker)
        finally:
            engine.close()
    finally:
        pack.detach()
