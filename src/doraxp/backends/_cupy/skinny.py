"""Products of a matrix of 16 bits with a float32 factor that has few rows or columns.

    M (rows, columns)   W, x or dy, in float16 or bfloat16
    F (rank, columns) or (rows, rank), in float32

24 bits of F are kept, and the sums are in float32. Each product reads M once, and takes one launch;
`pull` takes another one where many blocks share a sum. Arrays may have a stack in front.
"""

from __future__ import annotations

import math

import numpy as np

from doraxp._base.types import Namespace
from doraxp.backends._cupy.arrays import DeviceArray, as_stored, name_of, one_type, packed
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.signatures import Project, Pull, SumChunks
from doraxp.backends._cupy.source import WARP, Types, blocks

BAND, BAND_THREADS = 32, 256
"""Rows of a warp of `project`, and threads of a block. kernels/skinny.cu has the same."""
RANKS = 16
"""Ranks of a tile. A warp of `project` multiplies one or two of them at once."""
MOST_GROUPS = 8
"""The most warps of `project` that share a part of F."""
FLUTES, FLUTE_STEP, FLUTE_THREADS = 128, 16, 192
"""Columns of a block of `pull`, which takes one tile, rows of a step, and threads."""
DOWN = 3
"""Warps of a block of `pull` that share a chunk of the rows."""
FULL = 120
"""Blocks that keep a GPU of 132 multiprocessors busy, if each takes a whole one."""
PULLING = 264
"""Blocks of `pull` that a GPU of 132 multiprocessors runs at once: two on each."""


class Skinny:
    """The products, for a namespace and a device."""

    def __init__(self, xp: Namespace, cuda: Cuda) -> None:
        self.xp, self.cuda = xp, cuda

    def project(
        self, matrix: DeviceArray, factor: DeviceArray, *, turned: bool = False
    ) -> DeviceArray:
        """Return M Fᵀ, (*stack, rows, rank), for F (rank, columns), or given as Fᵀ if `turned`.

        If M is the transpose of an array in C order, so is the result.
        """
        stored, by_columns = as_stored(matrix, self.xp)
        if by_columns:
            columns = factor if turned else self.xp.matrix_transpose(factor)
            return self.xp.matrix_transpose(self.pull(columns, stored))
        factor = packed(factor, self.xp)
        *stack, rows, columns = stored.shape
        rank = factor.shape[-1 if turned else -2]
        result = self.cuda.empty((*stack, rows, rank), np.float32)
        if result.size == 0:
            return result
        tiles = 1 if rank <= RANKS else 2
        chunks, count = blocks(rank, RANKS * tiles), math.prod(stack)
        groups = row_groups(rows, chunks * count)
        arguments = Project(
            matrix=stored, factor=factor, result=result, rows=rows, columns=columns, rank=rank,
            turned=turned, tiles=tiles, groups=groups,
        )  # fmt: skip
        grid = blocks(rows, BAND * groups) * chunks, 1, count
        self.cuda.launch(arguments, _types(stored), grid, threads=BAND_THREADS)
        return result

    def pull(
        self, factor: DeviceArray, matrix: DeviceArray,
        factor2: DeviceArray | None = None, matrix2: DeviceArray | None = None,
    ) -> DeviceArray:  # fmt: skip
        """Return Fᵀ M + F₂ᵀ M₂, (*stack, rank, columns): the sums of `partial_pull`, added up."""
        partial = self.partial_pull(factor, matrix, factor2, matrix2)
        *stack, chunks, rank, columns = partial.shape
        if chunks == 1 or partial.size == 0:
            return self.xp.reshape(partial, (*stack, rank, columns))
        result = self.cuda.empty((*stack, rank, columns), np.float32)
        length, count = rank * columns, math.prod(stack)
        sums = SumChunks(partial=partial, result=result, chunks=chunks, out=length)
        self.cuda.launch(sums, one_type(result), (blocks(length, WARP), 1, count), threads=WARP)
        return result

    def partial_pull(
        self, factor: DeviceArray, matrix: DeviceArray,
        factor2: DeviceArray | None = None, matrix2: DeviceArray | None = None,
    ) -> DeviceArray:  # fmt: skip
        """Return Fᵀ M + F₂ᵀ M₂ as sums over chunks of rows, (*stack, chunks, rank, columns).

        F is (rows, rank); M₂ may have more rows. Both matrices have one dtype. A matrix that is the
        transpose of an array in C order takes a launch of its own.
        """
        xp = self.xp
        stored, by_columns = as_stored(matrix, xp)
        if by_columns:
            first = xp.matrix_transpose(self.project(stored, factor, turned=True))[..., None, :, :]
            if matrix2 is None:
                return packed(first, xp)
            return xp.concat([first, self.partial_pull(factor2, matrix2)], axis=-3)
        second = None
        if matrix2 is not None:
            second, by_columns = as_stored(matrix2, xp)
            if by_columns:
                rest = xp.matrix_transpose(self.project(second, factor2, turned=True))
                return xp.concat(
                    [self.partial_pull(factor, stored), rest[..., None, :, :]], axis=-3
                )
        factor, factor2 = packed(factor, xp), packed(factor2, xp)
        *stack, rows, columns = stored.shape
        rank, rows2 = factor.shape[-1], 0 if second is None else second.shape[-2]
        count = math.prod(stack)
        if count * rank * columns == 0:
            return self.cuda.empty((*stack, 1, rank, columns), np.float32)
        across = blocks(columns, FLUTES) * blocks(rank, RANKS)
        chunks, each = row_chunks(rows, rows2, across * count)
        partial = self.cuda.empty((*stack, chunks, rank, columns), np.float32)
        arguments = Pull(
            matrix=stored, factor=factor, rows=rows, matrix2=second, factor2=factor2, rows2=rows2,
            result=partial, columns=columns, rank=rank, per_chunk=each,
        )  # fmt: skip
        grid = across, chunks, count
        self.cuda.launch(arguments, _types(stored), grid, threads=FLUTE_THREADS)
        return partial


def row_groups(rows: int, others: int) -> int:
    """Return how many warps of a block of `project` take different rows and share F.

    More of them read F less often, as long as the blocks still keep the GPU busy: `others` blocks
    take the same rows.
    """
    groups = MOST_GROUPS
    while groups > 1 and blocks(rows, BAND * groups) * others < FULL:
        groups //= 2
    return groups


def row_chunks(rows: int, rows2: int, others: int) -> tuple[int, int]:
    """Return the number of chunks of rows of `pull`, and the steps of 16 rows of each.

    `others` blocks take the same rows. The chunks bring the blocks to PULLING at most, so the
    partial sums are PULLING blocks of 8 KiB at most.
    """
    steps = max(1, blocks(rows, FLUTE_STEP) + blocks(rows2, FLUTE_STEP))
    chunks = min(max(1, PULLING // others), blocks(steps, DOWN))
    each = blocks(steps, chunks)
    return blocks(steps, each), each


def _types(stored: DeviceArray) -> Types:
    return Types(name_of(stored), "float32", "float32")
