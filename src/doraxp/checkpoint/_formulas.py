"""The formula that made a merged weight: the right one, or a known wrong one.

::

    S  (k, in)  some rows that a file has        X  the same rows by one formula, rounded as S is

S is compared with the X of every formula. A formula is told from another one by the sum of
((S − X) / bound)², the cost, and not by the largest difference: in 16 bits the rounding errors may
be larger than the update, but they are the same in S and in X. The bound is the largest error of a
right merge. It gives each number its weight, because small numbers keep more of a small update.

Each formula is tried in each way in which a tool may round its steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np

from doraxp._base.types import Adapter, Config
from doraxp._core.updates import LowRank
from doraxp.checkpoint._audit_errors import DAMAGED
from doraxp.checkpoint._audit_parts import Part, Parts, limit, limited
from doraxp.checkpoint._audit_sample import Sample
from doraxp.checkpoint._audit_ways import Way, norms_are_coarse, ways
from doraxp.checkpoint._precision import PRECISION
from doraxp.checkpoint._slack import Wide
from doraxp.testing import right_merge, wrong_merges

RIGHT, UNCHANGED, TWICE = "right", "unchanged", "merged twice"
_WORDS = {
    "m/n is left out, as in LoRA": "plain LoRA",
    "s is applied twice": "scaled by s²",
    "alpha where s belongs": "α instead of s",
    "the norm is that of the base weight": "base norm",
    "the norm runs over the input axis": "norm over the other axis",
    "the norm of a column scales the row": "norm over the other axis",
    "the rows keep the norms of W, as in DoRA with m = ‖W‖": "the norms of BASE as m",
}
"""Short names of deviations that `doraxp.testing` knows; the others keep their own."""
_LEAST = 0.25
"""A difference of costs that counts: some five numbers in 16 bits, each off by its last digit."""
_FEW = 0.02
"""The part of the numbers that may differ where only the last rounding was to 16 bits."""
_MORE = 0.1
"""The part of the update that S may have beyond the whole."""
_ALIKE = 4.0
"""The square of a sum of errors, in units of its deviation. Its median is 0.45 where the errors are
independent."""


class Guess(NamedTuple):
    """A formula that may have made S."""

    name: str
    costs: Wide
    """Σ ((S − X) / bound)² by rows."""
    fits: bool
    """Whether S is X, to rounding errors."""


class Diagnosis(NamedTuple):
    """The formulas that explain S."""

    fits: bool
    """Whether S is of the right formula, to rounding errors."""
    refuted: bool
    """Whether a wrong formula explains S or a part of it better than the right one, or S has more
    than the whole update."""
    names: tuple[str, ...] = ()
    """Those wrong formulas that S fits; more than one where S cannot tell them apart."""
    part: Part | None = None
    """Some rows or columns that a wrong formula made, where S as a whole is not refuted."""


def diagnose(sample: Sample, bound: Wide, others: Iterable[tuple[str, Wide]] = ()) -> Diagnosis:
    """Compare S with every formula.

    Parameters
    ----------
    sample : Sample
    bound : array, shape (k, in)
        The largest error of a right merge.
    others : iterable of (str, array)
        More wrong formulas, by name, with their W'.
    """
    right = _Right(sample, bound)
    if right.is_certain:
        return Diagnosis(right.guess.fits, False)
    guesses: dict[str, Guess] = {}
    part: Part | None = None
    for way in right.ways:
        parts = right.parts(way)
        wrong = _wrong(sample, way)  # one formula at a time is in memory
        for name, merged in wrong if way else chain(others, wrong):
            error = _error(merged, sample, bound)
            guess = _guess(name, error, merged, sample, bound)
            guesses[name] = min(guesses.get(name, guess), guess, key=_total)
            found = parts.not_right(_WORDS.get(name, name), error)
            part = max(filter(None, (part, found)), key=Part.rank, default=None)
    fits = right.guess.fits
    better = [guess for guess in guesses.values() if _is_better(guess, right.guess)]
    named = [guess for guess in better if guess.fits and guess.name != UNCHANGED]
    if named:
        best = min(named, key=_total)
        names = (guess.name for guess in named if not _is_better(best, guess))
        words = dict.fromkeys(_WORDS.get(name, name) for name in names)
        return Diagnosis(fits, True, tuple(words))
    if better or right.is_exceeded():
        return Diagnosis(fits, True)
    is_named = part is not None and part.fits
    return Diagnosis(fits, part is not None and not is_named, (), part if is_named else None)


class _Right:
    """The right merge of a sample, in every way of rounding."""

    def __init__(self, sample: Sample, bound: Wide) -> None:
        self._sample, self._bound = sample, bound
        merged = right_merge(*_layer(sample))
        error = _error(merged, sample, bound)
        self.guess = _guess(RIGHT, error, merged, sample, bound)
        """The way that explains S best."""
        self.ways: list[Way | None] = [None]
        """The ways in which wrong formulas are tried."""
        # Each row in that way which is closest to S.
        self._error, self._merged = error.copy(), merged
        self._costs, self._way = _row_costs(error), None
        narrow_ways = ways(sample.dtypes)
        if np.mean(error != 0) > _FEW:
            self.ways += narrow_ways
        least = self._costs.sum()
        for way in narrow_ways:
            if self.is_certain:
                return
            merged = right_merge(*_layer(sample), way)
            error = _error(merged, sample, bound)
            guess = _guess(RIGHT, error, merged, sample, bound)
            # Damaged numbers cost more than all others in each way.
            self.guess = min(self.guess, guess, key=lambda one: (not one.fits, _total(one)))
            costs = _row_costs(error)
            closer = costs < self._costs
            self._error[closer], self._merged[closer] = error[closer], merged[closer]
            self._costs = np.minimum(costs, self._costs)
            if costs.sum() < least:
                least, self._way = costs.sum(), way

    @property
    def is_certain(self) -> bool:
        """Whether no cost can be lower by a difference that counts."""
        return _total(self.guess) < _LEAST

    @cached_property
    def _by_rows(self) -> bool:
        """Whether the errors of a row may have one cause."""
        is_coarse = norms_are_coarse(self._way, self._sample.dtypes.stored)
        return is_coarse or _is_alike(self._error, self._merged / self._bound)

    def parts(self, way: Way | None) -> Parts:
        """Return the search for parts by the formulas that are rounded in one way.

        They must also be better than the right formula that is rounded in the same way.
        """
        alike = _error(right_merge(*_layer(self._sample), way), self._sample, self._bound)
        is_coarse = norms_are_coarse(way, self._sample.dtypes.stored)
        return Parts(self._error, alike, by_rows=self._by_rows or is_coarse)

    def is_exceeded(self) -> bool:
        """Return whether S has more than the whole update, beyond chance, as `Parts` tells it.

        It has 1 + Σ error · update / ‖update‖² of it.
        """
        update = (self._merged - self._sample.base) / self._bound
        with np.errstate(over="ignore", invalid="ignore"):
            units = self._error * update
            is_much = units.sum() > _MORE * np.vdot(update, update)
            units = limited(units)
        if self._by_rows:
            units = units.sum(axis=1)
        total = float(units.sum())
        return bool(is_much) and total > 0 and total**2 > limit(1) * float(np.vdot(units, units))


def _row_costs(error: Wide) -> Wide:
    """Return the squares by rows, of a number 1/16 at most."""
    with np.errstate(over="ignore"):
        costs: Wide = limited(error * error).sum(axis=1)
    return costs


def _layer(sample: Sample) -> tuple[Wide, Adapter | LowRank, Config]:
    return sample.base, sample.adapter, sample.config


def _wrong(sample: Sample, way: Way | None) -> Iterator[tuple[str, Wide]]:
    """Yield the wrong formulas that a row can show alone."""
    yield UNCHANGED, sample.base
    once = sample.rounded(right_merge(*_layer(sample), way))
    yield TWICE, right_merge(once, sample.adapter, sample.config, way)
    yield from wrong_merges(*_layer(sample), way)


def _error(merged: Wide, sample: Sample, bound: Wide) -> Wide:
    """Return (S − X) / bound."""
    with np.errstate(over="ignore", invalid="ignore"):
        error: Wide = (sample.stored - sample.rounded(merged)) / bound
    return error


def _guess(name: str, error: Wide, merged: Wide, sample: Sample, bound: Wide) -> Guess:
    epsilon = PRECISION[sample.dtypes.stored].epsilon
    with np.errstate(over="ignore", invalid="ignore"):
        moved = (sample.stored - sample.base) / bound
        noise = error.size + np.linalg.norm(4 * epsilon * merged / bound) ** 2
        costs = np.vecdot(error, error)
    if name == RIGHT:
        near = np.abs(error) <= 1
        if np.mean(near) >= 1 - DAMAGED:  # the others are damaged
            error, moved = error[near], moved[near]
    # A formula must explain nearly all of the way from W to S.
    most = min(0.1 * float(np.vdot(moved, moved)), float(noise))
    fits = bool(np.vdot(error, error) <= most)
    return Guess(name, np.where(np.isfinite(costs), costs, np.inf), fits)


def _total(guess: Guess) -> float:
    return float(guess.costs.sum())


def _is_better(guess: Guess, other: Guess) -> bool:
    """Return True if S is X of `guess` rather than that of `other`, beyond chance.

    It is if its cost is less than a quarter of the other's, or if the difference of both is more
    than six times its own deviation by rows. In both cases the difference must be that of several
    numbers.
    """
    with np.errstate(invalid="ignore"):  # both may be infinite
        gain = other.costs - guess.costs
    if not np.isfinite(gain).all():
        return _total(guess) < _total(other)
    total = float(gain.sum())
    if total < _LEAST:
        return False
    deviation = float(np.sqrt(len(gain)) * gain.std())
    return _total(guess) < _total(other) / 4 or total > 6 * deviation


def _is_alike(error: Wide, size: Wide) -> bool:
    """Return whether the errors of a row have one cause: a rounding of n or of m / n.

    Then they are a multiple of W'. If they are independent of each other, the sum of their products
    with W' has the deviation ‖error‖ ‖W'‖ / √in.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.vecdot(error, size) ** 2 * error.shape[1]
        chance = np.vecdot(error, error) * np.vecdot(size, size)
        return bool(np.median(squares > _ALIKE * chance) > 0.5)
