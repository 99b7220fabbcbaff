"""Log-likelihood of each choice as the continuation of its question's prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from jmedlora.evaluation.batching import answer_in_batches
from jmedlora.evaluation.generation import EncodedPrompts
from jmedlora.evaluation.journal import AnswersSoFar
from jmedlora.evaluation.prefix import PromptBatch, lay_out, read_shared_prefix
from jmedlora.evaluation.results import Likelihoods


@torch.inference_mode()
def weigh_choices(
    model: PreTrainedModel,
    prompts: EncodedPrompts,
    choices: Sequence[Sequence[list[int]]],
    batch_size: int,
    device: torch.device | str,
    on_batch: Callable[[int], None] | None = None,
    so_far: AnswersSoFar | None = None,
) -> list[Likelihoods]:
    """For each prompt, the sum of the log-probabilities of each of its choices' tokens (nats), in the prompts' order.

    `choices`: the token ids of each prompt's choices, at least one token each. A batch holds at most `batch_size` continuations
    (at least one question's). Prompts are read once: their keys and values are shared by their choices, and those of what all
    prompts begin with by all. `on_batch` is called after each batch with the number of prompts done so far. Prompts that are
    in `so_far` (`sums` and `tokens` by position) are not weighed again, and it takes what is. A batch that does not fit into
    memory is halved.
    """
    so_far = so_far or AnswersSoFar(batch_size)
    token_ids = prompts.token_ids
    widest = max((len(each) for each in choices), default=1)
    prefix = read_shared_prefix(model, token_ids, device)

    def weigh(rows: list[int]) -> list[dict[str, list[Any]]]:
        batch = lay_out([token_ids[row] for row in rows], prefix, device)
        return _weigh_batch(model, batch, [choices[row] for row in rows], device)

    answer_in_batches(token_ids, weigh, so_far, batch_size, widest, on_batch)
    weighed = (so_far.answers[row] for row in range(len(token_ids)))
    return [Likelihoods(tuple(each["sums"]), tuple(each["tokens"])) for each in weighed]


def _weigh_batch(
    model: PreTrainedModel, batch: PromptBatch, choices: Sequence[Sequence[list[int]]], device: torch.device | str
) -> list[dict[str, list[Any]]]:
    """One batch: the prompts once, then all their choices as rows behind them."""
    output = model(
        input_ids=batch.tokens,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        past_key_values=batch.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    owners = [row for row, own in enumerate(choices) for _ in own]
    continuations = [ids for own in choices for ids in own]
    first = torch.log_softmax(output.logits[:, -1].float(), -1)
    sums = [float(first[owner, ids[0]]) for owner, ids in zip(owners, continuations)]
    width = max(map(len, continuations)) - 1
    if width:
        for index, value in enumerate(_weigh_rests(model, batch, owners, continuations, width, device)):
            sums[index] += value
    values, lengths = iter(sums), iter(map(len, continuations))
    return [{"sums": [next(values) for _ in own], "tokens": [next(lengths) for _ in own]} for own in choices]


def _weigh_rests(
    model: PreTrainedModel, batch: PromptBatch, owners: list[int], continuations: list[list[int]], width: int, device: torch.device | str
) -> list[float]:
    """Sums over all tokens but the first; what is padded behind a continuation is computed and left out."""
    index = torch.tensor(owners, device=device)
    batch.cache.batch_select_indices(index)
    tokens = torch.tensor([[*ids[:-1], *[0] * (width - len(ids) + 1)] for ids in continuations], device=device)
    mask = torch.cat([batch.mask[index], batch.mask.new_ones(len(owners), width)], dim=1)
    positions = batch.positions[index, -1:] + 1 + torch.arange(width, device=device)
    logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=batch.cache, use_cache=True).logits
    sums = []
    for row, ids in enumerate(continuations):  # row by row: the logarithms of a whole batch of logits would take its memory twice
        following = torch.tensor(ids[1:], device=device)
        likely = torch.log_softmax(logits[row, : len(following)].float(), -1)
        sums.append(float(likely.gather(-1, following[:, None]).sum()))
    return sums
