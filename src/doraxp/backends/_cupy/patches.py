"""V by patches on NVIDIA GPUs: its row norms, and merge, without an (out, in) temporary.

Each warp loads a patch of W and computes its part of s B A on tensor cores: in mixed precision to
22 bits, else as precisely as sums of float32 products. See kernels/merge.cu.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from doraxp._base.types import DType, Namespace
from doraxp.backends._cupy.arrays import (
    LOW,
    DeviceArray,
    PlainWeight,
    as_stored,
    column_blocks,
    name_of,
    packed,
    typed,
    types_of,
)
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.products import Products
from doraxp.backends._cupy.signatures import Merge, MergeWide, Norms, Squares, Tiles
from doraxp.backends._cupy.source import LIMIT, WARP, WARPS, Types, blocks
from doraxp.backends._direction import Factors
from doraxp.backends._generic import least_sum
from doraxp.backends._precision import is_exact

STRIP = 32
"""Rows and columns of a warp. kernels/merge.cu has the same, and all that follow here."""
BELOW, BESIDE = 2, 4
"""Warps of a block."""
TERMS = 16
"""Terms of the sum over the rank that tensor cores add up at once."""
PARTS, WIDE_PARTS = 2, 3
"""Parts in float16 of a number of s B or A: in mixed precision they hold 22 bits, else all."""
NORM_ROWS = 8
"""Rows of a block of `norms`. kernels/norm.cu has the same."""
WIDE_ROWS = 4
"""Rows of a thread of `merge_wide`."""


class Update(NamedTuple):
    """s B A as tensor cores load it, or nothing for a plain weight."""

    tiles: DeviceArray | None
    shrink: DeviceArray | None
    rank: int


NO_UPDATE = Update(None, None, 0)


class Patches:
    """The operations that form V."""

    def __init__(self, xp: Namespace, cuda: Cuda, products: Products) -> None:
        self.xp, self.cuda, self.products = xp, cuda, products

    # The norm

    def squares(self, weight: DeviceArray, dtype: DType) -> DeviceArray:
        """Return ‖wᵢ‖² by rows, in `dtype`. W is read once, in the order in which it is stored."""
        stored, turned = as_stored(weight, self.xp)
        chunks = self._chunks(stored, turned, PlainWeight(weight), NO_UPDATE, dtype)
        return self.products.sum_chunks(chunks)

    def norms(self, weight: DeviceArray, squares: DeviceArray) -> DeviceArray:
        """Return ‖wᵢ‖ from `squares`, ‖wᵢ‖², by one launch.

        The launch reads W where a square is out of range.
        """
        stored, turned = as_stored(weight, self.xp)
        chunks = self.xp.reshape(squares, (*squares.shape[:-1], 1, squares.shape[-1]))
        plain = PlainWeight(weight)
        return self._norms(stored, turned, plain, packed(chunks, self.xp), None)[0]

    # Merging

    def merge(self, factors: Factors, gain: DeviceArray) -> DeviceArray:
        """Return W' = g⊙V in the dtype of W. W is read once and W' is written once."""
        if gain.dtype == np.float64:
            return self._merge_wide(factors, packed(gain, self.xp))
        stored, turned = as_stored(factors.weight, self.xp)
        update = self._update(factors, turned, _types(stored, gain.dtype))
        return self._merged(stored, turned, factors, update, gain, backwards=False)

    def measure_and_merge(self, factors: Factors, magnitude: DeviceArray) -> DeviceArray:
        """Return W' = (m / n)⊙V, with n measured on V. W is read twice; s B A is split once.

        The second pass begins where the first one ended if the L2 cache may still hold that part
        of W: if W fits into it.
        """
        stored, turned = as_stored(factors.weight, self.xp)
        update = self._update(factors, turned, _types(stored, magnitude.dtype))
        chunks = self._chunks(stored, turned, factors, update, magnitude.dtype)
        _, gain = self._norms(stored, turned, factors, chunks, magnitude)
        fits = stored.nbytes <= self.cuda.cache_bytes()
        return self._merged(stored, turned, factors, update, gain, backwards=fits)

    # Launches

    def _chunks(
        self, stored: DeviceArray, turned: bool, factors: Factors | PlainWeight, update: Update,
        dtype: DType,
    ) -> DeviceArray:  # fmt: skip
        """Return the parts of ‖Vᵢ‖², (*stack, chunks, out), that each warp computes."""
        *stack, rows, columns = stored.shape
        out, inner = (columns, rows) if turned else (rows, columns)
        partial = self.cuda.empty((*stack, blocks(inner, STRIP), out), dtype)
        arguments = Squares(
            weight=stored, tiles=update.tiles, shrink=update.shrink,
            row_scale=packed(factors.row_scale, self.xp), partial=partial, rows=rows,
            columns=columns, rank=update.rank, turned=turned,
        )  # fmt: skip
        self._launch(arguments, _types(stored, dtype), stored.shape)
        return partial

    def _norms(
        self, stored: DeviceArray, turned: bool, factors: Factors | PlainWeight,
        chunks: DeviceArray, magnitude: DeviceArray | None,
    ) -> tuple[DeviceArray, DeviceArray | None]:  # fmt: skip
        *stack, count, out = chunks.shape
        _, a, b, row_scale = (packed(array, self.xp) for array in (None, *factors[1:]))
        inner, kind = factors.weight.shape[-1], chunks.dtype
        norm = self.cuda.empty((*stack, out), kind)
        gain = None if magnitude is None else self.cuda.empty((*stack, out), kind)
        arguments = Norms(
            partial=chunks, weight=stored, turned=turned, a=a, b=b, row_scale=row_scale,
            magnitude=packed(magnitude, self.xp), norm=norm, gain=gain, chunks=count, out=out,
            inner=inner, rank=0 if a is None else a.shape[-2],
            floor=least_sum(kind, inner, xp=self.xp),
        )  # fmt: skip
        types = types_of(stored, chunks, chunks)
        self.cuda.launch(arguments, types, (blocks(out, NORM_ROWS), 1, math.prod(stack)))
        return norm, gain

    def _merged(
        self, stored: DeviceArray, turned: bool, factors: Factors, update: Update,
        gain: DeviceArray | None, *, backwards: bool,
    ) -> DeviceArray:  # fmt: skip
        gain, merged = packed(gain, self.xp), self.cuda.empty(stored.shape, stored.dtype)
        *_, rows, columns = stored.shape
        arguments = Merge(
            weight=stored, tiles=update.tiles, shrink=update.shrink,
            row_scale=packed(factors.row_scale, self.xp), gain=gain, merged=merged, rows=rows,
            columns=columns, rank=update.rank, turned=turned, reversed=backwards,
        )  # fmt: skip
        self._launch(arguments, _types(stored, gain.dtype), stored.shape)
        return self.xp.matrix_transpose(merged) if turned else merged

    def _merge_wide(self, factors: Factors, gain: DeviceArray) -> DeviceArray:
        types = types_of(factors.weight, gain, gain)
        stored, a, b, row_scale = (packed(array, self.xp) for array in factors)
        *stack, out, inner = stored.shape
        merged = self.cuda.empty(stored.shape, stored.dtype)
        arguments = MergeWide(
            weight=stored, a=a, b=b, row_scale=row_scale, gain=gain, merged=merged,
            out=out, inner=inner, rank=a.shape[-2],
        )  # fmt: skip
        grid = column_blocks(inner, stored), min(blocks(out, WIDE_ROWS), LIMIT), math.prod(stack)
        self.cuda.launch(arguments, types, grid)
        return merged

    def _update(self, factors: Factors, turned: bool, types: Types) -> Update:
        """Return s B and A in parts, in the order in which tensor cores load them."""
        a, b = (packed(array, self.xp) for array in factors[1:3])
        *stack, rank, inner = a.shape
        out = b.shape[-2]
        rows, columns = (inner, out) if turned else (out, inner)
        count, steps = math.prod(stack), blocks(rank, TERMS)
        strips = blocks(rows, STRIP) + blocks(columns, STRIP)
        parts = PARTS if types.product in LOW else WIDE_PARTS
        tiles = self.cuda.empty((count, strips, steps, 2, parts, TERMS * TERMS // 2), np.uint32)
        shrink = self.cuda.empty((count, out + blocks(inner, STRIP)), a.dtype)
        arguments = Tiles(
            a=a, b=b, result=tiles, shrink=shrink, rows=rows, columns=columns, rank=rank,
            turned=turned,
        )  # fmt: skip
        self.cuda.launch(arguments, types, (blocks(strips, WARPS), steps, count))
        return Update(tiles, shrink, rank)

    def _launch(self, arguments: Squares | Merge, types: Types, shape: tuple[int, ...]) -> None:
        *stack, rows, columns = shape
        patches = blocks(rows, STRIP * BELOW) * blocks(columns, STRIP * BESIDE)
        grid = patches, 1, math.prod(stack)
        self.cuda.launch(arguments, types, grid, threads=WARP * BELOW * BESIDE)


def _types(stored: DeviceArray, dtype: DType) -> Types:
    """Return the types of the kernels that form V: in mixed precision, product_t is W's dtype."""
    mixed = name_of(stored) in LOW and np.dtype(dtype) == np.float32 and not is_exact()
    return typed(stored.dtype, stored.dtype if mixed else dtype, dtype)
