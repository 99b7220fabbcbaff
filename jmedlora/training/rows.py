"""The tokenised rows that a run trains on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jmedlora.config.digest import key_of
from jmedlora.config.locate import cache_dir
from jmedlora.data.instructions import load_instructions
from jmedlora.data.prompts import prompt_digest
from jmedlora.data.tokenisation import tokenise_rows
from jmedlora.plan.specs import RunSpec
from jmedlora.training.batches import MiniBatches
from jmedlora.training.loss import Row, labelled_tokens

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")


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


class TrainingSet:
    """Tokenised rows of a run, memory-mapped, and the mini-batches that they are taken in."""

    def __init__(self, spec: RunSpec, base: BaseModel, sources: Path):
        """Raises ValueError where the data are not those that the run was planned with."""
        loaded = load_instructions(spec.data, sources)
        if loaded.digest != spec.data_digest:
            raise ValueError(f"data {spec.data.name}: changed since the sweep was planned")
        limits = (spec.settings.max_input_tokens, spec.settings.max_target_tokens)
        identity = key_of(
            {"data": loaded.digest, "tokenizer": base.tokenizer_digest, "prompt": prompt_digest(spec.prompt), "limits": limits}
        )
        # held for its memory map, which the arrays below are views of
        self._rows = tokenise_rows(loaded.rows, spec.prompt, base.tokenizer, identity, *limits, cache_dir())
        table = self._rows.data
        chunks = table["input_ids"].chunks
        self._tokens = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in chunks]
        self._starts = np.cumsum([0, *map(len, chunks)])
        """The first row of each chunk."""
        self.lengths: np.ndarray = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks]).astype(np.int64)
        self._prompt_lengths: np.ndarray = table["prompt_length"].to_numpy().astype(np.int64)
        self.truncated = int(table["truncated"].to_numpy().sum())
        settings = spec.settings
        self.batches = MiniBatches(self.lengths, settings.batch_size, settings.seed, settings.length_grouping)
        if len(self.lengths) != spec.rows or self.batches.steps_per_epoch != spec.steps_per_epoch:
            raise ValueError(f"run {spec.run_key}: planned with {spec.rows} rows, found {len(self.lengths)}")

    def labelled(self, rows: list[int]) -> int:
        """Tokens of these rows that the loss counts."""
        return sum(labelled_tokens(int(self.lengths[row]), int(self._prompt_lengths[row])) for row in rows)

    def tokens(self, rows: list[int]) -> int:
        """All tokens of these rows."""
        return int(self.lengths[rows].sum())

    def take(self, rows: list[int]) -> list[Row]:
        """Tokens of rows."""
        found = []
        for row, chunk in zip(rows, np.searchsorted(self._starts, rows, side="right") - 1, strict=True):
            (offsets, values), place = self._tokens[chunk], row - self._starts[chunk]
            found.append(Row(values[offsets[place] : offsets[place + 1]], int(self._prompt_lengths[row])))
        return found
