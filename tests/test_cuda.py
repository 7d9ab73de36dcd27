"""The calls of kernels and of cuBLAS, recorded by a fake CuPy; and the kernels' declarations."""

from __future__ import annotations

import ctypes
import re
import types
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from doraxp.backends._cupy import device as _cuda
from doraxp.backends._cupy.arrays import layout
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.parameters import (
    ConstCompute,
    Index,
    Number,
    Parameter,
    Product,
    packer,
    parameters_of,
)
from doraxp.backends._cupy.signatures import KERNELS, Cast, OverNorm, Turning
from doraxp.backends._cupy.source import SOURCE, THREADS, Types

KINDS = {2: np.float16, 14: ml_dtypes.bfloat16, 0: np.float32, 1: np.float64}
"""cudaDataType, as CUDA's library_types.h has it."""
WHOLE_SUMS = 16
"""CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, as cublas_api.h has it."""


class FakeBlas:
    """cuBLAS's gemmEx on host pointers, column by column, and the modes of a handle."""

    CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F, CUBLAS_COMPUTE_32F_FAST_TF32 = 68, 70, 77
    CUBLAS_POINTER_MODE_HOST, CUBLAS_POINTER_MODE_DEVICE = 0, 1
    CUBLAS_GEMM_DEFAULT = -1

    def __init__(self):
        self.modes, self.within, self.fails = {"pointer": 0, "math": 3}, [], False

    def getPointerMode(self, handle):  # noqa: N802
        return self.modes["pointer"]

    def setPointerMode(self, handle, mode):  # noqa: N802
        self.modes["pointer"] = mode

    def getMathMode(self, handle):  # noqa: N802
        return self.modes["math"]

    def setMathMode(self, handle, mode):  # noqa: N802
        self.modes["math"] = mode

    def gemmEx(  # noqa: N802
        self, handle, first, second, m, n, k, alpha, a, a_kind, a_step, b, b_kind, b_step,
        beta, c, c_kind, c_step, compute, algorithm,
    ):  # fmt: skip
        self.within.append((dict(self.modes), compute, algorithm))
        if self.fails:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        scalar = ctypes.c_double if compute == 70 else ctypes.c_float
        one, beta = (scalar.from_address(pointer).value for pointer in (alpha, beta))
        assert one == 1
        left = columns(a, a_kind, a_step, *((k, m) if first else (m, k)))
        right = columns(b, b_kind, b_step, *((n, k) if second else (k, n)))
        result = columns(c, c_kind, c_step, m, n)
        left, right = (array.astype("float64") for array in (left, right))
        product = (left.T if first else left) @ (right.T if second else right)
        result[...] = product if beta == 0 else product + beta * result.astype("float64")


def columns(pointer, kind, step, rows, count):
    """Return the matrix at a pointer, whose columns are contiguous."""
    assert step >= rows
    dtype = np.dtype(KINDS[kind])
    raw = (ctypes.c_char * (((count - 1) * step + rows) * dtype.itemsize)).from_address(pointer)
    flat = np.frombuffer(raw, dtype)
    return np.lib.stride_tricks.as_strided(
        flat, (rows, count), (dtype.itemsize, step * dtype.itemsize)
    )


class OnDevice(np.ndarray):
    """An array that gives its pointer as CuPy's do."""

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.ctypes.data)


def on_device(array):
    return array.view(OnDevice)


@pytest.fixture
def blas(monkeypatch):
    fake = FakeBlas()
    names = ("CUDA_R_16F", "CUDA_R_16BF", "CUDA_R_32F", "CUDA_R_64F")
    runtime = types.SimpleNamespace(**dict(zip(names, KINDS, strict=True)))
    device = types.SimpleNamespace(get_cublas_handle=lambda: 1)
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime, device=device))
    # The package loads cuBLAS from NVIDIA's wheels; the module by itself does not find it there.
    modules = {"cupy": cupy, "cupy_backends.cuda.libs": types.SimpleNamespace(cublas=fake)}
    monkeypatch.setattr(_cuda, "import_module", modules.__getitem__)
    return fake


def matrix(rng, shape, way, dtype):
    """Return a matrix: whole, part of a wider one, or transposed."""
    rows, width = shape
    if way == "transposed":
        return on_device(rng.standard_normal((width, rows)).astype(dtype)).T
    if way == "transposed part":
        return on_device(rng.standard_normal((width, rows + 3)).astype(dtype))[:, 1 : 1 + rows].T
    wide = on_device(rng.standard_normal((rows, width + 3)).astype(dtype))
    return wide[:, 1 : 1 + width] if way == "part" else wide[:, :width].copy()


WAYS = ("whole", "part", "transposed", "transposed part")


@pytest.mark.parametrize("left_way", WAYS)
@pytest.mark.parametrize("right_way", WAYS)
@pytest.mark.parametrize("shape", [(4, 5, 3), (1, 5, 3), (4, 1, 3), (4, 5, 1), (1, 1, 1)])
@pytest.mark.parametrize("beta", [0.0, 1.0, "device"])
def test_gemm_gives_cublas_the_right_matrices_for_every_layout(
    blas, left_way, right_way, shape, beta
):
    m, k, n = shape
    rng = np.random.default_rng(0)
    left = matrix(rng, (m, k), left_way, "float32")
    right = matrix(rng, (k, n), right_way, "float32")
    out = on_device(rng.standard_normal((m, n)).astype("float32"))
    expected = left.astype("float64") @ right + (0 if beta == 0 else out)
    given = on_device(np.ones(2, "float32")) if beta == "device" else beta
    Cuda().gemm(left, right, out, given)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    ((modes, compute, algorithm),) = blas.within
    assert modes == {"pointer": int(beta == "device"), "math": WHOLE_SUMS}
    assert (compute, algorithm) == (68, -1)
    assert blas.modes == {"pointer": 0, "math": 3}


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64"])
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_sums_are_in_float32_and_tf32_is_used_only_on_request(blas, dtype, tf32, stored):
    rng = np.random.default_rng(0)
    left, right = matrix(rng, (4, 5), "whole", dtype), matrix(rng, (5, 3), "whole", dtype)
    wide = "float64" if dtype == "float64" else "float32"
    out = on_device(np.full((4, 3), np.nan, dtype if stored else wide))
    Cuda().gemm(left, right, out, 0.0, tf32=tf32)
    expected = (left.astype("float64") @ right.astype("float64")).astype(out.dtype)
    np.testing.assert_allclose(out.astype("float64"), expected.astype("float64"), rtol=1e-5)
    compute = {"float64": 70, "float32": 77 if tf32 else 68}.get(str(np.dtype(dtype)), 68)
    assert blas.within[0][:2] == ({"pointer": 0, "math": WHOLE_SUMS}, compute)


def test_the_handle_gets_its_modes_back_if_cublas_fails(blas):
    blas.fails = True
    one = on_device(np.ones((1, 1), "float32"))
    with pytest.raises(RuntimeError, match="NOT_SUPPORTED"):
        Cuda().gemm(one, one, one.copy(), on_device(np.ones(2, "float32")))
    assert blas.modes == {"pointer": 0, "math": 3}


def test_a_matrix_without_unit_stride_is_refused():
    with pytest.raises(ValueError, match=r"unit stride along one axis, got \(48, 8\)"):
        layout(np.ones((4, 12), "float32")[:, ::2])


class Null(NamedTuple):
    """A declaration of a kernel that does not exist."""

    update: ConstCompute | None
    z: Product
    size: Index
    scale: Number


def test_a_kernel_is_built_once_and_gets_numbers_of_the_declared_types(monkeypatch):
    built, calls = [], []

    class Module:
        def __init__(self, *, code, options):
            assert code == SOURCE
            built.append(options)

        def get_function(self, name):
            return lambda *call: calls.append((name, *call))

    modules = {"cupy": types.SimpleNamespace(RawModule=Module)}
    monkeypatch.setattr(_cuda, "import_module", modules.__getitem__)
    for cached in (_cuda._kernel, _cuda._module):
        cached.cache_clear()
    kinds = Types("bfloat16", "float32", "float32")
    for _ in range(2):
        Cuda().launch(Null(update=None, z="an array", size=4, scale=5), kinds, (1, 2, 3))
    defined = "-Dstorage_t=bf16_t", "-Dproduct_t=float", "-Dcompute_t=float"
    assert built == [("-std=c++17", *defined)]
    (given,) = {call[3] for call in calls}
    assert calls == [("null", (1, 2, 3), (THREADS,), given)] * 2
    assert given == (0, "an array", 4, 5)
    assert [type(value) for value in given] == [np.intp, str, np.int64, np.float32]
    for cached in (_cuda._kernel, _cuda._module):
        cached.cache_clear()


def test_cupys_own_memory_error_reaches_the_caller(monkeypatch):
    """It names the bytes. The arguments are unchanged: results are new arrays."""

    def empty(shape, dtype):
        raise MemoryError("Out of memory allocating 48 bytes (allocated so far: 0 bytes).")

    modules = {"cupy": types.SimpleNamespace(empty=empty)}
    monkeypatch.setattr(_cuda, "import_module", modules.__getitem__)
    with pytest.raises(MemoryError, match="allocating 48 bytes"):
        Cuda().empty((3, 4), "float32")


def test_upload_copies_by_asarray(monkeypatch):
    modules = {"cupy": types.SimpleNamespace(asarray=lambda values: ("device", values))}
    monkeypatch.setattr(_cuda, "import_module", modules.__getitem__)
    assert Cuda().upload(3) == ("device", 3)


def declared_in_the_source():
    """Return the parameters of every kernel of the source, by the kernel's name."""
    bounds = r"(?:__launch_bounds__\([^\n]*\)\s+)?"
    kernels = re.findall(rf'extern "C" __global__ void\s+{bounds}(\w+)\(([^)]*)\) {{', SOURCE)
    assert len(kernels) == SOURCE.count('extern "C" __global__')
    return {name: tuple(map(parameter, text.split(","))) for name, text in kernels}


def parameter(text):
    """Return a parameter of the source: `const float* name /* or null */`."""
    pattern = r"\s*((?:const )?[\w ]+?\*?) (?:__restrict__ )?(\w+)( /\* or null \*/)?"
    c_type, name, null = re.fullmatch(pattern, text).groups()
    return Parameter(name, c_type, null is not None)


def test_every_kernel_of_the_source_is_declared():
    assert tuple(declared_in_the_source()) == tuple(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_a_declaration_has_the_parameters_of_the_source(name):
    """Names, types, order, const, and which pointers may be null."""
    assert parameters_of(KERNELS[name]) == declared_in_the_source()[name]


def test_a_missing_or_unknown_argument_names_itself_and_the_kernel():
    with pytest.raises(TypeError, match=r"OverNorm.*missing 1 required .* argument: 'per_row'"):
        OverNorm(values=1, norm=2, result=3, size=4)
    with pytest.raises(TypeError, match=r"Cast.* unexpected keyword argument 'sizes'"):
        Cast(array=1, result=2, sizes=3)


@pytest.mark.parametrize("name", ["p", "rank", "scaling"])
def test_none_for_an_argument_that_is_not_nullable_is_refused(name):
    arguments = Turning(db=1, p=2, unit=3, size=4, rank=5, scaling=6)._replace(**{name: None})
    pack = packer(Turning, Types("float32", "float32", "float32"))
    with pytest.raises(TypeError, match=f"argument {name} of the kernel turning must not be None"):
        pack(arguments)


def test_a_stack_with_too_many_elements_for_the_grid_is_refused():
    with pytest.raises(ValueError, match="at most 65535 elements on a GPU, got 65536"):
        Cuda().launch((), Types("float32", "float32", "float32"), (1, 1, 65536))
