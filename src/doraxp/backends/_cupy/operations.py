"""CuPy on NVIDIA GPUs: fused kernels around products and guard.

Imports without CuPy and without a GPU. Values are never read on the host.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import numpy as np

from doraxp._base.types import AdamWLeaf, AdamWNumbers, Array, Reduce
from doraxp.backends._cupy.device import LIMIT, THREADS, Types
from doraxp.backends._cupy.guard import Suspects
from doraxp.backends._cupy.patches import Patches
from doraxp.backends._cupy.products import (
    LOW,
    WARPS,
    alike,
    columns_of,
    is_reduced,
    name_of,
    packed,
)
from doraxp.backends._direction import Factors

LEAST, CHUNK, CHUNKS = 4, 32, 64  # tokens whose sums a thread takes, by how many chunks there are
NEEDED = 80  # compute capability, ten times: the first with bfloat16
RUN = 4  # tokens that a thread of `outputs` takes, so that it reads gain and bias once for them
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


class CupyOperations(Patches):
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
        grid = columns_of(out, y), min(-(-tokens // RUN), LIMIT), math.prod(stack)
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
        grid = columns_of(out, d), chunks, math.prod(stack)
        sizes = (np.int64(size) for size in (tokens, tokens + room, out, each))
        self.cuda.launch("gradients", types, grid, d, z, gain, rows, along, totals, *sizes)
        e = self.sum_chunks(along)
        return rows[..., :tokens, :], e, None if totals is None else self.sum_chunks(totals)

    def norm_rows(
        self, scaled: Array, e: Array, gain: Array, norm: Array, scaled_b: Array
    ) -> tuple[Array, Array, Array]:
        """Takes one launch, and saves the copy: there is room where `scaled` lies."""
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

    def adapted_norm(
        self, u: Array, gram: Array, squares: Array, factors: Factors, magnitude: Array,
        cancellation: float, reduce: Reduce | None = None,
    ) -> tuple[Array, Array, Array, Any | None]:  # fmt: skip
        """Takes four launches: a product, the norm, the suspect rows, and their list."""
        if reduce is not None:
            return super().adapted_norm(u, gram, squares, factors, magnitude, cancellation, reduce)
        factors, magnitude, kind = self.laid(factors), packed(magnitude, self.xp), u.dtype
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
        self.measure(suspect, norm, factors, (magnitude, gain, unit))
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

    # AdamW

    def adamw(
        self, leaves: dict[str, AdamWLeaf], rates: dict[str, float | Array],
        decays: dict[str, float | Array], numbers: AdamWNumbers,
    ) -> dict[str, tuple[Array, Array, Array]]:  # fmt: skip
        """Saves all launches but one, or two where some leaves are of float64."""
        given = (*rates.values(), *decays.values(), *numbers)
        if not all(isinstance(number, float) for number in given):
            return super().adamw(leaves, rates, decays, numbers)  # a number is on the device
        stepped: dict[str, tuple[Array, Array, Array]] = {}
        for wide in (np.dtype(np.float32), np.dtype(np.float64)):
            group = {path: leaf for path, leaf in leaves.items() if leaf.mu.dtype == wide}
            if group:
                stepped |= self._adamw(group, rates, decays, numbers, wide)
        return stepped

    def _adamw(
        self, leaves: dict[str, AdamWLeaf], rates: dict[str, float | Array],
        decays: dict[str, float | Array], numbers: AdamWNumbers, wide: Any,
    ) -> dict[str, tuple[Array, Array, Array]]:  # fmt: skip
        xp, blocks, held = self.xp, 0, []
        stepped: dict[str, tuple[Array, Array, Array]] = {}
        table = np.zeros(len(leaves), LEAF)
        for row, (path, arrays) in enumerate(leaves.items()):
            p, g, *moments = (packed(array, xp) for array in arrays)
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


def _chunks(length: int) -> tuple[int, int]:
    """Return of how many rows a chunk of so many is, and how many chunks there are."""
    each = max(LEAST, min(CHUNK, length // CHUNKS), -(-length // LIMIT))
    return each, max(1, -(-length // each))
