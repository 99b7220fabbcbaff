"""An index of texts by their rare character n-grams, asked with many texts at once. NumPy alone, no loop over characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]

FEWEST_NGRAMS = 3
"""A text with fewer rare n-grams keeps this many of its rarest ones, so that it can be found at all."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SPREAD = np.uint64(0xD6E8FEB86659FD93)
_FILTER_BITS = 22
_END = "\n"
"""Stands between texts; normalised texts never hold it, so that no n-gram of the index crosses a border."""


@dataclass(frozen=True)
class NgramIndex:
    """Which of `size` texts hold which n-grams.

    hashes: the kept n-grams, sorted, each once; n-gram g belongs to the texts `owners[starts[g]:starts[g + 1]]`.
    kept: for each text, how many n-grams it is looked for by.
    common: for each text, whether nothing in it is rare, so that finding it says little.
    present: a table over the hashes' upper bits; tells most n-grams of foreign texts apart without a search.
    """

    length: int
    size: int
    hashes: Hashes
    starts: Integers
    owners: Integers
    kept: Integers
    common: npt.NDArray[np.bool_]
    present: npt.NDArray[np.bool_]


def build_index(texts: Sequence[str], length: int, most_texts: int) -> NgramIndex:
    """Indexes `texts` by n-grams of `length` characters that occur in at most `most_texts` of them; the others are boilerplate."""
    hashes, owner = _ngrams_of(texts, length)
    order = np.lexsort((owner, hashes))
    hashes, owner = hashes[order], owner[order]
    first = np.ones(len(hashes), dtype=bool)
    first[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
    hashes, owner = hashes[first], owner[first]
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    spread = counts[inverse]
    keep = spread <= most_texts
    rare = np.bincount(owner[keep], minlength=len(texts))
    by_text = np.lexsort((spread, owner))
    position = np.arange(len(owner)) - np.searchsorted(owner[by_text], owner[by_text])
    keep[by_text[(position < FEWEST_NGRAMS) & (rare < FEWEST_NGRAMS)[owner[by_text]]]] = True
    hashes, owner = hashes[keep], owner[keep]
    unique, starts = np.unique(hashes, return_index=True)
    present = np.zeros(1 << _FILTER_BITS, dtype=bool)
    present[_slots(unique)] = True
    kept = np.bincount(owner, minlength=len(texts))
    return NgramIndex(length, len(texts), unique, np.append(starts, len(owner)), owner, kept, rare == 0, present)


def find_candidates(index: NgramIndex, texts: Sequence[str], least_share: float) -> Iterator[tuple[int, int, float]]:
    """Yields (position in `texts`, position in the index, share of the indexed text's n-grams that were found), by position.

    Takes about 50 bytes a character of `texts`, and more where much is found: ask with a limited number of texts at once.
    """
    if not len(index.hashes):
        return
    hashes, row = _ngrams_of(texts, index.length, index)
    place = np.minimum(np.searchsorted(index.hashes, hashes), len(index.hashes) - 1)
    found = index.hashes[place] == hashes
    # an n-gram counts once per text, however often it stands there
    row, gram = np.divmod(np.unique(row[found] * len(index.hashes) + place[found]), len(index.hashes))
    many = index.starts[gram + 1] - index.starts[gram]
    within = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
    owner = index.owners[np.repeat(index.starts[gram], many) + within]
    pairs, counts = np.unique(np.repeat(row, many) * index.size + owner, return_counts=True)
    row, owner = np.divmod(pairs, index.size)
    share = counts / index.kept[owner]
    for i in np.flatnonzero(share >= least_share):
        yield int(row[i]), int(owner[i]), float(share[i])


def _ngrams_of(texts: Sequence[str], length: int, index: NgramIndex | None = None) -> tuple[Hashes, Integers]:
    """Hashes of all n-grams and the position of the text of each; with an index, only those that may be in it."""
    ends = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)
    codes = np.frombuffer(_END.join(texts).encode("utf-32-le"), dtype=np.uint32)
    count = max(0, len(codes) - length + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        hashes *= _MULTIPLIER
        hashes += codes[offset : offset + count]
    hashes *= _SPREAD
    if index is None:
        place: Integers = np.arange(count)
        row = np.searchsorted(ends, place, side="right")
        whole = place + length < ends[row] if len(texts) else np.zeros(0, dtype=bool)
        return hashes[whole], row[whole]
    place = np.flatnonzero(index.present[_slots(hashes)])
    return hashes[place], np.searchsorted(ends, place, side="right")


def _slots(hashes: Hashes) -> Hashes:
    return hashes >> np.uint64(64 - _FILTER_BITS)
