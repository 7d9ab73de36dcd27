"""Products on NVIDIA GPUs by cuBLAS, of the weight as it is stored.

A product of a float32 array with a bfloat16 weight is exact in its factors: the array is the sum of
three of bfloat16, and cuBLAS adds up three products in float32, or one of all parts of few rows:
the weight is then read once. `reduced_precision` rounds instead.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np

from doraxp._base.types import Array
from doraxp.backends._cupy.device import LIMIT, THREADS, Cuda, Types, dtype_name, layout
from doraxp.backends._generic import Operations

LOW = ("float16", "bfloat16")
FEW = 1024  # rows whose parts go into one product: its result has a row for each part
WARP, WARPS = 32, THREADS // 32  # threads of a warp, and warps of a block
PARTS = 3  # of 8 bits each: all 24 of a float32
_REDUCED: ContextVar[bool] = ContextVar("reduced", default=False)


@contextlib.contextmanager
def reduced_precision() -> Iterator[None]:
    """Let CuPy's products round their factors: the speed of the tensor cores.

    Within, float32 factors are rounded to TF32's 10 bits, or beside a float16 or bfloat16 weight to
    its dtype. Of x and dy in the weight's own dtype, z, g⊙dy and dx are stored in it too. Sums are
    made in float32 either way. The gradients' errors are then those of PyTorch's mixed precision.
    Other libraries are not concerned.
    """
    token = _REDUCED.set(True)
    try:
        yield
    finally:
        _REDUCED.reset(token)


def is_reduced() -> bool:
    """Say whether factors may be rounded here."""
    return _REDUCED.get()


class Products(Operations):
    """The operations that are products, on CuPy arrays."""

    def __init__(self, xp: Any, cuda: Any = None) -> None:
        super().__init__(xp)
        self.cuda = cuda or Cuda()

    def operand_dtype(self, array: Array, weight: Array, dtype: Any) -> Any:
        """Saves the cast of x and dy: tensor cores take them as they are."""
        own = name_of(array)
        low = own in LOW and own == name_of(weight) and np.dtype(dtype) == np.float32
        return array.dtype if low else dtype

    def times_transposed(self, x: Array, weight: Array, dtype: Any) -> Array:
        """Saves the cast of a low-precision W."""
        return self.multiply(x, self.xp.matrix_transpose(weight), dtype)

    def times(self, d: Array, weight: Array, dtype: Any) -> Array:
        """Saves the cast of a low-precision W."""
        return self.multiply(d, weight, dtype)

    def project(self, weight: Array, a: Array, dtype: Any) -> Array:
        """Saves the cast of a low-precision W."""
        return self.multiply(weight, self.xp.matrix_transpose(a), dtype)

    def product(self, left: Array, right: Array) -> Array:
        """Saves the cast of an x or dy in its own dtype, and for one token two launches."""
        dtype = np.promote_types(compute_dtype(left), compute_dtype(right))
        rows = self.xp.matrix_transpose(right)
        if self.takes_token(left, rows, dtype):
            result = self.cuda.empty((*left.shape[:-1], rows.shape[-2]), dtype)
            self.launch_token(packed(left, self.xp), rows, dtype, result)
            return result
        return self.multiply(left, right, dtype)

    def accumulate(self, total: Array, left: Array, right: Array) -> Array:
        """Saves the temporary of the product, and adding it: BLAS adds while it multiplies."""
        return self.multiply(left, right, total.dtype, out=total, beta=1.0)

    def takes_token(self, x: Array, rows: Array, dtype: Any) -> bool:
        """Say whether x rowsᵀ is one for `launch_token`: of one token, and rows longer than many.

        `rows` must lie row by row; of the three dtypes one may be another.
        """
        one = x.shape[-2] == 1 and rows.shape[-1] >= WARP and rows.flags.c_contiguous
        return one and len({x.dtype, rows.dtype, np.dtype(dtype)}) <= 2

    def launch_token(
        self, x: Array, rows: Array, dtype: Any, z: Array, update: tuple[Any, ...] = (None,) * 5,
        last: tuple[Any, ...] = (None, None, None),
    ) -> None:  # fmt: skip
        """Write z = x rowsᵀ; or for `update` = (A, s B, ρ, suspects, L) z = x Vᵀ, of W in `rows`.

        For `last` = (gain, bias, y) then y = g⊙z + bias.
        """
        wide, xp = dtype_name(np.dtype(dtype)), self.xp
        stored = next((name_of(array) for array in (x, rows) if name_of(array) != wide), wide)
        rank = 0 if update[0] is None else update[0].shape[-2]
        gain, bias, y = last
        *stack, out, inner = rows.shape
        count = math.prod(stack) * out
        by_block = rank == 0
        grid = count if by_block else -(-count // WARPS), 1, 1
        vectors = (packed(array, xp) for array in (*update, gain, bias))
        self.cuda.launch(
            "token", Types(stored, name_of(z), wide), grid,
            rows, np.int32(name_of(rows) == stored), x, np.int32(name_of(x) == stored),
            *vectors, z, y, *map(np.int64, (count, out, inner, rank)), np.int32(by_block),
        )  # fmt: skip

    def multiply(
        self, left: Array, right: Array, dtype: Any, *, out: Array | None = None,
        beta: float | Array = 0.0, parts: int = PARTS,
    ) -> Array:  # fmt: skip
        """Return out ← left right + beta out, by products of two axes; `out` is in `dtype`.

        A float32 factor beside one of bfloat16 is split into so many parts of 8 bits.
        """
        if out is None:
            shape = (*left.shape[:-1], right.shape[-1])
            out = self.cuda.empty(shape, dtype)
        if 0 in out.shape:
            return out
        if left.shape[-1] == 0:
            out[...] = 0
            return out
        if left.ndim == 2:
            self._multiply_two(left, right, out, beta, parts)
            return out
        for element in np.ndindex(left.shape[:-2]):
            self._multiply_two(left[element], right[element], out[element], beta, parts)
        return out

    def _multiply_two(
        self, left: Array, right: Array, out: Array, beta: float | Array, parts: int
    ) -> None:
        xp, reduced = self.xp, is_reduced()
        names = name_of(left), name_of(right)
        if names[0] != names[1]:
            low = next((array for array in (left, right) if name_of(array) in LOW), None)
            wide = left if low is right else right
            if low is None or name_of(wide) != "float32":  # float64, or two kinds of half
                common = np.promote_types(compute_dtype(left), compute_dtype(right))
                left, right = (xp.astype(array, common, copy=False) for array in (left, right))
            elif reduced:
                rounded = self.cast(wide, low.dtype)
                left, right = (low, rounded) if low is left else (rounded, right)
            else:
                self._multiply_parts(left, right, out, beta, parts)
                return
        elif names[0] not in LOW and out.dtype != left.dtype:
            left, right = (self.cast(array, out.dtype) for array in (left, right))
        self.cuda.gemm(_piece(left, xp), _piece(right, xp), out, beta, tf32=reduced)

    def _multiply_parts(
        self, left: Array, right: Array, out: Array, beta: float | Array, count: int
    ) -> None:
        """Multiply a float32 factor by one of half precision, exact in both."""
        xp = self.xp
        on_left = name_of(left) == "float32"
        wide, low = (left, right) if on_left else (right, left)
        if (left.shape[0] if on_left else right.shape[1]) <= FEW:
            self._multiply_few(wide, low, out, beta, on_left=on_left)
            return
        low = _piece(low, xp)
        if name_of(low) == "float16":  # its exponents are too few for the parts of any float32
            parts = [_piece(wide, xp)]
            low = xp.astype(low, xp.float32)
        else:
            columns = wide.strides[-1] != wide.itemsize
            rows = xp.matrix_transpose(wide) if columns else wide
            parts = list(self._split(rows, low, count)[0])
            parts = [xp.matrix_transpose(part) for part in parts] if columns else parts
        for part in parts:
            self.cuda.gemm(*((part, low) if on_left else (low, part)), out, beta)
            beta = 1.0

    def _multiply_few(
        self, wide: Array, low: Array, out: Array, beta: float | Array, *, on_left: bool
    ) -> None:
        """Multiply few rows or columns in float32 by `low` in one product: it is read once."""
        xp = self.xp
        rows = wide if on_left else xp.matrix_transpose(wide)  # (few, k)
        parts, shrink = self._split(rows, low)
        few, k = rows.shape
        parts, low = xp.reshape(parts, (PARTS * few, k)), _piece(low, xp)
        if on_left:
            products = self.cuda.empty((PARTS * few, low.shape[1]), xp.float32)
            self.cuda.gemm(parts, low, products, 0.0)
        else:
            products = self.cuda.empty((low.shape[0], PARTS * few), xp.float32)
            self.cuda.gemm(low, xp.matrix_transpose(parts), products, 0.0)
        sizes = np.int64(out.size), np.int64(out.shape[1])
        how = np.int32(PARTS), np.int32(on_left), np.float32(beta)
        grid = -(-out.size // THREADS), 1, 1
        self.cuda.launch("sum_parts", alike(out), grid, products, shrink, out, *sizes, *how)

    def _split(self, rows: Array, low: Array, count: int = PARTS) -> tuple[Array, Array | None]:
        """Return the parts (count, rows, k) in the dtype of `low`, and what to scale rows by."""
        rows = packed(rows, self.xp)
        parts = self.cuda.empty((count, *rows.shape), low.dtype)
        shrink = (
            self.cuda.empty((rows.shape[0],), rows.dtype) if name_of(low) == "float16" else None
        )
        sizes = *map(np.int64, rows.shape), np.int32(count)
        types = Types(name_of(low), "float32", "float32")
        across = 1 if shrink is not None else min(-(-rows.shape[1] // (4 * THREADS)), LIMIT)
        self.cuda.launch("split", types, (rows.shape[0], across, 1), rows, parts, shrink, *sizes)
        return parts, shrink

    def sum_chunks(self, partial: Array) -> Array:
        """Return the sums over chunks, one after the other: (*stack, chunks, k) -> (*stack, k)."""
        *stack, chunks, length = partial.shape
        result = self.cuda.empty((*stack, length), partial.dtype)
        grid = -(-length // WARP), 1, math.prod(stack)
        sizes = np.int64(chunks), np.int64(length)
        self.cuda.launch("sum_chunks", alike(partial), grid, partial, result, *sizes, threads=WARP)
        return result

    def cast(self, array: Array, dtype: Any) -> Array:
        """Saves two thirds of the time, where a float32 is rounded to 16 bits."""
        if name_of(array) != "float32" or dtype_name(np.dtype(dtype)) not in LOW:
            return super().cast(array, dtype)
        turned = self.xp.matrix_transpose(array)
        if turned.flags.c_contiguous and not array.flags.c_contiguous:
            return self.xp.matrix_transpose(self.cast(turned, dtype))
        array, result = packed(array, self.xp), self.cuda.empty(array.shape, dtype)
        if array.size:
            types = Types(dtype_name(np.dtype(dtype)), "float32", "float32")
            grid = -(-array.size // (THREADS * 8)), 1, 1
            self.cuda.launch("cast", types, grid, array, result, np.int64(array.size))
        return result


def name_of(array: Array) -> str:
    """Return the name of the dtype."""
    return dtype_name(array.dtype)


def compute_dtype(array: Array) -> Any:
    """Return the dtype to compute in."""
    return np.dtype(np.float32) if name_of(array) in LOW else array.dtype


def alike(array: Array) -> Types:
    """Return the types of a kernel that is of one dtype."""
    return Types(*[name_of(array)] * 3)


def packed(array: Array, xp: Any) -> Any:
    """Return an array, or None, row by row in memory: itself where it lies so."""
    if array is None or array.flags.c_contiguous:
        return array
    return xp.asarray(array, copy=True, order="C")


def lying(weight: Array, xp: Any) -> tuple[Array, bool]:
    """Return a weight, or its transpose where that lies row by row; and whether it is that."""
    turned = xp.matrix_transpose(weight)
    if turned.flags.c_contiguous and not weight.flags.c_contiguous:
        return turned, True
    return packed(weight, xp), False


def _piece(matrix: Array, xp: Any) -> Array:
    """Return a matrix whose rows or columns are in one piece, as BLAS wants it."""
    try:
        layout(matrix)
    except ValueError:  # pieces, rows in reverse or one row for all
        return packed(matrix, xp)
    return matrix


def columns_of(length: int, stored: Array) -> int:
    """Return how many blocks cover so many columns, at 16 bytes of `stored` to a thread."""
    return -(-length * int(stored.itemsize) // (16 * THREADS))
