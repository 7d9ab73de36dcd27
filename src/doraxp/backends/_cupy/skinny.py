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
    column_blocks,
    dtype_name,
    in_c_order,
    one_type,
    packed,
    together,
    typed,
)
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.plans import Plan, planned
from doraxp.backends._cupy.signatures import (
    AdaptedNorm,
    ExpandedNorm,
    PrepareAdapter,
    Project,
    Pull,
    SumChunks,
)
from doraxp.backends._cupy.source import THREADS, WARP, WARPS, blocks
from doraxp.backends._direction import Factors
from doraxp.backends._dtypes import as_dtype, transpose

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
PULL_COLUMNS, PULL_STEP, PULL_THREADS = 128, 16, 192
"""Columns of a block of `pull`, which takes one tile, rows of a step, and threads."""
PULL_BELOW = 3
"""Warps of a block of `pull` that share a chunk of the rows."""
FULL = 120
"""Blocks that keep a GPU of 132 multiprocessors busy, if each takes a whole one."""
PULLING = 264
"""Blocks of `pull` that a GPU of 132 multiprocessors runs at once: two on each."""


class PreparedAdapter(NamedTuple):
    """The adapter's own arrays, in the compute dtype."""

    lora_a: DeviceArray
    """A, (*stack, rank, in)."""
    scaled_b: DeviceArray
    """b = s B, (*stack, out, rank)."""
    gram: DeviceArray | None
    """A Aᵀ, (*stack, rank, rank); None where it was not asked for."""
    any_suspect: DeviceArray
    """Whether the norm has found a suspect row, (1,) int32: 0 so far."""


class Measured(NamedTuple):
    """The norm, and the arrays that follow from it by rows."""

    norm: DeviceArray
    """n = ‖V‖ by rows, (*stack, out)."""
    gain: DeviceArray
    """g = m / n, and 0 where n = 0, (*stack, out)."""
    unit: DeviceArray
    """V Aᵀ / n, and 0 where n = 0, (*stack, out, rank)."""
    gained: DeviceArray
    """g⊙b, and 0 in suspect rows, (*stack, out, rank)."""
    suspect: DeviceArray
    """The marks of suspect rows that are not rows of zeros, (*stack, out) bool."""


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
            columns = factor if turned else transpose(factor)
            return transpose(self.pull(columns, stored))
        factor = packed(factor, self.xp)
        rank = factor.shape[-1 if turned else -2]
        plan = _plan_project(stored.shape, rank, stored.dtype, turned)
        (result,) = self.cuda.empties(plan.made)
        if result.size:
            kernel = Project(matrix=stored, factor=factor, result=result, **plan.numbers)
            self.cuda.launch(kernel, plan.types, plan.grid, threads=plan.threads)
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
            first = transpose(self.project(stored, factor, turned=True))[..., None, :, :]
            if matrix2 is None:
                return packed(first, xp)
            return xp.concat([first, self.partial_pull(factor2, matrix2)], axis=-3)
        second = None
        if matrix2 is not None:
            second, by_columns = as_stored(matrix2, xp)
            if by_columns:
                rest = transpose(self.project(second, factor2, turned=True))
                return xp.concat(
                    [self.partial_pull(factor, stored), rest[..., None, :, :]], axis=-3
                )
        factor, factor2 = packed(factor, xp), packed(factor2, xp)
        plan = _plan_pull(
            stored.shape, 0 if second is None else second.shape[-2], factor.shape[-1], stored.dtype
        )
        (partial,) = self.cuda.empties(plan.made)
        if partial.size:
            kernel = Pull(
                matrix=stored, factor=factor, matrix2=second, factor2=factor2, result=partial,
                **plan.numbers,
            )  # fmt: skip
            self.cuda.launch(kernel, plan.types, plan.grid, threads=plan.threads)
        return partial

    def prepare(
        self, lora_a: DeviceArray, lora_b: DeviceArray, scaling: float, dtype: DType, *,
        gram: bool = True,
    ) -> PreparedAdapter:  # fmt: skip
        """Return A and s B in `dtype`, A Aᵀ for `gram`, and a 0 for suspect rows, by one launch.

        A itself is returned if it is in C order and of `dtype`.
        """
        xp, kind = self.xp, np.dtype(dtype)
        lora_a, lora_b = packed(lora_a, xp), packed(lora_b, xp)
        if lora_b.dtype != lora_a.dtype != kind:  # three dtypes: the kernel has types for two
            lora_b = as_dtype(lora_b, dtype, xp=xp)
        plan = _plan_prepare(lora_a.shape, lora_b.shape, lora_a.dtype, lora_b.dtype, kind, gram)
        wide_a, scaled_b, pairs, found = self.cuda.empties(plan.made)
        kernel = PrepareAdapter(
            a=lora_a, b=lora_b, wide_a=wide_a, scaled_b=scaled_b, gram=pairs, any=found,
            scaling=scaling, **plan.numbers,
        )  # fmt: skip
        self.cuda.launch(kernel, plan.types, plan.grid)
        return PreparedAdapter(lora_a if wide_a is None else wide_a, scaled_b, pairs, found)

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
        stored, turned = as_stored(weight, xp)
        plan = _plan_measure(b.shape, a.shape[-1], stored.dtype, b.dtype, u is None)
        norm, gain, unit, gained, suspect = self.cuda.empties(plan.made)
        made = {
            "weight": stored, "a": a, "b": b, "gram": packed(gram, xp),
            "squares": packed(squares, xp), "row_scale": row_scale,
            "magnitude": packed(magnitude, xp), "norm": norm, "gain": gain, "unit": unit,
            "gained": gained, "suspect": suspect, "any": any_suspect, "floor": floor,
            "cancellation": cancellation,
        }  # fmt: skip
        kernel: AdaptedNorm | ExpandedNorm
        if u is None:
            kernel = AdaptedNorm(**made, **plan.numbers)
        else:
            u, bg = packed(u, xp), packed(bg, xp)
            kernel = ExpandedNorm(u=u, bg=bg, turned=turned, **made, **plan.numbers)
        self.cuda.launch(kernel, plan.types, plan.grid, threads=plan.threads)
        return Measured(norm, gain, unit, gained, suspect)

    def makes_u(self, weight: DeviceArray, dtype: DType, rank: int) -> bool:
        """Return whether `measure` can make W Aᵀ itself: for W of 16 bits in C order."""
        return in_c_order(weight) and _makes_u(weight.dtype, dtype, rank)


@planned
def _makes_u(storage: DType, dtype: DType, rank: int) -> bool:
    return dtype_name(storage) in LOW and np.dtype(dtype) == np.float32 and rank <= 2 * RANKS


@planned
def _plan_project(shape: tuple[int, ...], rank: int, storage: DType, turned: bool) -> Plan:
    *stack, rows, columns = shape
    tiles = 1 if rank <= RANKS else 2
    chunks, count = blocks(rank, RANKS * tiles), math.prod(stack)
    groups = row_groups(rows, chunks * count)
    numbers = {
        "rows": rows, "columns": columns, "rank": rank, "turned": turned, "tiles": tiles,
        "groups": groups,
    }  # fmt: skip
    grid = blocks(rows, BAND * groups) * chunks, 1, count
    made = together(((*stack, rows, rank), np.float32))
    return Plan(typed(storage, np.float32, np.float32), grid, numbers, made, threads=BAND_THREADS)


@planned
def _plan_pull(shape: tuple[int, ...], rows2: int, rank: int, storage: DType) -> Plan:
    """Plan `partial_pull`, for a matrix in this shape."""
    *stack, rows, columns = shape
    count = math.prod(stack)
    across = blocks(columns, PULL_COLUMNS) * blocks(rank, RANKS)
    chunks, each = row_chunks(rows, rows2, across * count) if across * count else (1, 1)
    numbers = {
        "rows": rows, "rows2": rows2, "columns": columns, "rank": rank, "per_chunk": each
    }  # fmt: skip
    types, shape = typed(storage, np.float32, np.float32), (*stack, chunks, rank, columns)
    grid = across, chunks, count
    return Plan(types, grid, numbers, together((shape, np.float32)), threads=PULL_THREADS)


@planned
def _plan_prepare(
    a_shape: tuple[int, ...], b_shape: tuple[int, ...], a: DType, b: DType, kind: DType, gram: bool
) -> Plan:
    """Plan `prepare`: it makes A in the dtype `kind`, s B, A Aᵀ and the 0."""
    *stack, rank, inner = a_shape
    out, count = b_shape[-2], math.prod(stack)
    stored = b if a == kind else a
    copied = 0 if a == kind else rank * inner
    numbers = {
        "a_is_stored": a == stored, "b_is_stored": b == stored, "out": out, "inner": inner,
        "rank": rank,
    }  # fmt: skip
    sides = blocks(rank, SIDE) if gram else 0
    pairs = sides * (sides + 1) // 2
    grid = pairs + column_blocks(out * rank, stored) + column_blocks(copied, stored), 1, count
    made = together(
        (a_shape, kind) if copied else None, (b_shape, kind),
        ((*stack, rank, rank), kind) if gram else None, ((1,), np.int32),
    )  # fmt: skip
    return Plan(typed(stored, kind, kind), grid, numbers, made)


@planned
def _plan_measure(
    shape: tuple[int, ...], inner: int, storage: DType, kind: DType, fused: bool
) -> Plan:
    """Plan `measure`, for b in this shape; it is `fused` with W Aᵀ or not."""
    *stack, out, rank = shape
    count, threads = math.prod(stack), THREADS
    numbers = {"out": out, "inner": inner, "rank": rank}
    if fused:
        groups = min(row_groups(out, count), MOST_BANDS)
        numbers |= {"tiles": 1 if rank <= RANKS else 2, "groups": groups}
        grid, threads = (blocks(out, BAND * groups), 1, count), BAND_THREADS
    else:
        numbers["rows"] = count * out
        grid = blocks(count * out, ROWS_AT_ONCE * WARPS), 1, 1
    rows = *stack, out
    by_row, wide = (rows, kind), (shape, kind)
    made = together(by_row, by_row, wide, wide, (rows, np.bool))
    return Plan(typed(storage, kind, kind), grid, numbers, made, threads=threads)


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
