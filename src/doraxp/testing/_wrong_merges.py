"""W' by each known deviation, for some rows of a weight.

W  (k, in)  some rows of the weight     A  (rank, in)     B  (k, rank)     m  (k,)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from doraxp._base.types import Adapter, Config
from doraxp.testing._deviations import FORWARD, Changes
from doraxp.testing._formulas import DenseFormulas, deviating
from doraxp.testing._rounding import Plain, lengths

Wide: TypeAlias = NDArray[np.float64]
Rounding: TypeAlias = Callable[[Wide], Wide]
"""Rounds float64 numbers to a narrower dtype, and returns them in float64."""

ACROSS_ROWS = (
    "the norm runs over the input axis",
    "the norm of a column scales the row",
    "the norm is that of the whole matrix",
)
"""The deviations in which a row of W' depends on the other rows of W."""
_BEFORE_MERGED = {"gain", "n", "v", "base", "update", "s", "in_direction_form"}
_KNOWN: Mapping[str, Changes] = {
    name: changes for name, changes in FORWARD.items() if _BEFORE_MERGED & changes.keys()
}


def right_merge(
    weight: Any, adapter: Adapter, config: Config, step: Rounding | None = None
) -> Wide:
    """Return W' = (m / n)⊙(W + s B A) in float64, by the dense formulas.

    Parameters
    ----------
    weight : array, shape (k, in)
        Some rows of W.
    adapter : Adapter
        A, and those rows of B and m.
    config : Config
    step : callable, optional
        Rounds the inputs and the result of every step, as a merge does that computes in 16 bits.
    """
    return _merged(DenseFormulas, weight, adapter, config, step)


def wrong_merges(
    weight: Any, adapter: Adapter, config: Config, step: Rounding | None = None
) -> Iterator[tuple[str, Wide]]:
    """Yield the name of each known deviation and the W' that it makes.

    The arguments are those of `right_merge`. A deviation is left out if it does not change W', or
    if it needs the other rows of W.
    """
    for name, changes in _KNOWN.items():
        if name not in ACROSS_ROWS:
            formulas = deviating(DenseFormulas, changes)
            yield name, _merged(formulas, weight, adapter, config, step)


def wrong_merges_across_rows(
    v: Any, rows: Any, magnitude: Any, row_norms: Any, column_norms: Any
) -> Iterator[tuple[str, Wide]]:
    """Yield the name and the W' of each deviation that needs all rows, for some rows of V.

    A deviation is left out if the matrix must be square for it, and is not.

    Parameters
    ----------
    v : array, shape (k, in)
        Some rows of V = W + s B A.
    rows : array of int, shape (k,)
        Their places.
    magnitude : array, shape (out,)
        m of all rows.
    row_norms : array, shape (out,)
        ‖V‖ by rows.
    column_norms : array, shape (in,)
        ‖V‖ by columns.
    """
    whole = _RowsOfV(np.asarray(v, np.float64), np.asarray(rows), row_norms, column_norms)
    m = _plain(magnitude)[:, None]
    for name in ACROSS_ROWS:
        formulas = deviating(_WithV, _KNOWN[name])
        try:
            yield name, np.asarray(formulas(whole, m).merged)
        except ValueError:
            continue


class _WithV(DenseFormulas):
    """The formulas from V and m on."""

    def __init__(self, v: _RowsOfV, m: Plain) -> None:
        self.v, self.m = v, m


class _RowsOfV:
    """Some rows of V that know the norms of all rows and columns."""

    __array_ufunc__ = None  # NumPy's arrays leave the operators to this class

    def __init__(self, v: Wide, rows: Any, row_norms: Any, column_norms: Any) -> None:
        self._v, self._rows = v, rows
        self._norms = {-1: _plain(row_norms[:, None]), -2: _plain(column_norms[None, :])}

    def norms(self, axis: int = -1) -> Plain:
        return self._norms[axis]

    def __rmul__(self, gain: Plain) -> Wide:
        whole = np.broadcast_to(gain, (len(self._norms[-1]), self._v.shape[1]))  # (out, in)
        return np.asarray(whole[self._rows] * self._v)


class _Stepped:
    """An array that is rounded after every operation; the operators are NumPy's."""

    __array_ufunc__ = None

    def __init__(self, value: Any, step: Rounding) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            self.value, self.step = step(np.asarray(value, np.float64)), step

    def _new(self, value: Any) -> _Stepped:
        return _Stepped(value, self.step)

    def __matmul__(self, other: _Stepped) -> _Stepped:
        return self._new(self.value @ other.value)

    def __mul__(self, other: Any) -> _Stepped:
        return self._new(self.value * _value(other))

    __rmul__ = __mul__

    def __add__(self, other: Any) -> _Stepped:
        return self._new(self.value + _value(other))

    __radd__ = __add__

    def __abs__(self) -> _Stepped:
        return self._new(np.abs(self.value))

    def reshape(self, *shape: int) -> _Stepped:
        return self._new(self.value.reshape(shape))

    def over(self, other: _Stepped) -> _Stepped:
        return self._new(_plain(self.value).over(other.value))

    def norms(self, axis: int = -1) -> _Stepped:
        return self._new(lengths(self.value, axis))


def _value(operand: Any) -> Any:
    return operand.value if isinstance(operand, _Stepped) else operand


def _plain(array: Any) -> Plain:
    return np.asarray(array, np.float64).view(Plain)


def _merged(
    formulas: type, weight: Any, adapter: Adapter, config: Config, step: Rounding | None
) -> Wide:
    if config.alpha is None or config.alpha < 0:
        config = dataclasses.replace(config, alpha=config.rank)
    no_tokens = {"x": np.empty((0, weight.shape[1])), "dy": np.empty((0, weight.shape[0]))}
    arrays = {"weight": weight, **adapter._asdict(), **no_tokens}
    number: Callable[[Any], Any] = _plain
    if step is not None:

        def number(array: Any) -> _Stepped:
            return _Stepped(array, step)

    with np.errstate(over="ignore", invalid="ignore"):
        merged = formulas(config, arrays, number).merged
    return np.asarray(_value(merged))
