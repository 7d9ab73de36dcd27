"""Products of a matrix of 16 bits with a float32 factor that has few rows or columns.

    M (rows, columns)   W, x or dy, in float16 or bfloat16
    F (rank, columns) or (rows, rank), in float32

24 bits of F are kept, and the sums are in float32. Each product reads M once, and takes one launch;
`pull` takes another one where many blocks share a sum. Arrays may have a stack in front.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from doraxp._base.types import DType, Namespace
from doraxp.backends._cupy.arrays import (
    LOW,
    DeviceArray,
    as_stored,
    dtype_name,
    name_of,
    one_type,
    packed,
)
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.signatures import (
    AdaptedNorm,
    ExpandedNorm,
    PrepareAdapter,
    Project,
    Pull,
    SumChunks,
)
from doraxp.backends._cupy.source import THREADS, WARP, WARPS, Types, blocks
from doraxp.backends._direction import Factors

BAND, BAND_THREADS = 32, 256
"""Rows of a warp of `project`, and threads of a block. kernels/skinny.cu has the same."""
RANKS = 16
"""Ranks of a tile. A warp of `project` multiplies one or two of them at once."""
MOST_GROUPS, MOST_BANDS = 8, 4
"""The most warps of `project` and of `adapted_norm` that share a part of F."""
SIDE = 4
"""Ranks on each side of the part of A Aᵀ that a block of `prepare_adapter` makes."""
ROWS_AT_ONCE = 4
"""Rows that a warp of `expanded_norm` makes at once. kernels/adapter.cu has the same."""
MOST_PAIRED = 64
"""The largest rank for which `prepare_adapter` makes A Aᵀ: each block reads 8 rows of A."""
PULL_COLUMNS, PULL_STEP, PULL_THREADS = 128, 16, 192
"""Columns of a block of `pull`, which takes one tile, rows of a step, and threads."""
PULL_BELOW = 3
"""Warps of a block of `pull` that share a chunk of the rows."""
FULL = 120
"""Blocks that keep a GPU of 132 multiprocessors busy, if each takes a whole one."""
PULLING = 264
"""Blocks of `pull` that a GPU of 132 multiprocessors runs at once: two on each."""


class Prepared(NamedTuple):
    """The adapter's own arrays."""

    lora_a: DeviceArray  # (*stack, rank, in), in the compute dtype
    scaled_b: DeviceArray  # s B, (*stack, out, rank)
    gram: DeviceArray | None  # A Aᵀ, (*stack, rank, rank)
    any_suspect: DeviceArray  # (1,) int32: 0, until the norm finds a suspect row


class Measured(NamedTuple):
    """The norm, and the arrays that follow from it by rows."""

    norm: DeviceArray  # n, (*stack, out)
    gain: DeviceArray  # g = m / n
    unit: DeviceArray  # V Aᵀ / n, (*stack, out, rank)
    gained: DeviceArray  # g⊙b, (*stack, out, rank), and 0 in suspect rows
    suspect: DeviceArray  # (*stack, out) bool: the suspect rows that are not zeros


class Skinny:
    """The products and the norm, for a namespace and a device."""

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
        """Return Fᵀ M + F₂ᵀ M₂, (*stack, rank, columns), for F (rows, rank); M₂ may have more rows.

        Both matrices have one dtype. A matrix that is the transpose of an array in C order takes a
        launch of its own.
        """
        stored, by_columns = as_stored(matrix, self.xp)
        if by_columns:
            result = self.xp.matrix_transpose(self.project(stored, factor, turned=True))
            return result if matrix2 is None else result + self.pull(factor2, matrix2)
        second = None
        if matrix2 is not None:
            second, by_columns = as_stored(matrix2, self.xp)
            if by_columns:
                result = self.pull(factor, stored)
                result += self.xp.matrix_transpose(self.project(second, factor2, turned=True))
                return result
        factor, factor2 = packed(factor, self.xp), packed(factor2, self.xp)
        *stack, rows, columns = stored.shape
        rank, rows2 = factor.shape[-1], 0 if second is None else second.shape[-2]
        count = math.prod(stack)
        if count * rank * columns == 0:
            return self.cuda.empty((*stack, rank, columns), np.float32)
        across = blocks(columns, PULL_COLUMNS) * blocks(rank, RANKS)
        chunks, each = row_chunks(rows, rows2, across * count)
        partial = self.cuda.empty((*stack, chunks, rank, columns), np.float32)
        arguments = Pull(
            matrix=stored, factor=factor, rows=rows, matrix2=second, factor2=factor2, rows2=rows2,
            result=partial, columns=columns, rank=rank, per_chunk=each,
        )  # fmt: skip
        grid = across, chunks, count
        self.cuda.launch(arguments, _types(stored), grid, threads=PULL_THREADS)
        if chunks == 1:
            return self.xp.reshape(partial, (*stack, rank, columns))
        result = self.cuda.empty((*stack, rank, columns), np.float32)
        length = rank * columns
        sums = SumChunks(partial=partial, result=result, chunks=chunks, out=length)
        self.cuda.launch(sums, one_type(result), (blocks(length, WARP), 1, count), threads=WARP)
        return result

    def prepare(
        self, lora_a: DeviceArray, lora_b: DeviceArray, scaling: float, dtype: DType, *,
        gram: bool = True,
    ) -> Prepared:  # fmt: skip
        """Return A and s B in `dtype`, A Aᵀ for `gram`, and a 0 for suspect rows, by one launch.

        A itself is returned if it is in C order and of `dtype`.
        """
        wide = dtype_name(np.dtype(dtype))
        lora_a, lora_b = packed(lora_a, self.xp), packed(lora_b, self.xp)
        stored = next(
            (name_of(array) for array in (lora_a, lora_b) if name_of(array) != wide), wide
        )
        if name_of(lora_b) not in (stored, wide):  # three dtypes: the kernel has types for two
            lora_b = self.xp.astype(lora_b, dtype)
        *stack, rank, inner = lora_a.shape
        out, count = lora_b.shape[-2], math.prod(stack)
        if name_of(lora_a) == wide:
            wide_a, copied = None, 0
        else:
            wide_a, copied = self.cuda.empty(lora_a.shape, dtype), rank * inner
        scaled_b = self.cuda.empty(lora_b.shape, dtype)
        pairs = self.cuda.empty((*stack, rank, rank), dtype) if gram else None
        found = self.cuda.empty((1,), np.int32)
        arguments = PrepareAdapter(
            a=lora_a, a_is_stored=name_of(lora_a) == stored, b=lora_b,
            b_is_stored=name_of(lora_b) == stored, wide_a=wide_a, scaled_b=scaled_b, gram=pairs,
            any=found, out=out, inner=inner, rank=rank, scaling=scaling,
        )  # fmt: skip
        each = THREADS * (8 if stored in LOW else 16 // np.dtype(stored).itemsize)
        sides = blocks(rank, SIDE) if gram else 0
        grid = sides * (sides + 1) // 2 + blocks(out * rank, each) + blocks(copied, each), 1, count
        self.cuda.launch(arguments, Types(stored, wide, wide), grid)
        return Prepared(lora_a if wide_a is None else wide_a, scaled_b, pairs, found)

    def measure(
        self, factors: Factors, gram: DeviceArray, squares: DeviceArray | None,
        magnitude: DeviceArray, any_suspect: DeviceArray, floor: float, cancellation: float, *,
        u: DeviceArray | None = None, bg: DeviceArray | None = None,
    ) -> Measured:  # fmt: skip
        """Return n and the arrays by rows that follow from it, by one launch.

        `u` is W Aᵀ, and `bg` is b A Aᵀ; both may be None where `makes_u` is true. `squares` is ‖w‖²
        by rows, which ρ makes needless. Sets any_suspect[0] to 1 if a suspect row is not of zeros.
        """
        xp, (weight, *rest) = self.xp, factors
        a, b, row_scale = (packed(array, xp) for array in rest)
        kind = b.dtype
        *stack, out, rank = b.shape
        inner, count = a.shape[-1], math.prod(stack)
        norm, gain = (self.cuda.empty((*stack, out), kind) for _ in range(2))
        unit, gained = (self.cuda.empty(b.shape, kind) for _ in range(2))
        suspect = self.cuda.empty((*stack, out), xp.bool)
        made = {
            "a": a, "b": b, "gram": packed(gram, xp), "squares": packed(squares, xp),
            "row_scale": row_scale, "magnitude": packed(magnitude, xp), "norm": norm, "gain": gain,
            "unit": unit, "gained": gained, "suspect": suspect, "any": any_suspect, "out": out,
            "inner": inner, "rank": rank, "floor": floor, "cancellation": cancellation,
        }  # fmt: skip
        stored, turned = as_stored(weight, xp)
        types = Types(name_of(weight), name_of(b), name_of(b))
        if u is None:
            tiles = 1 if rank <= RANKS else 2
            groups = min(row_groups(out, count), MOST_BANDS)
            fused = AdaptedNorm(weight=stored, tiles=tiles, groups=groups, **made)
            grid = blocks(out, BAND * groups), 1, count
            self.cuda.launch(fused, types, grid, threads=BAND_THREADS)
        else:
            rows = count * out
            arguments = ExpandedNorm(
                u=packed(u, xp), weight=stored, turned=turned, bg=packed(bg, xp), rows=rows, **made
            )
            self.cuda.launch(arguments, types, (blocks(rows, ROWS_AT_ONCE * WARPS), 1, 1))
        return Measured(norm, gain, unit, gained, suspect)

    def makes_u(self, weight: DeviceArray, dtype: DType, rank: int) -> bool:
        """Return whether `measure` can make W Aᵀ itself: for W of 16 bits in C order."""
        low = name_of(weight) in LOW and np.dtype(dtype) == np.float32
        return low and bool(weight.flags.c_contiguous) and rank <= 2 * RANKS


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
    steps = max(1, blocks(rows, PULL_STEP) + blocks(rows2, PULL_STEP))
    chunks = min(max(1, PULLING // others), blocks(steps, PULL_BELOW))
    each = blocks(steps, chunks)
    return blocks(steps, each), each


def _types(stored: DeviceArray) -> Types:
    return Types(name_of(stored), "float32", "float32")
