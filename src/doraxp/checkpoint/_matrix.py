"""The matrix of a stored weight, from blocks of rows as the file has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from doraxp._base.types import HostArray
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._safetensors import AnySource

Wide: TypeAlias = NDArray[np.float64]
Reading: TypeAlias = Callable[[slice], HostArray]
"""Returns the stored rows of a slice with a start and a stop."""
BLOCK = 1 << 19
"""Elements of one block: in float32 2 MiB, which a core's cache can hold."""


def row_blocks(shape: tuple[int, ...], multiple: int = 1) -> Iterator[slice]:
    """Cut the first axis of a stored weight into blocks, which begin at multiples of a number."""
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))  # a row may have no elements
    step = max(multiple, step // multiple * multiple)
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def as_matrix(block: HostArray, kind: LayerKind, shape: tuple[int, ...]) -> HostArray:
    """Return the part of the matrix that some rows of a stored weight are.

    These are rows of the matrix; of a transposed kind, columns: (in, k·kernel).
    """
    block = block.reshape(len(block), -1)
    if not kind.is_transposed:
        return block
    inner = shape[1]
    return block.reshape(len(block), inner, -1).swapaxes(0, 1).reshape(inner, -1)


def matrix_rows(
    read: Reading, shape: tuple[int, ...], rows: NDArray[np.intp], kind: LayerKind
) -> Wide:
    """Return some rows of the matrix of a stored weight, in ascending order."""
    if kind.is_transposed:
        parts = [as_matrix(read(block), kind, shape)[rows] for block in row_blocks(shape)]
        return np.concatenate(parts, axis=1).astype(np.float64)
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)  # each is one read
    parts = [read(slice(int(run[0]), int(run[-1]) + 1)).reshape(len(run), -1) for run in runs]
    return np.concatenate(parts).astype(np.float64)


def source_rows(source: AnySource, rows: NDArray[np.intp], kind: LayerKind) -> Wide:
    """Return some rows of the matrix of a tensor in a file, in ascending order."""
    return matrix_rows(source.read, source.tensor.shape, rows, kind)
