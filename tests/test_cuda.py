"""The calls of kernels and of cuBLAS, recorded by a fake CuPy; and the kernels' declarations."""

from __future__ import annotations

import ctypes
import importlib
import math
import pkgutil
import re
import threading
import types
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from doraxp.backends import _cupy
from doraxp.backends._cupy import device as _cuda
from doraxp.backends._cupy.arrays import column_blocks, layout
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.parameters import (
    LEAF,
    LEAVES,
    Arguments,
    ConstCompute,
    Index,
    Int,
    Leaves,
    Number,
    Parameter,
    Product,
    parameters_of,
)
from doraxp.backends._cupy.signatures import KERNELS, Cast, OverNorm
from doraxp.backends._cupy.source import BUILDS, SOURCE, THREADS, Types

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
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("given_mode", [0, 1])
def test_gemm_gives_cublas_the_right_matrices_for_every_layout(
    blas, left_way, right_way, shape, beta, given_mode
):
    m, k, n = shape
    rng = np.random.default_rng(0)
    left = matrix(rng, (m, k), left_way, "float32")
    right = matrix(rng, (k, n), right_way, "float32")
    out = on_device(rng.standard_normal((m, n)).astype("float32"))
    expected = left.astype("float64") @ right + (0 if beta == 0 else out)
    blas.modes["pointer"] = given_mode
    Cuda().gemm(left, right, out, beta)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    ((modes, compute, algorithm),) = blas.within
    assert modes == {"pointer": 0, "math": WHOLE_SUMS}
    assert (compute, algorithm) == (68, -1)
    assert blas.modes == {"pointer": given_mode, "math": 3}


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
        Cuda().gemm(one, one, one.copy(), 1.0)
    assert blas.modes == {"pointer": 0, "math": 3}


def test_a_matrix_without_unit_stride_is_refused():
    with pytest.raises(ValueError, match=r"unit stride along one axis, got \(48, 8\)"):
        layout(np.ones((4, 12), "float32")[:, ::2])


class Null(NamedTuple):
    """A declaration of a kernel that does not exist."""

    update: ConstCompute | None
    z: Product
    size: Index
    table: Leaves
    turned: Int
    scale: Number


class Wide(Null):
    """The same kernel in float64."""


FLOAT, DOUBLE = Types("bfloat16", "float32", "float32"), Types("float32", "float64", "float64")


class Launches:
    """A fake CuPy, whose driver reads the arguments of a launch from memory at once."""

    def __init__(self, monkeypatch, during=lambda: None):
        self.calls, self.built, self.bound = [], [], []
        self.device, self.stream, self.during = 0, 7, during
        runtime = types.SimpleNamespace(
            getDevice=lambda: self.device, memGetInfo=lambda: self.bound.append(self.device)
        )
        cuda = types.SimpleNamespace(
            runtime=runtime,
            driver=types.SimpleNamespace(launchKernel=self.launch_kernel),
            get_current_stream=lambda: types.SimpleNamespace(ptr=self.stream),
        )
        modules = {"cupy": types.SimpleNamespace(RawModule=self.module, cuda=cuda)}
        monkeypatch.setattr(_cuda, "import_module", modules.__getitem__)

    def module(self, *, code, options):
        assert code == SOURCE
        self.built.append((self.device, options))
        # Each look-up of a function loads it for the current device.
        return types.SimpleNamespace(
            get_function=lambda name: types.SimpleNamespace(
                kernel=types.SimpleNamespace(ptr=(name, self.device))
            )
        )

    def launch_kernel(self, function, *numbers):
        *sizes, shared, stream, arguments, extra = numbers
        assert (shared, extra) == (0, 0)
        self.during()
        kinds = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_longlong, Table, ctypes.c_int
        kinds = (*kinds, ctypes.c_double if function[0] == "wide" else ctypes.c_float)
        pointers = (ctypes.c_void_p * len(kinds)).from_address(arguments)
        read = [kind.from_address(at) for kind, at in zip(kinds, pointers, strict=True)]
        values = [bytes(each) if isinstance(each, Table) else each.value for each in read]
        self.calls.append((function, sizes, stream, values))


Table = ctypes.c_char * (LEAVES * LEAF.size)


def at(address):
    """Return an array that CuPy would have at an address."""
    return types.SimpleNamespace(data=types.SimpleNamespace(ptr=address))


def null(**changed):
    given = {"update": None, "z": at(512), "size": 2**40, "table": b"table", "turned": True}
    return Null(**{**given, "scale": 5, **changed})


def test_a_kernel_is_built_once_and_gets_numbers_of_the_declared_types(monkeypatch):
    fake, cuda = Launches(monkeypatch), Cuda()
    for _ in range(2):
        cuda.launch(null(), FLOAT, (1, 2, 3))
    defined = "-Dstorage_t=bf16_t", "-Dproduct_t=float", "-Dcompute_t=float"
    assert fake.built == [(0, ("-std=c++17", *defined))]
    assert fake.calls[0] == fake.calls[1]
    function, sizes, stream, values = fake.calls[0]
    assert function == ("null", 0)
    assert sizes == [1, 2, 3, THREADS, 1, 1]
    assert stream == 7
    table = b"table".ljust(LEAVES * LEAF.size, b"\0")
    assert values == [None, 512, 2**40, table, 1, 5]
    cuda.launch(null(update=at(1024)), FLOAT, (1, 1, 1), threads=32)
    assert fake.calls[2][1] == [1, 1, 1, 32, 1, 1]
    assert fake.calls[2][3][0] == 1024


def test_a_number_of_the_compute_dtype_is_wide_only_in_float64(monkeypatch):
    fake = Launches(monkeypatch)
    Cuda().launch(Wide(*null(scale=0.1)), DOUBLE, (1, 1, 1))
    assert fake.calls[0][3][-1] == 0.1
    Cuda().launch(null(scale=0.1), FLOAT, (1, 1, 1))
    assert fake.calls[1][3][-1] == np.float32(0.1)


@pytest.mark.parametrize("name", KERNELS)
def test_the_arguments_of_a_launch_fit_into_the_drivers_4096_bytes(name):
    assert len(Arguments(KERNELS[name], DOUBLE)._memory) <= 4096


@pytest.mark.parametrize("scale", [1e300, -1e300])
def test_a_number_out_of_range_of_float32_becomes_infinite(monkeypatch, scale):
    fake = Launches(monkeypatch)
    Cuda().launch(null(scale=scale), FLOAT, (1, 1, 1))
    assert fake.calls[0][3] == [
        None,
        512,
        2**40,
        fake.calls[0][3][3],
        1,
        math.copysign(math.inf, scale),
    ]


def test_a_kernel_is_loaded_for_each_device_and_starts_on_the_current_stream(monkeypatch):
    fake, cuda = Launches(monkeypatch), Cuda()
    for fake.device, fake.stream in ((0, 7), (1, 8), (0, 9)):
        cuda.launch(null(), FLOAT, (1, 1, 1))
    assert [(call[0], call[2]) for call in fake.calls] == [
        (("null", 0), 7), (("null", 1), 8), (("null", 0), 9),
    ]  # fmt: skip


def test_each_thread_has_a_context_before_its_first_launch_on_a_device(monkeypatch):
    """The driver refuses a launch from a thread that no context belongs to."""
    fake, cuda = Launches(monkeypatch), Cuda()

    def launch_on_two():
        for fake.device in (0, 1, 0, 1):
            cuda.launch(null(), FLOAT, (1, 1, 1))
            assert fake.bound[-1:] != []

    for _ in range(2):
        thread = threading.Thread(target=launch_on_two)
        thread.start()
        thread.join()
    assert fake.bound == [0, 1, 0, 1]
    assert len(fake.calls) == 8


def test_a_launch_within_a_launch_leaves_its_arguments_alone(monkeypatch):
    """A finaliser or another thread may start the same kernel before the driver has read them."""
    cuda, within = Cuda(), []

    def during():
        if within:
            cuda.launch(null(z=at(within.pop())), FLOAT, (1, 1, 1))

    fake = Launches(monkeypatch, during)
    for _ in range(2):  # the second time, memory from the first launch is at hand
        within.append(1024)
        cuda.launch(null(z=at(512)), FLOAT, (1, 1, 1))
    assert [call[3][1] for call in fake.calls] == [1024, 512] * 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 1.5}, "argument size of the kernel null must be of type index_t, got 1.5"),
        ({"turned": "no"}, "argument turned of the kernel null must be of type int, got 'no'"),
        ({"turned": 2**31}, "argument turned of the kernel null must be of type int, got 21474836"),
        ({"scale": "1"}, "argument scale of the kernel null must be of type compute_t, got '1'"),
        ({"update": np.ones(1)}, r"argument update of the kernel null must be of type const compu"),
        ({"z": 3}, r"argument z of the kernel null must be of type product_t\*, got 3"),
    ],
)  # fmt: skip
def test_an_argument_of_another_type_is_named(monkeypatch, changed, message):
    fake = Launches(monkeypatch)
    with pytest.raises(TypeError, match=message):
        Cuda().launch(null(**changed), FLOAT, (1, 1, 1))
    assert fake.calls == []


def test_cupys_own_memory_error_reaches_the_caller(monkeypatch):
    """It names the bytes. The arguments are unchanged: results are new arrays."""

    def ndarray(shape, dtype):
        raise MemoryError("Out of memory allocating 48 bytes (allocated so far: 0 bytes).")

    modules = {"cupy": types.SimpleNamespace(ndarray=ndarray)}
    monkeypatch.setattr(_cuda, "import_module", modules.__getitem__)
    with pytest.raises(MemoryError, match="allocating 48 bytes"):
        Cuda().empty((3, 4), "float32")


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


SHARED = {
    "BAND", "BAND_THREADS", "BELOW", "BESIDE", "LEAF_BLOCK", "LEAVES", "MOST_BANDS", "NORM_ROWS",
    "PARTS", "PULL_BELOW", "PULL_COLUMNS", "PULL_STEP", "PULL_THREADS", "RANKS", "ROWS_AT_ONCE",
    "ROWS_OF_UPDATE", "SIDE", "STRIP", "STRIP_OF_UPDATE", "SWATH_COLUMNS", "SWATH_RANKS",
    "SWATH_STEP", "SWATH_THREADS", "TERMS", "THREADS", "TILE", "TOKEN_ROWS", "UNPACK_RUN", "WARP",
    "WARPS", "WIDE_PARTS", "WIDE_ROWS",
}  # fmt: skip
"""The constants that both Python and the source have: sizes of grids, blocks and arrays."""
SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def constants_of_the_source(types):
    """Return the constants of the source that are numbers, for arrays of these types."""
    found, text = {}, re.sub(r"//[^\n]*", "", SOURCE)
    entries = [
        [part.strip() for part in entry.split("=", 1)]
        for body in re.findall(r"^enum \{(.*?)\};", text, re.MULTILINE | re.DOTALL)
        for entry in body.split(",")
        if re.search(r"\b[A-Z_]+ = ", entry) and "::" not in entry
    ]
    for name, value in entries:
        value = re.sub(r"sizeof\((\w+)_t\)", lambda m: str(SIZES[getattr(types, m[1])]), value)
        value = re.sub(r"(.*) \? (.*) : (.*)", r"(\2) if (\1) else (\3)", value)
        found[name] = eval(value.replace("/", "//"), {}, found)
    return found


def constants_of_python():
    """Return the whole numbers that the backend's modules name, where each name has one value."""
    found = {}
    for module in pkgutil.iter_modules(_cupy.__path__):
        for name, value in vars(importlib.import_module(f"{_cupy.__name__}.{module.name}")).items():
            if name.isupper() and type(value) is int:
                assert found.setdefault(name, value) == value, f"{name} has two values"
    return found


@pytest.mark.parametrize("types", BUILDS, ids=" ".join)
def test_python_and_the_source_have_the_same_constants(types):
    of_source, of_python = constants_of_the_source(types), constants_of_python()
    assert of_source.keys() & of_python.keys() == SHARED
    if SIZES[types.product] > 2:
        of_python["PARTS"] = of_python["WIDE_PARTS"]
    shared = sorted(SHARED)
    assert [(name, of_source[name]) for name in shared] == [
        (name, of_python[name]) for name in shared
    ]
    assert of_python["MOST_GROUPS"] <= of_source["BAND_WARPS"]
    of_block, stored = of_source["PER_THREAD"] * THREADS, np.dtype(f"V{SIZES[types.storage]}")
    assert [column_blocks(of_block + more, stored) for more in (0, 1)] == [1, 2]


def test_a_missing_or_unknown_argument_names_itself_and_the_kernel():
    with pytest.raises(TypeError, match=r"OverNorm.*missing 1 required .* argument: 'per_row'"):
        OverNorm(values=1, norm=2, result=3, size=4)
    with pytest.raises(TypeError, match=r"Cast.* unexpected keyword argument 'sizes'"):
        Cast(array=1, result=2, sizes=3)


@pytest.mark.parametrize("name", ["z", "size", "scale"])
def test_none_for_an_argument_that_is_not_nullable_is_refused(name):
    arguments = null(**{name: None})
    block = Arguments(Null, Types("float32", "float32", "float32"))
    with pytest.raises(TypeError, match=f"argument {name} of the kernel null must not be None"):
        block.store(arguments)


def test_a_stack_with_too_many_elements_for_the_grid_is_refused():
    with pytest.raises(ValueError, match="at most 65535 elements on a GPU, got 65536"):
        Cuda().launch((), Types("float32", "float32", "float32"), (1, 1, 65536))
