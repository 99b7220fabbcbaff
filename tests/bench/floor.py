"""The arithmetic that a sweep cannot do without, and the time that it takes at the speed of this machine's products."""

from __future__ import annotations

import os
import time
from functools import lru_cache

import torch
from transformers import AutoTokenizer

from tests.bench.workload import EPOCHS, RANKS, SHAPES, Workload

_WIDTH = 2048


@lru_cache(maxsize=1)
def product_rate() -> float:
    """FLOP/s of fp32 products of large matrices, with a thread for each core; the best of some."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    left, right = torch.randn(_WIDTH, _WIDTH), torch.randn(_WIDTH, _WIDTH)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    torch.set_num_threads(before)
    return 2 * _WIDTH**3 / best


def arithmetic_flop(workload: Workload, new_tokens: int) -> float:
    """Of training each rank as far as its longest run goes, and of reading and answering the questions for all runs and the base.

    Counted: products with the base's weights, forward and for the gradients of activations; the adapters' own products; attention;
    logits of labelled and of answered tokens. new_tokens: of all answers.
    """
    shape = next(shape for shape in SHAPES.values() if shape["hidden_size"] == _hidden(workload))
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    linear = layers * (4 * hidden * hidden + 3 * hidden * inner)
    low_rank = layers * (4 * 2 * hidden + 3 * (hidden + inner))
    """Weights of an adapter of rank 1."""
    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    head = len(tokenizer) * hidden
    total = 0.0
    for row in workload.rows("train"):
        asked, answered = len(tokenizer(row["prompt"]).input_ids), len(tokenizer(row["answer"]).input_ids) + 1
        tokens = asked + answered
        alike = 4 * tokens * linear + 4 * answered * head + 6 * layers * tokens**2 * hidden
        total += max(EPOCHS) * (len(RANKS) * alike + sum(6 * tokens * rank * low_rank for rank in RANKS))
    prompts = [len(tokenizer(row["prompt"]).input_ids) for row in workload.rows("questions")]
    for rank in [0, *RANKS * len(EPOCHS)]:
        total += sum(2 * tokens * (linear + rank * low_rank) + 2 * layers * tokens**2 * hidden + 2 * head for tokens in prompts)
    return total + new_tokens * 2 * (linear + head)


def arithmetic_floor(workload: Workload, new_tokens: int) -> float:
    """Seconds."""
    return arithmetic_flop(workload, new_tokens) / product_rate()


def _hidden(workload: Workload) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(workload.model).hidden_size)
