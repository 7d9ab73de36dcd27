"""V by patches on NVIDIA GPUs: its row norms, and merge, without an (out, in) temporary.

Each warp loads a patch of W and computes its part of s B A on tensor cores, with all digits of a
float32.
"""

from __future__ import annotations

import math

import numpy as np

from doraxp._base.types import DType, Namespace
from doraxp.backends._cupy.arrays import (
    DeviceArray,
    PlainWeight,
    as_stored,
    column_blocks,
    dtype_name,
    name_of,
    packed,
    types_of,
)
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.products import PARTS, Products
from doraxp.backends._cupy.signatures import Merge, MergeWide, Squares, Tiles
from doraxp.backends._cupy.source import LIMIT, WARP, WARPS, Types, blocks
from doraxp.backends._direction import Factors

STRIP = 32
"""Rows and columns of a warp. kernels/merge.cu has the same, and all that follow here."""
BELOW, BESIDE = 2, 4
"""Warps of a block."""
TERMS = 16
"""Terms of the sum over the rank that tensor cores add up at once."""
ROWS = 4
"""Rows of a thread of `merge_wide`."""


class Patches:
    """The operations that form V."""

    def __init__(self, xp: Namespace, cuda: Cuda, products: Products) -> None:
        self.xp, self.cuda, self.products = xp, cuda, products

    def squares(self, factors: Factors | PlainWeight, dtype: DType) -> DeviceArray:
        """Return ‖Vᵢ‖² by rows, in `dtype`. W is read once, in the order in which it is stored."""
        stored, turned = as_stored(factors.weight, self.xp)
        *stack, rows, columns = stored.shape
        out, inner = (columns, rows) if turned else (rows, columns)
        partial = self.cuda.empty((*stack, blocks(inner, STRIP), out), dtype)
        kind = dtype_name(np.dtype(dtype))
        types = Types(name_of(stored), kind, kind)
        tiles, rank = self._tiles(factors, turned, types, PARTS)
        arguments = Squares(
            weight=stored, tiles=tiles, row_scale=packed(factors.row_scale, self.xp),
            partial=partial, rows=rows, columns=columns, rank=rank, parts=PARTS, turned=turned,
        )  # fmt: skip
        self._launch(arguments, types, stored.shape)
        return self.products.sum_chunks(partial)

    def merge(self, factors: Factors, gain: DeviceArray) -> DeviceArray:
        """Return W' = g⊙V in the dtype of W. W is read once and W' is written once."""
        weight, gain = factors.weight, packed(gain, self.xp)
        types = types_of(weight, gain, gain)
        if gain.dtype == np.float64:
            return self._merge_wide(types, factors, gain)
        stored, turned = as_stored(weight, self.xp)
        merged = self.cuda.empty(stored.shape, weight.dtype)
        parts = PARTS
        tiles, rank = self._tiles(factors, turned, types, parts)
        *_, rows, columns = stored.shape
        arguments = Merge(
            weight=stored, tiles=tiles, row_scale=packed(factors.row_scale, self.xp), gain=gain,
            merged=merged, rows=rows, columns=columns, rank=rank, parts=parts, turned=turned,
        )  # fmt: skip
        self._launch(arguments, types, stored.shape)
        return self.xp.matrix_transpose(merged) if turned else merged

    def _merge_wide(self, types: Types, factors: Factors, gain: DeviceArray) -> DeviceArray:
        stored, a, b, row_scale = (packed(array, self.xp) for array in factors)
        *stack, out, inner = stored.shape
        merged = self.cuda.empty(stored.shape, stored.dtype)
        arguments = MergeWide(
            weight=stored, a=a, b=b, row_scale=row_scale, gain=gain, merged=merged,
            out=out, inner=inner, rank=a.shape[-2],
        )  # fmt: skip
        grid = column_blocks(inner, stored), min(blocks(out, ROWS), LIMIT), math.prod(stack)
        self.cuda.launch(arguments, types, grid)
        return merged

    def _tiles(
        self, factors: Factors | PlainWeight, turned: bool, types: Types, parts: int
    ) -> tuple[DeviceArray | None, int]:
        """Return s B and A in the order in which tensor cores load them, and the rank.

        Each is split into this many `parts`. Without an update, return None and 0.
        """
        if factors.lora_a is None:
            return None, 0
        a, b = (packed(array, self.xp) for array in factors[1:3])
        *stack, rank, inner = a.shape
        out = b.shape[-2]
        rows, columns = (inner, out) if turned else (out, inner)
        count, steps = math.prod(stack), blocks(rank, TERMS)
        sides = 2 * (blocks(rows, STRIP) + blocks(columns, STRIP))
        tiles = self.cuda.empty((count, sides, steps, parts, TERMS * TERMS // 2), np.uint32)
        arguments = Tiles(
            a=a, b=b, result=tiles, rows=rows, columns=columns, rank=rank, parts=parts,
            turned=turned,
        )  # fmt: skip
        self.cuda.launch(arguments, types, (blocks(sides, WARPS), steps, count))
        return tiles, rank

    def _launch(self, arguments: Squares | Merge, types: Types, shape: tuple[int, ...]) -> None:
        *stack, rows, columns = shape
        patches = blocks(rows, STRIP * BELOW) * blocks(columns, STRIP * BESIDE)
        grid = patches, 1, math.prod(stack)
        self.cuda.launch(arguments, types, grid, threads=WARP * BELOW * BESIDE)
