"""`Slack`: the largest error of a right merge."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from doraxp._base.types import HostArray
from doraxp.checkpoint._precision import Precision
from doraxp.layers import AdaptedLayer

Wide: TypeAlias = NDArray[np.float64]
Places: TypeAlias = slice | NDArray[np.intp]
_FLOAT32, _LARGEST = 2.0**-24, 1e30


class Slack:
    """The largest error of a right merge whose every step is rounded to one of some dtypes.

    ::

        |S − W'| ≤ ε (c |W'| + 2½ g |s| ‖b‖ ‖a‖ + t)              t = τ (1 + g (1 + |s|))
        c = 4 + 2½ |s| ‖b‖ ‖A‖ / n + (1 + |s|) τ / n + τ / |m| + τ / g

    W, V, n, m, g and W' have half a step each, and the last one a whole step if its rounding is
    stochastic. A, B, B A and s B A have half a step each too: their errors, with that of W where W
    and the update cancel, are at most 2½ ε |s| ‖bᵢ‖ ‖aⱼ‖, with the row bᵢ of B and the column aⱼ
    of A. Sums in float32 add (√in + √rank) 2⁻²⁴ / ε to 4 and to the 2½ before g. τ is the smallest
    normal number: below it, the distance no longer shrinks, so ‖b‖ and ‖a‖ are larger by τ √rank.

    Parameters
    ----------
    layer : AdaptedLayer
    precision : Precision
        ε and τ of the steps.
    """

    def __init__(self, layer: AdaptedLayer, precision: Precision) -> None:
        a, b, m = (np.asarray(leaf, np.float64) for leaf in layer.adapter)
        self._precision = precision
        epsilon, normal = precision
        rank, inner = a.shape
        self._sums = _FLOAT32 * (inner**0.5 + rank**0.5) / epsilon
        lost = normal * rank**0.5
        self._scale = abs(layer.config.scaling)
        self._columns = np.linalg.norm(a, axis=0) + lost  # ‖a‖, (in,)
        self._reach = self._scale * (np.linalg.norm(b, axis=1) + lost)  # |s| ‖b‖, (out,)
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
        epsilon, normal = self._precision
        m, reach = self._magnitude[rows], self._reach[rows]
        gain = over(m, norm)
        relative = 4 + self._sums + 2.5 * over(reach * np.linalg.norm(self._columns), norm)
        for lost, factor in ((1 + self._scale, norm), (1, m), (1, gain)):
            relative += over(np.full_like(norm, lost * normal), factor)
        least = normal * (1 + gain * (1 + self._scale))
        # In a row with a tiny n, c is beyond the range of float32, and 0 times infinity is NaN.
        relative, reach, least = (
            np.minimum(part, _LARGEST)[:, None].astype(size.dtype)
            for part in (relative, (2.5 + self._sums) * gain * reach, least)
        )
        bound: HostArray = size * relative
        bound += reach * self._columns[columns].astype(size.dtype)
        bound += least
        bound *= size.dtype.type(epsilon)
        return bound


def over(numerator: Wide, denominator: Wide) -> Wide:
    """Return the quotient, and 0 where the divisor is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator != 0)
