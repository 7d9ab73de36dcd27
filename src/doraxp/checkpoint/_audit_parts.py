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
    """Return numbers between -1/16 and 1/16; -1/16 for NaN."""
    return np.fmin(np.fmax(numbers, -_LARGEST), _LARGEST)


class Part(NamedTuple):
    """Some rows or columns of a sample that the right formula did not make."""

    name: str
    """The other formula."""
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
    """The search for parts.

    Parameters
    ----------
    error, alike : array, shape (k, in)
        e, by two ways of rounding; the smaller one of each number counts.
    by_rows : bool
        Whether a unit is a row.
    """

    def __init__(self, error: Wide, alike: Wide, *, by_rows: bool) -> None:
        with np.errstate(over="ignore"):
            self._squares = np.minimum(error * error, alike * alike)
        self._right, self._by_rows = limited(self._squares), by_rows
        self._limit = limit(2 * sum(error.shape) * _FORMULAS)
        # Σ d ≤ √units √(Σ d²)
        self._possible = bool(np.count_nonzero(self._squares) >= self._limit)

    def not_right(self, name: str, other: Wide) -> Part | None:
        """Return the part that says most, by another formula and its e'; None without a part."""
        if not self._possible:
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            squares = other * other
            gain = limited(self._squares - squares)  # d of each number
        gain[(squares > 1) & (gain > 0)] = 0  # no formula explains a damaged number
        found = [part for axis in (0, 1) for part in self._along(name, axis, gain, squares)]
        return max(found, key=Part.rank, default=None)

    def _along(self, name: str, axis: int, gain: Wide, squares: Wide) -> Iterator[Part]:
        """Yield the parts of one axis."""
        totals = _levels(gain.sum(1 - axis))
        if max(float(total.max()) for total in totals) <= _LEAST:  # as most formulas
            return
        length, across, count = gain.shape[axis], gain.shape[1 - axis], gain.size
        right, cost = (_levels(x.sum(1 - axis)) for x in (self._right, limited(squares)))
        for level, (total, spread) in enumerate(
            zip(totals, self._spreads(axis, gain), strict=True)
        ):
            size = 1 << level
            numbers = across * np.minimum(size, length - size * np.arange(len(total)))
            is_part = (total > _LEAST) & (total**2 > self._limit * spread)
            for place in np.flatnonzero(is_part).tolist():
                here = numbers[place]
                outside = (right[-1][0] - right[level][place]) / max(1, count - here)
                inside = right[level][place] / here
                rest = cost[level][place] / here - outside
                fits = outside < inside / 2 and rest < (inside - outside) / 4
                start, stop = place * size, min(length, (place + 1) * size)
                yield Part(name, axis, start, stop, float(total[place]), bool(fits))

    def _spreads(self, axis: int, gain: Wide) -> list[Wide]:
        """Return Σ d² of each part, by levels."""
        if not self._by_rows:
            return _levels((gain * gain).sum(1 - axis))
        if axis == 0:
            return _levels(gain.sum(1) ** 2)
        # A unit is a row's numbers in all columns of the part.
        return [(units * units).sum(0) for units in _levels(gain)]


def _levels(sums: Wide) -> list[Wide]:
    """Return sums of 1, 2, 4, 8 … neighbours along the last axis, up to the sum of all."""
    levels = [sums]
    while (length := levels[-1].shape[-1]) > 1:
        levels.append(np.add.reduceat(levels[-1], np.arange(0, length, 2), axis=-1))
    return levels
