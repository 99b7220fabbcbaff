"""Batches of prompts: which go together, what is left to do of them, and what happens when they do not fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from jmedlora.evaluation.journal import AnswersSoFar

log = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Prompts of one batch differ in length by at most this: what a longer one adds, all others are padded with.
_WIDEST_SHARE, _SLACK_TOKENS = 1.3, 32


class Asked(NamedTuple):
    """A prompt that one of the resident adapters is to answer, both by position."""

    adapter: int
    prompt: int


def answer_in_batches(
    token_ids: list[list[int]],
    answer: Callable[[list[Asked]], list[Any]],
    so_far: Sequence[AnswersSoFar],
    batch_size: int,
    width: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> None:
    """Has every prompt answered by every adapter that has no answer to it in its `so_far`, which takes what `answer` gives.

    A prompt counts for `width` of the `batch_size`, which is of one adapter: several answer the same prompts in one batch. What
    is asked at once is ordered by adapter. Batches are those of an evaluation without anything in `so_far`, less what is
    answered: after a restart between two batches the same prompts share a batch, so that rounding is the same too. One that does
    not fit into memory is halved, and so are those after it: `batch_size` of `so_far` tells. Raises torch.OutOfMemoryError for
    one prompt alone. `on_batch` is called with the number of answers so far, of all adapters, after each batch and for what is in
    `so_far`.
    """
    if on_batch is not None and any(own.answers for own in so_far):
        on_batch(sum(len(own.answers) for own in so_far))
    at_once = sum(own.batch_size for own in so_far)
    for batch in batches_of_similar_length(token_ids, max(1, batch_size // width)):
        rest = [Asked(adapter, prompt) for adapter, own in enumerate(so_far) for prompt in batch if prompt not in own.answers]
        while rest:
            asked = rest[: max(1, at_once // width)]
            answers = unless_out_of_memory(answer, asked)
            if answers is None:
                at_once = len(asked) // 2 * width
                log.warning("%d prompts at once do not fit into memory: %d from here on", len(asked), len(asked) // 2)
                torch.cuda.empty_cache()  # what is free lies in pieces of the batch that failed
                for own in so_far:
                    own.batch_size = min(own.batch_size, max(1, at_once // len(so_far)))
                continue
            for adapter, own in enumerate(so_far):
                if new := {each.prompt: given for each, given in zip(asked, answers, strict=True) if each.adapter == adapter}:
                    own.add(new)
            rest = rest[len(asked) :]
            if on_batch is not None:
                on_batch(sum(len(own.answers) for own in so_far))


def unless_out_of_memory(compute: Callable[[list[_Item]], _Result], items: list[_Item]) -> _Result | None:
    """None where memory does not suffice for more than one; only after returning is what failed free, which the error's traceback holds."""
    try:
        return compute(items)
    except torch.OutOfMemoryError:
        if len(items) == 1:
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
