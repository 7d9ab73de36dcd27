"""What the CuPy backend asks of a GPU: arrays, the kernels of `kernels.cu`, and cuBLAS.

Everything runs on the caller's current device and stream, and nothing is read back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from doraxp._base.types import Array

SOURCE = Path(__file__).with_name("kernels.cu").read_text(encoding="utf-8")
THREADS = 128
"""Of a block, where nothing else is said; as in the source."""
LIMIT = 65535
"""Of a grid's y and z."""
KERNELS = (
    "outputs",
    "gradients",
    "sum_chunks",
    "norm_rows",
    "turning",
    "token",
    "assemble",
    "norms",
    "over_norm",
    "split",
    "cast",
    "sum_parts",
    "guard_norms",
    "list_suspects",
    "guard_outputs",
    "guard_inputs",
    "guard_hide",
    "guard_low",
    "tiles",
    "merge",
    "squares",
    "merge_wide",
    "adamw",
)
WHOLE_SUMS = 16
"""CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, which CuPy does not name: the parts of a sum
are added in the dtype of the sum, where the result is narrower."""
TYPES = {"float16": "half_t", "bfloat16": "bf16_t", "float32": "float", "float64": "double"}
"""What a dtype is called in the source."""


class Types(NamedTuple):
    """The dtypes that S, Z and C stand for in the source, by name."""

    storage: str
    product: str
    compute: str

    def options(self) -> tuple[str, ...]:
        """Return those of the compiler, NVRTC's or another."""
        return ("-std=c++17", *(f"-D{s}={TYPES[t]}" for s, t in zip("SZC", self, strict=True)))


BUILDS = (
    Types("bfloat16", "float32", "float32"),
    Types("bfloat16", "bfloat16", "float32"),
    Types("float16", "float32", "float32"),
    Types("float16", "float16", "float32"),
    Types("float32", "float32", "float32"),
    Types("float64", "float64", "float64"),
    Types("bfloat16", "float64", "float64"),
    Types("float16", "float64", "float64"),
    Types("float32", "float64", "float64"),
)
"""Every three that the operations ask for: those that are compiled without a device."""


class Cuda:
    """A GPU, through CuPy."""

    @functools.cached_property
    def cupy(self) -> Any:
        """CuPy: to ask for it by name takes longer than to use it."""
        return import_module("cupy")

    @functools.cached_property
    def blas(self) -> Any:
        """Return cuBLAS, as CuPy's package finds it: in NVIDIA's wheels too."""
        return import_module("cupy_backends.cuda.libs").cublas

    def device(self) -> int:
        """Return the number of the current device."""
        return int(self.cupy.cuda.runtime.getDevice())

    def pointer(self, array: Array) -> int:
        """Return the address of the first number."""
        return int(array.data.ptr)

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        """Return an array that is not written yet; CuPy's MemoryError names the bytes."""
        return self.cupy.empty(tuple(shape), dtype)

    def upload(self, values: Any) -> Array:
        """Return a NumPy array on the device; the copy waits for nothing."""
        return self.cupy.asarray(values)

    def launch(
        self, name: str, types: Types, grid: tuple[int, int, int], *arguments: Any,
        threads: int = THREADS,
    ) -> None:  # fmt: skip
        """Start a kernel. An argument is an array, None for a null pointer, or a NumPy scalar."""
        if grid[2] > LIMIT:
            raise ValueError(f"a stack must have at most {LIMIT} elements on a GPU, got {grid[2]}")
        values = tuple(np.intp(0) if value is None else value for value in arguments)
        _kernel(name, types)(grid, (threads,), values)

    def gemm(
        self, left: Array, right: Array, out: Array, beta: float | Array, *, tf32: bool = False
    ) -> None:
        """Set out ← left right + beta out, added up in float32, or for float64 in float64.

        left (m, k) and right (k, n) are of one dtype, each of unit stride along one axis; out
        (m, n) lies row by row. A `beta` on the device is an array of two, {1, beta}, in the dtype
        of the sum. With `tf32`, float32 factors are rounded to 10 bits.
        """
        blas = self.blas
        wide = left.dtype == np.float64
        compute = blas.CUBLAS_COMPUTE_64F if wide else blas.CUBLAS_COMPUTE_32F
        if tf32 and left.dtype == np.float32:
            compute = blas.CUBLAS_COMPUTE_32F_FAST_TF32
        (m, k), n = left.shape, right.shape[1]
        # cuBLAS reads columns: what lies row by row is its transpose to it, and so it is asked
        # for outᵀ = rightᵀ leftᵀ.
        (first, first_step), (second, second_step) = map(layout, (right, left))
        on_device = not isinstance(beta, float)
        scalars: Any = beta if on_device else np.array([1, beta], "f8" if wide else "f4")
        pointer = scalars.data.ptr if on_device else scalars.ctypes.data
        handle = self.cupy.cuda.device.get_cublas_handle()
        pointer_mode, math_mode = blas.getPointerMode(handle), blas.getMathMode(handle)
        try:
            blas.setPointerMode(
                handle,
                blas.CUBLAS_POINTER_MODE_DEVICE if on_device else blas.CUBLAS_POINTER_MODE_HOST,
            )
            blas.setMathMode(handle, WHOLE_SUMS)  # and TF32 is our caller's to choose
            blas.gemmEx(
                handle, first, second, n, m, k,
                pointer, right.data.ptr, _data_type(right.dtype), first_step,
                left.data.ptr, _data_type(left.dtype), second_step,
                pointer + scalars.itemsize, out.data.ptr, _data_type(out.dtype), n,
                compute, blas.CUBLAS_GEMM_DEFAULT,
            )  # fmt: skip
        finally:
            blas.setPointerMode(handle, pointer_mode)
            blas.setMathMode(handle, math_mode)


def layout(matrix: Array) -> tuple[int, int]:
    """Return whether a matrix is transposed to row by row, as cuBLAS's number, and its step.

    A matrix that has neither its rows nor its columns in one piece is a ValueError.
    """
    (rows, columns), (down, across) = matrix.shape, matrix.strides
    down, across = down // matrix.itemsize, across // matrix.itemsize
    if (across == 1 or columns == 1) and (down >= columns or rows == 1):
        return 0, max(down if rows > 1 else columns, 1)
    if (down == 1 or rows == 1) and (across >= rows or columns == 1):
        return 1, max(across if columns > 1 else rows, 1)
    raise ValueError(f"a matrix must be of unit stride along one axis, got {matrix.strides}")


@functools.cache
def dtype_name(dtype: Any) -> str:
    """Return what NumPy takes a microsecond or two to put together."""
    return str(dtype)


@functools.cache
def _data_type(dtype: Any) -> int:
    runtime = import_module("cupy").cuda.runtime
    names = {"float16": "16F", "bfloat16": "16BF", "float32": "32F", "float64": "64F"}
    return int(getattr(runtime, f"CUDA_R_{names[str(dtype)]}"))


@functools.cache
def _kernel(name: str, types: Types) -> Any:
    # CuPy keeps one build for each device.
    return _module(types).get_function(name)


@functools.cache
def _module(types: Types) -> Any:
    return import_module("cupy").RawModule(code=SOURCE, options=types.options())
