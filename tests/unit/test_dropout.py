import pytest
import torch
from torch import Tensor

from jmedlora.models.dropout import Chances, KeyedDropout, Masks, RowsOfAdapter, keep_mask

CPU = torch.device("cpu")


def _masks(*adapters: tuple[Chances, RowsOfAdapter], positions: int = 40, layer: int = 0, layers: tuple[str, ...] = ("layer",)) -> Masks:
    dropout = KeyedDropout([chances for chances, _ in adapters], layers, CPU)
    dropout.enter([rows for _, rows in adapters])
    return dropout.masks(layer, positions, 24, torch.float32)


def _mask(rows: list[int], seed: int = 0, step: int = 1, positions: int = 40, name: str = "layer") -> Tensor:
    return _masks((Chances(seed, 0.3), RowsOfAdapter(rows, step)), positions=positions, layers=(name,)).keep


def test_masks_are_fixed_for_all_time() -> None:
    # Written down on purpose: other masks would make another adapter under the same run key.
    dropout = KeyedDropout([Chances(3, 0.3)], ["layer", "other"], CPU)
    dropout.enter([RowsOfAdapter([4, 9], step=5)])
    kept = dropout.masks(1, 3, 8, torch.float32).keep
    assert ["".join(str(int(value)) for value in row.flatten()) for row in kept] == ["111101001111101101001001", "110101111101111110010110"]


def test_mask_depends_on_seed_step_row_and_layer_alone() -> None:
    reference = _mask([4])
    assert torch.equal(_mask([4]), reference)
    for other in (_mask([5]), _mask([4], seed=1), _mask([4], step=2), _mask([4], name="other")):
        assert not torch.equal(other, reference)


def test_mask_is_independent_of_batch_padding_and_other_layers() -> None:
    reference = _mask([4])
    assert torch.equal(_mask([9, 4, 2])[1:2], reference)
    assert torch.equal(_mask([4], positions=70)[:, :40], reference)
    one = (Chances(0, 0.3), RowsOfAdapter([4], 1))
    assert torch.equal(_masks(one, layer=1, layers=("another", "layer")).keep, reference)


def test_masks_of_an_adapter_are_the_same_beside_any_others() -> None:
    """Of other seeds, steps, probabilities and numbers of rows, none among these; in the order of the batch."""
    pack = [
        (Chances(0, 0.3), RowsOfAdapter([4, 7], 1)),
        (Chances(0, 0.0), RowsOfAdapter([4], 1)),
        (Chances(5, 0.9), RowsOfAdapter([], 3)),
        (Chances(0, 0.3), RowsOfAdapter([4, 7, 1], 2)),
        (Chances(5, 0.6), RowsOfAdapter(range(2), 3)),
    ]
    together = _masks(*pack)
    assert together.keep.shape == (8, 40, 24)
    alone = [_masks(each) for each in pack if each[1].rows]
    assert torch.equal(together.keep, torch.cat([masks.keep for masks in alone]))
    assert torch.equal(together.scale, torch.cat([masks.scale for masks in alone]))
    assert together.keep[2].all() and together.scale[2] == 1, "nothing is dropped at probability 0"
    assert together.scale.flatten().tolist() == pytest.approx([1 / 0.7] * 2 + [1.0] + [1 / 0.7] * 3 + [2.5] * 2)


@pytest.mark.parametrize("other", [Chances(0, 0.3), Chances(1, 0.3), Chances(0, 0.2)])
def test_masks_that_all_adapters_share_are_computed_once(other: Chances) -> None:
    rows = RowsOfAdapter([4, 2], 3)
    same = _masks((Chances(0, 0.3), rows), (other, RowsOfAdapter((4, 2), 3)))
    assert len(same.keep) == len(same.scale) == (2 if other == Chances(0, 0.3) else 4)
    assert torch.equal(same.keep[:2], _masks((Chances(0, 0.3), rows)).keep)


@pytest.mark.parametrize("differs", [RowsOfAdapter([2, 4], 3), RowsOfAdapter([4, 2], 4), RowsOfAdapter([4], 3)])
def test_masks_of_other_rows_or_steps_are_not_shared(differs: RowsOfAdapter) -> None:
    chances = Chances(0, 0.3)
    masks = _masks((chances, RowsOfAdapter([4, 2], 3)), (chances, differs))
    assert torch.equal(masks.keep[2:], _masks((chances, differs)).keep)


@pytest.mark.parametrize("probability", [0.0625, 0.1, 0.5, 0.9])
def test_values_are_dropped_independently_with_the_asked_probability(probability: float) -> None:
    keys = torch.tensor([1, -2, 300, 2**31 - 1], dtype=torch.int32)
    thresholds = torch.full((4,), round(probability * 2**32) - 2**31, dtype=torch.int32)
    kept = keep_mask(keys, 300, 192, thresholds).double()
    assert kept.mean(dim=(1, 2)).tolist() == pytest.approx([1 - probability] * 4, abs=0.006)
    assert kept.mean(dim=(0, 1)).sub(1 - probability).abs().max() < 0.08, "no channel is favoured"
    centred = kept - (1 - probability)
    variance = probability * (1 - probability)
    for left, right in ((centred[:, 1:], centred[:, :-1]), (centred[..., 1:], centred[..., :-1]), (centred[1:], centred[:-1])):
        assert (left * right).mean().item() / variance == pytest.approx(0, abs=0.012)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_asked_probability_becomes_the_share_of_what_is_dropped(probability: float) -> None:
    kept = _masks((Chances(0, probability), RowsOfAdapter(range(60), 1))).keep.double()
    assert kept.mean().item() == pytest.approx(1 - probability, abs=0.006)


def test_masks_are_not_to_be_had_before_the_rows_are_known() -> None:
    with pytest.raises(RuntimeError, match=r"before KeyedDropout\.enter"):
        KeyedDropout([Chances(0, 0.5)], ["layer"], CPU).masks(0, 3, 4, torch.float32)
