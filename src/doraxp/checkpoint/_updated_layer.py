"""`UpdatedLayer`: an adapter of any kind, as a merge needs it, and the sizes of its update.

::

    V = W + s ΔW        n = ‖V‖ by rows of the matrix        W' = (m / n)⊙V, or V without m
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from doraxp._base.types import Array, Config, DType, HostArray
from doraxp._core.kinds import LayerKind
from doraxp._core.updates import Hadamard, Kronecker, LowRank, Update, UpdateAdapter
from doraxp.checkpoint._matrix import Wide, as_matrix, matrix_rows, row_blocks
from doraxp.layers import AdaptedLayer


class UpdatedLayer(NamedTuple):
    """The adapter of one layer: an update of any kind, with a magnitude or without one."""

    adapter: UpdateAdapter
    """ΔW in the layout of the stored weight, and m of the rows of the matrix."""
    config: Config
    """Its `scaling` is s."""
    kind: LayerKind
    """How the layer stores its weight."""
    shape: tuple[int, ...]
    """The shape that the weight is stored in."""

    @property
    def magnitude(self) -> Wide | None:
        """Return m in float64, (out,); None without one."""
        m = self.adapter.magnitude
        return None if m is None else np.asarray(m, np.float64)

    @property
    def update(self) -> Update:
        """Return ΔW in float64, without s."""
        return self.adapter.update.mapped(lambda array: np.asarray(array, np.float64))

    @property
    def rows_kind(self) -> LayerKind:
        """The kind whose rows are looked at: without a magnitude those of the file will do."""
        if self.adapter.magnitude is not None:
            return self.kind
        return LayerKind("conv" if len(self.shape) > 2 else "linear")

    def matrix(self, block: HostArray) -> HostArray:
        """Return the part of the matrix that some stored rows are."""
        return as_matrix(block, self.rows_kind, self.shape)

    def update_rows(self, rows: NDArray[np.intp], kind: LayerKind | None = None) -> Wide:
        """Return s ΔW of some rows of the matrix, or of that of `kind`, in ascending order."""
        update = self.update

        def read(block: slice) -> HostArray:
            return np.asarray(update.rows(block))

        return self.config.scaling * matrix_rows(read, self.shape, rows, kind or self.rows_kind)

    def update_squares(self) -> Wide:
        """Return ‖s ΔWᵢ‖² by rows of the matrix."""
        factors, s = self.factors, self.config.scaling
        if factors is not None:
            a, b = (np.asarray(leaf) for leaf in factors)
            squares: Wide = np.einsum("or,or->o", s * b @ (a @ a.T), s * b)
            return squares
        update, is_transposed = self.update, self.rows_kind.is_transposed
        total = np.zeros(self.rows_kind.matrix_shape(self.shape)[0])
        for rows in row_blocks(self.shape):
            part = self.matrix(s * np.asarray(update.rows(rows)))
            total[slice(None) if is_transposed else rows] += np.vecdot(part, part)
        return total

    @property
    def factors(self) -> LowRank | None:
        """A and B in float64, for the matrix whose rows are looked at; None for other updates."""
        update, is_transposed = self.update, self.rows_kind.is_transposed
        if not isinstance(update, LowRank) or (is_transposed and len(self.shape) > 2):
            return None
        a, b = (np.asarray(leaf) for leaf in update)
        return LowRank(b.T, a.T) if is_transposed else update


AnyLayer: TypeAlias = AdaptedLayer | UpdatedLayer
"""An adapter to train, or one that can only be merged."""


class Reach(NamedTuple):
    """Bounds of an update: |ΔWᵢⱼ|, without cancelling, is at most rowsᵢ · columnsⱼ."""

    rows: Wide
    """(out,), such as ‖b‖ of B A."""
    columns: Wide
    """(in,), such as ‖a‖ of B A."""
    terms: int
    """The products that are added for one number of ΔW."""

    def in_matrix(self, kind: LayerKind, shape: tuple[int, ...]) -> Reach:
        """Return the bounds for the matrix of a stored weight."""
        if not kind.is_transposed:
            return self
        by_input = self.columns.reshape(shape[1], -1)  # (in, kernel)
        return Reach(by_input.max(axis=1), np.repeat(self.rows, by_input.shape[1]), self.terms)


def reach(update: Update, lost: float = 0.0) -> Reach:
    """Return the bounds of an update of float64 arrays.

    `lost` is the largest number that underflows: each factor's lengths are larger by √terms of it.
    """
    if isinstance(update, LowRank):
        a, b = (np.asarray(leaf) for leaf in update)
        more = lost * len(a) ** 0.5
        return Reach(np.linalg.norm(b, axis=1) + more, np.linalg.norm(a, axis=0) + more, len(a))
    if isinstance(update, Hadamard):
        one, other = (reach(part, lost) for part in update)
        terms = max(one.terms, other.terms)
        return Reach(one.rows * other.rows, one.columns * other.columns, terms)
    if isinstance(update, Kronecker):
        left, right = np.abs(np.asarray(update.left)), reach(update.right, lost)
        rows = np.kron(left.max(axis=1) + lost, right.rows)
        return Reach(rows, np.tile(right.columns, left.shape[1]), right.terms)
    largest = [
        np.abs(np.asarray(update.rows(rows))).max(axis=1) for rows in row_blocks(update.shape)
    ]
    return Reach(np.concatenate(largest) + lost, np.ones(update.shape[1]), 1)


def dtypes_of(update: Update) -> tuple[DType, ...]:
    """Return the dtypes of an update's arrays; none for one that is read from its file."""
    found: list[DType] = []

    def collect(array: Array) -> Array:
        found.append(array.dtype)
        return array

    update.mapped(collect)
    return tuple(found)
