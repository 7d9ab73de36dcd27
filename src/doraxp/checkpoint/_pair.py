"""Two matrices that are read block by block: the weight before and after a change.

W, W*   (out, in)   before and after, with the rows w and w*
D = W* − W          with the rows d
γ       (out,)      the row gains less 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from doraxp._base.types import HostArray
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._safetensors import AnySource

Matrix: TypeAlias = NDArray[np.float64]
OnRows: TypeAlias = Callable[[int], object]
"""Called with the size of each block that was read."""


class Block(NamedTuple):
    """Some rows and columns of both matrices."""

    rows: slice
    columns: slice
    base: HostArray
    tuned: HostArray


class Pair(Protocol):
    """Two matrices that are read block by block, as often as needed.

    Each block has all columns of some rows, or else each has all rows of some columns.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of both."""

    def blocks(self) -> Iterator[Block]:
        """Read both matrices once."""


class WeightPair(Pair, Protocol):
    """A weight before and after, which one adapter is made for."""

    @property
    def base(self) -> AnySource:
        """The weight before, as the base has it."""

    @property
    def kind(self) -> LayerKind:
        """How the weight is stored."""

    def fault(self) -> str:
        """Return the tensor whose numbers nothing can be computed with, and the reason."""


class Sums(NamedTuple):
    """Products of the rows, each (out,): ‖d‖², ⟨d, w⟩ and ‖w‖²."""

    dd: Matrix
    dw: Matrix
    ww: Matrix

    @staticmethod
    def zeros(rows: int) -> Sums:
        """Return sums of nothing."""
        return Sums(*(np.zeros(rows) for _ in Sums._fields))

    def add(self, rows: slice, difference: HostArray, weight: HostArray) -> None:
        """Add the products of some rows, or of a part of their columns."""
        self.dd[rows] += np.einsum("ij,ij->i", difference, difference)
        self.dw[rows] += np.einsum("ij,ij->i", difference, weight)
        self.ww[rows] += np.einsum("ij,ij->i", weight, weight)

    def squares(self, gamma: Matrix) -> Matrix:
        """Return ‖d − γ w‖² of each row."""
        return np.maximum(self.dd - 2 * gamma * self.dw + gamma * gamma * self.ww, 0.0)


def row_sums(pair: Pair, on_rows: OnRows) -> Sums:
    """Return the products of the rows; NaN or infinity where a weight has them."""
    sums = Sums.zeros(pair.shape[0])
    with np.errstate(invalid="ignore", over="ignore"):
        for block in pair.blocks():
            weight, difference = wide(block)
            sums.add(block.rows, difference, weight)
            on_rows(weight.size)
    return sums


def wide(block: Block) -> tuple[HostArray, HostArray]:
    """Return W and D of a block: in float32 if both are narrower, else in float64."""
    narrow = max(block.base.dtype.itemsize, block.tuned.dtype.itemsize) < 4
    dtype: np.dtype[Any] = np.dtype(np.float32 if narrow else np.float64)
    weight = block.base.astype(dtype)
    return weight, block.tuned.astype(dtype) - weight
