"""`Slack`: the largest error of a right merge."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from doraxp._base.types import HostArray
from doraxp.checkpoint._precision import Precision
from doraxp.checkpoint._updated_layer import UpdatedLayer, reach

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
    For another update than B A, `reach` has the numbers that stand for ‖b‖ and ‖a‖. Without m, g is
    1 and m is n.

    Parameters
    ----------
    layer : UpdatedLayer
    precision : Precision
        ε and τ of the steps.
    """

    def __init__(self, layer: UpdatedLayer, precision: Precision) -> None:
        self._precision = precision
        epsilon, normal = precision
        rows, self._columns, rank = reach(layer.update, normal).in_matrix(
            layer.rows_kind, layer.shape
        )
        self._sums = _FLOAT32 * (len(self._columns) ** 0.5 + rank**0.5) / epsilon
        self._scale = abs(layer.config.scaling)
        self._reach = self._scale * rows  # |s| ‖b‖, (out,)
        m = layer.magnitude
        self._magnitude = None if m is None else np.abs(m)

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
        m = norm if self._magnitude is None else self._magnitude[rows]
        lengths = self._reach[rows]
        gain = over(m, norm)
        relative = 4 + self._sums + 2.5 * over(lengths * np.linalg.norm(self._columns), norm)
        for lost, factor in ((1 + self._scale, norm), (1, m), (1, gain)):
            relative += over(np.full_like(norm, lost * normal), factor)
        least = normal * (1 + gain * (1 + self._scale))
        # In a row with a tiny n, c is beyond the range of float32, and 0 times infinity is NaN.
        relative, lengths, least = (
            np.minimum(part, _LARGEST)[:, None].astype(size.dtype)
            for part in (relative, (2.5 + self._sums) * gain * lengths, least)
        )
        bound: HostArray = size * relative
        bound += lengths * self._columns[columns].astype(size.dtype)
        bound += least
        bound *= size.dtype.type(epsilon)
        return bound


def over(numerator: Wide, denominator: Wide) -> Wide:
    """Return the quotient, and 0 where the divisor is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator != 0)
