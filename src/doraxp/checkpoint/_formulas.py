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
from itertools import chain
from typing import NamedTuple

import numpy as np

from doraxp._base.types import Adapter, Config
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
    part_name: str = ""
    """That formula."""


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
    merged = right_merge(*_layer(sample))
    error = _error(merged, sample, bound)
    right = _guess(RIGHT, error, merged, sample, bound)
    if right.costs.sum() < _LEAST:  # no other cost can be lower by more
        return Diagnosis(right.fits, False)
    closest = _Closest(error, merged)
    narrow_ways = ways(sample.dtypes)
    for way in narrow_ways:
        steps = right_merge(*_layer(sample), way)
        other = _error(steps, sample, bound)
        guess = _guess(RIGHT, other, steps, sample, bound)
        # Damaged numbers cost more than all others in each way.
        right = min(right, guess, key=lambda one: (not one.fits, _total(one)))
        if right.costs.sum() < _LEAST:
            return Diagnosis(right.fits, False)
        closest.add(other, steps, way)
    tried: list[Way | None] = [None]
    if np.mean(error != 0) > _FEW:
        tried += narrow_ways
    stored = sample.dtypes.stored
    by_rows = norms_are_coarse(closest.way, stored) or _is_alike(
        closest.error, closest.merged / bound
    )
    guesses: dict[str, Guess] = {}
    part, part_name = None, ""
    for tried_way in tried:
        # A wrong formula must also be better than the right one that is rounded in the same way.
        alike = _error(right_merge(*_layer(sample), tried_way), sample, bound)
        is_coarse = by_rows or norms_are_coarse(tried_way, stored)
        parts = Parts(closest.error, alike, by_rows=is_coarse)
        wrong = _wrong(sample, tried_way)  # one formula at a time is in memory
        for name, steps in wrong if tried_way else chain(others, wrong):
            other = _error(steps, sample, bound)
            one = _guess(name, other, steps, sample, bound)
            guesses[name] = min(guesses.get(name, one), one, key=_total)
            found = parts.not_right(other)
            if found is not None and (part is None or found.rank() > part.rank()):
                part, part_name = found, _WORDS.get(name, name)
    better = [guess for guess in guesses.values() if _is_better(guess, right)]
    named = [guess for guess in better if guess.fits and guess.name != UNCHANGED]
    if not named:
        update = (closest.merged - sample.base) / bound
        if better or _has_more(closest.error, update, by_rows=by_rows):
            return Diagnosis(right.fits, True)
        if part is not None and part.fits:
            return Diagnosis(right.fits, False, (), part, part_name)
        return Diagnosis(right.fits, part is not None)
    best = min(named, key=_total)
    names = (guess.name for guess in named if not _is_better(best, guess))
    words = dict.fromkeys(_WORDS.get(name, name) for name in names)
    return Diagnosis(right.fits, True, tuple(words))


class _Closest:
    """The right merge, each row in that way of rounding which is closest to S."""

    def __init__(self, error: Wide, merged: Wide) -> None:
        self.error, self.merged = error.copy(), merged.copy()
        self.way: Way | None = None
        """The way that is closest to S as a whole."""
        self._costs = self._costs_of(error)
        self._least = self._costs.sum()

    def add(self, error: Wide, merged: Wide, way: Way | None) -> None:
        """Take the rows that are closer to S by another way."""
        costs = self._costs_of(error)
        closer = costs < self._costs
        self.error[closer], self.merged[closer] = error[closer], merged[closer]
        self._costs = np.minimum(costs, self._costs)
        if costs.sum() < self._least:
            self._least, self.way = costs.sum(), way

    @staticmethod
    def _costs_of(error: Wide) -> Wide:
        with np.errstate(over="ignore"):
            costs: Wide = limited(error * error).sum(axis=1)
        return costs


def _layer(sample: Sample) -> tuple[Wide, Adapter, Config]:
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


def _has_more(error: Wide, update: Wide, *, by_rows: bool) -> bool:
    """Return whether S has more than the whole update, beyond chance, as `Parts` tells it.

    It has 1 + Σ error · update / ‖update‖² of it.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        units = error * update
        is_much = units.sum() > _MORE * np.vdot(update, update)
        units = limited(units)
        if by_rows:
            units = units.sum(axis=1)
        total = float(units.sum())
        return bool(is_much) and total > 0 and total**2 > limit(1) * float(np.vdot(units, units))
