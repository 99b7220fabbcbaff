"""Which rows make up which mini-batch, and how a mini-batch is divided: pure functions of numbers.

A mini-batch is what one optimizer step sees over all workers; a micro-batch is what one worker takes through the model at once.
"""

from __future__ import annotations

import math
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
    """What one worker takes through the model at once: the rows of each adapter.

    With `is_filler` they are there for the other workers' sake alone, which wait for this one, and count nothing.
    """

    rows: list[list[int]]
    is_filler: bool = False


def divide(
    rows: Sequence[Sequence[int]],
    lengths: Sequence[Sequence[int] | np.ndarray],
    workers: int,
    micro_batch_size: int | None,
    worth_tokens: float,
    most_tokens: float = math.inf,
) -> list[list[MicroBatch]]:
    """The micro-batches of the adapters' mini-batches, per worker: the same number for each.

    rows: of each adapter, its mini-batch. lengths: of each adapter, tokens of every row of its data set. A worker takes at most
    `micro_batch_size` rows of each adapter at once; a further micro-batch has to save `worth_tokens` of padding, or be needed
    for none to have more than `most_tokens`, padding included (but for a single row of each adapter). Rows of similar length
    come together, and long ones first, so that little is padded, the workers wait little for each other, and memory is short at
    the start or never.
    """
    by_length = [sorted(own, key=lambda row, known=known: (-int(known[row]), row)) for own, known in zip(rows, lengths, strict=True)]  # type: ignore[misc]
    count = max(map(len, by_length))
    # the longest row of every adapter, the second longest of every adapter, and so on: adapters have equal numbers of rows in a micro-batch
    ranks = [max(int(known[own[at]]) for own, known in zip(by_length, lengths, strict=True) if at < len(own)) for at in range(count)]
    micro_batches: list[list[MicroBatch]] = [[] for _ in range(workers)]
    for start, end in _rounds(np.asarray(ranks), len(rows), workers, micro_batch_size or count, worth_tokens, most_tokens):
        for worker in range(workers):
            first, last = (start + (end - start) * place // workers for place in (worker, worker + 1))
            taken = [own[first:last] for own in by_length]
            is_filler = not any(taken)
            micro_batches[worker].append(MicroBatch(_shortest(by_length) if is_filler else taken, is_filler))
    return micro_batches


def _rounds(lengths: np.ndarray, adapters: int, workers: int, most: int, worth: float, most_tokens: float) -> list[tuple[int, int]]:
    """Stretches of `lengths` (descending), each of at most `most` a worker, cut where that saves padding worth a micro-batch.

    What still has too many tokens for a worker is cut into equal parts.
    """
    pieces = -(-len(lengths) // (workers * most))
    bounds = [len(lengths) * piece // pieces for piece in range(pieces + 1)]
    rounds = []
    waiting = [(start, end) for start, end in pairwise(bounds)][::-1]
    while waiting:
        start, end = waiting.pop()
        saved = (lengths[start] - lengths[start:end]) * np.arange(end - start, 0, -1) * adapters
        cut = int(saved.argmax())
        if saved[cut] < worth:
            shares = -(-(end - start) // workers)
            too_many = shares * int(lengths[start]) * adapters / most_tokens
            cut = workers * -(-shares // math.ceil(too_many)) if too_many > 1 and shares > 1 else 0
        if cut:
            waiting += [(start + cut, end), (start, start + cut)]
        else:
            rounds.append((start, end))
    return rounds


def _shortest(by_length: list[list[int]]) -> list[list[int]]:
    """One row, of one adapter."""
    owner = next(place for place, own in enumerate(by_length) if own)
    return [own[-1:] if place == owner else [] for place, own in enumerate(by_length)]
