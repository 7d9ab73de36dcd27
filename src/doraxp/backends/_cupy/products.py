"""Matrix products on NVIDIA GPUs, by cuBLAS, without a cast of the weight.

The product of a float32 array and a bfloat16 weight loses nothing of either factor. The array is
the exact sum of three bfloat16 arrays (its parts), and the products of the parts add up in float32.
For few rows, one product takes all parts at once, so it reads the weight once.
"""

from __future__ import annotations

import math

import numpy as np

from doraxp._base.types import DType, Namespace
from doraxp.backends._cupy.arrays import (
    LOW,
    DeviceArray,
    column_blocks,
    common_dtype,
    dtype_name,
    for_blas,
    in_c_order,
    name_of,
    one_type,
    packed,
    together,
    typed,
)
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.plans import Plan, planned
from doraxp.backends._cupy.signatures import Cast, Split, SumChunks, SumParts, Token
from doraxp.backends._cupy.skinny import Skinny
from doraxp.backends._cupy.source import LIMIT, THREADS, WARP, WARPS, Types, blocks
from doraxp.backends._direction import Factors
from doraxp.backends._dtypes import transpose
from doraxp.backends._precision import is_exact, is_reduced

FEW = 1024
"""The most rows whose parts go into one product. Its result has a row for each part."""
TOKEN_ROWS = 2
"""Rows of a warp of `token`. kernels/token.cu has the same."""
NARROW = 256
"""The most rows or columns of a factor that the kernels for a factor as narrow as a rank take."""
FLOAT_PARTS, ROUNDED = 3, 2
"""Parts of 8 bits that hold all 24 bits of a float32, and those whose product is rounded to 8."""
_NO_UPDATE: dict[str, None] = dict.fromkeys(
    ("a", "b", "row_scale", "suspect", "low_rank", "gain", "bias")
)


def is_mixed(x: DeviceArray, weight: DeviceArray) -> bool:
    """Return whether x and W have one 16-bit dtype, in which z and g⊙dy may be stored here."""
    return name_of(x) in LOW and x.dtype == weight.dtype and not is_exact()


class Products:
    """Products of arrays in any two of the four dtypes, and the casts and sums that they need."""

    def __init__(self, xp: Namespace, cuda: Cuda, skinny: Skinny) -> None:
        self.xp, self.cuda, self.skinny = xp, cuda, skinny

    def product(self, left: DeviceArray, right: DeviceArray) -> DeviceArray:
        """Return left right in the compute dtype.

        One token takes one launch. A float32 factor that is as narrow as a rank takes one, or two
        where many blocks share a sum.
        """
        dtype = common_dtype(left.dtype, right.dtype)
        rows: DeviceArray = transpose(right)
        if self.takes_token(left, rows, dtype):
            x = packed(left, self.xp)
            return self._launch_token(x, rows, dtype, None, dtype, rank=0, **_NO_UPDATE)[0]
        names = name_of(left), name_of(right)
        if names[0] in LOW and names[1] == "float32" and right.shape[-1] <= NARROW:
            if in_c_order(rows):
                return self.skinny.project(left, rows)
            return self.skinny.project(left, right, turned=True)
        if names[0] == "float32" and names[1] in LOW and left.shape[-2] <= NARROW:
            return self.skinny.pull(transpose(left), right)
        return self.multiply(left, right, dtype)

    # One token

    def takes_token(self, x: DeviceArray, rows: DeviceArray, dtype: DType) -> bool:
        """Return whether the kernel for one token can compute x rowsᵀ in `dtype`.

        `rows` must be in C order and have at least a warp's columns, and one of the three dtypes
        may differ from the other two.
        """
        tokens, inner = x.shape[-2:]
        if tokens != 1 or inner < WARP or not in_c_order(rows):
            return False
        return x.dtype == rows.dtype or np.dtype(dtype) in (x.dtype, rows.dtype)

    def token_outputs(
        self, x: DeviceArray, factors: Factors, suspect: DeviceArray, low_rank: DeviceArray,
        gain: DeviceArray, bias: DeviceArray | None, z: DType, y: DType,
    ) -> tuple[DeviceArray, DeviceArray]:  # fmt: skip
        """Return z = x Vᵀ and y = g⊙z + bias in these dtypes, for one token, by one launch.

        The kernel forms suspect rows of V.
        """
        xp, (weight, a, b, row_scale) = self.xp, factors
        return self._launch_token(
            packed(x, xp), weight, z, y, gain.dtype, rank=a.shape[-2], a=a, b=b,
            row_scale=row_scale, suspect=suspect, low_rank=packed(low_rank, xp),
            gain=packed(gain, xp), bias=packed(bias, xp),
        )  # fmt: skip

    def _launch_token(
        self, x: DeviceArray, rows: DeviceArray, of_z: DType, of_y: DType | None, dtype: DType, *,
        rank: int, **update: DeviceArray,
    ) -> tuple[DeviceArray, DeviceArray]:  # fmt: skip
        """Return z, and y if `of_y` gives its dtype; else None takes the place of y."""
        plan = _plan_token(rows.shape, rank, x.dtype, rows.dtype, of_z, of_y, dtype)
        z, y = self.cuda.empties(plan.made)
        kernel = Token(matrix=rows, x=x, z=z, y=y, **update, **plan.numbers)
        self.cuda.launch(kernel, plan.types, plan.grid)
        return z, y

    # Products by cuBLAS

    def multiply(
        self, left: DeviceArray, right: DeviceArray, dtype: DType, *,
        out: DeviceArray | None = None, beta: float = 0.0, parts: int = FLOAT_PARTS,
        whole: bool = False,
    ) -> DeviceArray:  # fmt: skip
        """Return out ← left right + beta out in `dtype`, one element of the stack at a time.

        A float32 factor that meets a bfloat16 one is split into this many `parts` of 8 bits. With
        `whole`, `reduced_precision` has no effect.
        """
        if out is None:
            shape = (*left.shape[:-1], right.shape[-1])
            out = self.cuda.empty(shape, dtype)
        if 0 in out.shape:
            return out
        if left.shape[-1] == 0:
            if beta == 0:
                out[...] = 0
            return out
        tf32 = not whole and is_reduced()
        if left.ndim == 2:
            self._multiply_two(left, right, out, beta, parts, tf32=tf32)
            return out
        for element in np.ndindex(left.shape[:-2]):
            self._multiply_two(left[element], right[element], out[element], beta, parts, tf32=tf32)
        return out

    def _multiply_two(
        self,
        left: DeviceArray,
        right: DeviceArray,
        out: DeviceArray,
        beta: float,
        parts: int,
        *,
        tf32: bool,
    ) -> None:
        xp = self.xp
        if left.dtype != right.dtype:
            low = next((array for array in (left, right) if name_of(array) in LOW), None)
            wide = left if low is right else right
            if low is None or name_of(wide) != "float32":  # float64, or float16 and bfloat16
                common = common_dtype(left.dtype, right.dtype)
                left, right = (xp.astype(array, common, copy=False) for array in (left, right))
            else:
                self._multiply_parts(left, right, out, beta, parts)
                return
        elif out.dtype != left.dtype and name_of(left) not in LOW:
            left, right = (self.cast(array, out.dtype) for array in (left, right))
        self.cuda.gemm(for_blas(left, xp), for_blas(right, xp), out, beta, tf32=tf32)

    def _multiply_parts(
        self,
        left: DeviceArray,
        right: DeviceArray,
        out: DeviceArray,
        beta: float,
        count: int,
    ) -> None:
        """Multiply a float32 factor and one of 16 bits, and round neither."""
        xp = self.xp
        on_left = name_of(left) == "float32"
        wide, low = (left, right) if on_left else (right, left)
        if (left.shape[0] if on_left else right.shape[1]) <= FEW:
            self._multiply_few(wide, low, out, beta, on_left=on_left)
            return
        low = for_blas(low, xp)
        if name_of(low) == "float16":  # it has too few exponents for the parts of any float32
            parts = [for_blas(wide, xp)]
            low = xp.astype(low, xp.float32)
        else:
            columns = wide.strides[-1] != wide.itemsize
            rows = transpose(wide) if columns else wide
            parts = list(self._split(rows, low, count)[0])
            parts = [transpose(part) for part in parts] if columns else parts
        for part in parts:
            self.cuda.gemm(*((part, low) if on_left else (low, part)), out, beta)
            beta = 1.0

    def _multiply_few(
        self,
        wide: DeviceArray,
        low: DeviceArray,
        out: DeviceArray,
        beta: float,
        *,
        on_left: bool,
    ) -> None:
        """Multiply all parts of few float32 rows or columns by `low` at once: it is read once."""
        xp = self.xp
        rows = wide if on_left else transpose(wide)  # (few, k)
        parts, shrink = self._split(rows, low)
        few, k = rows.shape
        parts, low = xp.reshape(parts, (FLOAT_PARTS * few, k)), for_blas(low, xp)
        if on_left:
            products = self.cuda.empty((FLOAT_PARTS * few, low.shape[1]), xp.float32)
            self.cuda.gemm(parts, low, products, 0.0)
        else:
            products = self.cuda.empty((low.shape[0], FLOAT_PARTS * few), xp.float32)
            self.cuda.gemm(low, transpose(parts), products, 0.0)
        arguments = SumParts(
            products=products, shrink=shrink, result=out, size=out.size, columns=out.shape[1],
            parts=FLOAT_PARTS, on_left=on_left, beta=beta,
        )  # fmt: skip
        self.cuda.launch(arguments, one_type(out), (blocks(out.size, THREADS), 1, 1))

    def _split(
        self, rows: DeviceArray, low: DeviceArray, count: int = FLOAT_PARTS
    ) -> tuple[DeviceArray, DeviceArray | None]:
        """Return the parts of `rows`, (count, few, k), in the dtype of `low`; and `shrink`.

        `shrink` holds a factor for each row of the product, or is None.
        """
        rows = packed(rows, self.xp)
        few, k = rows.shape
        parts = self.cuda.empty((count, few, k), low.dtype)
        shrink = self.cuda.empty((few,), rows.dtype) if name_of(low) == "float16" else None
        types = Types(name_of(low), "float32", "float32")
        across = 1 if shrink is not None else min(blocks(k, 4 * THREADS), LIMIT)
        arguments = Split(a=rows, parts=parts, shrink=shrink, rows=few, columns=k, part_count=count)
        self.cuda.launch(arguments, types, (few, across, 1))
        return parts, shrink

    # Helpers of products and of other parts of the backend

    def sum_chunks(self, partial: DeviceArray) -> DeviceArray:
        """Return the sums over chunks, one after the other: (*stack, chunks, k) -> (*stack, k)."""
        *stack, chunks, length = partial.shape
        result = self.cuda.empty((*stack, length), partial.dtype)
        arguments = SumChunks(partial=partial, result=result, chunks=chunks, out=length)
        grid = blocks(length, WARP), 1, math.prod(stack)
        self.cuda.launch(arguments, one_type(partial), grid, threads=WARP)
        return result

    def cast(self, array: DeviceArray, dtype: DType) -> DeviceArray:
        """Return `array` in `dtype`. A kernel rounds float32 to 16 bits in a third of the time."""
        if name_of(array) != "float32" or dtype_name(np.dtype(dtype)) not in LOW:
            return self.xp.astype(array, dtype, copy=False)
        turned: DeviceArray = transpose(array)
        if in_c_order(turned) and not in_c_order(array):
            return transpose(self.cast(turned, dtype))
        array, result = packed(array, self.xp), self.cuda.empty(array.shape, dtype)
        if array.size:
            types = Types(dtype_name(np.dtype(dtype)), "float32", "float32")
            arguments = Cast(array=array, result=result, size=array.size)
            self.cuda.launch(arguments, types, (column_blocks(array.size, result), 1, 1))
        return result


@planned
def _plan_token(
    shape: tuple[int, ...], rank: int, x: DType, rows: DType, of_z: DType, of_y: DType | None,
    dtype: DType,
) -> Plan:  # fmt: skip
    """Plan `token`, for rows in this shape. Without a rank, it multiplies alone."""
    *stack, out, inner = shape
    count, wide = math.prod(stack), np.dtype(dtype)
    stored = next((each for each in (x, rows) if each != wide), wide)
    by_block = rank == 0
    numbers = {
        "matrix_is_stored": rows == stored, "x_is_stored": x == stored, "rows": count * out,
        "out": out, "inner": inner, "rank": rank, "by_block": by_block,
    }  # fmt: skip
    grid = count * out if by_block else blocks(count * blocks(out, TOKEN_ROWS), WARPS), 1, 1
    result = *stack, 1, out
    made = together((result, of_z), None if of_y is None else (result, of_y))
    return Plan(typed(stored, of_z, dtype), grid, numbers, made)
