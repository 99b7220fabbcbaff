"""Trajectories in training together: their adapters in one base model, on one engine, an optimizer step of each at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jmedlora.config import clock
from jmedlora.models.dropout import RowsOfAdapter
from jmedlora.models.lora import AdapterPack, Shape
from jmedlora.plan.costs import tokens_worth_a_micro_batch
from jmedlora.plan.memory import CACHED_TOKENS
from jmedlora.training.batches import divide
from jmedlora.training.engine import PackEngine
from jmedlora.training.loss import collate
from jmedlora.training.optimizer_state import Start
from jmedlora.training.process import Worker
from jmedlora.training.rows import BaseModel
from jmedlora.training.schedule import factor
from jmedlora.training.trajectory import Trajectory


class Wishes(NamedTuple):
    """What a worker, or any of them, wants to be done after a step."""

    state: bool
    stop: bool


class Stepped(NamedTuple):
    """How an optimizer step went for one trajectory: its line of train.jsonl, or why there is none."""

    record: dict[str, Any] | None
    problem: str = ""


class TrainingPack:
    """The adapters of some trajectories, ready to step. Every worker calls every method alike."""

    def __init__(self, trajectories: Sequence[Trajectory], base: BaseModel, pack: AdapterPack, engine: PackEngine, worker: Worker):
        self._trajectories, self._base, self._pack, self._engine, self._worker = trajectories, base, pack, engine, worker
        linear = [module for module in base.model.base_model.modules() if isinstance(module, nn.Linear)]
        weights = sum(module.in_features * module.out_features for module in linear)
        layers: int = base.model.config.num_hidden_layers
        self._worth_tokens = tokens_worth_a_micro_batch(layers, weights, worker.device.type == "cuda", torch.get_num_threads())
        self._most_tokens = CACHED_TOKENS if worker.device.type == "cpu" else math.inf

    def adapter_tensors(self, place: int) -> dict[str, Tensor]:
        """The weights of one adapter, as a checkpoint holds them."""
        return self._engine.adapter_tensors(place)

    def state_tensors(self, place: int) -> dict[str, Tensor]:
        """Weights and moments of one adapter, after its first step."""
        return self._engine.state_tensors(place)

    def step(self, wishes: Wishes) -> tuple[list[Stepped], Wishes]:
        """The next optimizer step of every trajectory; returns how it went for each, and what any of the workers wishes.

        An adapter whose loss or gradient is not finite stays as it was, and the others do not notice.
        """
        started = time.perf_counter()
        steps = [each.step + 1 for each in self._trajectories]
        taken = [each.rows.batches.rows_of(step) for each, step in zip(self._trajectories, steps, strict=True)]
        labelled = [each.rows.labelled(rows) for each, rows in zip(self._trajectories, taken, strict=True)]
        losses, broken, wishes = self._backward(steps, taken, labelled, wishes)
        settings = [each.lead.settings for each in self._trajectories]
        rates = [
            own.learning_rate * factor(step, own, each.lead.total_steps)
            for own, step, each in zip(settings, steps, self._trajectories, strict=True)
        ]
        norms = self._engine.step(rates, broken)
        seconds = (time.perf_counter() - started) / len(steps)
        stepped = []
        for place, each in enumerate(self._trajectories):
            loss, step = losses[place] / labelled[place], steps[place]
            if not math.isfinite(loss):
                stepped.append(Stepped(None, f"step {step}: the loss is {loss}"))
            elif not math.isfinite(norms[place]):
                stepped.append(Stepped(None, f"step {step}: the gradient is not finite"))
            else:
                record = {
                    "step": step,
                    "epoch": step / each.lead.steps_per_epoch,
                    "loss": loss,
                    "learning_rate": rates[place],
                    "grad_norm": norms[place],
                    "tokens": each.rows.tokens(taken[place]),
                    "seconds": seconds,
                    "time": clock.now(),
                }
                stepped.append(Stepped(record))
        return stepped, wishes

    def _backward(
        self, steps: list[int], taken: list[list[int]], labelled: list[int], wishes: Wishes
    ) -> tuple[list[float], set[int], Wishes]:
        """The gradients of a mini-batch of each; returns summed losses, adapters whose loss is not finite, and wishes, over all workers."""
        worker, count = self._worker, len(steps)
        lengths = [each.rows.lengths for each in self._trajectories]
        micro_batch_size = self._trajectories[0].lead.settings.micro_batch_size
        mine = divide(taken, lengths, worker.workers, micro_batch_size, self._worth_tokens, self._most_tokens)[worker.rank]
        total = torch.zeros(count, device=worker.device)
        for place, micro_batch in enumerate(mine, start=1):
            self._pack.enter([RowsOfAdapter(rows, step) for rows, step in zip(micro_batch.rows, steps, strict=True)])
            rows = [each.rows.take(own) for each, own in zip(self._trajectories, micro_batch.rows, strict=True)]
            tensors = collate(rows, int(self._base.tokenizer.pad_token_id), worker.device, micro_batch.is_filler)
            total = total + self._engine.backward(tensors, labelled, last=place == len(mine))
        summed = _sums_over_workers([total, torch.tensor([float(wishes.state), float(wishes.stop)])])
        losses_of_all = summed[:count]
        broken = {place for place, loss in enumerate(losses_of_all) if not math.isfinite(loss)}
        return losses_of_all, broken, Wishes(summed[count] > 0, summed[count + 1] > 0)


@contextmanager
def training_pack(trajectories: Sequence[Trajectory], base: BaseModel, worker: Worker) -> Iterator[TrainingPack]:
    """The adapters of trajectories, fresh or as they were, in the base model; taken out again at the end, whatever happens."""
    leads = [each.lead for each in trajectories]
    shapes = [Shape.of(lead.settings) for lead in leads]
    pack = AdapterPack(base.model, trajectories[0].targets, shapes, base.model.device)
    try:
        starts = [Start(each.step, each.state) for each in trajectories]
        settings = [lead.settings for lead in leads]
        engine = PackEngine(pack, settings, leads[0].deepspeed.zero_stage, leads[0].compute_precision, worker, starts)
        for each in trajectories:
            each.state = None  # it is on the engine now
        try:
            yield TrainingPack(trajectories, base, pack, engine, worker)
        finally:
            engine.close()
    finally:
        pack.detach()
        base.model.eval()


def _sums_over_workers(values: list[Tensor]) -> list[float]:
    """The sums of each value of some vectors over all workers, on the first one's device."""
    device = values[0].device
    precise = torch.float64 if device.type == "cpu" else torch.float32
    totals = torch.cat([value.detach().to(device, precise) for value in values])
    dist.all_reduce(totals)
    return totals.tolist()
