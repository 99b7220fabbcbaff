"""Batches of prompts: which go together, what is left to do of them, and what happens when they do not fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from jmedlora.evaluation.journal import AnswersSoFar

log = logging.getLogger(__name__)

# Prompts of one batch differ in length by at most this: what a longer one adds, all others are padded with.
_WIDEST_SHARE, _SLACK_TOKENS = 1.3, 32


def answer_in_batches(
    token_ids: list[list[int]],
    answer: Callable[[list[int]], list[Any]],
    so_far: AnswersSoFar,
    batch_size: int,
    width: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> None:
    """Has every prompt answered that has no answer in `so_far`, which takes what `answer(positions of prompts)` gives.

    A prompt counts for `width` of the `batch_size`. Batches are those of an evaluation without anything in `so_far`, less what is
    answered: after a restart between two batches the same prompts share a batch, so that rounding is the same too. One that does
    not fit into memory is halved, and so are those after it: `so_far.batch_size` tells. Raises torch.OutOfMemoryError for one
    prompt alone. `on_batch` is called with the number of prompts answered so far, after each batch and for what is in `so_far`.
    """
    if so_far.answers and on_batch is not None:
        on_batch(len(so_far.answers))
    for batch in batches_of_similar_length(token_ids, max(1, batch_size // width)):
        rest = [row for row in batch if row not in so_far.answers]
        while rest:
            rows = rest[: max(1, so_far.batch_size // width)]
            answers = _answers_unless_out_of_memory(answer, rows)
            if answers is None:
                so_far.batch_size = len(rows) // 2 * width
                log.warning("%d prompts at once do not fit into memory: %d from here on", len(rows), len(rows) // 2)
                torch.cuda.empty_cache()  # what is free lies in pieces of the batch that failed
                continue
            so_far.add(dict(zip(rows, answers, strict=True)))
            rest = rest[len(rows) :]
            if on_batch is not None:
                on_batch(len(so_far.answers))


def _answers_unless_out_of_memory(answer: Callable[[list[int]], list[Any]], rows: list[int]) -> list[Any] | None:
    """None where memory does not suffice; only after returning is the failed batch free, which the error's traceback holds."""
    try:
        return answer(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
        return None


def batches_of_similar_length(token_ids: list[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Positions of the prompts from short to long, in batches of at most `batch_size` that need little padding together."""
    batch: list[int] = []
    for row in sorted(range(len(token_ids)), key=lambda i: (len(token_ids[i]), i)):
        too_long = batch and len(token_ids[row]) > _WIDEST_SHARE * len(token_ids[batch[0]]) + _SLACK_TOKENS
        if too_long or len(batch) == batch_size:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
