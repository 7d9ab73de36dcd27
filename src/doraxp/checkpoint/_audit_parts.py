"""The part of a weight that another formula made: some rows, or some columns.

::

    e, e'   the errors of S by the right formula and by another one, in bounds, (k, in)
    d       e² − e'² of one unit: of one number, or of a row's numbers in the part

    the right formula did not make a part where  Σ d > λ √(Σ d²),   λ² = 2 ln(parts · formulas / p)

In a right merge e has either sign with the same probability, and then P(Σ d > λ √(Σ d²)) is at most
exp(−λ² / 2). So among all parts and all formulas, the probability of a false alarm is at most
p = 10⁻⁷. For this the errors of the units must be independent of each other. Where a merge rounds n
or m / n to 16 bits, those of a row have one cause: the row is the unit then, and a number
otherwise. A part needs about 60 units.

A number has 1/16 at most, which is the square of one step of its dtype: the numbers with the
smallest bounds must not outweigh all others. The parts are 1, 2, 4, 8 … rows or columns, side by
side in the sample.
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
_LARGEST, _LEAST = 1 / 16, 1.0
"""Of d of one number, and of Σ d: sixteen such numbers."""


def limit(tests: int) -> float:
    """Return λ², for some tests of one weight."""
    return float(2 * np.log(tests / _CHANCE))


def limited(numbers: Wide) -> Wide:
    """Return numbers with 1/16 at most; 0 for NaN."""
    return np.clip(np.nan_to_num(numbers, nan=0.0), -_LARGEST, _LARGEST)


class Part(NamedTuple):
    """Some rows or columns of a sample that the right formula did not make."""

    axis: int
    """0 for rows, 1 for columns."""
    start: int
    stop: int
    gain: float
    """Σ d."""
    fits: bool
    """Whether the other formula made it: there it explains three quarters of the right one's
    costs, beyond those that the right one has outside, and outside these are less than half."""

    def rank(self) -> tuple[bool, float]:
        """Return a key that is larger for a part that says more."""
        return self.fits, self.gain


class Parts:
    """The search for a part, by the error of the right formula.

    Parameters
    ----------
    error : array, shape (k, in)
        e.
    """

    def __init__(self, error: Wide) -> None:
        with np.errstate(over="ignore"):
            self._squares = error * error
        self._right = limited(self._squares)
        self._limit = limit(2 * sum(error.shape) * _FORMULAS)
        # Σ d ≤ √units √(Σ d²)
        self._possible = bool(np.count_nonzero(self._squares) >= self._limit)

    def not_right(self, other: Wide, alike: Wide, *, by_rows: bool) -> Part | None:
        """Return the part that says most; None without a part.

        Parameters
        ----------
        other : array, shape (k, in)
            e'.
        alike : array, shape (k, in)
            e of the right formula, if its steps are rounded as those of the other one are. The
            smaller error of each number counts.
        by_rows : bool
            Whether a unit is a row.
        """
        if not self._possible:
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            squares = other * other
            right = np.minimum(self._squares, alike * alike)
            gain = limited(right - squares)  # d of each number
        found = [part for axis in (0, 1) for part in self._along(axis, gain, squares, by_rows)]
        return max(found, key=Part.rank, default=None)

    def _along(self, axis: int, gain: Wide, squares: Wide, by_rows: bool) -> Iterator[Part]:
        """Yield the parts of one axis."""
        length, across = gain.shape[axis], gain.shape[1 - axis]
        total, right, cost = (x.sum(1 - axis) for x in (gain, self._right, limited(squares)))
        spread = total * total if by_rows else (gain * gain).sum(1 - axis)  # Σ d²
        # Damaged numbers, which no formula explains, are beyond their bounds.
        far = (~(squares <= 1)).sum(1 - axis)
        whole, count, size = right.sum(), gain.size, 1
        while True:
            numbers = across * np.minimum(size, length - size * np.arange(len(total)))
            is_part = (total > _LEAST) & (total**2 > self._limit * spread) & (far <= numbers / 2)
            for place in np.flatnonzero(is_part).tolist():
                start, stop = place * size, min(length, (place + 1) * size)
                outside = (whole - right[place]) / max(1, count - numbers[place])
                inside = right[place] / numbers[place]
                rest = cost[place] / numbers[place] - outside
                fits = outside < inside / 2 and rest < (inside - outside) / 4
                yield Part(axis, start, stop, float(total[place]), bool(fits))
            if size >= length:
                return
            size *= 2
            total, right, cost, spread, far = map(_pairs, (total, right, cost, spread, far))
            if by_rows and axis == 1:  # a unit is a row's numbers in all columns of the part
                gain = _pairs(gain)
                spread = (gain * gain).sum(0)


def _pairs(array: Wide) -> Wide:
    """Return the sums of two neighbours each, along the last axis."""
    return np.add.reduceat(array, np.arange(0, array.shape[-1], 2), axis=-1)
