"""A GPU as the CuPy backend uses it: arrays, launches of the kernels, and cuBLAS.

Everything runs on the caller's current device and stream. No value is read back to the host.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from doraxp._base.types import DType
from doraxp.backends._cupy.arrays import DeviceArray, layout
from doraxp.backends._cupy.parameters import kernel_name, packer
from doraxp.backends._cupy.source import LIMIT, SOURCE, THREADS, Types

WHOLE_SUMS = 16
"""CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, which CuPy does not name. cuBLAS then adds the
parts of a sum in the dtype of the sum, even if the result is narrower."""


class Cuda:
    """A GPU, through CuPy."""

    @functools.cached_property
    def cupy(self) -> Any:
        """Return CuPy. Looking it up by name takes longer than using it."""
        return import_module("cupy")

    @functools.cached_property
    def blas(self) -> Any:
        """Return cuBLAS. CuPy's package finds it in NVIDIA's wheels too."""
        return import_module("cupy_backends.cuda.libs").cublas

    def device(self) -> int:
        """Return the number of the current device."""
        return int(self.cupy.cuda.runtime.getDevice())

    def cache_bytes(self) -> int:
        """Return the size of the current device's L2 cache."""
        return _cache_bytes(self.device())

    def pointer(self, array: DeviceArray) -> int:
        """Return the address of the first number of an array."""
        return int(array.data.ptr)

    def empty(self, shape: Sequence[int], dtype: DType) -> DeviceArray:
        """Return an uninitialised array. If memory runs out, CuPy's MemoryError names the bytes."""
        return self.cupy.empty(tuple(shape), dtype)

    def upload(self, values: Any) -> DeviceArray:
        """Return a copy of a NumPy array on the device, without waiting for the queue."""
        return self.cupy.asarray(values)

    def launch(
        self, arguments: tuple[Any, ...], types: Types, grid: tuple[int, int, int],
        *, threads: int = THREADS,
    ) -> None:  # fmt: skip
        """Start the kernel whose declaration `arguments` is an instance of."""
        if grid[2] > LIMIT:
            raise ValueError(f"a stack must have at most {LIMIT} elements on a GPU, got {grid[2]}")
        function, pack = _kernel(type(arguments), types)
        function(grid, (threads,), pack(arguments))

    def gemm(
        self,
        left: DeviceArray,
        right: DeviceArray,
        out: DeviceArray,
        beta: float | DeviceArray,
        *,
        tf32: bool = False,
    ) -> None:
        """Set out ← left right + beta out. The sum is in float32, or for float64 in float64.

        left (m, k) and right (k, n) have one dtype, and `layout` accepts both. out (m, n) is in C
        order. `beta` is a number, or an array {1, beta} on the device, in the dtype of the sum.
        With `tf32`, float32 factors are rounded to 10 bits.
        """
        blas = self.blas
        wide = left.dtype == np.float64
        compute = blas.CUBLAS_COMPUTE_64F if wide else blas.CUBLAS_COMPUTE_32F
        if tf32 and left.dtype == np.float32:
            compute = blas.CUBLAS_COMPUTE_32F_FAST_TF32
        (m, k), n = left.shape, right.shape[1]
        # cuBLAS expects columns to be contiguous, so it sees a matrix in C order as its transpose.
        # This call asks it for outᵀ = rightᵀ leftᵀ.
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
            blas.setMathMode(handle, WHOLE_SUMS)  # without TF32: `compute` asks for it
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


@functools.cache
def _cache_bytes(device: int) -> int:
    runtime = import_module("cupy").cuda.runtime
    return int(runtime.getDeviceProperties(device)["l2CacheSize"])


@functools.cache
def _data_type(dtype: DType) -> int:
    runtime = import_module("cupy").cuda.runtime
    names = {"float16": "16F", "bfloat16": "16BF", "float32": "32F", "float64": "64F"}
    return int(getattr(runtime, f"CUDA_R_{names[str(dtype)]}"))


@functools.cache
def _kernel(declared: type, types: Types) -> tuple[Any, Any]:
    # CuPy keeps one build for each device.
    return _module(types).get_function(kernel_name(declared)), packer(declared, types)


@functools.cache
def _module(types: Types) -> Any:
    return import_module("cupy").RawModule(code=SOURCE, options=types.options())
