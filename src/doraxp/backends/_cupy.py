"""CuPy on NVIDIA GPUs: fused kernels around products and guard.

Imports without CuPy and without a GPU. Values are never read on the host.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import numpy as np

from doraxp._types import Array, Reduce
from doraxp.backends._cuda import LIMIT, THREADS, Types, dtype_name
from doraxp.backends._cupy_guard import Guard, Suspects
from doraxp.backends._cupy_products import (
    LOW,
    PARTS,
    WARPS,
    alike,
    compute_dtype,
    is_reduced,
    lying,
    name_of,
    packed,
)
from doraxp.backends._generic import Factors

LEAST, CHUNK, CHUNKS = 4, 32, 64  # tokens whose sums a thread takes, by how many chunks there are
NEEDED = 80  # compute capability, ten times: the first with bfloat16
RUN = 4  # tokens that a thread of `outputs` takes, so that it reads gain and bias once for them
STRIP = 32  # rows and columns of a warp of `merge`
BELOW, BESIDE = 2, 4  # warps of a block of it
MEASURED = 64  # the largest rank by which V is formed no slower than W is read twice
TERMS = 16  # of a rank, that tensor cores add up at once
ROWS = 4  # rows of a thread of `merge_wide`
LEAF_BLOCK = 4 * THREADS  # numbers of a block of `adamw`
KINDS = ("float16", "bfloat16", "float32", "float64")  # as `adamw` counts them
LEAF = np.dtype(
    [(name, np.uint64) for name in ("p", "g", "mu", "nu", "new_p", "new_mu", "new_nu")]
    + [(name, np.int64) for name in ("size", "first_block", "p_type", "g_type")]
    + [(name, np.float64) for name in ("rate", "decay")]
)
"""`Leaf` of the source."""


def why_not() -> str | None:
    """Return why CuPy cannot run here, or None where it can."""
    if importlib.util.find_spec("cupy") is None:
        return "not installed: pip install 'doraxp[cuda13]', or [cuda12] for a CUDA 12 driver"
    try:
        cupy = importlib.import_module("cupy")
    except Exception as error:  # a broken CUDA installation raises more than ImportError
        return f"installed, but the import failed: {type(error).__name__}: {error}"
    if not cupy.cuda.is_available():
        return "installed, but no NVIDIA device was found (is the driver there? try nvidia-smi)"
    capability = str(cupy.cuda.Device().compute_capability)  # "75" is 7.5
    if int(capability) < NEEDED:
        return (
            f"installed, but the device is of compute capability {capability[:-1]}."
            f"{capability[-1]}, and {NEEDED / 10} is needed: no kernel compiles for it"
        )
    return None


class CupyOperations(Guard):
    """The operations on CuPy arrays."""

    def may_look(self, array: Array) -> bool:
        """Never: reading a value waits for the whole queue."""
        return False

    def check_current(self, name: str, array: Array) -> None:
        """Kernels go to the current device, whatever they are given."""
        number = self.cuda.device()
        if array.device.id != number:
            raise ValueError(
                f"{name} is on CUDA device {array.device.id}, but the current one is {number}: "
                f"use `with cupy.cuda.Device({array.device.id}):`"
            )

    # The two hot passes

    def outputs(
        self, x: Array, base: Array | None, factors: Factors, low_rank: Array, formed: Any,
        gain: Array, bias: Array | None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Saves a pass over z: the guard writes to the columns that it serves, and to no other."""
        if not isinstance(formed, Suspects) or base is not None:
            return super().outputs(x, base, factors, low_rank, formed, gain, bias)
        low = name_of(x) in LOW
        kind = x.dtype if low and is_reduced() else gain.dtype
        weight, a, scaled_b, row_scale = factors
        if self.takes_token(x, weight, gain.dtype):
            x, shape = packed(x, self.xp), (*x.shape[:-1], weight.shape[-2])
            z, y = (self.cuda.empty(shape, dtype) for dtype in (kind, x.dtype))
            update = a, scaled_b, row_scale, formed.suspect, low_rank
            self.launch_token(x, weight, gain.dtype, z, update, (gain, bias, y))
            return z, y
        z = self.multiply(x, self.xp.matrix_transpose(weight), kind)
        kind = x.dtype if low else kind
        z, y = self._finish(z, row_scale, (low_rank, scaled_b), gain, bias, kind)
        self.guard_outputs(formed, x, z, (y, gain, bias))
        return z, y

    def scale_and_shift(
        self, z: Array, row_scale: Array | None, update: tuple[Array, Array] | None,
        gain: Array, bias: Array | None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Saves four passes over z."""
        return self._finish(packed(z, self.xp), row_scale, update, gain, bias, gain.dtype)

    def _finish(
        self, z: Array, row_scale: Array | None, update: tuple[Array, Array] | None,
        gain: Array, bias: Array | None, dtype: Any,
    ) -> tuple[Array, Array]:  # fmt: skip
        *stack, tokens, out = z.shape
        y = self.cuda.empty(z.shape, dtype)
        if y.size == 0:
            return z, y
        row_scale, gain, bias = (packed(v, self.xp) for v in (row_scale, gain, bias))
        types = Types(name_of(y), name_of(z), name_of(gain))
        sizes = np.int64(tokens), np.int64(out)
        added = None
        if update is not None:
            low_rank, transposed = update[0], self.xp.matrix_transpose(update[1])
            if row_scale is None:
                z = self.multiply(low_rank, transposed, z.dtype, out=z, beta=1.0)
            else:
                added = self.multiply(low_rank, transposed, z.dtype)
        changed = None if row_scale is None and added is None else z
        grid = _columns(out, y), min(-(-tokens // RUN), LIMIT), math.prod(stack)
        self.cuda.launch(
            "outputs", types, grid, z, added, row_scale, gain, bias, changed, y, *sizes
        )
        return z, y

    def scale_and_sum(
        self, d: Array, z: Array, gain: Array, room: int, *, total: bool = False
    ) -> tuple[Array, Array, Array | None]:
        """Saves all passes but one: d and z are read once."""
        xp = self.xp
        d = packed(d, xp)
        *stack, tokens, out = d.shape
        kind = d.dtype if is_reduced() and z.dtype == d.dtype else gain.dtype
        z = packed(xp.astype(z, kind, copy=False), xp)
        rows = self.cuda.empty((*stack, tokens + room, out), kind)
        each, chunks = _chunks(tokens)
        along = self.cuda.empty((*stack, chunks, out), gain.dtype)
        totals = self.cuda.empty((*stack, chunks, out), gain.dtype) if total else None
        types = Types(name_of(d), name_of(z), name_of(gain))
        grid = _columns(out, d), chunks, math.prod(stack)
        sizes = (np.int64(size) for size in (tokens, tokens + room, out, each))
        self.cuda.launch("gradients", types, grid, d, z, gain, rows, along, totals, *sizes)
        e = self.sum_chunks(along)
        return rows[..., :tokens, :], e, None if totals is None else self.sum_chunks(totals)

    def norm_rows(
        self, scaled: Array, e: Array, gain: Array, norm: Array, scaled_b: Array
    ) -> tuple[Array, Array, Array]:
        """Saves seven launches, and the copy: there is room where `scaled` lies."""
        whole: Array = scaled.base
        *stack, out, rank = scaled_b.shape
        dm, p = (self.cuda.empty(e.shape, e.dtype) for _ in range(2))
        grid = -(-out // THREADS), min(rank, LIMIT), math.prod(stack)
        sizes = map(np.int64, (scaled.shape[-2], out, rank))
        types = Types(name_of(whole), name_of(whole), name_of(e))
        given = e, gain, norm, packed(scaled_b, self.xp)
        self.cuda.launch("norm_rows", types, grid, *given, dm, p, whole, *sizes)
        return dm, p, whole

    def low_rows(self, scaled: Array, rows: Array, scaled_b: Array) -> Array:
        """Saves two launches."""
        return self.product(rows, scaled_b)

    def turning(self, db: Array, p: Array, unit_projection: Array, scaling: float) -> Array:
        """Saves two launches. `db` is written to."""
        grid = -(-db.size // THREADS), 1, 1
        sizes = np.int64(db.size), np.int64(db.shape[-1]), db.dtype.type(scaling)
        self.cuda.launch("turning", alike(db), grid, db, p, unit_projection, *sizes)
        return db

    # The norm

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
        tiles, rank = self._tiles_of(factors, turned, types, PARTS)
        row_scale = packed(factors.row_scale, self.xp)
        sizes = np.int64(rows), np.int64(columns), rank, np.int32(PARTS), np.int32(turned)
        given = stored, tiles, row_scale, partial, *sizes
        self._launch_patches("squares", types, stored.shape, *given)
        return self.sum_chunks(partial)

    def _tiles_of(
        self, factors: Factors, turned: bool, types: Types, parts: int
    ) -> tuple[Array | None, Any]:
        """Return the tiles of s B A, or of its transpose, and the rank; or None and 0."""
        _, a, scaled_b, _ = factors
        if a is None:
            return None, np.int64(0)
        left, right = (a, scaled_b) if turned else (scaled_b, a)
        return self._tiles(left, right, (not turned, turned), types, parts)

    def _tiles(
        self, left: Array, right: Array, tall: tuple[bool, bool], types: Types, parts: int
    ) -> tuple[Array, Any]:
        """Return two factors as tensor cores take them, each in so many parts, and the rank.

        They are (*stack, rows, rank) and (*stack, rank, columns), or transposed: see `tall`.
        """
        left, right = (packed(array, self.xp) for array in (left, right))
        *stack, rows, rank = left.shape
        columns = right.shape[-2 if tall[1] else -1]
        if not tall[0]:
            rows, rank = rank, rows
        count, steps = math.prod(stack), -(-rank // TERMS)
        sides = 2 * (-(-rows // STRIP) - (-columns // STRIP))
        result = self.cuda.empty((count, sides, steps, parts, TERMS * TERMS // 2), np.uint32)
        sizes = (np.int64(size) for size in (rows, columns, rank))
        grid = -(-sides // WARPS), steps, count
        self.cuda.launch(
            "tiles", types, grid,
            left, np.int32(tall[0]), right, np.int32(tall[1]), result, *sizes, np.int32(parts),
        )  # fmt: skip
        return result, np.int64(rank)

    def _launch_patches(self, name: str, types: Types, shape: tuple[int, ...], *given: Any) -> None:
        *stack, rows, columns = shape
        blocks = -(-rows // (STRIP * BELOW)) * -(-columns // (STRIP * BESIDE))
        grid = blocks, 1, math.prod(stack)
        self.cuda.launch(name, types, grid, *given, threads=32 * BELOW * BESIDE)

    def adapted_norm(
        self, u: Array, gram: Array, squares: Array, factors: Factors, magnitude: Array,
        cancellation: float, reduce: Reduce | None = None,
    ) -> tuple[Array, Array, Array, Any | None]:  # fmt: skip
        """Saves some thirty launches."""
        if reduce is not None:
            return super().adapted_norm(u, gram, squares, factors, magnitude, cancellation, reduce)
        factors, kind = self.laid(factors), u.dtype
        norm, gain = (self.cuda.empty(squares.shape, kind) for _ in range(2))
        suspect = self.cuda.empty(squares.shape, self.xp.bool)
        unit = self.cuda.empty(u.shape, kind)
        *_, out, rank = u.shape
        bg = self.product(factors.scaled_b, gram)
        vectors = squares, factors.row_scale, gram, magnitude
        given = u, factors.scaled_b, bg, *vectors, norm, gain, unit, suspect
        sizes = (np.int64(size) for size in (squares.size, out, rank))
        floor = self.floor(kind, factors.weight.shape[-1])
        self.cuda.launch(
            "assemble", alike(u), (-(-squares.size // WARPS), 1, 1),
            *(packed(array, self.xp) for array in given), *sizes,
            kind.type(floor), kind.type(cancellation),
        )  # fmt: skip
        self.measure(suspect, norm, factors, (packed(magnitude, self.xp), gain, unit))
        return norm, gain, unit, self.listed(suspect, norm, factors)

    def over_norm(self, values: Array, norm: Array) -> Array:
        """Saves four launches."""
        values, norm = packed(values, self.xp), packed(norm, self.xp)
        result = self.cuda.empty(values.shape, values.dtype)
        if values.size:
            grid = -(-values.size // THREADS), 1, 1
            sizes = np.int64(values.size), np.int64(values.size // norm.size)
            self.cuda.launch("over_norm", alike(values), grid, values, norm, result, *sizes)
        return result

    # Merge and AdamW

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
        tiles, rank = self._tiles_of(factors, turned, types, parts)
        row_scale, sizes = packed(factors.row_scale, xp), map(np.int64, stored.shape[-2:])
        given = stored, tiles, row_scale, gain, merged, *sizes, rank
        how = np.int32(parts), np.int32(turned)
        self._launch_patches("merge", types, stored.shape, *given, *how)
        return xp.matrix_transpose(merged) if turned else merged

    def _merge_wide(self, types: Types, factors: Factors, gain: Array) -> Array:
        stored, *rest = (packed(array, self.xp) for array in factors)
        *stack, out, inner = stored.shape
        merged = self.cuda.empty(stored.shape, stored.dtype)
        grid = _columns(inner, stored), min(-(-out // ROWS), LIMIT), math.prod(stack)
        sizes = (np.int64(size) for size in (out, inner, rest[0].shape[-2]))
        self.cuda.launch("merge_wide", types, grid, stored, *rest, gain, merged, *sizes)
        return merged

    def adamw(
        self, leaves: dict[str, tuple[Array, ...]], rates: dict[str, Any], decays: dict[str, Any],
        numbers: tuple[Any, ...],
    ) -> dict[str, tuple[Array, Array, Array]] | None:  # fmt: skip
        """Saves all launches but one, or two where some leaves are of float64."""
        given = (*rates.values(), *decays.values(), *numbers)
        if not all(isinstance(number, float) for number in given):
            return None  # one is on the device
        stepped: dict[str, tuple[Array, Array, Array]] = {}
        for wide in (np.dtype(np.float32), np.dtype(np.float64)):
            group = {path: each for path, each in leaves.items() if compute_dtype(each[0]) == wide}
            if group:
                stepped |= self._adamw(group, rates, decays, numbers, wide)
        return stepped

    def _adamw(
        self, leaves: dict[str, tuple[Array, ...]], rates: dict[str, Any], decays: dict[str, Any],
        numbers: tuple[float, ...], wide: Any,
    ) -> dict[str, tuple[Array, Array, Array]]:  # fmt: skip
        xp, blocks, held = self.xp, 0, []
        stepped: dict[str, tuple[Array, Array, Array]] = {}
        table = np.zeros(len(leaves), LEAF)
        for row, (path, arrays) in enumerate(leaves.items()):
            p, g, *moments = (packed(array, xp) for array in arrays)
            moments = [xp.astype(moment, wide, copy=False) for moment in moments]
            new = [self.cuda.empty(p.shape, dtype) for dtype in (p.dtype, wide, wide)]
            pointers = (self.cuda.pointer(array) for array in (p, g, *moments, *new))
            codes = (KINDS.index(name_of(array)) for array in (p, g))
            table[row] = (*pointers, p.size, blocks, *codes, rates[path], decays[path])
            blocks += -(-p.size // LEAF_BLOCK)
            held.append((p, g, *moments))  # until the launch
            stepped[path] = (new[0], new[1], new[2])
        if blocks:
            leaf_table = self.cuda.upload(table.view(np.uint8))
            scalars = map(wide.type, numbers)
            size = np.int32(len(leaves))
            types = Types(*[wide.name] * 3)
            self.cuda.launch("adamw", types, (blocks, 1, 1), leaf_table, size, *scalars)
        return stepped


def _columns(length: int, stored: Array) -> int:
    """Return how many blocks cover so many columns, at 16 bytes of `stored` to a thread."""
    return -(-length * int(stored.itemsize) // (16 * THREADS))


def _chunks(length: int) -> tuple[int, int]:
    """Return of how many rows a chunk of so many is, and how many chunks there are."""
    each = max(LEAST, min(CHUNK, length // CHUNKS), -(-length // LIMIT))
    return each, max(1, -(-length // each))
