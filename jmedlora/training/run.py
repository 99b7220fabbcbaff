"""One run: an adapter trained from its first step to its last."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jmedlora.config import clock
from jmedlora.config.digest import key_of
from jmedlora.config.locate import cache_dir
from jmedlora.data.instructions import load_instructions
from jmedlora.data.patience import when_there_is_room
from jmedlora.data.prompts import prompt_digest
from jmedlora.data.tokenisation import tokenise_rows
from jmedlora.models.adapters import base_name, save_adapter
from jmedlora.models.dropout import DropoutContext
from jmedlora.models.lora import ADAPTER, attach_lora
from jmedlora.plan.layout import RunFolder
from jmedlora.plan.specs import RunSpec
from jmedlora.training.batches import MiniBatches, divide
from jmedlora.training.engine import NotFinite, RunEngine, sums_over_workers
from jmedlora.training.loss import collate, labelled_tokens
from jmedlora.training.process import Worker
from jmedlora.training.records import RunRecords, library_versions
from jmedlora.training.schedule import factor
from jmedlora.training.state import SavedState, keep_newest, save_state

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")


STATE_EVERY_S = 300.0
"""What a killed run loses at most, beside the step that it was at; a state is written at every checkpoint as well."""


@dataclass(frozen=True)
class BaseModel:
    """The base model that the runs of a trial share, with its tokenizer and the digest of the tokenizer's files."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokenizer_digest: str


def digest_tokenizer(folder: Path) -> str:
    """SHA-256 over the files of a model folder that say how texts become tokens, in hex."""
    total = hashlib.sha256()
    for file in sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)}):
        total.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def train_run(
    spec: RunSpec,
    base: BaseModel,
    folder: RunFolder,
    sources: Path,
    worker: Worker,
    records: RunRecords | None,
    checkpoint_steps: list[int],
    start: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Trains one adapter and writes its checkpoints to `folder`; `base` is afterwards as it was before.

    records: on the leading worker only. checkpoint_steps: steps after which an adapter is written, the last one among them.
    start: steps that are done, whose state is in `folder`. should_stop: asked at every step on every worker; where one says
    yes, all stop after the step, with its state saved.
    Returns whether all steps are done. Raises NotFinite, on every worker alike, when loss or gradient is not a number.
    """
    rows = _TrainingSet(spec, base, sources)
    batches = MiniBatches(rows.lengths, spec.settings.batch_size, spec.settings.seed, spec.settings.length_grouping)
    if len(rows.lengths) != spec.rows or batches.steps_per_epoch != spec.steps_per_epoch:
        raise ValueError(f"run {spec.run_key}: planned with {spec.rows} rows, found {len(rows.lengths)}")
    if records is not None:
        records.tell(truncated_rows=rows.truncated)
    state = SavedState(start, folder.state(start)).tensors() if start else None
    with _adapter(spec, base.model, worker, start, state) as (adapted, engine, dropout):
        saved_at = time.monotonic()
        for step in range(start + 1, spec.total_steps + 1):
            wishes = _Wishes(worker.leads and time.monotonic() - saved_at >= STATE_EVERY_S, should_stop())
            record, wishes = _train_step(spec, step, rows, batches, engine, dropout, worker, base.tokenizer, wishes)
            if records is not None:
                records.add_step(record)
            is_checkpoint = step in checkpoint_steps
            if is_checkpoint:
                _checkpoint(spec, step, folder, adapted, engine, records)
            if is_checkpoint or wishes.state or wishes.stop:
                _save_state(spec, step, folder, engine, records)
                saved_at = time.monotonic()
            if wishes.stop and step < spec.total_steps:
                return False
    if records is not None:
        keep_newest(folder, 1)
    return True


@dataclass(frozen=True)
class _Wishes:
    """What a worker, or any of them, wants to be done after a step."""

    state: bool
    stop: bool


class _TrainingSet:
    """Tokenised rows of a run, memory-mapped."""

    def __init__(self, spec: RunSpec, base: BaseModel, sources: Path):
        loaded = load_instructions(spec.data, sources)
        if loaded.digest != spec.data_digest:
            raise ValueError(f"data {spec.data.name}: changed since the sweep was planned")
        limits = (spec.settings.max_input_tokens, spec.settings.max_target_tokens)
        identity = key_of(
            {"data": loaded.digest, "tokenizer": base.tokenizer_digest, "prompt": prompt_digest(spec.prompt), "limits": limits}
        )
        self._rows: datasets.Dataset = tokenise_rows(loaded.rows, spec.prompt, base.tokenizer, identity, *limits, cache_dir())
        table = self._rows.data
        self.lengths: np.ndarray = np.concatenate([chunk.value_lengths().to_numpy() for chunk in table["input_ids"].chunks]).astype(
            np.int64
        )
        self.prompt_lengths: np.ndarray = table["prompt_length"].to_numpy().astype(np.int64)
        self.truncated = int(table["truncated"].to_numpy().sum())

    def labelled(self, rows: list[int]) -> int:
        """Tokens of these rows that the loss counts."""
        return sum(labelled_tokens(int(self.lengths[row]), int(self.prompt_lengths[row])) for row in rows)

    def take(self, rows: list[int]) -> list[dict[str, Any]]:
        return [self._rows[row] for row in rows]


@contextmanager
def _adapter(
    spec: RunSpec, model: PreTrainedModel, worker: Worker, steps: int, state: dict[str, Tensor] | None
) -> Iterator[tuple[PeftModel, RunEngine, DropoutContext]]:
    """An adapter, fresh or as it was after `steps` steps, on an engine of its own; taken out again at the end, whatever happens."""
    dropout = DropoutContext(spec.settings.seed)
    adapted = attach_lora(model, spec.settings, spec.model.family, model.device, dropout)
    try:
        engine = RunEngine(adapted, spec.settings, spec.deepspeed.zero_stage, spec.compute_precision, worker, steps, state)
        try:
            yield adapted, engine, dropout
        finally:
            engine.close()
    finally:
        adapted.unload()
        model.eval()


def _train_step(
    spec: RunSpec,
    step: int,
    rows: _TrainingSet,
    batches: MiniBatches,
    engine: RunEngine,
    dropout: DropoutContext,
    worker: Worker,
    tokenizer: PreTrainedTokenizerBase,
    wishes: _Wishes,
) -> tuple[dict[str, Any], _Wishes]:
    """One optimizer step over all workers; returns its line of train.jsonl, and what any of the workers wishes."""
    settings, started = spec.settings, time.perf_counter()
    taken = batches.rows_of(step)
    labelled = rows.labelled(taken)
    mine = divide(taken, rows.lengths, worker.workers, settings.micro_batch_size)[worker.rank]
    total = torch.zeros((), device=worker.device)
    for place, micro_batch in enumerate(mine, start=1):
        dropout.enter(step, micro_batch.rows, worker.device)
        tensors = collate(rows.take(micro_batch.rows), int(tokenizer.pad_token_id), worker.device)
        total += engine.backward(tensors, micro_batch.weight, labelled, last=place == len(mine))
    summed, state, stop = sums_over_workers([total, torch.tensor(float(wishes.state)), torch.tensor(float(wishes.stop))])
    loss = summed / labelled
    if not math.isfinite(loss):
        raise NotFinite(f"step {step}: the loss is {loss}")
    learning_rate = settings.learning_rate * factor(step, settings, spec.total_steps)
    try:
        grad_norm = engine.step(learning_rate)
    except NotFinite as reason:
        raise NotFinite(f"step {step}: the {reason}") from None
    record = {
        "step": step,
        "epoch": step / spec.steps_per_epoch,
        "loss": loss,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "tokens": int(rows.lengths[taken].sum()),
        "seconds": time.perf_counter() - started,
        "time": clock.now(),
    }
    return record, _Wishes(state > 0, stop > 0)


def _checkpoint(spec: RunSpec, step: int, folder: RunFolder, adapted: PeftModel, engine: RunEngine, records: RunRecords | None) -> None:
    tensors = engine.adapter_tensors()
    if records is not None:
        config, base = adapted.peft_config[ADAPTER], base_name(spec.model)
        when_there_is_room(
            lambda: save_adapter(folder.checkpoint(step), tensors, config, base), f"checkpoint of step {step}", records.add_note
        )
        records.add_checkpoint(step)


def _save_state(spec: RunSpec, step: int, folder: RunFolder, engine: RunEngine, records: RunRecords | None) -> None:
    tensors = engine.state_tensors()
    if records is not None:
        facts = {"run_key": spec.run_key, "total_steps": spec.total_steps, "versions": library_versions()}
        records.sync()
        when_there_is_room(lambda: save_state(folder, step, tensors, facts), f"state of step {step}", records.add_note)
