"""The merge of one weight, block of rows by block of rows as it is stored.

::

    V = W + s B A       n = ‖V‖ by rows       W' = (m / n)⊙V

Where the matrix is the transpose of what is stored, a row of it is a column of the file: then the
norms are summed in a first pass, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from doraxp._base.types import Array
from doraxp.backends import Operations, operations
from doraxp.layers import AdaptedLayer


class Library(NamedTuple):
    """An array library that computes, and the way there and back from NumPy."""

    place: Callable[[Array], Array]
    product: Callable[[Array, Array], Array]
    fetch: Callable[[Array], Array]


class Reused:
    """An `np.empty` that gives the same memory again, so what it gave before is lost.

    Fresh memory is a page fault for every 4 KiB of it, and that takes longer than the arithmetic.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > self._memory.size:
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes].view(dtype).reshape(shape)

    def cast(self, array: Array, dtype: np.dtype[Any]) -> Array:
        """Return the array in another dtype."""
        if array.dtype == dtype:
            return array
        result = self(array.shape, dtype)
        np.copyto(result, array, casting="unsafe")
        return result


BLOCK = 1 << 19
"""Elements of one block: in float32 2 MiB, which a core's cache holds."""
Read = Callable[[slice], Array]
Product = Callable[[Array, Array], Array]


class Change(NamedTuple):
    """How far the merge moved one weight."""

    magnitude: float
    """ΔM = mean over the matrix's rows of abs(‖w'ᵢ‖ − ‖wᵢ‖)."""
    direction: float
    """ΔD = mean over the matrix's rows of 1 − cos(w'ᵢ, wᵢ)."""
    largest: float
    """max over the rows of ‖w'ᵢ − wᵢ‖ / ‖wᵢ‖."""


class Norms(NamedTuple):
    """What `change` needs of each row of the matrix, on the host."""

    base: Array  # ‖wᵢ‖
    adapted: Array  # n


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Cut the first axis of a stored weight into blocks."""
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))  # a row may have no elements
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def merge_rows(
    read: Read, layer: AdaptedLayer, library: Library, dtype: str
) -> Iterator[tuple[Array, Norms | None]]:
    """Yield the blocks of W' as stored, and with each, or only the last, norms of whole rows.

    Parameters
    ----------
    read : callable
        Returns rows of the stored weight.
    layer : AdaptedLayer
    library : Library
        Computes.
    dtype : {"float32", "float64"}
        To compute in.

    Raises
    ------
    FloatingPointError
        Values are too large for it, with NumPy.
    """
    with np.errstate(over="raise"):
        a, b, m = (library.place(leaf.astype(dtype, copy=False)) for leaf in layer.adapter)
        b = layer.config.scaling * b
    ops, wide = operations(lora_a=a, lora_b=b, magnitude=m), Reused()

    def place(rows: slice) -> Array:
        with np.errstate(over="raise"):
            return library.place(wide.cast(_flat(read(rows)), np.dtype(dtype)))

    merge = _merge_columns if layer.kind.is_transposed else _merge_rows
    for merged, norms in merge(place, library.product, layer, a, b, m, ops):
        yield library.fetch(merged), norms and Norms(*(library.fetch(norm) for norm in norms))


def _merge_rows(
    read: Read, product: Product, layer: AdaptedLayer, a: Array, b: Array, m: Array, ops: Operations
) -> Iterator[tuple[Array, Norms]]:
    for rows in row_blocks(layer.shape):
        weight = read(rows)  # (k, in)
        with np.errstate(invalid="ignore"):  # the norms tell of NaN and infinity
            v = product(b[rows, :], a)
            v += weight
            base, norm = (ops.row_norms(x, ops.row_squares(x, v.dtype)) for x in (weight, v))
        with np.errstate(invalid="ignore", over="raise"):
            v *= ops.over_norm(m[rows], norm)[:, None]
        yield v, Norms(base, norm)


def _merge_columns(
    read: Read, product: Product, layer: AdaptedLayer, a: Array, b: Array, m: Array, ops: Operations
) -> Iterator[tuple[Array, Norms | None]]:
    xp = ops.xp
    blocks = list(row_blocks(layer.shape))
    bt, at = xp.matrix_transpose(b), xp.matrix_transpose(a)  # (rank, out), (in, rank)

    def form(rows: slice) -> tuple[Array, Array]:
        weight, v = read(rows), product(at[rows, :], bt)  # (k, out)
        v += weight
        return weight, v

    # Squares do not overflow in float64, but for weights that are as large themselves.
    squares = [xp.zeros_like(m, dtype=xp.float64) for _ in Norms._fields]
    for rows in blocks:
        for total, part in zip(squares, form(rows), strict=True):
            wide = xp.astype(part, xp.float64, copy=False)
            total += xp.sum(wide * wide, axis=0)
    norms = Norms(*(xp.astype(xp.sqrt(total), m.dtype) for total in squares))
    with np.errstate(invalid="ignore", over="raise"):
        gain = ops.over_norm(m, norms.adapted)
    for rows in blocks:
        _, v = form(rows)
        with np.errstate(invalid="ignore", over="raise"):  # the norms tell of NaN and infinity
            v *= gain[None, :]
        yield v, norms if rows.stop == layer.shape[0] else None


def change(norms: Iterable[Norms], layer: AdaptedLayer) -> Change:
    """Return ΔM, ΔD and the largest change, from what each row's triangle has for sides.

    ::

        1 − cos(v, w) = (‖v − w‖² − (n − ‖w‖)²) / (2 n ‖w‖)      v − w = s B A
        ‖w' − w‖² = (m − ‖w‖)² + 2 m ‖w‖ (1 − cos)
    """
    a, b, m = (leaf.astype(np.float64) for leaf in layer.adapter)
    base, adapted = (np.concatenate(sides).astype(np.float64) for sides in zip(*norms, strict=True))
    b *= layer.config.scaling
    update = np.einsum("or,or->o", b @ (a @ a.T), b)  # ‖v − w‖²
    m = np.where(adapted > 0, m, 0.0)
    length = np.abs(m)
    with np.errstate(over="ignore", invalid="ignore"):  # squares of what is above 1e154
        sides = 2 * adapted * base
        turn = update - (adapted - base) ** 2
        direction = np.divide(turn, sides, out=np.ones_like(turn), where=sides > 0)
        direction = np.where((base == 0) & (m == 0), 0.0, np.clip(direction, 0.0, 2.0))
        direction = np.where(m < 0, 2.0 - direction, direction)
        moved = np.sqrt((length - base) ** 2 + 2 * length * base * direction)
    ratio = np.divide(moved, base, out=np.where(moved > 0, np.inf, 0.0), where=base > 0)
    return Change(
        float(np.mean(np.abs(length - base))), float(np.mean(direction)), float(np.max(ratio))
    )


def _flat(rows: Array) -> Array:
    return rows.reshape(rows.shape[0], -1)
