"""The passes beside the products, over (tokens, out), (tokens, in) and (out, rank).

    W (out, in)   A (rank, in)   b = s B (out, rank)   ρ (out,) or None for 1   V = ρ⊙W + b A

Each pass reads its arrays once. Those that need V form the suspect rows from their factors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from doraxp._base.types import DType, Namespace
from doraxp.backends._cupy.arrays import (
    DeviceArray,
    column_blocks,
    in_c_order,
    name_of,
    one_type,
    packed,
    types_of,
)
from doraxp.backends._cupy.device import Cuda
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
STRIP, TALL = 32, 32
"""Columns and rows that a warp of `update` makes at once. kernels/forward.cu has the same."""
TILE = 8
"""Tokens, or ranks, that a thread works on at once. kernels/forward.cu has the same."""
UPDATERS = 1024
"""About how many blocks `update` has: each keeps the factor of its columns in registers."""
SWATH, SWATH_RANKS, SWATH_STEP, SWATH_THREADS = 512, 16, 16, 256
"""Columns and ranks of a block of `mixed_gradients`, tokens of a step, and threads. The kernel has
the same."""
BUSY = 132
"""Multiprocessors of a GPU: `mixed_gradients` has about as many blocks, or twice as many."""
SQUARES = 16
"""The most blocks of rows of `row_gradients` that sum up a square of their own."""


class Through(NamedTuple):
    """The arrays of a backward that the suspect rows are multiplied with."""

    d: DeviceArray
    """dy, (*stack, tokens, out)."""
    x: DeviceArray
    """x~, (*stack, tokens, in)."""
    gain: DeviceArray
    norm: DeviceArray
    p: DeviceArray | None
    """g⊙dm, or None where the norm has no gradient."""


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
        bias: DeviceArray | None, shift: DeviceArray | None, dtype: DType | None,
    ) -> DeviceArray | None:  # fmt: skip
        """Return y = g⊙z + bias in `dtype`, after z ← ρ⊙z. Without a dtype, return None.

        Overwrites z, (*stack, tokens, out) in C order: also the columns of suspect rows, with
        x Vᵀ + shift bᵀ.
        """
        xp = self.xp
        *stack, tokens, out = z.shape
        y = None if dtype is None else self.cuda.empty(z.shape, dtype)
        if z.size == 0:
            return y
        weight, row_scale = found.factors.weight, found.factors.row_scale
        kernel = Outputs(
            z=z, row_scale=row_scale, gain=packed(gain, xp), bias=packed(bias, xp), y=y,
            stored=x.dtype == weight.dtype, **_suspects(found), b=found.factors.scaled_b,
            x=packed(x, xp), shift=packed(shift, xp), tokens=tokens, out=out,
            inner=weight.shape[-1], rank=found.factors.lora_a.shape[-2],
        )  # fmt: skip
        grid = column_blocks(out, weight), min(blocks(tokens, RUN), LIMIT), math.prod(stack)
        self.cuda.launch(kernel, types_of(weight, z, gain), grid)
        return y

    def update(
        self, low: DeviceArray, factor: DeviceArray, dtype: DType, *, by_rows: bool = False,
        over: DeviceArray | None = None, found: Suspects | None = None,
        through: Through | None = None, storage: DeviceArray | None = None,
    ) -> DeviceArray:  # fmt: skip
        """Return low factorᵀ / ρ, (*stack, rows, columns), in `dtype`.

        low is (*stack, rows, rank), the factor (*stack, columns, rank) if `by_rows`, else
        (*stack, rank, columns); `over` is ρ or None. With `found` and `through`, the rows are
        tokens, and any below them belong to dA; the suspect rows' part of d V and of dA is added.
        """
        xp, cuda = self.xp, self.cuda
        low, factor = packed(low, xp), packed(factor, xp)
        *stack, rows, rank = low.shape
        columns = factor.shape[-2 if by_rows else -1]
        result = cuda.empty((*stack, rows, columns), dtype)
        if result.size == 0:
            return result
        stored = storage
        guarded: dict[str, Any] = dict.fromkeys(
            ("any", "suspect", "weight", "a", "b", "row_scale", "gain", "norm", "p", "d", "x")
        )
        numbers = {"turned": 0, "stored": 0, "tokens": rows, "out": 0}
        if found is not None and through is not None:
            stored = found.factors.weight
            given, numbers = _through(found, through, xp)
            guarded |= given
        kernel = Update(
            low=low, factor=factor, over=packed(over, xp), result=result, rows=rows,
            columns=columns, rank=rank, by_rows=by_rows, **guarded, **numbers,
        )  # fmt: skip
        if result.itemsize == 2:
            across, each = blocks(columns, STRIP * WARPS), TALL
        else:
            across, each = column_blocks(columns, stored), TILE
        down = min(blocks(rows, each), max(1, UPDATERS // across), LIMIT)
        self.cuda.launch(kernel, types_of(stored, result, low), (across, down, math.prod(stack)))
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
        cuda, kind = self.cuda, gain.dtype
        *stack, tokens, out = d.shape
        rank = low_rank.shape[-1]
        across = blocks(out, SWATH)
        each, chunks = _long_chunks(tokens, across * blocks(rank, SWATH_RANKS) * math.prod(stack))
        dz = cuda.empty(d.shape, d.dtype)
        along = cuda.empty((*stack, chunks, out), kind)
        totals = cuda.empty(along.shape, kind) if total else None
        low = cuda.empty((*stack, across, tokens, rank), kind)
        db = cuda.empty((*stack, chunks, rank, out), kind)
        kernel = MixedGradients(
            dy=d, z=z, gain=gain, row_scale=found.factors.row_scale, suspect=found.suspect,
            gained=found.gained, low_rank=low_rank, dz=dz, sum_dyz=along, sum_dy=totals, low=low,
            db=db, tokens=tokens, out=out, rank=rank, per_chunk=each,
        )  # fmt: skip
        grid = across * blocks(rank, SWATH_RANKS), chunks, math.prod(stack)
        types = types_of(d, gain, gain)
        cuda.launch(kernel, types, grid, threads=SWATH_THREADS)
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
        cuda, factors, kind = self.cuda, found.factors, gain.dtype
        b, row_scale = factors.scaled_b, factors.row_scale
        *stack, out, rank = b.shape
        dm, p = (cuda.empty(gain.shape, kind) for _ in range(2))
        db = cuda.empty(b.shape, kind)
        dbias = None if totals is None else cuda.empty(gain.shape, kind)
        pull, square, over, per_block = None, None, None, 1
        if exact and rows is None:
            per_block = blocks(out, THREADS * SQUARES)
            pull = cuda.empty(b.shape, kind)
            square = cuda.empty((*stack, blocks(out, THREADS * per_block), rank, rank), kind)
        elif rows is not None and row_scale is not None:
            over = cuda.empty(b.shape, kind)
        tokens = 0 if rows is None else rows.shape[-2] - rank
        row_blocks = blocks(out, THREADS * per_block)
        low, low_size = None, 0
        if low_sums is not None:
            low = cuda.empty((*stack, *low_sums.shape[-2:]), kind)
            low_size = low.shape[-2] * rank
        kernel = RowGradients(
            sum_dyz=along, sum_dy=totals, chunks=along.shape[-2], db_sums=db_sums,
            db_chunks=db_sums.shape[-3] if by_rank else 1, by_rank=by_rank, gain=gain, norm=norm,
            b=b, unit=unit, row_scale=row_scale, suspect=found.suspect, exact=exact,
            scaling=scaling, dm=dm, p_result=p, dbias=dbias, db=db, pull=pull,
            rows=rows, square=square, over=over, low_sums=low_sums,
            low_chunks=0 if low_sums is None else low_sums.shape[-3], low_size=low_size, low=low,
            tokens=tokens, out=out, rank=rank, per_block=per_block, row_blocks=row_blocks,
        )  # fmt: skip
        across = row_blocks + blocks(low_size, THREADS)
        grid = across, min(blocks(rank, TILE), LIMIT), math.prod(stack)
        cuda.launch(kernel, one_type(gain), grid)
        return RowSums(dm, p if exact else None, db, dbias, pull, square, over, low)

    def gradient_a(
        self, partial: DeviceArray, square: DeviceArray | None, found: Suspects, through: Through
    ) -> DeviceArray:
        """Return dA = Σ partial + (Σ square) A + the suspect rows' part, (*stack, rank, in).

        `partial` is (*stack, chunks, rank, in): the sums lowᵀ x + pullᵀ W over chunks of rows.
        """
        *stack, chunks, rank, inner = partial.shape
        result = self.cuda.empty((*stack, rank, inner), partial.dtype)
        given, numbers = _through(found, through, self.xp)
        kernel = GradientA(
            partial=partial, chunks=chunks, square=square,
            square_chunks=1 if square is None else square.shape[-3], result=result, **given,
            **numbers, inner=inner, rank=rank,
        )  # fmt: skip
        grid = blocks(inner, THREADS), min(blocks(rank, TILE), LIMIT), math.prod(stack)
        types = types_of(found.factors.weight, partial, partial)
        self.cuda.launch(kernel, types, grid)
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


def _suspects(found: Suspects) -> dict[str, Any]:
    """Return the arguments by which a kernel finds the suspect rows and forms them."""
    weight: DeviceArray = found.factors.weight
    return {
        "any": found.any, "suspect": found.suspect, "weight": weight,
        "turned": not in_c_order(weight), "a": found.factors.lora_a,
    }  # fmt: skip


def _through(
    found: Suspects, through: Through, xp: Namespace
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays and the numbers by which a kernel adds the suspect rows' part."""
    arrays = _suspects(found)
    turned = arrays.pop("turned")
    d, x, gain, norm, p = through
    arrays |= {
        "b": found.factors.scaled_b, "row_scale": found.factors.row_scale, "gain": gain,
        "norm": norm, "p": p, "d": d, "x": packed(x, xp),
    }  # fmt: skip
    stored = name_of(d) == name_of(found.factors.weight)
    tokens, out = d.shape[-2:]
    return arrays, {"turned": turned, "stored": stored, "tokens": tokens, "out": out}


def _long_chunks(tokens: int, others: int) -> tuple[int, int]:
    """Return the tokens of a chunk of `mixed_gradients`, and the number of chunks.

    `others` blocks take the same tokens.
    """
    steps = blocks(tokens, SWATH_STEP)
    chunks = max(1, min(BUSY // others, steps, LIMIT))
    each = blocks(steps, chunks)
    return each * SWATH_STEP, max(1, blocks(steps, each))


def _chunks(tokens: int) -> tuple[int, int]:
    """Return the number of tokens of a chunk, and the number of chunks."""
    each = max(LEAST, min(CHUNK, tokens // CHUNKS), blocks(tokens, LIMIT))
    return each, max(1, blocks(tokens, each))
