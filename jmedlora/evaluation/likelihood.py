"""Log-likelihood of each choice as the continuation of its question's prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from jmedlora.evaluation.batching import Asked, answer_in_batches
from jmedlora.evaluation.generation import EncodedPrompts
from jmedlora.evaluation.journal import AnswersSoFar
from jmedlora.evaluation.prefix import ReadPrompts, read_prompts, read_shared_prefix
from jmedlora.evaluation.resident import Resident
from jmedlora.evaluation.results import Likelihoods


@torch.inference_mode()
def weigh_choices(
    resident: Resident,
    prompts: EncodedPrompts,
    choices: Sequence[Sequence[list[int]]],
    batch_size: int,
    so_far: Sequence[AnswersSoFar],
    on_batch: Callable[[int], None] | None = None,
) -> list[list[Likelihoods]]:
    """For each resident adapter and prompt, the sum of the log-probabilities of each choice's tokens (nats), in the prompts' order.

    `choices`: the token ids of each prompt's choices, at least one token each. A batch holds at most `batch_size` continuations
    (at least one question's) of each adapter. Prompts are read once: their keys and values are shared by their choices, and those
    of what all prompts begin with by all. `on_batch` is called after each batch with the number of prompts done so far. Prompts
    that are in an adapter's `so_far` (`sums` and `tokens` by position) are not weighed again, and it takes what is. A batch that
    does not fit into memory is halved.
    """
    token_ids = prompts.token_ids
    widest = max((len(each) for each in choices), default=1)
    longest = max((len(ids) for each in choices for ids in each), default=0)
    prefix = read_shared_prefix(resident, token_ids)

    def weigh(asked: list[Asked]) -> list[dict[str, list[Any]]]:
        read = read_prompts(resident, asked, token_ids, prefix, longest)
        return _weigh_batch(resident, read, [choices[each.prompt] for each in asked], [each.adapter for each in asked])

    answer_in_batches(token_ids, weigh, so_far, batch_size, widest, on_batch)
    return [
        [Likelihoods(tuple(own.answers[prompt]["sums"]), tuple(own.answers[prompt]["tokens"])) for prompt in range(len(token_ids))]
        for own in so_far
    ]


def _weigh_batch(
    resident: Resident, read: ReadPrompts, choices: Sequence[Sequence[list[int]]], adapters: Sequence[int]
) -> list[dict[str, list[Any]]]:
    """The choices of a batch of prompts, as rows behind them. adapters: of the prompts."""
    owners = [row for row, own in enumerate(choices) for _ in own]
    continuations = [ids for own in choices for ids in own]
    first = torch.log_softmax(read.logits.float(), -1)
    sums = [float(first[owner, ids[0]]) for owner, ids in zip(owners, continuations)]
    width = max(map(len, continuations)) - 1
    if width:
        resident.enter([adapters[owner] for owner in owners])
        for index, value in enumerate(_weigh_rests(resident, read, owners, continuations, width)):
            sums[index] += value
    values, lengths = iter(sums), iter(map(len, continuations))
    return [{"sums": [next(values) for _ in own], "tokens": [next(lengths) for _ in own]} for own in choices]


def _weigh_rests(resident: Resident, read: ReadPrompts, owners: list[int], continuations: list[list[int]], width: int) -> list[float]:
    """Sums over all tokens but the first; what is padded behind a continuation is computed and left out."""
    model, device = resident.model, resident.device
    index = torch.tensor(owners, device=device)
    read.cache.batch_select_indices(index)
    tokens = torch.tensor([[*ids[:-1], *[0] * (width - len(ids) + 1)] for ids in continuations], device=device)
    mask = torch.cat([read.mask[index], read.mask.new_ones(len(owners), width)], dim=1)
    positions = read.positions[index] + torch.arange(width, device=device)
    logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=read.cache, use_cache=True).logits
    sums = []
    for row, ids in enumerate(continuations):  # row by row: the logarithms of a whole batch of logits would take its memory twice
        following = torch.tensor(ids[1:], device=device)
        likely = torch.log_softmax(logits[row, : len(following)].float(), -1)
        sums.append(float(likely.gather(-1, following[:, None]).sum()))
    return sums
