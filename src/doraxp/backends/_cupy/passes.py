"""The passes beside the products, over (tokens, out), (tokens, in) and (out, rank).

    W (out, in)   A (rank, in)   b = s B (out, rank)   ρ (out,) or None for 1   V = ρ⊙W + b A

Each pass reads its arrays once. Those that need V form the suspect rows from their factors.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypedDict

import numpy as np

from doraxp._base.types import DType, Namespace
from doraxp.backends._cupy.arrays import (
    DeviceArray,
    column_blocks,
    in_c_order,
    one_type,
    packed,
    together,
    typed,
    types_of,
)
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.plans import Plan, planned
from doraxp.backends._cupy.signatures import (
    GradientA,
    Gradients,
    MixedGradients,
    Outputs,
    OverNorm,
    RowGradients,
    Update,
)
from doraxp.backends._cupy.source import LIMIT, THREADS, WARPS, blocks
from doraxp.backends._cupy.suspects import Suspects

LEAST, CHUNK, CHUNKS = 4, 32, 64
"""The fewest and the most tokens of a chunk, and how many chunks there are in between."""
RUN = 4
"""Tokens that a thread of `outputs` takes. It loads gain and bias once for them."""
STRIP_OF_UPDATE, ROWS_OF_UPDATE = 32, 32
"""Columns and rows that a warp of `update` makes at once. kernels/forward.cu has the same."""
TILE = 8
"""Tokens, or ranks, that a thread works on at once. kernels/forward.cu has the same."""
UPDATERS = 1024
"""About how many blocks `update` has: each keeps the factor of its columns in registers."""
SWATH_COLUMNS, SWATH_RANKS, SWATH_STEP, SWATH_THREADS = 512, 16, 16, 256
"""Columns and ranks of a block of `mixed_gradients`, tokens of a step, and threads. The kernel has
the same."""
BUSY = 132
"""Multiprocessors of a GPU: `mixed_gradients` has about as many blocks, or twice as many."""
SQUARES = 16
"""The most blocks of rows of `row_gradients` that sum up a square of their own."""


class SuspectPart(TypedDict):
    """The arguments by which a kernel adds the suspect rows' part of d V and of dA.

    All arrays are None where there is nothing to add.
    """

    any: DeviceArray
    suspect: DeviceArray
    weight: DeviceArray
    turned: bool
    a: DeviceArray
    b: DeviceArray
    row_scale: DeviceArray
    gain: DeviceArray
    norm: DeviceArray
    p: DeviceArray
    """g⊙dm, or None where the norm has no gradient."""
    d: DeviceArray
    """dy, (*stack, tokens, out) in C order."""
    d_is_stored: bool
    """Whether it is of W's dtype; else it is of the compute dtype."""
    x: DeviceArray
    """x~, (*stack, tokens, in) in C order."""
    x_is_stored: bool


NO_PART = SuspectPart(
    any=None, suspect=None, weight=None, turned=False, a=None, b=None, row_scale=None, gain=None,
    norm=None, p=None, d=None, d_is_stored=False, x=None, x_is_stored=False,
)  # fmt: skip


class MixedSums(NamedTuple):
    """The results of `mixed_gradients`."""

    dz: DeviceArray
    """ρ⊙g⊙dy with 0 for suspect rows, (*stack, tokens, out), in 16 bits."""
    along: DeviceArray
    """Σ dy⊙z over chunks of tokens, (*stack, chunks, out)."""
    totals: DeviceArray | None
    """Σ dy over chunks of tokens, (*stack, chunks, out)."""
    low: DeviceArray
    """dy (g⊙b) without suspect rows, over blocks of columns: (*stack, blocks, tokens, rank)."""
    db: DeviceArray
    """Lᵀ dy over chunks of tokens, (*stack, chunks, rank, out)."""


class RowSums(NamedTuple):
    """The gradients that belong to rows of W, and the rows of the gradient through the norm."""

    magnitude: DeviceArray
    radial: DeviceArray | None
    lora_b: DeviceArray
    bias: DeviceArray | None
    pull: DeviceArray | None
    """ρ⊙q⊙b without suspect rows, (*stack, out, rank)."""
    square: DeviceArray | None
    """bᵀ (q⊙b) without suspect rows, (*stack, blocks, rank, rank): the sums over blocks of rows."""
    over: DeviceArray | None
    """b / ρ, (*stack, out, rank)."""
    low: DeviceArray | None
    """dz b without suspect rows, (*stack, tokens, rank)."""


class Passes:
    """The passes before and after the products."""

    def __init__(self, xp: Namespace, cuda: Cuda) -> None:
        self.xp, self.cuda = xp, cuda

    def outputs(
        self, found: Suspects, z: DeviceArray, x: DeviceArray, gain: DeviceArray,
        bias: DeviceArray | None, shift: DeviceArray | None, dtype: DType,
    ) -> DeviceArray:  # fmt: skip
        """Return y = g⊙z + bias in `dtype`, after z ← ρ⊙z.

        Overwrites z, (*stack, tokens, out) in C order: also the columns of suspect rows, with
        x Vᵀ + shift bᵀ.
        """
        y = self.cuda.empty(z.shape, dtype)
        if z.size == 0:
            return y
        xp, (weight, a, b, row_scale) = self.xp, found.factors
        plan = _plan_outputs(z.shape, a.shape, x.dtype, weight.dtype, z.dtype, gain.dtype)
        kernel = Outputs(
            z=z, row_scale=row_scale, gain=packed(gain, xp), bias=packed(bias, xp), y=y,
            any=found.any, suspect=found.suspect, weight=weight, turned=not in_c_order(weight),
            a=a, b=b, x=packed(x, xp), shift=packed(shift, xp), **plan.numbers,
        )  # fmt: skip
        self.cuda.launch(kernel, plan.types, plan.grid)
        return y

    def update(
        self, low: DeviceArray, factor: DeviceArray, dtype: DType, storage: DType, *,
        by_rows: bool = False, over: DeviceArray | None = None,
        part: SuspectPart = NO_PART,
    ) -> DeviceArray:  # fmt: skip
        """Return low factorᵀ / ρ, (*stack, rows, columns), in `dtype`; W is of dtype `storage`.

        low is (*stack, rows, rank), the factor (*stack, columns, rank) if `by_rows`, else
        (*stack, rank, columns); `over` is ρ or None. With a `part`, the rows are tokens, and any
        below them belong to dA.
        """
        xp, d = self.xp, part["d"]
        low, factor = packed(low, xp), packed(factor, xp)
        of_d = None if d is None else d.shape
        plan = _plan_update(low.shape, factor.shape, low.dtype, dtype, storage, of_d, by_rows)
        (result,) = self.cuda.empties(plan.made)
        if result.size:
            kernel = Update(
                low=low, factor=factor, over=packed(over, xp), result=result, **part,
                **plan.numbers,
            )  # fmt: skip
            self.cuda.launch(kernel, plan.types, plan.grid)
        return result

    def gradients(
        self, d: DeviceArray, z: DeviceArray, gain: DeviceArray, found: Suspects, room: int,
        *, total: bool,
    ) -> tuple[DeviceArray, DeviceArray, DeviceArray | None]:  # fmt: skip
        """Return dz = ρ⊙g⊙d, and the sums of d⊙z and, with `total`, of d over chunks of tokens.

        The first array is in z's dtype, with 0 for suspect rows. It has `room` more rows than d,
        which are not written. The sums are (*stack, chunks, out).
        """
        *stack, tokens, out = d.shape
        rows = self.cuda.empty((*stack, tokens + room, out), z.dtype)
        each, chunks = _chunks(tokens)
        along = self.cuda.empty((*stack, chunks, out), gain.dtype)
        totals = self.cuda.empty((*stack, chunks, out), gain.dtype) if total else None
        kernel = Gradients(
            dy=d, z=z, gain=gain, row_scale=found.factors.row_scale, suspect=found.suspect,
            dz=rows, sum_dyz=along, sum_dy=totals, tokens=tokens, rows=tokens + room, out=out,
            per_chunk=each,
        )  # fmt: skip
        grid = column_blocks(out, d), chunks, math.prod(stack)
        self.cuda.launch(kernel, types_of(d, z, gain), grid)
        return rows, along, totals

    def mixed_gradients(
        self, d: DeviceArray, z: DeviceArray, low_rank: DeviceArray, gain: DeviceArray,
        found: Suspects, *, total: bool,
    ) -> MixedSums:  # fmt: skip
        """Return dz = ρ⊙g⊙d in z's dtype, and all sums of d by one pass over d and z."""
        cuda = self.cuda
        plan = _plan_mixed(d.shape, low_rank.shape[-1], d.dtype, gain.dtype, total)
        (dz,) = cuda.empties(plan.made)
        along, totals, low, db = cuda.empties(plan.scratch)
        kernel = MixedGradients(
            dy=d, z=z, gain=gain, row_scale=found.factors.row_scale, suspect=found.suspect,
            gained=found.gained, low_rank=low_rank, dz=dz, sum_dyz=along, sum_dy=totals, low=low,
            db=db, **plan.numbers,
        )  # fmt: skip
        cuda.launch(kernel, plan.types, plan.grid, threads=plan.threads)
        return MixedSums(dz, along, totals, low, db)

    def row_gradients(
        self, along: DeviceArray, totals: DeviceArray | None, db_sums: DeviceArray, found: Suspects,
        gain: DeviceArray, norm: DeviceArray, unit: DeviceArray, scaling: float,
        *, by_rank: bool, exact: bool, rows: DeviceArray | None = None,
        low_sums: DeviceArray | None = None,
    ) -> RowSums:  # fmt: skip
        """Return dm, p, dB, dbias and the rows of the norm's gradient, given sums over tokens.

        `db_sums` is dyᵀ L, (*stack, chunks, rank, out) if `by_rank`, else (*stack, out, rank). With
        `rows` from `gradients`, the norm's rows are written below the tokens' there; without, they
        are returned as `pull`. `low_sums` (*stack, chunks, tokens, rank) are added up to `low`.
        """
        cuda, (_, _, b, row_scale) = self.cuda, found.factors
        plan = _plan_rows(
            b.shape, b.dtype, along.shape[-2], db_sums.shape[-3] if by_rank else 1,
            None if rows is None else rows.shape[-2], None if low_sums is None else low_sums.shape,
            by_rank, exact, totals is not None, row_scale is not None,
        )  # fmt: skip
        dm, p, db, dbias = cuda.empties(plan.made)
        pull, square, over, low = cuda.empties(plan.scratch)
        kernel = RowGradients(
            sum_dyz=along, sum_dy=totals, db_sums=db_sums, gain=gain, norm=norm, b=b, unit=unit,
            row_scale=row_scale, suspect=found.suspect, scaling=scaling, dm=dm, p_result=p,
            dbias=dbias, db=db, pull=pull, rows=rows, square=square, over=over, low_sums=low_sums,
            low=low, **plan.numbers,
        )  # fmt: skip
        cuda.launch(kernel, plan.types, plan.grid)
        return RowSums(dm, p if exact else None, db, dbias, pull, square, over, low)

    def gradient_a(
        self, partial: DeviceArray, square: DeviceArray | None, part: SuspectPart
    ) -> DeviceArray:
        """Return dA = Σ partial + (Σ square) A + the part of suspect rows, (*stack, rank, in).

        `partial` is (*stack, chunks, rank, in): the sums lowᵀ x + pullᵀ W over chunks of rows.
        """
        square_chunks = 1 if square is None else square.shape[-3]
        storage = part["weight"].dtype
        plan = _plan_a(partial.shape, square_chunks, part["d"].shape, storage, partial.dtype)
        (result,) = self.cuda.empties(plan.made)
        kernel = GradientA(partial=partial, square=square, result=result, **part, **plan.numbers)
        self.cuda.launch(kernel, plan.types, plan.grid)
        return result

    def over_norm(self, values: DeviceArray, norm: DeviceArray) -> DeviceArray:
        """Return values / n by rows, and 0 where n = 0."""
        values, norm = packed(values, self.xp), packed(norm, self.xp)
        result = self.cuda.empty(values.shape, values.dtype)
        if values.size:
            arguments = OverNorm(
                values=values, norm=norm, result=result, size=values.size,
                per_row=values.size // norm.size,
            )  # fmt: skip
            self.cuda.launch(arguments, one_type(values), (blocks(values.size, THREADS), 1, 1))
        return result


def suspect_part(
    found: Suspects, d: DeviceArray, x: DeviceArray, gain: DeviceArray, norm: DeviceArray,
    p: DeviceArray | None,
) -> SuspectPart:  # fmt: skip
    """Return the part of suspect rows in d V and in dA, for d and x in C order."""
    weight, a, b, row_scale = found.factors
    return SuspectPart(
        any=found.any, suspect=found.suspect, weight=weight, turned=not in_c_order(weight), a=a,
        b=b, row_scale=row_scale, gain=gain, norm=norm, p=p, d=d,
        d_is_stored=d.dtype == weight.dtype, x=x, x_is_stored=x.dtype == weight.dtype,
    )  # fmt: skip


@planned
def _plan_outputs(
    shape: tuple[int, ...], a_shape: tuple[int, ...], x: DType, storage: DType, z: DType,
    compute: DType,
) -> Plan:  # fmt: skip
    *stack, tokens, out = shape
    rank, inner = a_shape[-2:]
    numbers = {"stored": x == storage, "tokens": tokens, "out": out, "inner": inner, "rank": rank}
    grid = column_blocks(out, storage), min(blocks(tokens, RUN), LIMIT), math.prod(stack)
    return Plan(typed(storage, z, compute), grid, numbers, together())


@planned
def _plan_update(
    low_shape: tuple[int, ...], factor_shape: tuple[int, ...], low: DType, dtype: DType,
    storage: DType, d_shape: tuple[int, ...] | None, by_rows: bool,
) -> Plan:  # fmt: skip
    *stack, rows, rank = low_shape
    columns = factor_shape[-2 if by_rows else -1]
    tokens, out = (rows, 0) if d_shape is None else d_shape[-2:]
    numbers = {
        "rows": rows, "columns": columns, "rank": rank, "by_rows": by_rows, "tokens": tokens,
        "out": out,
    }  # fmt: skip
    if np.dtype(dtype).itemsize == 2:
        across, each = blocks(columns, STRIP_OF_UPDATE * WARPS), ROWS_OF_UPDATE
    else:
        across, each = column_blocks(columns, storage), TILE
    down = min(blocks(rows, each), max(1, UPDATERS // max(1, across)), LIMIT)
    grid = across, down, math.prod(stack)
    return Plan(
        typed(storage, dtype, low), grid, numbers, together(((*stack, rows, columns), dtype))
    )


@planned
def _plan_mixed(
    shape: tuple[int, ...], rank: int, dtype: DType, compute: DType, total: bool
) -> Plan:
    *stack, tokens, out = shape
    across = blocks(out, SWATH_COLUMNS)
    others = across * blocks(rank, SWATH_RANKS)
    each, chunks = _long_chunks(tokens, others * math.prod(stack))
    along = (*stack, chunks, out), compute
    scratch = together(
        along, along if total else None, ((*stack, across, tokens, rank), compute),
        ((*stack, chunks, rank, out), compute),
    )  # fmt: skip
    numbers = {"tokens": tokens, "out": out, "rank": rank, "per_chunk": each}
    types, grid = typed(dtype, compute, compute), (others, chunks, math.prod(stack))
    return Plan(types, grid, numbers, together((shape, dtype)), scratch, SWATH_THREADS)


@planned
def _plan_rows(
    shape: tuple[int, ...], kind: DType, chunks: int, db_chunks: int, rows: int | None,
    low_sums: tuple[int, ...] | None, by_rank: bool, exact: bool, total: bool, scaled: bool,
) -> Plan:  # fmt: skip
    """Plan `row_gradients`, for b in this shape and rows of W that are `scaled` by ρ or not."""
    *stack, out, rank = shape
    wide, narrow = (shape, kind), ((*stack, out), kind)
    pull, square, over, low, per_block, low_size = None, None, None, None, 1, 0
    if exact and rows is None:
        per_block = blocks(out, THREADS * SQUARES)
        pull = wide
        square = (*stack, blocks(out, THREADS * per_block), rank, rank), kind
    elif rows is not None and scaled:
        over = wide
    if low_sums is not None:
        low = (*stack, *low_sums[-2:]), kind
        low_size = low_sums[-2] * rank
    row_blocks = blocks(out, THREADS * per_block)
    numbers = {
        "chunks": chunks, "db_chunks": db_chunks, "by_rank": by_rank, "exact": exact,
        "low_chunks": 0 if low_sums is None else low_sums[-3], "low_size": low_size,
        "tokens": 0 if rows is None else rows - rank, "out": out, "rank": rank,
        "per_block": per_block, "row_blocks": row_blocks,
    }  # fmt: skip
    across = row_blocks + blocks(low_size, THREADS)
    grid = across, min(blocks(rank, TILE), LIMIT), math.prod(stack)
    made = together(narrow, narrow, wide, narrow if total else None)
    return Plan(typed(kind, kind, kind), grid, numbers, made, together(pull, square, over, low))


@planned
def _plan_a(
    shape: tuple[int, ...], square_chunks: int, d_shape: tuple[int, ...], storage: DType,
    kind: DType,
) -> Plan:  # fmt: skip
    """Plan `gradient_a`, for partial sums in this shape."""
    *stack, chunks, rank, inner = shape
    tokens, out = d_shape[-2:]
    numbers = {
        "chunks": chunks, "square_chunks": square_chunks, "tokens": tokens, "out": out,
        "inner": inner, "rank": rank,
    }  # fmt: skip
    grid = blocks(inner, THREADS), min(blocks(rank, TILE), LIMIT), math.prod(stack)
    made = together(((*stack, rank, inner), kind))
    return Plan(typed(storage, kind, kind), grid, numbers, made)


def _long_chunks(tokens: int, others: int) -> tuple[int, int]:
    """Return the tokens of a chunk of `mixed_gradients`, and the number of chunks.

    `others` blocks take the same tokens.
    """
    steps = blocks(tokens, SWATH_STEP)
    chunks = max(1, min(BUSY // others, steps, LIMIT))
    each = max(1, blocks(steps, chunks))
    return each * SWATH_STEP, max(1, blocks(steps, each))


def _chunks(tokens: int) -> tuple[int, int]:
    """Return the number of tokens of a chunk, and the number of chunks."""
    each = max(LEAST, min(CHUNK, tokens // CHUNKS), blocks(tokens, LIMIT))
    return each, max(1, blocks(tokens, each))
