"""W' by each known deviation, for some rows of a weight.

W  (k, in)  some rows of the weight     A  (rank, in)     B  (k, rank)     m  (k,)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from doraxp._base.types import Adapter, Config
from doraxp._core.updates import LowRank
from doraxp.testing._changes import Changes
from doraxp.testing._deviations import FORWARD, KEPT_NORMS
from doraxp.testing._formulas import DenseFormulas, deviating
from doraxp.testing._rounding import Plain, lengths

Wide: TypeAlias = NDArray[np.float64]
Dtype: TypeAlias = np.dtype[Any]
Dtypes: TypeAlias = Sequence[Dtype]
"""Of W, A, B and m."""

ACROSS_ROWS = (
    "the norm runs over the input axis",
    "the norm of a column scales the row",
    "each column is divided by its own norm",
    "the norm is that of the whole matrix",
)
"""The deviations in which a row of W' depends on the other rows of W."""
_BEFORE_MERGED = {
    "gain",
    "length",
    "eps",
    "eps_in_root",
    "v",
    "base",
    "update",
    "s",
    "in_direction_form",
}
_KNOWN: Mapping[str, Changes] = {
    name: changes for name, changes in FORWARD.items() if _BEFORE_MERGED & changes.keys()
}


def right_merge(
    weight: Any, adapter: Adapter | LowRank, config: Config, dtypes: Dtypes | None = None
) -> Wide:
    """Return W' = (m / n)⊙(W + s B A) in float64, by the dense formulas; without m, W + s B A.

    Parameters
    ----------
    weight : array, shape (k, in)
        Some rows of W.
    adapter : Adapter or LowRank
        A, and those rows of B and m; a LowRank is plain LoRA, without m.
    config : Config
    dtypes : sequence of 4 dtypes, optional
        Of W, A, B and m in a tool's memory. They are rounded to these, and the result of every step
        to the dtype of its operands: to the wider one of two, and to float32 if these are bfloat16
        and float16. float64 by default.
    """
    return _merged(_reference(adapter), weight, adapter, config, dtypes)


def wrong_merges(
    weight: Any, adapter: Adapter | LowRank, config: Config, dtypes: Dtypes | None = None
) -> Iterator[tuple[str, Wide]]:
    """Yield the name of each known deviation and the W' that it makes.

    The arguments are those of `right_merge`. A deviation is left out if it does not change W', or
    if it needs the other rows of W.
    """
    reference = _reference(adapter)
    for name, changes in _KNOWN.items():
        is_known = reference is DenseFormulas or changes.keys() & _BEFORE_MERGED <= {"update", "s"}
        if name not in ACROSS_ROWS and is_known:
            formulas = deviating(reference, changes)
            yield name, _merged(formulas, weight, adapter, config, dtypes)
    if reference is not DenseFormulas:
        yield KEPT_NORMS, _merged(_KeptNorms, weight, adapter, config, dtypes)


def _reference(adapter: Adapter | LowRank) -> type:
    return _Unscaled if isinstance(adapter, LowRank) else DenseFormulas


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


class _Unscaled(DenseFormulas):
    """The formulas of plain LoRA."""

    @cached_property
    def merged(self) -> Any:
        return self.v


class _KeptNorms(DenseFormulas):
    """DoRA with m = ‖W‖, as PEFT loads LoRA where the configuration says DoRA."""

    @cached_property
    def gain(self) -> Any:
        return self.w.norms().over(self.n)


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
    """An array that is rounded to its dtype after every operation; the operators are NumPy's."""

    __array_ufunc__ = None

    def __init__(self, value: Any, dtype: Dtype) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            self.value = np.asarray(value, np.float64).astype(dtype).astype(np.float64)
        self.dtype, self.shape = dtype, self.value.shape

    def _new(self, value: Any, other: Any = None) -> _Stepped:
        dtype = self.dtype
        if isinstance(other, _Stepped) and other.dtype != dtype:
            wider = max(dtype, other.dtype, key=lambda one: one.itemsize)
            dtype = wider if dtype.itemsize != other.dtype.itemsize else np.dtype(np.float32)
        return _Stepped(value, dtype)

    def __matmul__(self, other: _Stepped) -> _Stepped:
        return self._new(self.value @ other.value, other)

    def __mul__(self, other: Any) -> _Stepped:
        return self._new(self.value * _value(other), other)

    __rmul__ = __mul__

    def __add__(self, other: Any) -> _Stepped:
        return self._new(self.value + _value(other), other)

    __radd__ = __add__

    def __abs__(self) -> _Stepped:
        return self._new(np.abs(self.value))

    def reshape(self, *shape: int) -> _Stepped:
        return self._new(self.value.reshape(shape))

    def over(self, other: _Stepped) -> _Stepped:
        return self._new(_plain(self.value).over(other.value), other)

    def sqrt(self) -> _Stepped:
        return self._new(np.sqrt(self.value))

    def norms(self, axis: int = -1) -> _Stepped:
        return self._new(lengths(self.value, axis))


def _value(operand: Any) -> Any:
    return operand.value if isinstance(operand, _Stepped) else operand


def _plain(array: Any) -> Plain:
    return np.asarray(array, np.float64).view(Plain)


def _merged(
    formulas: type, weight: Any, adapter: Adapter | LowRank, config: Config, dtypes: Dtypes | None
) -> Wide:
    if config.alpha is None or config.alpha < 0:
        config = dataclasses.replace(config, alpha=config.rank)
    inputs = {"weight": weight, **adapter._asdict()}
    if isinstance(adapter, LowRank):
        inputs["magnitude"] = np.ones(len(weight))  # no formula of LoRA reads it
    tokens = {"x": np.empty((0, weight.shape[1])), "dy": np.empty((0, weight.shape[0]))}
    if dtypes is None:
        numbers: Mapping[str, Any] = {name: _plain(x) for name, x in (inputs | tokens).items()}
    else:
        pairs = zip(inputs.items(), dtypes, strict=True)
        numbers = {name: _Stepped(array, dtype) for (name, array), dtype in pairs}
        numbers |= {name: _Stepped(array, dtypes[0]) for name, array in tokens.items()}
    with np.errstate(over="ignore", invalid="ignore"):
        merged = formulas(config, numbers, lambda number: number).merged
    return np.asarray(_value(merged))
