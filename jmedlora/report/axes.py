"""How far the axes of figures reach, and where the labels of points go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

LOWEST, HIGHEST = -0.02, 1.02
"""No score lies outside 0 to 1; a marker at either end is still whole."""
_ROOM = 0.08  # of the range of the data, to both sides
_LEAST = 0.1  # a shorter axis would blow up differences of nothing
_WIDTH, _HEIGHT = 700, 240  # pixels of the axes of a page of common width, for labels
_CHARACTER, _LINE, _GAP, _MARKER = 7.0, 15.0, 8.0, 6.0  # pixels of a label and around a marker


def score_range(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis of scores: a little room around the data, never far outside 0 to 1."""
    if not values:
        return LOWEST, HIGHEST
    low, high = min(values), max(values)
    room = max(_ROOM * (high - low), (_LEAST - (high - low)) / 2)
    return round(max(LOWEST, low - room), 4), round(min(HIGHEST, high + room), 4)


class Label(NamedTuple):
    """The name of a point, to be written beside the last point of a plotly trace."""

    trace: Any
    point: tuple[float, float]
    name: str


@dataclass(frozen=True)
class _Box:
    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: _Box) -> bool:
        return self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top


def place_labels(labels: Sequence[Label], limits: tuple[float, float]) -> None:
    """Writes each label above, below, right or left of its point, where it covers neither a label nor another point.

    A label for which there is no such place is left out: the point still tells its name when pointed at. `limits` are the ends
    of both axes.
    """
    scale = limits[1] - limits[0]
    places = [((x - limits[0]) / scale * _WIDTH, (y - limits[0]) / scale * _HEIGHT) for _, (x, y), _ in labels]
    taken = [_Box(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in dict.fromkeys(places)]
    for label, place in zip(labels, places, strict=True):
        free = [(side, box) for side, box in _sides(label.name, *place).items() if _is_inside(box) and not any(map(box.meets, taken))]
        if free:
            side, box = free[0]
            label.trace.text = [*[""] * (len(label.trace.x) - 1), label.name]
            label.trace.textposition = side
            taken.append(box)


def _sides(name: str, x: float, y: float) -> dict[str, _Box]:
    """By plotly's name of the position, the best first."""
    half = _CHARACTER * len(name) / 2
    return {
        "top center": _Box(x - half, y + _GAP, x + half, y + _GAP + _LINE),
        "bottom center": _Box(x - half, y - _GAP - _LINE, x + half, y - _GAP),
        "middle right": _Box(x + _GAP, y - _LINE / 2, x + _GAP + 2 * half, y + _LINE / 2),
        "middle left": _Box(x - _GAP - 2 * half, y - _LINE / 2, x - _GAP, y + _LINE / 2),
    }


def _is_inside(box: _Box) -> bool:
    """Within the axes and what is free beside them: left and below stand the numbers of the axes."""
    return box.left > -_LINE and box.right < _WIDTH + _LINE and box.bottom > -_GAP and box.top < _HEIGHT + 2 * _LINE
