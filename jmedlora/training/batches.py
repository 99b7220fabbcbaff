"""Which rows make up which mini-batch, and how a mini-batch is divided: pure functions of numbers.

A mini-batch is what one optimizer step sees over all workers; a micro-batch is what one worker takes through the model at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jmedlora.data.mixing import combine, key_from

# Mini-batches per stretch of shuffled rows that length grouping sorts.
_GROUPED_BATCHES = 50


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `range(rows)` (int64) for one pass over the data (`epoch` from 0), whatever the library versions."""
    return np.argsort(combine(key_from("order", seed, epoch), np.arange(rows, dtype=np.uint64)), kind="stable")


def group_by_length(order: np.ndarray, lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """`order` with each stretch of 50 mini-batches sorted from long rows to short ones."""
    stretch = _GROUPED_BATCHES * batch_size
    pieces = [order[start : start + stretch] for start in range(0, len(order), stretch)]
    return np.concatenate([piece[np.argsort(-lengths[piece], kind="stable")] for piece in pieces])


class MiniBatches:
    """The rows of every optimizer step of a run; the last step of an epoch may have fewer than `batch_size`."""

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int, length_grouping: bool):
        """lengths: tokens per row."""
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._batch_size = batch_size
        self._seed = seed
        self._length_grouping = length_grouping
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._lengths) // self._batch_size)

    def rows_of(self, step: int) -> list[int]:
        """Row numbers of optimizer step `step` (1-based)."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        if epoch != self._epoch:
            order = epoch_order(len(self._lengths), self._seed, epoch)
            self._order = group_by_length(order, self._lengths, self._batch_size) if self._length_grouping else order
            self._epoch = epoch
        start = place * self._batch_size
        return self._order[start : start + self._batch_size].tolist()


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one worker takes at once; weight 0 where a row only fills a worker's place."""

    rows: list[int]
    weight: float = 1.0


def divide(rows: Sequence[int], lengths: Sequence[int] | np.ndarray, workers: int, micro_batch_size: int | None) -> list[list[MicroBatch]]:
    """The micro-batches of a mini-batch, per worker: the same number for each, of at most `micro_batch_size` rows.

    lengths: tokens of every row of the data set. Rows of similar length come together, and long ones first, so that
    little is padded, the workers wait little for each other, and memory is short at the start or never.
    """
    size = micro_batch_size or -(-len(rows) // workers)
    rounds = -(-len(rows) // (workers * size))
    places = rounds * workers
    by_length = sorted(rows, key=lambda row: (-int(lengths[row]), row))
    bounds = [len(by_length) * place // places for place in range(places + 1)]
    pieces = [by_length[start:end] for start, end in pairwise(bounds)]
    micro_batches = [MicroBatch(piece) if piece else MicroBatch([by_length[-1]], 0.0) for piece in pieces]
    return [micro_batches[worker::workers] for worker in range(workers)]
