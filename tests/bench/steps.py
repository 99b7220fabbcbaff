"""Training steps, ours and what others would write, in turns on one base model: the ratios `step-short`, `step-long` and `single`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jmedlora.config.parts import Architecture, ResourcesConfig
from jmedlora.config.run import RunSettings
from jmedlora.models.dropout import RowsOfAdapter
from jmedlora.models.lora import AdapterPack, Shape, target_modules
from jmedlora.models.random_models import random_base
from jmedlora.plan.memory import CACHED_TOKENS
from jmedlora.plan.packing import make_trials
from jmedlora.plan.specs import RunSpec
from jmedlora.training.batches import divide
from jmedlora.training.engine import PackEngine
from jmedlora.training.loss import Collated
from jmedlora.training.process import Worker, ensure_process_group, this_worker
from tests.bench.cases import Case
from tests.bench.explaining import where_time_goes
from tests.bench.loops import looped, plain
from tests.bench.measuring import Arm, Row, Taken, in_turns, row_of
from tests.bench.workload import LEARNING_RATE, RANKS, SHAPES

TWELVE = RANKS * 3
VOCABULARY = 8000
CLOSE = 1e-5
"""Weights after a few steps are taken for the same within this."""


def architecture(size: str) -> Architecture:
    """The shape of a workload's model."""
    shape = SHAPES[size]
    heads = {"heads": shape["num_attention_heads"], "kv_heads": shape["num_attention_heads"]}
    widths = {"hidden_size": shape["hidden_size"], "intermediate_size": shape["intermediate_size"]}
    return Architecture(layers=shape["num_hidden_layers"], vocabulary=VOCABULARY, max_positions=4096, **widths, **heads)


class Trained(NamedTuple):
    """Of every adapter: the losses of its steps, and its weights after them."""

    losses: list[list[float]]
    weights: list[dict[str, Tensor]]


@dataclass(frozen=True)
class Work:
    """Adapters of some ranks, each with rows of its own, all of the same length; a first step that is not timed, and `steps` that are."""

    size: str
    ranks: Sequence[int]
    rows: int
    """Of each adapter and step."""
    input_tokens: int
    target_tokens: int
    steps: int

    @property
    def tokens(self) -> int:
        """Of each adapter and step."""
        return self.rows * (self.input_tokens + self.target_tokens)

    @cached_property
    def worker(self) -> Worker:
        ensure_process_group()
        return this_worker()

    @cached_property
    def base(self) -> PreTrainedModel:
        return random_base("llama", architecture(self.size), "fp32", "fp32", True, self.worker.device)

    @cached_property
    def specs(self) -> list[RunSpec]:
        """As the plan would describe them; adapters of equal rank differ in their seed."""
        found = []
        for place, rank in enumerate(self.ranks):
            case = Case(
                self.size, "llama", architecture(self.size), rank=rank, targets="all-linear", rows=self.rows,
                input_tokens=self.input_tokens, target_tokens=self.target_tokens, accumulated=1,
            )  # fmt: skip
            spec = case.spec()
            settings = spec.settings.model_copy(update={"seed": place, "learning_rate": LEARNING_RATE, "alpha": "2r"})
            key = f"{place:012d}"
            found.append(spec.model_copy(update={"run_key": key, "trajectory_key": key, "settings": settings}))
        return found

    @property
    def settings(self) -> list[RunSettings]:
        return [spec.settings for spec in self.specs]

    def pack(self) -> int:
        """How many adapters `pack: auto` trains at once."""
        device = self.worker.device.type
        resources = ResourcesConfig(gpus_per_worker=1, max_gpus=1) if device == "cuda" else ResourcesConfig()
        trials = make_trials(self.specs, resources, {self.size: architecture(self.size)}, "auto", True)
        return max(trial.pack for trial in trials)

    @cached_property
    def ids(self) -> Tensor:
        """(steps, adapters, rows, tokens)"""
        width = self.input_tokens + self.target_tokens
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, VOCABULARY, (1 + self.steps, len(self.ranks), self.rows, width), generator=generator)

    def batch(self, step: int, first: int, last: int) -> Collated:
        """What adapters `first` to `last` (exclusive) take in a step (from 0)."""
        return self.collated(self.ids[step, first:last])

    def collated(self, ids: Tensor) -> Collated:
        """ids: (adapters, rows, tokens)."""
        count, rows, width = ids.shape
        places = torch.arange(self.input_tokens - 1, width - 1)
        positions = torch.cat([places + row * width for row in range(count * rows)])
        adapters = torch.arange(count).repeat_interleave(rows * self.target_tokens)
        tensors = ids.flatten(0, 1), positions, ids[..., self.input_tokens :].flatten(), adapters
        return Collated(*(each.to(self.worker.device) for each in tensors))

    def timed(self, step: Callable[[Collated], Any], first: int, last: int) -> tuple[float, list[Any]]:
        """Seconds of the timed steps of some adapters, and what all steps returned."""
        batches = [self.batch(place, first, last) for place in range(1 + self.steps)]
        found = [step(batches[0])]
        self._wait()
        started = time.perf_counter()
        found += [step(batch) for batch in batches[1:]]
        self._wait()
        return time.perf_counter() - started, found

    def _wait(self) -> None:
        if self.worker.device.type == "cuda":
            torch.cuda.synchronize()

    def gflops(self, seconds: float) -> float:
        """Of the timed steps: products with the base's weights, forward and backward, and the logits of labelled tokens."""
        shape = SHAPES[self.size]
        hidden = shape["hidden_size"]
        linear = shape["num_hidden_layers"] * (4 * hidden + 3 * shape["intermediate_size"]) * hidden
        flop = 4 * self.tokens * linear + 4 * self.rows * self.target_tokens * hidden * VOCABULARY
        return self.steps * len(self.ranks) * flop / seconds / 1e9

    def __str__(self) -> str:
        ranks = ", ".join(map(str, sorted(set(self.ranks))))
        return f"{self.size}: {len(self.ranks)} adapters of rank {ranks}, {self.rows} rows of {self.tokens // self.rows} tokens each"


class _Packed:
    """Some adapters on an engine, as `TrainingPack` steps them."""

    def __init__(self, work: Work, pack: AdapterPack, engine: PackEngine):
        self._work, self._pack, self._engine = work, pack, engine
        self._steps = 0

    def step(self, batch: Collated) -> list[float]:
        """One optimizer step of each; their mean losses."""
        self._steps += 1
        count, rows, width = len(self._pack), self._work.rows, batch.input_ids.shape[1]
        labelled, ids = len(batch.targets) // count, batch.input_ids.view(count, rows, width)
        total = torch.zeros(count, device=batch.input_ids.device)
        most = CACHED_TOKENS if self._work.worker.device.type == "cpu" else math.inf
        (parts,) = divide([range(rows)] * count, [[width] * rows] * count, 1, None, math.inf, most)
        for place, part in enumerate(parts, start=1):
            self._pack.enter([RowsOfAdapter(own, self._steps) for own in part.rows])
            micro_batch = batch if len(parts) == 1 else self._work.collated(ids[:, part.rows[0]])
            total += self._engine.backward(micro_batch, [labelled] * count, last=place == len(parts))
        self._engine.step([LEARNING_RATE] * count)
        return (total / labelled).tolist()

    def weights(self) -> list[dict[str, Tensor]]:
        """The adapters as PEFT's files name them."""
        return [self._engine.adapter_tensors(adapter) for adapter in range(len(self._pack))]


@contextmanager
def packed(work: Work, settings: Sequence[RunSettings]) -> Iterator[_Packed]:
    """The adapters in the base and on an engine, and out of it again."""
    targets = target_modules(work.base, settings[0], "llama")
    pack = AdapterPack(work.base, targets, [Shape.of(own) for own in settings], work.worker.device)
    try:
        engine = PackEngine(pack, settings, 0, "fp32", work.worker)
        try:
            yield _Packed(work, pack, engine)
        finally:
            engine.close()
    finally:
        pack.detach()


def ours(work: Work, pack: int) -> Arm:
    """All adapters, `pack` at once."""

    def turn() -> Taken:
        total, trained = 0.0, Trained([], [])
        for first in range(0, len(work.ranks), pack):
            last = min(first + pack, len(work.ranks))
            with packed(work, work.settings[first:last]) as loop:
                seconds, losses = work.timed(loop.step, first, last)
                total += seconds
                trained.losses.extend(map(list, zip(*losses, strict=True)))
                trained.weights.extend(loop.weights())
        return Taken(total, trained)

    return turn


def one_by_one(work: Work, all_logits: bool) -> Arm:
    """PEFT, one adapter after another."""

    def turn() -> Taken:
        total, trained = 0.0, Trained([], [])
        for place, settings in enumerate(work.settings):
            with plain(work.base, settings, all_logits) as loop:
                seconds, losses = work.timed(loop.step, place, place + 1)
                total += seconds
                trained.losses.append(losses)
                trained.weights.append(loop.weights())
        return Taken(total, trained)

    return turn


def loop_over_adapters(work: Work) -> Arm:
    """All adapters at once, by a Python loop in every layer."""

    def turn() -> Taken:
        with looped(work.base, work.settings) as loop:
            seconds, losses = work.timed(loop.step, 0, len(work.ranks))
            return Taken(seconds, Trained(list(map(list, zip(*losses, strict=True))), loop.weights()))

    return turn


def agreement(ours: Trained, theirs: Trained) -> str:
    """How far losses (relative) and weights of two arms are apart; both began with the same adapters and took the same rows.

    Adam divides a gradient by its own size, so that where one is no larger than rounding, a weight moves as far as any other.
    """
    losses = max(
        abs(a - b) / abs(b) for own, other in zip(ours.losses, theirs.losses, strict=True) for a, b in zip(own, other, strict=True)
    )
    apart = torch.cat([
        (own[name] - other[name]).abs().flatten() for own, other in zip(ours.weights, theirs.weights, strict=True) for name in own
    ])  # fmt: skip
    told = f"same start and rows: losses at most {losses:.0e} apart, weights {float(apart.max()):.0e} after {len(ours.losses[0])} steps"
    beyond = int((apart > CLOSE).sum())
    return f"{told} ({beyond} of {len(apart)} above {CLOSE:.0e})" if beyond else told


def compared(name: str, work: Work, pack: int, baselines: dict[str, Arm], pairs: int) -> list[Row]:
    """A row for each baseline; all arms take turns."""
    own = ours(work, pack)
    mine, *others = in_turns([own, *baselines.values()], pairs)
    words = f"{work}; pack: auto trains {pack} at once"
    goes = where_time_goes(own, "ours")
    rows = []
    for (baseline, arm), theirs in zip(baselines.items(), others, strict=True):
        speeds = ", ".join(f"{work.gflops(min(each.amount for each in taken)):.0f}" for taken in (mine, theirs))
        notes = [words, f"GFLOP/s of products with the base's weights, ours and {baseline}: {speeds}", goes, where_time_goes(arm, baseline)]
        rows.append(row_of(name, baseline, mine, theirs, agreement(mine[-1].found, theirs[-1].found), notes=notes))
    return rows


def step_short(pairs: int) -> list[Row]:
    """Twelve adapters, 64 tokens each."""
    work = Work("tiny", TWELVE, rows=1, input_tokens=48, target_tokens=16, steps=20)
    return compared("step-short", work, work.pack(), {"B1": one_by_one(work, True), "B2": loop_over_adapters(work)}, pairs)


def step_long(pairs: int) -> list[Row]:
    """Twelve adapters, 1024 tokens each."""
    work = Work("small", TWELVE, rows=4, input_tokens=240, target_tokens=16, steps=1)
    return compared("step-long", work, work.pack(), {"B1": one_by_one(work, True)}, pairs)


def single(pairs: int) -> list[Row]:
    """One adapter, with the same loss in both arms."""
    work = Work("small", (16,), rows=8, input_tokens=240, target_tokens=16, steps=4)
    return compared("single", work, 1, {"peft": one_by_one(work, False)}, pairs)
