"""A GPU as the CuPy backend uses it: arrays, launches of the kernels, and cuBLAS.

Everything runs on the caller's current device and stream. No value is read back to the host.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from doraxp._base.types import DType, HostArray
from doraxp.backends._cupy.arrays import DeviceArray, Together, in_c_order, layout
from doraxp.backends._cupy.parameters import Arguments, kernel_name
from doraxp.backends._cupy.source import LIMIT, SOURCE, THREADS, Types

WHOLE_SUMS = 16
"""CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, which CuPy does not name. cuBLAS then adds the
parts of a sum in the dtype of the sum, even if the result is narrower."""

_ADDRESS, _IN_C_ORDER = map(operator.attrgetter, ("data.ptr", "_c_contiguous"))


class _Kernel(NamedTuple):
    """A kernel on one device."""

    function: Any
    """CuPy's function. It keeps the module loaded."""
    free: list[Arguments]
    """Memory for the arguments of launches, none of which is in use."""


class _Bound(threading.local):
    """The devices on which the current thread has a context."""

    def __init__(self) -> None:
        self.devices: set[int] = set()


class Cuda:
    """A GPU, through CuPy."""

    def __init__(self) -> None:
        self._modules: dict[Types, Any] = {}
        self._kernels: dict[tuple[type, Types, int], _Kernel] = {}
        self._bound = _Bound()

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

    def addresses(self, arrays: Sequence[DeviceArray]) -> list[int]:
        """Return the address of the first number of each array."""
        return list(map(_ADDRESS, arrays))

    def in_c_order(self, arrays: Sequence[DeviceArray]) -> bool:
        """Return whether every array is in C order."""
        try:
            return all(map(_IN_C_ORDER, arrays))
        except AttributeError:
            return all(map(in_c_order, arrays))

    def empty(self, shape: Sequence[int], dtype: DType) -> DeviceArray:
        """Return an uninitialised array. If memory runs out, CuPy's MemoryError names the bytes."""
        # `cupy.empty` takes twice as long, and finds a type faster than a dtype.
        return self.cupy.ndarray(tuple(shape), getattr(dtype, "type", dtype))

    def empties(self, together: Together) -> list[DeviceArray]:
        """Return uninitialised arrays that share one allocation: it lives as long as one of them.

        That saves the host's time for all allocations except one. None stays None.
        """
        cupy = self.cupy
        memory, array = cupy.cuda.alloc(together.size), cupy.ndarray
        return [
            None if place is None else array(place.shape, place.kind, memory + place.offset)
            for place in together.places
        ]

    def launch(
        self, arguments: tuple[Any, ...], types: Types, grid: tuple[int, int, int],
        *, threads: int = THREADS,
    ) -> None:  # fmt: skip
        """Start the kernel whose declaration `arguments` is an instance of."""
        if grid[2] > LIMIT:
            raise ValueError(f"a stack must have at most {LIMIT} elements on a GPU, got {grid[2]}")
        cuda = self.cupy.cuda
        device = cuda.runtime.getDevice()
        if device not in self._bound.devices:
            cuda.runtime.memGetInfo()  # gives the thread a context: the driver needs one
            self._bound.devices.add(device)
        key = arguments.__class__, types, device
        kernel = self._kernels.get(key)
        if kernel is None:
            kernel = self._kernels[key] = self._load(arguments.__class__, types)
        # Neither another thread nor a finaliser may write to this memory before the driver reads
        # it: it is not on the list meanwhile.
        try:
            memory = kernel.free.pop()
        except IndexError:
            memory = Arguments(arguments.__class__, types)
        memory.store(arguments)
        cuda.driver.launchKernel(
            kernel.function.ptr, *grid, threads, 1, 1, 0, cuda.get_current_stream().ptr,
            memory.address, 0,
        )  # fmt: skip
        kernel.free.append(memory)

    def _load(self, declared: type, types: Types) -> _Kernel:
        """Return a kernel for the current device. CuPy keeps one build for each device."""
        module = self._modules.get(types)
        if module is None:
            module = self.cupy.RawModule(code=SOURCE, options=types.options())
            self._modules[types] = module
        return _Kernel(module.get_function(kernel_name(declared)).kernel, [])

    def gemm(
        self,
        left: DeviceArray,
        right: DeviceArray,
        out: DeviceArray,
        beta: float,
        *,
        tf32: bool = False,
    ) -> None:
        """Set out ← left right + beta out. The sum is in float32, or for float64 in float64.

        left (m, k) and right (k, n) have one dtype, and `layout` accepts both. out (m, n) is in C
        order. With `tf32`, float32 factors are rounded to 10 bits.
        """
        cuda, blas = self.cupy.cuda, self.blas
        wide, kind, result_kind, compute = _gemm_types(left.dtype, out.dtype, tf32)
        (m, k), n = left.shape, right.shape[1]
        # cuBLAS expects columns to be contiguous, so it sees a matrix in C order as its transpose.
        # This call asks it for outᵀ = rightᵀ leftᵀ.
        (first, first_step), (second, second_step) = layout(right), layout(left)
        pointer = _scalars(beta, wide).address
        # CuPy's own products use the same handle and expect its own modes.
        handle = cuda.device.get_cublas_handle()
        modes = blas.getPointerMode(handle), blas.getMathMode(handle)
        try:
            if modes[0] != blas.CUBLAS_POINTER_MODE_HOST:
                blas.setPointerMode(handle, blas.CUBLAS_POINTER_MODE_HOST)
            blas.setMathMode(handle, WHOLE_SUMS)  # without TF32: `compute` asks for it
            blas.gemmEx(
                handle, first, second, n, m, k,
                pointer, right.data.ptr, kind, first_step, left.data.ptr, kind, second_step,
                pointer + (8 if wide else 4), out.data.ptr, result_kind, n,
                compute, blas.CUBLAS_GEMM_DEFAULT,
            )  # fmt: skip
        finally:
            if modes[0] != blas.CUBLAS_POINTER_MODE_HOST:
                blas.setPointerMode(handle, modes[0])
            blas.setMathMode(handle, modes[1])


class _Scalars(NamedTuple):
    """1 and beta as cuBLAS reads them."""

    values: HostArray
    address: int


@functools.lru_cache(maxsize=64)
def _scalars(beta: float, wide: bool) -> _Scalars:
    values = np.array([1, beta], "f8" if wide else "f4")
    return _Scalars(values, values.ctypes.data)


class _GemmTypes(NamedTuple):
    """cuBLAS's numbers for the dtypes of a product."""

    wide: bool
    """Whether the sum is in float64."""
    factor: int
    result: int
    compute: int


@functools.cache
def _cache_bytes(device: int) -> int:
    runtime = import_module("cupy").cuda.runtime
    return int(runtime.getDeviceProperties(device)["l2CacheSize"])


@functools.cache
def _gemm_types(factor: DType, result: DType, tf32: bool) -> _GemmTypes:
    blas = import_module("cupy_backends.cuda.libs").cublas
    runtime = import_module("cupy").cuda.runtime
    codes = {"float16": "16F", "bfloat16": "16BF", "float32": "32F", "float64": "64F"}
    kinds = [int(getattr(runtime, f"CUDA_R_{codes[str(dtype)]}")) for dtype in (factor, result)]
    wide = str(factor) == "float64"
    compute = blas.CUBLAS_COMPUTE_64F if wide else blas.CUBLAS_COMPUTE_32F
    if tf32 and str(factor) == "float32":
        compute = blas.CUBLAS_COMPUTE_32F_FAST_TF32
    return _GemmTypes(wide, kinds[0], kinds[1], int(compute))
