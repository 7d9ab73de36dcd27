"""The guard on NVIDIA GPUs: rows that the factored formulas cannot serve are served by V itself.

Which these are is known to the device alone. Kernels are launched in any case; they form a suspect
row where they need it, and without such rows they end at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from doraxp._base.types import Array, Reduce
from doraxp.backends._cupy.device import LIMIT, THREADS, Types, dtype_name
from doraxp.backends._cupy.products import (
    FEW,
    PARTS,
    WARPS,
    Products,
    alike,
    lying,
    name_of,
    packed,
)
from doraxp.backends._direction import Factors

GUARDS = 64  # blocks of the guard's kernels: it has few rows, or none
MEASURERS = 1024  # blocks that look for its rows
LISTERS = 1024  # threads that list them
TILE = 8  # tokens of a thread
ROUNDED = 2  # parts of a factor: 16 bits, where the result keeps 8
TILES = 16  # blocks over tokens of `guard_outputs`: empty blocks take their time too
BLOCKS = 2048  # of `guard_inputs`


class Suspects(NamedTuple):
    """The rows of V, not of zeros, that the guard's kernels form again where they are needed."""

    rows: Array  # (stack · out,) int32; the first `count` are indices of rows
    count: Array  # (1,) int32
    switches: Array  # (2,): 1, and 1 where count > 0, else 0
    suspect: Array  # (*stack, out): the same rows, marked
    factors: Factors


class Guard(Products):
    """The operations of the guard, on CuPy arrays."""

    def guard(
        self, suspect: Array, norm: Array, factors: Factors, dtype: Any,
        reduce: Reduce | None = None,
    ) -> tuple[Array, Any]:  # fmt: skip
        """Saves V: rows are formed where they are needed. `norm` and `suspect` are written to."""
        if reduce is not None:
            return super().guard(suspect, norm, factors, dtype, reduce)
        factors = self.laid(factors)
        self.measure(suspect, norm, factors)
        return norm, self.listed(suspect, norm, factors)

    def norms(self, squares: Array, factors: Factors, reduce: Reduce | None = None) -> Array:
        """Takes two launches: no list of the suspect rows is wanted."""
        if reduce is not None:
            return super().norms(squares, factors, reduce)
        kind, size = squares.dtype, np.int64(squares.size)
        norm, suspect = (self.cuda.empty(squares.shape, dtype) for dtype in (kind, self.xp.bool))
        grid = -(-squares.size // THREADS), 1, 1
        floor = kind.type(self.floor(kind, factors.weight.shape[-1]))
        self.cuda.launch("norms", alike(squares), grid, squares, norm, suspect, size, floor)
        self.measure(suspect, norm, self.laid(factors))
        return norm

    def laid(self, factors: Factors) -> Factors:
        """Return the factors as kernels want them: W by rows or by columns, the rest by rows."""
        weight, *rest = factors
        stored, turned = lying(weight, self.xp)
        rest = [packed(array, self.xp) for array in rest]
        return Factors(weight if turned else stored, *rest)

    def measure(
        self, suspect: Array, norm: Array, factors: Factors, then: tuple[Any, ...] = (None,) * 3
    ) -> None:
        """Write n of the suspect rows; and for `then` = (m, g, V Aᵀ / n) the latter two."""
        which, grid = (suspect, np.int64(norm.size)), (min(norm.size, MEASURERS), 1, 1)
        self._launch_guard("guard_norms", factors, which, norm.dtype, grid, (norm, *then))

    def listed(self, suspect: Array, norm: Array, factors: Factors) -> Suspects:
        """Return the suspect rows that are not of zeros, and unmark those that are."""
        rows = self.cuda.empty((norm.size,), np.int32)
        count, switches = self.cuda.empty((1,), np.int32), self.cuda.empty((2,), norm.dtype)
        found = Suspects(rows, count, switches, suspect, factors)
        given = suspect, norm, *found[:3], np.int64(norm.size)
        self.cuda.launch("list_suspects", alike(norm), (1, 1, 1), *given, threads=LISTERS)
        return found

    def guarded_times_transposed(
        self, formed: Any, x: Array, factored: Callable[[Array], Array]
    ) -> Array:
        """Replace the columns of the factored x Vᵀ that belong to suspect rows."""
        if not isinstance(formed, Suspects):
            return self.product(x, self.xp.matrix_transpose(formed))
        z = factored(x)
        self.guard_outputs(formed, x, z, (None, None, None))
        return z

    def guard_outputs(self, formed: Suspects, x: Array, z: Array, last: tuple[Any, ...]) -> None:
        """Write z[..., i] = x Vᵢᵀ, and for `last` = (y, gain, bias) y[..., i] too."""
        x = packed(x, self.xp)
        tokens = x.shape[-2]
        if tokens == 0:
            return
        stored = x.dtype == formed.factors.weight.dtype
        wide = formed.switches.dtype
        step, along = (stride // z.itemsize for stride in z.strides[-2:])
        element = z.shape[-2] * z.shape[-1]
        types = name_of(formed.factors.weight), name_of(z), name_of(formed.switches)
        grid = GUARDS, min(-(-tokens // TILE), TILES), 1
        y, gain, bias = last
        given = (
            x, np.int32(stored), z, *map(np.int64, (element, step, along)), y,
            packed(gain, self.xp), packed(bias, self.xp), np.int64(tokens),
        )  # fmt: skip
        self._launch_guard("guard_outputs", formed.factors, formed[:2], wide, grid, given, types)

    def guarded_times(
        self, formed: Any, d: Array, low: Array, factored: Callable[[Array], Array], rounded: int
    ) -> Array:
        """Keep the columns of d of suspect rows out of the factored d V, and add their part."""
        xp = self.xp
        if not isinstance(formed, Suspects):
            return self.product(d, formed)
        weight, a, scaled_b, row_scale = formed.factors
        d = packed(d, xp)
        *stack, tokens, out = d.shape
        inner, elements = weight.shape[-1], math.prod(stack)
        result = self.cuda.empty((*stack, tokens, inner), d.dtype)
        if tokens == 0:
            return result
        wide = formed.switches.dtype
        types = name_of(weight), name_of(d), name_of(formed.switches)
        across = -(-inner // THREADS)
        few = min(-(-tokens // TILE), max(1, BLOCKS // (across * elements)))
        grid = across, few, elements
        given = d, result, np.int64(tokens)
        self._launch_guard("guard_inputs", formed.factors, formed[:2], wide, grid, given, types)
        sizes = np.int64(tokens), np.int64(out)
        grid = -(-tokens // THREADS), GUARDS, 1
        self.cuda.launch("guard_hide", Types(*types), grid, *formed[:2], d, *sizes)
        low, rank = packed(low, xp), np.int64(low.shape[-1])
        grid = min(-(-tokens // WARPS), LIMIT), elements, 1
        self.cuda.launch(
            "guard_low", Types(*types), grid, formed.count, d, scaled_b, low, *sizes, rank
        )
        self.multiply(low, a, d.dtype, out=result, beta=formed.switches)
        if row_scale is not None:
            d = xp.astype(row_scale[..., None, :] * d, d.dtype, copy=False)
        if rounded <= FEW or name_of(d) != "float32" or name_of(weight) != "bfloat16":
            return self.multiply(d, weight, d.dtype, out=result, beta=1.0)
        for rows, parts in (slice(rounded), ROUNDED), (slice(rounded, None), PARTS):
            part = result[..., rows, :]
            self.multiply(d[..., rows, :], weight, d.dtype, out=part, beta=1.0, parts=parts)
        return result

    def _launch_guard(
        self, name: str, factors: Factors, which: tuple[Any, ...], dtype: Any,
        grid: tuple[int, int, int], given: tuple[Any, ...],
        types: tuple[str, str, str] | None = None,
    ) -> None:  # fmt: skip
        weight, a, scaled_b, row_scale = factors
        *_, out, inner = weight.shape
        rank = 0 if a is None else a.shape[-2]
        kind = dtype_name(np.dtype(dtype))
        sizes = (np.int64(size) for size in (out, inner, rank))
        turned = np.int32(not weight.flags.c_contiguous)
        self.cuda.launch(
            name, Types(*(types or (name_of(weight), kind, kind))), grid, *which,
            weight, turned, a, scaled_b, row_scale, *given, *sizes,
        )  # fmt: skip
