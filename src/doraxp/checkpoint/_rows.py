"""The merge of one weight, block of rows by block of rows as it is stored.

::

    V = W + s ΔW        n = ‖V‖ by rows       W' = (m / n)⊙V, or V without m
    several adapters    W + Σ strength (W'ᵢ − W)

Where the matrix is the transpose of the stored weight, a row of the matrix is a column of the
file. Then a first pass over the blocks sums the norms, in float64, and a second pass merges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias, cast

import numpy as np

from doraxp._base.types import Array, HostArray
from doraxp._core.updates import LowRank
from doraxp.backends import operations
from doraxp.checkpoint._engine import Engine, Reused
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._matrix import row_blocks
from doraxp.checkpoint._safetensors import AnySource
from doraxp.checkpoint._updated_layer import UpdatedLayer


class Norms(NamedTuple):
    """The norms of some rows of the matrix, before and after the update."""

    base: Array  # ‖wᵢ‖
    adapted: Array  # n; of a sum ‖w'ᵢ‖
    moved: Array | None = None  # ‖w'ᵢ − wᵢ‖ of a sum


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


@dataclass(frozen=True)
class Term:
    """A change of a weight, of which a merge takes `strength` times."""

    layer: UpdatedLayer | AnySource
    """The adapter, read; or the weight that the file has in full."""
    strength: float = 1.0


def alone(terms: Sequence[Term]) -> UpdatedLayer | None:
    """Return the adapter of one term of strength 1; None for a sum of changes."""
    first, *others = terms
    if others or first.strength != 1 or not isinstance(first.layer, UpdatedLayer):
        return None
    return first.layer


def merged_blocks(
    name: str,
    source: AnySource,
    terms: Sequence[Term],
    engine: Engine,
    dtype: str,
    *,
    multiple: int = 1,
) -> Iterator[Block]:
    """Yield the merged weight block by block. Each block of W is read once for all terms.

    ::

        W' of one adapter                        one term of strength 1
        W + Σ strength (W'ᵢ − W)                 else

    The sum does not depend on the order of the terms, bit for bit: two terms commute, and of more
    those of each number are added from the smallest to the largest.

    Parameters
    ----------
    name : str
        The weight's name in the base, for errors.
    source : Source
        The weight before the merge.
    terms : sequence of Term
    engine : Engine
    dtype : {"float32", "float64"}
        To compute in.
    multiple : int
        Blocks begin at multiples of this number of rows.

    Raises
    ------
    CheckpointError
        The weight contains NaN or infinity, or values that are too large to compute with.
    """
    stored, wide = Reused(), Reused()

    def read(rows: slice) -> HostArray:
        with np.errstate(over="raise"):
            return wide.cast(_flat(source.read(rows, stored)), np.dtype(dtype))

    try:
        parts = [_part(term, engine, dtype) for term in terms]
        if alone(terms) is None:
            blocks = _sums(read, source.tensor.shape, terms, parts, multiple)
        else:
            blocks = _merge(read, source.tensor.shape, parts[0], multiple)
        for block in blocks:
            if not all(np.isfinite(np.asarray(norm)).all() for norm in block.norms[:2]):
                raise CheckpointError(
                    f"{source.reader.path}: {source.name} contains NaN or infinity"
                )
            if not engine.raises:
                _check_finite(block.merged)
            yield block
    except FloatingPointError:
        raise CheckpointError(f"{name} has values too large for {dtype}") from None


_Read: TypeAlias = Callable[[slice], HostArray]
"""Returns rows of W, flat, in the dtype of the computation; the next call overwrites them."""


def _merge(read: _Read, shape: tuple[int, ...], part: _Part, multiple: int) -> Iterator[Block]:
    """Yield the blocks of W'."""
    _measure(read, shape, [part])
    for rows in row_blocks(shape, multiple):
        weight = read(rows)
        merged, norms = part.merged(rows, weight)
        yield Block(rows, weight, merged, norms)


def _sums(
    read: _Read,
    shape: tuple[int, ...],
    terms: Sequence[Term],
    parts: Sequence[_Part],
    multiple: int,
) -> Iterator[Block]:
    """Yield the blocks of W + Σ strength (W'ᵢ − W)."""
    _measure(read, shape, parts)
    memory = Reused()
    for rows in row_blocks(shape, multiple):
        weight = read(rows)
        changes = memory((len(parts) + 1, *weight.shape), weight.dtype)
        with np.errstate(over="raise", invalid="ignore"):
            for own, term, part in zip(changes, terms, parts, strict=False):
                np.subtract(part.merged(rows, weight)[0], weight, out=own)
                own *= weight.dtype.type(term.strength)
            if len(parts) > 2:
                changes[:-1].sort(axis=0)
            total, merged = changes[0], changes[-1]
            for own in changes[1:-1]:
                total += own
            np.add(weight, total, out=merged)
        sides = (np.linalg.norm(one, axis=1) for one in (weight, merged, total))
        yield Block(rows, weight, merged, Norms(*sides))


def _measure(read: _Read, shape: tuple[int, ...], parts: Sequence[_Part]) -> None:
    """Read W once for the norms of all transposed matrices."""
    by_columns = [part for part in parts if isinstance(part, _Columns)]
    if by_columns:
        for rows in row_blocks(shape):
            weight = read(rows)
            for part in by_columns:
                part.measure(rows, weight)


def _part(term: Term, engine: Engine, dtype: str) -> _Part:
    if not isinstance(term.layer, UpdatedLayer):
        return _Whole(term.layer, dtype)
    form = _Former(term.layer, engine, dtype)
    if form.magnitude is None:
        return _Unscaled(form)
    return _Columns(form) if term.layer.kind.is_transposed else _Rows(form)


class _Part(Protocol):
    """The W' of one term."""

    def merged(self, rows: slice, weight: HostArray) -> tuple[HostArray, Norms]:
        """Return some rows of W', flat, and their norms as `Block` has them."""


class _Whole:
    """A weight that the adapter's file has in full."""

    def __init__(self, source: AnySource, dtype: str) -> None:
        self._source, self._dtype = source, np.dtype(dtype)

    def merged(self, rows: slice, weight: HostArray) -> tuple[HostArray, Norms]:
        merged = _flat(self._source.read(rows)).astype(self._dtype)
        if not np.isfinite(merged).all():
            raise CheckpointError(
                f"{self._source.reader.path}: {self._source.name} contains NaN or infinity"
            )
        return merged, Norms(np.linalg.norm(weight, axis=1), np.linalg.norm(merged, axis=1))


class _Former:
    """Forms V of one adapter on an engine."""

    def __init__(self, layer: UpdatedLayer, engine: Engine, dtype: str) -> None:
        def placed(array: Array) -> Array:
            place: Array = engine.place(np.asarray(array, dtype))
            return place

        self.layer, self.engine = layer, engine
        m = layer.adapter.magnitude
        with np.errstate(over="raise"):
            self.magnitude = None if m is None else placed(m)
            self.update = layer.adapter.update.mapped(placed).scaled(layer.config.scaling)
        if isinstance(self.update, LowRank) and not engine.raises:
            _check_finite(engine.fetch(self.update.lora_b))
        self.ops = operations(number=placed(np.zeros(1)))

    def __call__(self, rows: slice, host: HostArray) -> tuple[Array, Array]:
        """Return the same rows of W and of V, as they are stored."""
        weight: Array = self.engine.place(host)
        with np.errstate(invalid="ignore"):  # the norms show NaN and infinity
            if isinstance(self.update, LowRank):
                v = self.engine.product(self.update.lora_b[rows, :], self.update.lora_a)
                v += weight
            else:
                v = self.update.rows(rows) + weight
        return weight, v

    def row_norms(self, rows: Array) -> Array:
        """Return ‖·‖ by rows."""
        with np.errstate(invalid="ignore"):
            return self.ops.row_norms(rows, self.ops.row_squares(rows, rows.dtype))

    def gain(self, m: Array, norm: Array) -> Array:
        """Return m / n, 0 where n is 0."""
        with np.errstate(invalid="ignore", over="raise"):
            return self.ops.over_norm(m, norm)

    def fetched(self, *norms: Array) -> Norms:
        """Return norms as arrays of NumPy."""
        return Norms(*(self.engine.fetch(norm) for norm in norms))


class _Unscaled:
    """An adapter without a magnitude."""

    def __init__(self, form: _Former) -> None:
        self._form = form

    def merged(self, rows: slice, weight: HostArray) -> tuple[HostArray, Norms]:
        form = self._form
        with np.errstate(over="raise"):
            placed, v = form(rows, weight)
        norms = form.fetched(form.row_norms(placed), form.row_norms(v))
        return form.engine.fetch(v), norms


class _Rows:
    """An adapter whose m has a number for each stored row."""

    def __init__(self, form: _Former) -> None:
        self._form = form

    def merged(self, rows: slice, weight: HostArray) -> tuple[HostArray, Norms]:
        form = self._form
        m = cast(Array, form.magnitude)
        placed, v = form(rows, weight)  # (k, in)
        base, adapted = form.row_norms(placed), form.row_norms(v)
        gain = form.gain(m[rows], adapted)
        with np.errstate(invalid="ignore", over="raise"):
            v *= gain[:, None]
        return form.engine.fetch(v), form.fetched(base, adapted)


class _Columns:
    """An adapter whose m has a number for each column of the stored weight, or for its kernel."""

    def __init__(self, form: _Former) -> None:
        self._form, xp = form, form.ops.xp
        self._m = cast(Array, form.magnitude)
        # Squares do not overflow in float64, unless the weights are that large themselves.
        self._squares = [xp.zeros_like(self._m, dtype=xp.float64) for _ in range(2)]
        self._gain: Array | None = None

    def measure(self, rows: slice, weight: HostArray) -> None:
        """Add some rows to the norms of the columns."""
        xp, inner = self._form.ops.xp, self._m.shape[0]
        for total, part in zip(self._squares, self._form(rows, weight), strict=True):
            wide = xp.astype(part, xp.float64, copy=False)
            total += xp.sum(xp.reshape(xp.sum(wide * wide, axis=0), (inner, -1)), axis=-1)

    def merged(self, rows: slice, weight: HostArray) -> tuple[HostArray, Norms]:
        form, xp, m = self._form, self._form.ops.xp, self._m
        norms = [xp.astype(xp.sqrt(total), m.dtype) for total in self._squares]
        _, v = form(rows, weight)
        if self._gain is None:
            gain = form.gain(m, norms[1])
            kernel = v.shape[1] // m.shape[0]
            self._gain = xp.reshape(gain[:, None] * xp.ones((1, kernel), dtype=gain.dtype), (1, -1))
        else:
            norms = [norm[:0] for norm in norms]
        with np.errstate(invalid="ignore", over="raise"):
            v *= self._gain
        return form.engine.fetch(v), form.fetched(*norms)


def _check_finite(array: HostArray) -> None:
    """Raise FloatingPointError for NaN or infinity, which finite numbers give only by overflow."""
    if not np.isfinite(array).all():
        raise FloatingPointError("overflow")


def _flat(rows: HostArray) -> HostArray:
    return rows.reshape(rows.shape[0], -1)
