import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmedlora.training.batches import MicroBatch, MiniBatches, divide, epoch_order, group_by_length


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


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    workers=st.integers(1, 5),
    size=st.one_of(st.none(), st.integers(1, 9)),
)
def test_divide_gives_every_row_once_and_every_worker_the_same_number(lengths: list[int], workers: int, size: int | None) -> None:
    rows = list(range(len(lengths)))
    divided = divide(rows, lengths, workers, size)
    assert len(divided) == workers
    assert len({len(share) for share in divided}) == 1
    parts = [part for share in divided for part in share]
    assert sorted(row for part in parts if part.weight for row in part.rows) == rows
    assert all(len(part.rows) == 1 for part in parts if not part.weight)
    assert all(1 <= len(part.rows) <= (size or len(rows)) for part in parts)
    rounds = [max(lengths[row] for part in parts_now for row in part.rows) for parts_now in zip(*divided, strict=True)]
    assert rounds == sorted(rounds, reverse=True), "the longest come first"


def test_divide_keeps_rows_of_similar_length_together() -> None:
    lengths = [5, 50, 6, 51, 7, 52]
    assert divide(range(6), lengths, workers=1, micro_batch_size=3) == [[MicroBatch([5, 3, 1]), MicroBatch([4, 2, 0])]]


def test_a_worker_without_rows_gets_a_weightless_one() -> None:
    weights = [part.weight for share in divide([7], {7: 3}, workers=2, micro_batch_size=None) for part in share]  # type: ignore[arg-type]
    assert sorted(weights) == [0.0, 1.0]
