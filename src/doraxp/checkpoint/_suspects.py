"""The formula that made a merged weight: the right one, or a known wrong one.

::

    S  (k, in)  some rows that a file has        X  the same rows by one formula, rounded as S is

S is compared with the X of every formula. A formula is told from another one by the sum of
((S − X) / bound)², the cost, and not by the largest difference: in 16 bits the rounding errors may
be larger than the update, but they are the same in S and in X. The bound is the largest error of a
right merge. It gives each number its weight, because small numbers keep more of a small update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from doraxp._base.types import Adapter, Config, HostArray
from doraxp.checkpoint._safetensors import DTYPES
from doraxp.layers import AdaptedLayer
from doraxp.testing import right_merge, wrong_merges

Wide: TypeAlias = NDArray[np.float64]
Places: TypeAlias = slice | NDArray[np.intp]
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
PRECISION = {
    "F64": (2.0**-52, 2.0**-1022),
    "F32": (2.0**-23, 2.0**-126),
    "F16": (2.0**-10, 2.0**-14),
    "BF16": (2.0**-7, 2.0**-126),
}
"""Epsilon and the smallest normal number."""
_FLOAT32, _LARGEST = 2.0**-24, 1e30
_LEAST = 0.25
"""A difference of costs that counts: some ten numbers in 16 bits, each off by its last digit."""
_DAMAGED = 0.01
"""The part of the numbers that may be far off in a weight that is merged right, but damaged."""
_FEW = 0.02
"""The part of the numbers that may differ where only the last rounding was to 16 bits."""


class Sample(NamedTuple):
    """Some rows of a matrix: before the merge, as a file has them, and their adapter."""

    rows: NDArray[np.intp]
    """Their places, (k,)."""
    base: Wide
    """W, (k, in)."""
    stored: Wide
    """S, (k, in)."""
    adapter: Adapter
    """A, and those rows of B and m, in float64."""
    config: Config
    dtype: str
    """The dtype of S in the file, as safetensors files name it."""

    def rounded(self, values: Wide) -> Wide:
        """Return numbers as the file would have them."""
        with np.errstate(over="ignore"):
            return values.astype(DTYPES[self.dtype]).astype(np.float64)

    @property
    def epsilon(self) -> float:
        """The distance from 1 to the next number of that dtype."""
        return PRECISION[self.dtype][0]


class Slack:
    """The largest error of a right merge whose every step is rounded to the stored dtype.

    ::

        |S − W'| ≤ ε (c |W'| + 2 g |s| ‖b‖ ‖a‖ + t)
        c = 3½ + 2 |s| ‖b‖ ‖A‖ / n + τ / n + τ / |m| + τ / g        t = τ (1 + g)

    m, n, g, V and W' have half a step each, and the last one a whole step if its rounding is
    stochastic. A, B and the product are rounded too: their errors are at most ε |s| ‖bᵢ‖ ‖aⱼ‖, with
    the row bᵢ of B and the column aⱼ of A. Sums in float32 add (√in + √rank) 2⁻²⁴ / ε to 3½ and to
    the 2 before g. τ is the smallest normal number: below it, the distance no longer shrinks.

    Parameters
    ----------
    layer : AdaptedLayer
    dtype : str
        That of S, as safetensors files name it.
    """

    def __init__(self, layer: AdaptedLayer, dtype: str) -> None:
        a, b, m = (np.asarray(leaf, np.float64) for leaf in layer.adapter)
        self.epsilon, self._normal = PRECISION[dtype]
        self._sums = _FLOAT32 * (a.shape[1] ** 0.5 + a.shape[0] ** 0.5) / self.epsilon
        self._columns = np.linalg.norm(a, axis=0)  # ‖a‖, (in,)
        self._reach = abs(layer.config.scaling) * np.linalg.norm(b, axis=1)  # |s| ‖b‖, (out,)
        self._magnitude = np.abs(m)

    def bound(
        self, size: HostArray, rows: Places, norm: Wide, columns: Places = slice(None)
    ) -> HostArray:
        """Return the bound for a part of the matrix, (k, l), in the dtype of `size`.

        Parameters
        ----------
        size : array, shape (k, l)
            abs(W').
        rows, columns : slice or array of int
            The places of k rows and l columns.
        norm : array, shape (k,)
            n of those rows.
        """
        m, reach = self._magnitude[rows], self._reach[rows]
        gain = over(m, norm)
        relative = 3.5 + self._sums + 2 * over(reach * np.linalg.norm(self._columns), norm)
        for factor in (norm, m, gain):  # each may have lost digits to underflow
            relative += over(np.full_like(norm, self._normal), factor)
        parts = (relative, (2 + self._sums) * gain * reach, self._normal * (1 + gain))
        # In a row with a tiny n, c is beyond the range of float32, and 0 times infinity is NaN.
        relative, reach, least = (
            np.minimum(part, _LARGEST)[:, None].astype(size.dtype) for part in parts
        )
        bound: HostArray = size * relative
        bound += reach * self._columns[columns].astype(size.dtype)
        bound += least
        bound *= size.dtype.type(self.epsilon)
        return bound


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
    """Whether a wrong formula explains S better than the right one."""
    names: tuple[str, ...]
    """Those wrong formulas that S fits; more than one where S cannot tell them apart."""


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
    guess = _guess(RIGHT, merged, sample, bound)
    if guess.costs.sum() < _LEAST:  # no other cost can be lower by more
        return Diagnosis(guess.fits, False, ())
    steps: list[Callable[[Wide], Wide] | None] = [None]
    in_16_bits = DTYPES[sample.dtype].itemsize == 2
    if in_16_bits and np.mean(sample.rounded(merged) != sample.stored) > _FEW:
        steps.append(sample.rounded)
    guesses: dict[str, Guess] = {}
    for step in steps:
        right = (RIGHT, right_merge(*_layer(sample), step))
        # One formula at a time is in memory.
        for name, merged in chain([right], _wrong(sample, step), () if step else others):
            guess = _guess(name, merged, sample, bound)
            old = guesses.get(name, guess)
            guesses[name] = min(old, guess, key=lambda one: float(one.costs.sum()))
    right_guess = guesses.pop(RIGHT)
    better = [guess for guess in guesses.values() if _is_better(guess, right_guess)]
    named = [guess for guess in better if guess.fits and guess.name != UNCHANGED]
    if not named:
        return Diagnosis(right_guess.fits, bool(better), ())
    best = min(named, key=lambda one: float(one.costs.sum()))
    names = (guess.name for guess in named if not _is_better(best, guess))
    words = dict.fromkeys(_WORDS.get(name, name) for name in names)
    return Diagnosis(right_guess.fits, True, tuple(words))


def _layer(sample: Sample) -> tuple[Wide, Adapter, Config]:
    return sample.base, sample.adapter, sample.config


def _wrong(sample: Sample, step: Callable[[Wide], Wide] | None) -> Iterator[tuple[str, Wide]]:
    """Yield the wrong formulas that a row can show alone."""
    yield UNCHANGED, sample.base
    once = sample.rounded(right_merge(*_layer(sample), step))
    yield TWICE, right_merge(once, sample.adapter, sample.config, step)
    yield from wrong_merges(*_layer(sample), step)


def _guess(name: str, merged: Wide, sample: Sample, bound: Wide) -> Guess:
    with np.errstate(over="ignore", invalid="ignore"):
        error = (sample.stored - sample.rounded(merged)) / bound
        moved = (sample.stored - sample.base) / bound
        noise = error.size + np.linalg.norm(4 * sample.epsilon * merged / bound) ** 2
        costs = np.vecdot(error, error)
    if name == RIGHT:
        near = np.abs(error) <= 1
        if np.mean(near) >= 1 - _DAMAGED:  # the others are damaged
            error, moved = error[near], moved[near]
    # A formula must explain nearly all of the way from W to S.
    most = min(0.1 * float(np.vdot(moved, moved)), float(noise))
    fits = bool(np.vdot(error, error) <= most)
    return Guess(name, np.where(np.isfinite(costs), costs, np.inf), fits)


def _is_better(guess: Guess, other: Guess) -> bool:
    """Return True if S is X of `guess` rather than that of `other`, beyond chance.

    It is if its cost is less than a quarter of the other's, or if the difference of both is more
    than six times its own deviation by rows. In both cases the difference must be that of several
    numbers.
    """
    with np.errstate(invalid="ignore"):  # both may be infinite
        gain = other.costs - guess.costs
    if not np.isfinite(gain).all():
        return bool(guess.costs.sum() < other.costs.sum())
    total = float(gain.sum())
    if total < _LEAST:
        return False
    deviation = float(np.sqrt(len(gain)) * gain.std())
    return float(guess.costs.sum()) < float(other.costs.sum()) / 4 or total > 6 * deviation


def over(numerator: Wide, denominator: Wide) -> Wide:
    """Return the quotient, and 0 where the divisor is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator != 0)
