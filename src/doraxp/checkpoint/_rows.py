"""The merge of one weight, block of rows by block of rows as it is stored.

::

    V = W + s B A       n = ‖V‖ by rows       W' = (m / n)⊙V

Where the matrix is the transpose of the stored weight, a row of the matrix is a column of the
file. Then a first pass over the blocks sums the norms, in float64, and a second pass merges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from doraxp._base.types import Array, HostArray
from doraxp._core.kinds import LayerKind
from doraxp.backends import Operations, operations
from doraxp.checkpoint._engine import Engine, Reused
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._safetensors import AnySource
from doraxp.layers import AdaptedLayer

BLOCK = 1 << 19
"""Elements of one block: in float32 2 MiB, which a core's cache can hold."""


class Norms(NamedTuple):
    """The norms of some rows of the matrix, before and after the update."""

    base: Array  # ‖wᵢ‖
    adapted: Array  # n


class Block(NamedTuple):
    """Some rows of a merged weight, as it is stored."""

    rows: slice
    """Their place along the first axis of the stored weight."""
    weight: HostArray
    """W, flat after the first axis, in the dtype of the computation."""
    merged: HostArray
    """W', in the same shape and dtype. The next block may overwrite both."""
    norms: Norms
    """The norms of those rows of the matrix that no block before had.

    Usually these are the block's own rows. Where the matrix is the transpose of the stored weight,
    the first block has the norms of all rows, and those of the other blocks are empty.
    """


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Cut the first axis of a stored weight into blocks."""
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))  # a row may have no elements
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def matrix_rows(source: AnySource, rows: NDArray[np.intp], kind: LayerKind) -> NDArray[np.float64]:
    """Return some rows of the matrix of a stored weight, in ascending order."""
    if kind.is_transposed:
        parts = [source.read(block)[:, rows] for block in row_blocks(source.tensor.shape)]
        return np.concatenate(parts).astype(np.float64).T
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)  # each is one read
    parts = [
        source.read(slice(int(run[0]), int(run[-1]) + 1)).reshape(len(run), -1) for run in runs
    ]
    return np.concatenate(parts).astype(np.float64)


def merged_blocks(
    name: str, source: AnySource, layer: AdaptedLayer, engine: Engine, dtype: str
) -> Iterator[Block]:
    """Yield the merged weight block by block.

    Parameters
    ----------
    name : str
        The weight's name in the base, for errors.
    source : Source
        The weight before the merge.
    layer : AdaptedLayer
    engine : Engine
    dtype : {"float32", "float64"}
        To compute in.

    Raises
    ------
    CheckpointError
        The weight contains NaN or infinity, or values that are too large to compute with.
    """
    stored = Reused()
    try:
        for block in _merge(lambda rows: source.read(rows, stored), layer, engine, dtype):
            if not all(np.isfinite(np.asarray(norm)).all() for norm in block.norms):
                raise CheckpointError(
                    f"{source.reader.path}: {source.name} contains NaN or infinity"
                )
            if not engine.raises:
                _check_finite(block.merged)
            yield block
    except FloatingPointError:
        raise CheckpointError(f"{name} has values too large for {dtype}") from None


class _Formed(NamedTuple):
    """The same rows of W and of V, as they are stored."""

    host: HostArray
    """W, for NumPy."""
    weight: Array
    v: Array


_Form: TypeAlias = Callable[[slice], _Formed]


def _merge(
    read: Callable[[slice], HostArray], layer: AdaptedLayer, engine: Engine, dtype: str
) -> Iterator[Block]:
    """Yield the blocks of W'; `read` returns rows of the stored weight.

    Raises
    ------
    FloatingPointError
        Values are too large for `dtype`, and the engine raises.
    """
    with np.errstate(over="raise"):
        a, b, m = (engine.place(np.asarray(leaf, dtype)) for leaf in layer.adapter)
        b = layer.config.scaling * b
    if not engine.raises:
        _check_finite(engine.fetch(b))
    ops, wide = operations(lora_a=a, lora_b=b, magnitude=m), Reused()
    left, right = b, a  # V - W, as it is stored, is left @ right
    if layer.kind.is_transposed:
        left, right = ops.xp.matrix_transpose(a), ops.xp.matrix_transpose(b)

    def form(rows: slice) -> _Formed:
        with np.errstate(over="raise"):
            host = wide.cast(_flat(read(rows)), np.dtype(dtype))
        weight = engine.place(host)
        with np.errstate(invalid="ignore"):  # the norms show NaN and infinity
            v = engine.product(left[rows, :], right)
            v += weight
        return _Formed(host, weight, v)

    scaled = _by_columns if layer.kind.is_transposed else _by_rows
    for rows, formed, norms, gain in scaled(form, list(row_blocks(layer.shape)), m, ops):
        merged = formed.v
        with np.errstate(invalid="ignore", over="raise"):
            merged *= gain
        norms = Norms(*(engine.fetch(norm) for norm in norms))
        yield Block(rows, formed.host, engine.fetch(merged), norms)


_Scaled: TypeAlias = Iterator[tuple[slice, _Formed, Norms, Array]]
"""Rows, W and V, norms as `Block` has them, and m / n, in a shape that multiplies V."""


def _by_rows(form: _Form, blocks: Iterable[slice], m: Array, ops: Operations) -> _Scaled:
    for rows in blocks:
        formed = form(rows)  # (k, in)
        norms = Norms(_row_norms(formed.weight, ops), _row_norms(formed.v, ops))
        yield rows, formed, norms, _gain(m[rows], norms.adapted, ops)[:, None]


def _by_columns(form: _Form, blocks: Iterable[slice], m: Array, ops: Operations) -> _Scaled:
    xp = ops.xp
    # Squares do not overflow in float64, unless the weights are that large themselves.
    squares = [xp.zeros_like(m, dtype=xp.float64) for _ in Norms._fields]
    for rows in blocks:
        for total, part in zip(squares, form(rows)[1:], strict=True):  # (k, out)
            wide = xp.astype(part, xp.float64, copy=False)
            total += xp.sum(wide * wide, axis=0)
    norms = Norms(*(xp.astype(xp.sqrt(total), m.dtype) for total in squares))
    gain = _gain(m, norms.adapted, ops)[None, :]
    for rows in blocks:
        yield rows, form(rows), norms, gain
        norms = Norms(*(norm[:0] for norm in norms))


def _row_norms(rows: Array, ops: Operations) -> Array:
    with np.errstate(invalid="ignore"):
        return ops.row_norms(rows, ops.row_squares(rows, rows.dtype))


def _gain(m: Array, norm: Array, ops: Operations) -> Array:
    with np.errstate(invalid="ignore", over="raise"):
        return ops.over_norm(m, norm)


def _check_finite(array: HostArray) -> None:
    """Raise FloatingPointError for NaN or infinity, which finite numbers give only by overflow."""
    if not np.isfinite(array).all():
        raise FloatingPointError("overflow")


def _flat(rows: HostArray) -> HostArray:
    return rows.reshape(rows.shape[0], -1)
