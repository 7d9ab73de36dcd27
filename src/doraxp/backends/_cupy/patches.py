"""V by patches on NVIDIA GPUs: its row norms, and merge, without an (out, in) temporary.

Each warp has a patch of W, and multiplies its part of s B A on tensor cores, with float32's digits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from doraxp._base.types import Array
from doraxp.backends._cupy.device import LIMIT, Types, dtype_name
from doraxp.backends._cupy.guard import Guard
from doraxp.backends._cupy.products import (
    PARTS,
    WARP,
    WARPS,
    columns_of,
    is_reduced,
    lying,
    name_of,
    packed,
)
from doraxp.backends._direction import Factors

STRIP = 32  # rows and columns of a warp
BELOW, BESIDE = 2, 4  # warps of a block
MEASURED = 64  # the largest rank by which V is formed no slower than W is read twice
TERMS = 16  # of a rank, that tensor cores add up at once
ROWS = 4  # rows of a thread of `merge_wide`


class Patches(Guard):
    """The operations that form V, on CuPy arrays."""

    def row_squares(self, weight: Array, dtype: Any) -> Array:
        """Saves the (out, in) temporaries: W is read once, as it lies."""
        return self._squares(Factors(weight, None, None, None), np.dtype(dtype))

    def measures_direction(self, dtype: Any, rank: int) -> bool:
        """Where tensor cores have the digits, V of a small rank is formed as fast as W is read."""
        return bool(dtype == np.float32) and rank <= MEASURED

    def direction_squares(self, factors: Factors, dtype: Any) -> Array:
        """Saves every (out, in) temporary: W is read once. `dtype` is float32."""
        return self._squares(factors, np.dtype(dtype))

    def _squares(self, factors: Factors, dtype: Any) -> Array:
        stored, turned = lying(factors.weight, self.xp)
        *stack, rows, columns = stored.shape
        out, inner = (columns, rows) if turned else (rows, columns)
        partial = self.cuda.empty((*stack, -(-inner // STRIP), out), dtype)
        types = Types(name_of(stored), dtype_name(dtype), dtype_name(dtype))
        tiles, rank = self._tiles(factors, turned, types, PARTS)
        row_scale = packed(factors.row_scale, self.xp)
        sizes = np.int64(rows), np.int64(columns), rank, np.int32(PARTS), np.int32(turned)
        given = stored, tiles, row_scale, partial, *sizes
        self._launch_patches("squares", types, stored.shape, *given)
        return self.sum_chunks(partial)

    def _tiles(
        self, factors: Factors, turned: bool, types: Types, parts: int
    ) -> tuple[Array | None, Any]:
        """Return s B and A as tensor cores take them, each in so many parts, and the rank.

        Where there is no update, that is None and 0.
        """
        if factors.lora_a is None:
            return None, np.int64(0)
        a, b = (packed(array, self.xp) for array in factors[1:3])
        *stack, rank, inner = a.shape
        out = b.shape[-2]
        rows, columns = (inner, out) if turned else (out, inner)
        count, steps = math.prod(stack), -(-rank // TERMS)
        sides = 2 * (-(-rows // STRIP) - (-columns // STRIP))
        tiles = self.cuda.empty((count, sides, steps, parts, TERMS * TERMS // 2), np.uint32)
        sizes = (np.int64(size) for size in (rows, columns, rank))
        how = np.int32(parts), np.int32(turned)
        grid = -(-sides // WARPS), steps, count
        self.cuda.launch("tiles", types, grid, a, b, tiles, *sizes, *how)
        return tiles, np.int64(rank)

    def _launch_patches(self, name: str, types: Types, shape: tuple[int, ...], *given: Any) -> None:
        *stack, rows, columns = shape
        blocks = -(-rows // (STRIP * BELOW)) * -(-columns // (STRIP * BESIDE))
        grid = blocks, 1, math.prod(stack)
        self.cuda.launch(name, types, grid, *given, threads=WARP * BELOW * BESIDE)

    def merge(self, factors: Factors, gain: Array, dtype: Any) -> Array:
        """Saves every (out, in) temporary: W is read once and W' written once, as W lies."""
        xp, weight = self.xp, factors.weight
        gain = packed(gain, xp)
        types = Types(name_of(weight), name_of(gain), name_of(gain))
        if gain.dtype == np.float64:
            return self._merge_wide(types, factors, gain)
        stored, turned = lying(weight, xp)
        merged = self.cuda.empty(stored.shape, weight.dtype)
        rounded = 1 if name_of(weight) == "bfloat16" else 2  # parts of 8 bits
        parts = rounded if is_reduced() else PARTS
        tiles, rank = self._tiles(factors, turned, types, parts)
        row_scale, sizes = packed(factors.row_scale, xp), map(np.int64, stored.shape[-2:])
        given = stored, tiles, row_scale, gain, merged, *sizes, rank
        how = np.int32(parts), np.int32(turned)
        self._launch_patches("merge", types, stored.shape, *given, *how)
        return xp.matrix_transpose(merged) if turned else merged

    def _merge_wide(self, types: Types, factors: Factors, gain: Array) -> Array:
        stored, *rest = (packed(array, self.xp) for array in factors)
        *stack, out, inner = stored.shape
        merged = self.cuda.empty(stored.shape, stored.dtype)
        grid = columns_of(inner, stored), min(-(-out // ROWS), LIMIT), math.prod(stack)
        sizes = (np.int64(size) for size in (out, inner, rest[0].shape[-2]))
        self.cuda.launch("merge_wide", types, grid, stored, *rest, gain, merged, *sizes)
        return merged
