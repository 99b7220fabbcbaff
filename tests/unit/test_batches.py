import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmedlora.training.batches import MicroBatch, MiniBatches, divide, epoch_order, group_by_length

WORTH = 256
"""Tokens of padding that a micro-batch has to save."""


def test_epoch_order_is_fixed_for_all_time() -> None:
    # Written down on purpose: another order would be another adapter under the same run key.
    assert epoch_order(10, seed=0, epoch=0).tolist() == [7, 4, 8, 3, 5, 1, 2, 9, 0, 6]


@given(rows=st.integers(1, 300), seed=st.integers(0, 2**31), epoch=st.integers(0, 50))
def test_epoch_order_is_a_permutation(rows: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(rows, seed, epoch)) == list(range(rows))


def test_epoch_order_differs_by_epoch_and_seed() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_first_places_are_spread_evenly() -> None:
    firsts = np.bincount([epoch_order(4, seed, 0)[0] for seed in range(2000)], minlength=4)
    assert firsts.min() > 400


def test_grouping_sorts_within_stretches_of_fifty_batches() -> None:
    lengths = np.random.default_rng(0).integers(1, 99, 250)
    order = epoch_order(250, 0, 0)
    grouped = group_by_length(order, lengths, batch_size=2)
    for start in (0, 100, 200):
        piece = grouped[start : start + 100]
        assert sorted(piece) == sorted(order[start : start + 100])
        assert (np.diff(lengths[piece]) <= 0).all()


@pytest.mark.parametrize("grouping", [False, True])
def test_every_epoch_has_every_row_once_and_a_smaller_last_batch(grouping: bool) -> None:
    batches = MiniBatches(list(range(1, 104)), batch_size=2, seed=3, length_grouping=grouping)
    assert batches.steps_per_epoch == 52
    first, second = ([batches.rows_of(step) for step in range(start, start + 52)] for start in (1, 53))
    for epoch in (first, second):
        assert [len(rows) for rows in epoch] == [2] * 51 + [1]
        assert sorted(row for rows in epoch for row in rows) == list(range(103))
    assert first != second
    assert batches.rows_of(2) == first[1], "going back gives the same rows"


_LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=40)


@given(
    lengths=st.lists(_LENGTHS, min_size=1, max_size=4),
    workers=st.integers(1, 5),
    size=st.one_of(st.none(), st.integers(1, 9)),
)
def test_divide_gives_every_row_once_and_every_worker_the_same_number(lengths: list[list[int]], workers: int, size: int | None) -> None:
    rows = [list(range(len(own))) for own in lengths]
    divided = divide(rows, lengths, workers, size, WORTH)
    assert len(divided) == workers
    assert len({len(share) for share in divided}) == 1
    parts = [part for share in divided for part in share]
    for adapter, own in enumerate(rows):
        assert sorted(row for part in parts if not part.is_filler for row in part.rows[adapter]) == own
        assert all(len(part.rows[adapter]) <= (size or len(own)) for part in parts)
    assert all(len(part.rows) == len(rows) and any(part.rows) for part in parts)
    rounds = [[part for part in now if not part.is_filler] for now in zip(*divided, strict=True)]
    assert all(rounds), "nobody waits for fillers alone"
    longest = [max(_widest(part, lengths) for part in now) for now in rounds]
    assert longest == sorted(longest, reverse=True), "the longest come first"
    for now in rounds:
        counts = [max(map(len, part.rows)) for part in now]
        assert max(counts) - min(counts) <= 1, "workers have equal shares of a round"


def _widest(part: MicroBatch, lengths: list[list[int]]) -> int:
    return max(known[row] for own, known in zip(part.rows, lengths, strict=True) for row in own)


@given(
    lengths=st.integers(1, 40).flatmap(
        lambda count: st.lists(st.lists(st.integers(1, 400), min_size=count, max_size=count), min_size=2, max_size=4)
    ),
    workers=st.integers(1, 5),
    size=st.one_of(st.none(), st.integers(1, 9)),
)
def test_rows_of_several_adapters_come_in_equal_numbers(lengths: list[list[int]], workers: int, size: int | None) -> None:
    for share in divide([range(len(own)) for own in lengths], lengths, workers, size, WORTH):
        for part in share:
            assert part.is_filler or len({len(own) for own in part.rows}) == 1


def test_a_smaller_mini_batch_takes_the_places_of_the_longest_rows() -> None:
    lengths = [[9, 8, 7, 6, 5], [4, 6, 5]]
    (parts,) = divide([range(5), range(3)], lengths, workers=1, micro_batch_size=2, worth_tokens=WORTH)
    assert parts == [MicroBatch([[0], [1]]), MicroBatch([[1, 2], [2, 0]]), MicroBatch([[3, 4], []])]


def test_divide_keeps_rows_of_similar_length_together() -> None:
    lengths = [5, 50, 6, 51, 7, 52]
    assert divide([range(6)], [lengths], workers=1, micro_batch_size=3, worth_tokens=WORTH) == [
        [MicroBatch([[5, 3, 1]]), MicroBatch([[4, 2, 0]])]
    ]


@pytest.mark.parametrize(("short", "adapters", "pieces"), [(7, 1, 1), (8, 1, 2), (3, 2, 1), (4, 2, 2), (2, 3, 1), (3, 3, 2)])
def test_a_mini_batch_is_cut_where_the_padding_saved_is_worth_it(short: int, adapters: int, pieces: int) -> None:
    """Rows of 40 tokens and of 8: each short one by itself saves 32 tokens."""
    lengths = [40, 40, *[8] * short]
    (parts,) = divide([range(len(lengths))] * adapters, [lengths] * adapters, workers=1, micro_batch_size=None, worth_tokens=WORTH)
    assert (32 * short * adapters >= WORTH) == (pieces == 2)
    whole = list(range(len(lengths)))
    expected = [whole] if pieces == 1 else [whole[:2], whole[2:]]
    assert parts == [MicroBatch([own] * adapters) for own in expected]


@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=40), adapters=st.integers(1, 4))
def test_cuts_pay_and_none_that_would_pay_is_left(lengths: list[int], adapters: int) -> None:
    (parts,) = divide([range(len(lengths))] * adapters, [lengths] * adapters, workers=1, micro_batch_size=None, worth_tokens=WORTH)
    kept = [[lengths[row] for row in part.rows[0]] for part in parts]
    for own in kept:
        assert max((own[0] - own[cut]) * (len(own) - cut) * adapters for cut in range(len(own))) < WORTH
    taken = adapters * sum(own[0] * len(own) for own in kept)
    assert taken + WORTH * (len(kept) - 1) <= adapters * max(lengths) * len(lengths)


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    adapters=st.integers(1, 4),
    workers=st.integers(1, 3),
    most=st.integers(1, 3000),
)
def test_no_micro_batch_has_too_many_tokens(lengths: list[int], adapters: int, workers: int, most: int) -> None:
    """But for a row of each adapter; every row comes once; and with room for all, nothing is cut."""
    shares = divide([range(len(lengths))] * adapters, [lengths] * adapters, workers, None, math.inf, most)
    assert sorted(row for share in shares for part in share if not part.is_filler for row in part.rows[0]) == list(range(len(lengths)))
    for part in (part for share in shares for part in share if not part.is_filler):
        rows = len(part.rows[0])
        assert rows <= 1 or rows * adapters * max(lengths[row] for row in part.rows[0]) <= most
    assert len(shares[0]) == 1 or -(-len(lengths) // workers) * adapters * max(lengths) > most


@pytest.mark.parametrize("adapters", [1, 2])
def test_a_worker_without_rows_gets_a_filler(adapters: int) -> None:
    """One row, of one adapter, and the shortest there is."""
    lengths = [[9, 3, 5], [4, 2, 1]][:adapters]
    shares = divide([[0, 1, 2]] * adapters, lengths, workers=4, micro_batch_size=None, worth_tokens=WORTH)
    parts = [part for share in shares for part in share]
    assert [part.is_filler for part in parts].count(True) == 1
    (filler,) = (part for part in parts if part.is_filler)
    assert filler.rows == [[1], []][:adapters]


def test_a_filler_is_of_an_adapter_that_has_rows() -> None:
    shares = divide([[], [1]], [[5], [7, 8]], workers=2, micro_batch_size=None, worth_tokens=WORTH)
    assert sorted((part.is_filler, part.rows) for share in shares for part in share) == [(False, [[], [1]]), (True, [[], [1]])]
