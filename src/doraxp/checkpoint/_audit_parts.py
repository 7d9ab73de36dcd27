"""The part of a weight that another formula made: some rows, or some columns.

::

    e, e'   the errors of S by the right formula and by another one, in bounds, (k, in)
    d       e² − e'² of one unit: of one number, or of a row's numbers in the part

    a part is of the other formula where  Σ d > λ √(Σ d²),    λ² = 2 ln(parts · formulas / 10⁻⁷)

In a right merge e has either sign with the same probability, and then P(Σ d > λ √(Σ d²)) is at most
exp(−λ² / 2), for errors of any size. So among all parts of a weight and all formulas, the
probability of a false alarm is 10⁻⁷. For this the errors of the units must be independent of each
other. Where a merge rounds n or m / n to 16 bits, those of a row have one cause: the row is the
unit then, and a number otherwise. A part needs about 60 units.

The parts are 1, 2, 4, 8 … rows or columns, side by side in the sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from doraxp.checkpoint._slack import Wide

_CHANCE = 1e-7
"""The probability of a false alarm in one weight."""
_FORMULAS = 200
"""There are fewer formulas, in all ways of rounding."""
_LARGEST = 1e70


def limit(tests: int) -> float:
    """Return λ², for some tests of one weight."""
    return float(2 * np.log(tests / _CHANCE))


class Part(NamedTuple):
    """Some rows or columns of a sample that another formula made."""

    axis: int
    """0 for rows, 1 for columns."""
    start: int
    stop: int
    gain: float
    """Σ d."""
    fits: bool
    """Whether the other formula's cost is less than a quarter of the right one's."""

    def rank(self) -> tuple[bool, float]:
        """Return a key that is larger for a part that says more."""
        return self.fits, self.gain


class Parts:
    """The search for a part, by the error of the right formula.

    Parameters
    ----------
    error : array, shape (k, in)
        e.
    by_rows : bool
        Whether a unit is a row.
    """

    def __init__(self, error: Wide, *, by_rows: bool) -> None:
        self._squares, self._by_rows = _squares(error), by_rows
        self._limit = limit(2 * sum(error.shape) * _FORMULAS)
        units = np.count_nonzero(self._squares.any(axis=1) if by_rows else self._squares)
        self._possible = bool(units >= self._limit)  # Σ d ≤ √units √(Σ d²)

    def made_by(self, other: Wide) -> Part | None:
        """Return the part with the largest gain; None if there is no part of the other formula."""
        if not self._possible:
            return None
        squares = _squares(other)
        gain = self._squares - squares  # d of each number
        found = [*self._along(0, gain, squares), *self._along(1, gain, squares)]
        return max(found, key=Part.rank, default=None)

    def _along(self, axis: int, gain: Wide, squares: Wide) -> Iterator[Part]:
        """Yield the parts of one axis that are of the other formula."""
        length, across = gain.shape[axis], gain.shape[1 - axis]
        total, right, cost = (x.sum(1 - axis) for x in (gain, self._squares, squares))
        spread = total * total if self._by_rows else (gain * gain).sum(1 - axis)  # Σ d²
        size = 1
        while True:
            is_other = (total > 0) & (total**2 > self._limit * spread) & (cost <= size * across)
            for place in np.flatnonzero(is_other).tolist():
                start, fits = place * size, bool(cost[place] < right[place] / 4)
                stop = min(start + size, length)
                yield Part(axis, start, stop, float(total[place]), fits)
            if size >= length:
                return
            size *= 2
            total, right, cost, spread = map(_pairs, (total, right, cost, spread))
            if self._by_rows and axis == 1:  # a unit is a row's numbers in all columns of the part
                gain = _pairs(gain)
                spread = (gain * gain).sum(0)


def _squares(error: Wide) -> Wide:
    """Return the squares, so large at most that their own squares are finite."""
    squares: Wide = np.clip(np.nan_to_num(error, nan=_LARGEST), -_LARGEST, _LARGEST) ** 2
    return squares


def _pairs(array: Wide) -> Wide:
    """Return the sums of two neighbours each, along the last axis."""
    return np.add.reduceat(array, np.arange(0, array.shape[-1], 2), axis=-1)
