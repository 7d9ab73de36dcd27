"""The norms of a base weight's rows, and which of them DoRA cannot divide by.

::

    rows       of the matrix `LayerKind.matrix(W)`: those that m has a number for
    norm       √Σ w², the squares summed in float32, in float64 for float64; then in W's dtype
    PEFT       m / norm with m = norm: NaN where the norm is 0, infinite or NaN

A sum of `in` squares below t = in · (smallest normal number) / ε may have lost digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from doraxp._base.types import HostArray
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._engine import Reused
from doraxp.checkpoint._matrix import row_blocks
from doraxp.checkpoint._safetensors import DTYPES, Source

STEP = 1e-4
"""A usual learning rate: AdamW moves m by about as much in a step."""
_HALF_ZERO, _HALF_INFINITY = 2.0**-25, 65520.0
"""float16 rounds numbers up to the first one to 0, and from the second one on to infinity."""
OnBytes = Callable[[int], None]


class RowCounts(NamedTuple):
    """The rows of a weight's matrix, counted. A row counts once among the first four faults."""

    rows: int = 0
    """Their number, which is that of m's numbers."""
    not_finite: int = 0
    """Rows with NaN or infinity."""
    zero: int = 0
    """Rows whose numbers are all 0."""
    underflow: int = 0
    """Other rows whose norm is 0, because the squares underflow."""
    overflow: int = 0
    """Finite rows whose norm is infinite."""
    fragile: int = 0
    """Rows whose norm may have lost digits: their squares are near underflow."""
    float16: int = 0
    """Rows with a usual norm, which is 0 or infinite after a cast to float16."""
    coarse: int = 0
    """Rows of a 16-bit weight whose norm, in that dtype, does not change by a step of 1e-4."""

    @property
    def broken(self) -> int:
        """The rows that are NaN in PEFT."""
        return self.not_finite + self.zero + self.underflow + self.overflow


class _Sums(NamedTuple):
    """The sums over some rows of the matrix."""

    peak: HostArray
    """max abs(w); infinite or NaN where a number is."""
    squares: HostArray
    """Σ w², in the dtype of the computation."""


def count_rows(source: Source, kind: LayerKind, on_bytes: OnBytes) -> RowCounts:
    """Return the counts of a weight. It is read once, by blocks of rows.

    `on_bytes` is called with the bytes of each block.
    """
    inner = kind.matrix_shape(source.tensor.shape)[-1]
    total = RowCounts()
    for part in _parts(source, kind):
        sums = _by_columns(part, on_bytes) if kind.is_transposed else _by_rows(part, on_bytes)
        for one in sums:
            more = _counts(one, inner, source.tensor.dtype)
            total = RowCounts(*map(sum, zip(total, more, strict=True)))
    return total


def count_not_finite(source: Source, on_bytes: OnBytes) -> int:
    """Return how many numbers of a tensor are NaN or infinite."""
    flat = source._replace(shape=(source.tensor.nbytes // DTYPES[source.tensor.dtype].itemsize, 1))
    return sum(int(np.count_nonzero(~np.isfinite(block))) for block in _blocks(flat, on_bytes))


def _parts(source: Source, kind: LayerKind) -> Iterator[Source]:
    """Yield matrices (rows, columns) as they are stored: one for each element of a stack.

    A stack by rows is one matrix, in which its elements are one below the other.
    """
    shape = source.tensor.shape
    if kind.name == "conv":
        yield source._replace(shape=(shape[0], source.tensor.nbytes // _size(source, shape[0])))
        return
    flat = source.flat()
    height = shape[-2] if kind.name == "transposed_experts" else flat.tensor.shape[0]
    for start in range(0, flat.tensor.shape[0], height):
        yield flat.rows(start, start + height)


def _size(source: Source, rows: int) -> int:
    return rows * DTYPES[source.tensor.dtype].itemsize


def _blocks(source: Source, on_bytes: OnBytes) -> Iterator[HostArray]:
    """Yield blocks of rows in float32, or float64; each overwrites the one before."""
    stored, wide = Reused(), Reused()
    dtype = np.dtype(np.float64 if source.tensor.dtype == "F64" else np.float32)
    for rows in row_blocks(source.tensor.shape):
        block = source.read(rows, stored)
        on_bytes(block.nbytes)
        yield wide.cast(block, dtype)


def _by_rows(source: Source, on_bytes: OnBytes) -> Iterator[_Sums]:
    for block in _blocks(source, on_bytes):
        yield _Sums(*_sums(block, axis=1))


def _by_columns(source: Source, on_bytes: OnBytes) -> Iterator[_Sums]:
    peak = squares = None
    for block in _blocks(source, on_bytes):
        more_peak, more = _sums(block, axis=0)
        with np.errstate(over="ignore"):
            peak = more_peak if peak is None else np.maximum(peak, more_peak)
            squares = more if squares is None else squares + more
    if peak is not None and squares is not None:
        yield _Sums(peak, squares)


def _sums(block: HostArray, axis: int) -> tuple[HostArray, HostArray]:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        peak = np.abs(block).max(axis=axis, initial=0)
        return peak, np.square(block).sum(axis=axis)


def _counts(sums: _Sums, inner: int, dtype: str) -> RowCounts:
    peak, squares = sums
    own = DTYPES[dtype]
    info = np.finfo(squares.dtype)
    least = inner * float(info.smallest_normal) / float(info.eps)
    is_finite = np.isfinite(peak)
    with np.errstate(over="ignore", invalid="ignore"):
        norm = np.sqrt(squares)
        is_infinite = is_finite & ~np.isfinite(norm.astype(own).astype(norm.dtype))
        is_usual = is_finite & ~is_infinite & (squares > 0)
        is_half_broken = (peak <= _HALF_ZERO) | (norm >= _HALF_INFINITY)
        moved = (norm.astype(own).astype(norm.dtype) + norm.dtype.type(STEP)).astype(own)
        is_coarse = is_usual & (moved == norm.astype(own))
    masks = (
        ~is_finite,
        peak == 0,
        is_finite & (peak > 0) & (squares == 0),
        is_infinite,
        is_usual & (squares <= least),
        is_usual & is_half_broken,
        is_coarse & (own.itemsize == 2),
    )
    return RowCounts(len(peak), *(int(np.count_nonzero(mask)) for mask in masks))
