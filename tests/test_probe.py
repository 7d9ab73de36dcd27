"""benchmarks/probe.py and gpu_kernels.py, with NumPy in CuPy's place: no GPU is needed."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import re
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cuda_host import HostCuda

import doraxp
from doraxp.backends import operations
from doraxp.backends._cupy.arrays import together
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.products import FEW
from doraxp.backends._cupy.signatures import KERNELS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = (
    "device_figures", "gpu_kernels", "probe_lines", "probe_passes", "probe_products",
    "probe_launches", "probe",
)  # fmt: skip
CODES = {0: np.float32, 14: ml_dtypes.bfloat16}


class Array(np.ndarray):
    """An array with the `data` of CuPy's: an address, and a copy that takes one."""

    @property
    def data(self):
        def copy(source, size):
            ctypes.memmove(self.ctypes.data, source.ptr, size)

        return types.SimpleNamespace(ptr=self.ctypes.data, copy_from_device_async=copy)


def at(pointer, code, shape, step):
    """Return the matrix in column order at an address, as cuBLAS sees it."""
    dtype = np.dtype(CODES[code])
    size = step * shape[1] * dtype.itemsize
    flat = np.frombuffer((ctypes.c_char * size).from_address(pointer), dtype)
    return flat.reshape(shape[1], step).T[: shape[0]]


def gemm_ex(
    handle, op_a, op_b, m, n, k, alpha, a, type_a, step_a, b, type_b, step_b, beta, c, type_c,
    step_c, compute, algorithm,
):  # fmt: skip
    """Do what cublasGemmEx does: C ← α op(A) op(B) + β C, in column order."""
    assert (handle, compute, algorithm) == (7, "32F", "any")
    left = at(a, type_a, (k, m) if op_a else (m, k), step_a).astype("f4")
    right = at(b, type_b, (n, k) if op_b else (k, n), step_b).astype("f4")
    alpha, beta = (ctypes.c_float.from_address(pointer).value for pointer in (alpha, beta))
    product = alpha * (left.T if op_a else left) @ (right.T if op_b else right)
    result = at(c, type_c, (m, n), step_c)
    result[...] = (product + (beta * result.astype("f4") if beta else 0)).astype(result.dtype)


class Stream:
    ptr = 5

    def __init__(self, **_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def synchronize(self):
        pass


def fake_cupy():
    def as_array(make):
        return lambda *args, **kwargs: make(*args, **kwargs).view(Array)

    rng = np.random.default_rng(0)
    function = types.SimpleNamespace(ptr=3)

    class Function:
        kernel = function

        def __call__(self, grid, block, arguments):
            assert all(isinstance(size, int) and size > 0 for size in (*grid, *block))

    class RawModule:
        def __init__(self, code, options):
            self.code = code

        def get_function(self, name):
            assert name in self.code or name.startswith("copy_")
            return Function()

        def compile(self):
            built.append(self.code)

    built = []
    stream = Stream()
    device = types.SimpleNamespace(
        synchronize=lambda: None, compute_capability="90", get_cublas_handle=lambda: 7
    )
    cuda = types.SimpleNamespace(
        Device=lambda *_: device,
        device=device,
        Stream=Stream,
        get_current_stream=lambda: stream,
        set_allocator=lambda allocator: built.append(allocator),
        runtime=types.SimpleNamespace(CUDA_R_16BF=14, CUDA_R_32F=0),
        driver=types.SimpleNamespace(launchKernel=launch_kernel),
    )
    module = types.ModuleType("cupy")
    pool = types.SimpleNamespace(free_all_blocks=lambda: None)
    vars(module).update(
        built=built,
        cuda=cuda,
        RawModule=RawModule,
        ndarray=type("ndarray", (), {}),  # array-api-compat asks whether an array is one
        float32=np.float32,
        matmul=np.matmul,
        empty=as_array(np.empty),
        empty_like=as_array(np.empty_like),
        get_default_memory_pool=lambda: pool,
        random=types.SimpleNamespace(
            standard_normal=lambda shape, dtype: rng.standard_normal(shape, dtype).view(Array)
        ),
    )
    return module


def launch_kernel(function, *sizes):
    *grid_and_block, shared, stream, packed, extra = sizes
    assert (function, grid_and_block) == (3, [132, 1, 1, 128, 1, 1])
    assert (shared, stream, extra) == (0, 5, 0)
    pointers = [ctypes.c_uint64.from_address(packed + 8 * i).value for i in range(2)]
    assert ctypes.c_int32.from_address(pointers[1]).value == 132 * 128


@pytest.fixture
def scripts(monkeypatch):
    """Return the scripts' modules by name; each call takes 2 ms, and its kernels 3 µs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    fake = fake_cupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    libs = types.ModuleType("cupy_backends.cuda.libs")
    libs.cublas = types.SimpleNamespace(
        gemmEx=gemm_ex, setMathMode=lambda *_: None, CUBLAS_COMPUTE_32F="32F",
        CUBLAS_GEMM_DEFAULT="any",
    )  # fmt: skip
    for name in ("cupy_backends", "cupy_backends.cuda"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", libs)
    monkeypatch.setattr("doraxp.bench.gpu_seconds", lambda _, call, repeats: (call(), 2e-3)[1])
    monkeypatch.setattr("doraxp.bench.gpu_host_seconds", lambda _, call: (call(), 5e-3)[1])
    modules = types.SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})

    def profiled(call, repeats=5):
        call()
        return [modules.gpu_kernels.Kernel(name, 3.0, 1.0) for name in ("outputs", "gemm")]

    monkeypatch.setattr(modules.gpu_kernels, "profiled", profiled)
    monkeypatch.setattr(modules.probe_lines, "profiled", profiled)
    yield types.SimpleNamespace(**vars(modules), cupy=fake)
    for name in NAMES:
        sys.modules.pop(name, None)


def figures(folder):
    return [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]


def test_a_variant_is_printed_and_kept_with_its_ratio(scripts, tmp_path, monkeypatch, capsys):
    probe = scripts.probe_lines.Probe(tmp_path)
    seconds = iter([9, 4e-6, 2e-6, 3e-6, 9, 16e-6, 12e-6, 1])
    monkeypatch.setattr("doraxp.bench.gpu_seconds", lambda *_: next(seconds))
    probe.device("first", "4×4", lambda: lambda: None)
    probe.device("second", "4×4", lambda: lambda: None, over="first", each=2)
    first, second = figures(tmp_path)
    assert (first["microseconds"], first["ratio"]) == (pytest.approx(3), None)
    assert second["part"] == "probe"
    assert (second["microseconds"], second["ratio"]) == (pytest.approx(8), pytest.approx(8 / 3))
    assert "2.67 ÷ first" in capsys.readouterr().out


def test_sets_of_arrays_are_used_in_turn_where_the_cache_could_hold_one(scripts, tmp_path):
    used = []

    def make():
        number = len(made)
        made.append(number)
        return lambda: used.append(number)

    made = []
    scripts.probe_lines.Probe(tmp_path).device("name", "", make, size=1 << 27)
    assert made == [0, 1]
    assert used[:4] == [0, 1, 0, 1]


def test_a_variant_that_fails_does_not_stop_the_others(scripts, tmp_path, capsys):
    probe = scripts.probe_lines.Probe(tmp_path)

    def fail():
        raise RuntimeError("no memory\nmore")

    probe.device("first", "", lambda: fail)
    probe.host("second", lambda: fail)
    probe.kernel("third", "", lambda: lambda: None, of="absent")
    probe.host("fourth", lambda: lambda: None)
    reasons = [figure.get("reason") for figure in figures(tmp_path)]
    assert reasons[:2] == ["RuntimeError: no memory"] * 2
    assert "no kernel absent" in reasons[2]
    assert reasons[3] is None
    assert capsys.readouterr().out.count("could not run: ") == 3


def test_a_kernel_is_found_by_the_beginning_of_its_name(scripts, tmp_path):
    scripts.probe_lines.Probe(tmp_path).kernel("name", "", lambda: lambda: None, of="out")
    (figure,) = figures(tmp_path)
    assert figure["microseconds"] == 3
    assert figure["kernels"] == {"outputs": 3}


@pytest.mark.parametrize("turned", [(), ("left",), ("right",), ("left", "right")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_probes_call_of_cublas_names_its_matrices(scripts, turned, dtype, beta):
    def draw(name, rows, columns):
        if name in turned:
            return scripts.gpu_kernels.draw(columns, rows, dtype="bfloat16").T
        return scripts.gpu_kernels.draw(rows, columns, dtype="bfloat16")

    left, right = draw("left", 5, 3), draw("right", 3, 7)
    out = scripts.gpu_kernels.draw(5, 7, dtype=dtype)
    product, before = (np.asarray(a).astype("f4") for a in (left, out))
    expected = product @ np.asarray(right).astype("f4") + beta * before
    scripts.probe_products.cublas.cache_clear()
    scripts.probe_products.gemm(left, right, out, beta)
    np.testing.assert_allclose(
        np.asarray(out).astype("f4"), expected, atol=2e-5 if dtype == "float32" else 0.1
    )


def test_update_first_and_update_after_make_the_same_sum(scripts):
    orders = scripts.probe_products.Orders.make(5, 6, 7, 4, "float32", True)
    found = []
    for act in (orders.update_first, orders.update_after):
        act()
        found.append(np.array(orders.out))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.lanes("cuda-host")
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_order_that_is_built_launches_the_kernel_and_adds_the_product(
    backend, emulated, scripts, turned, dtype
):
    orders = scripts.probe_products.Orders.make(40, 48, 96, 4, dtype, turned)
    emulated.cuda.launched.clear()
    actual = backend.run(orders.by_backend)
    assert emulated.cuda.launched == ["update", "gemm"]
    assert str(actual.dtype) == dtype
    factor = orders.wide_factor.T if turned else orders.wide_factor
    product = orders.left.astype("f8") @ orders.right.astype("f8")
    expected = product + orders.wide_low.astype("f8") @ factor.astype("f8")
    bound = {"bfloat16": 2**-7, "float32": 1e-6}[dtype] * np.max(np.abs(expected))
    np.testing.assert_allclose(backend.numpy(actual).astype("f8"), expected, rtol=0, atol=bound)


def test_all_variants_are_measured_or_say_why_not(scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scripts.probe_lines, "ROTATED", 1)
    for module in (scripts.probe_passes, scripts.probe_products):
        monkeypatch.setattr(module, "SHAPES", ((24, 16, 4), (16, 32, 2)))
        monkeypatch.setattr(module, "TOKENS", 8)
    monkeypatch.setattr(scripts.probe_products, "SKINNY", ((8, 16, 4),))
    monkeypatch.setattr(sys, "argv", ["probe.py", "variants", str(tmp_path)])
    scripts.probe.main()
    found = figures(tmp_path)
    needs_gpu = ("backend's kernel", "by own kernels", "over_norm", "Cuda.gemm", "cuda-core")
    failed = [one for one in found if "reason" in one]
    assert [one for one in failed if not any(part in one["name"] for part in needs_gpu)] == []
    names = {one["name"] for one in found}
    assert {"merge, n known", "copy, 16 bytes a thread", "outputs, tokens of a thread: 16"} <= names
    assert {"z in bfloat16: update first", "dx in float32: product, beta 1"} <= names
    assert {"z in bfloat16: C by the backend's kernel, then product"} <= names
    assert {"M Fᵀ by cuBLAS, 3 parts", "Fᵀ M by own kernels", "host: step"} <= names
    assert {"host: launch by driver.launchKernel", "launch by RawKernel"} <= names
    assert scripts.probe_passes.importlib.import_module("doraxp.backends._cupy.passes").RUN == 4


def test_the_machine_is_described_with_its_two_ceilings(scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("doraxp.bench.device", lambda: {"name": "NVIDIA Fake", "driver": "580.1"})
    monkeypatch.setattr(scripts.probe, "LARGE", (64, 8))
    monkeypatch.setattr(scripts.probe, "build_all", lambda: None)
    scripts.probe.machine(tmp_path)
    machine, ceilings = figures(tmp_path)
    assert machine["device"]["name"] == "NVIDIA Fake"
    assert machine["versions"]["numpy"] == np.__version__
    assert ceilings["copy_bytes_per_second"] == pytest.approx(2 * 4 * 64 / 2e-3)
    assert ceilings["bfloat16_operations_per_second"] == pytest.approx(2 * 8**3 / 2e-3)
    assert "NVIDIA Fake, driver 580.1, doraxp " in capsys.readouterr().out


def test_kernels_are_built_as_the_backend_builds_them(scripts):
    from doraxp.backends._cupy.source import BUILDS, SOURCE

    scripts.probe.build(BUILDS[0].options())
    assert scripts.cupy.built == [SOURCE]


def test_the_sums_of_kernels_of_each_call_are_kept(scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        scripts.gpu_kernels, "SHAPES", [(24, 16, 4, "bfloat16"), (8, 6, 2, "float32")]
    )
    monkeypatch.setattr(scripts.gpu_kernels, "TOKENS", (5,))
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", "--folder", str(tmp_path)])
    scripts.gpu_kernels.main()
    found = figures(tmp_path)
    of_step = [(one["call"], one["case"]["dtype"]) for one in found if "step" in one["call"]]
    assert of_step == [
        ("step", "bfloat16"), ("step, exact products", "bfloat16"), ("step", "float32"),
        ("step, TF32", "float32"),
    ]  # fmt: skip
    sums = {(one["microseconds"], one["launches"]) for one in found}
    assert sums == {(6.0, 2.0)}
    (token,) = [one for one in found if one["call"] == "forward" and one["case"]["out"] == 24]
    assert token["case"] == {"out": 24, "inner": 16, "rank": 4, "dtype": "bfloat16", "tokens": 1}
    assert {"norm", "merge", "merge, from nothing", "copy of W", "adamw"} <= {
        o["call"] for o in found
    }


def test_calls_for_a_tool_are_made_once_without_a_memory_pool(scripts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", "--calls", "small"])
    monkeypatch.setattr(scripts.gpu_kernels, "profiled", lambda _: pytest.fail("profiled"))
    own = types.SimpleNamespace(cuda=Cuda())
    monkeypatch.setattr(scripts.gpu_kernels, "operations", lambda x: own)
    scripts.gpu_kernels.main()
    assert scripts.cupy.built == [None]
    names = [layer.name for layer in scripts.gpu_kernels.SMALL]
    assert capsys.readouterr().out == "".join(f"All calls were made: {name}\n" for name in names)


def test_layers_for_which_no_time_is_left_are_named(scripts, tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 0.0, 30.0, 41.0])
    monkeypatch.setattr(scripts.gpu_kernels.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(scripts.gpu_kernels, "call_once", lambda _: None)
    layers = scripts.gpu_kernels.SMALL[:4]
    names = f"calls of layers: {layers[2].name}, {layers[3].name}"
    with pytest.raises(SystemExit, match=f"No time was left for the {names}"):
        scripts.gpu_kernels.call_all(layers, 40, tmp_path)
    assert figures(tmp_path) == [{"part": "skipped", "name": names, "reason": "no time was left"}]
    assert capsys.readouterr().out.count("All calls were made: ") == 2


def test_for_a_tool_no_two_arrays_share_an_allocation(scripts, monkeypatch):
    own = types.SimpleNamespace(cuda=Cuda())
    monkeypatch.setattr(scripts.cupy, "empty", np.empty, raising=False)
    monkeypatch.setattr(scripts.gpu_kernels, "operations", lambda x: own)
    wanted = together(((3,), "float32"), None, ((2, 0), "int32"), ((5, 2), ml_dtypes.bfloat16))
    kept = Cuda.empties
    with scripts.gpu_kernels.separate_arrays():
        first, absent, empty, last = Cuda.empties(HostCuda(), wanted)
    assert Cuda.empties is kept
    assert absent is None
    assert [(each.shape, str(each.dtype)) for each in (first, empty, last)] == [
        ((3,), "float32"), ((2, 0), "int32"), ((5, 2), "bfloat16")
    ]  # fmt: skip
    assert all(each.base.nbytes == each.nbytes for each in (first, empty, last))


@pytest.fixture
def emulated(backend, scripts):
    """Return gpu_kernels.py with arrays of the emulated device, and that device."""
    draw = scripts.cupy.random.standard_normal
    scripts.cupy.random.standard_normal = lambda *args, **how: backend.asarray(draw(*args, **how))
    scripts.cupy.empty = lambda *args: backend.asarray(np.empty(*args))
    cuda = operations(weight=backend.asarray(np.ones((1, 1), "f4"))).cuda
    return types.SimpleNamespace(**vars(scripts.gpu_kernels), cuda=cuda)


@pytest.mark.lanes("cuda-host")
@pytest.mark.dtypes("bfloat16", "float16", "float32", "float64")
def test_the_small_layers_of_bfloat16_and_float64_launch_every_kernel(backend, dtype, emulated):
    for layer in emulated.SMALL:
        if layer.dtype == dtype:
            backend.run(emulated.call_once, layer)
    of_float64 = {"merge_wide"}
    of_packed = {"unpack"}  # of weights in 4 bits, which tests/test_row_weight.py launches
    expected = {"bfloat16": set(KERNELS) - of_float64 - of_packed, "float64": of_float64}
    assert expected.get(dtype, set()) <= set(emulated.cuda.launched)


@pytest.mark.lanes("cuda-host")
@pytest.mark.dtypes("bfloat16", "float16", "float32", "float64")
def test_the_small_layers_are_as_their_fields_say(backend, dtype, emulated):
    layers = [layer for layer in emulated.SMALL if layer.dtype == dtype]
    assert layers
    for layer in layers:
        given, x, dy, bias = emulated.made(layer)
        weight, adapter, _ = given
        assert x.shape == (*layer.stack, layer.tokens, layer.inner)
        assert str(x.dtype) == str(weight.dtype) == layer.dtype
        assert str(dy.dtype) == (layer.dy or layer.dtype)
        assert weight.flags.c_contiguous != layer.by_columns
        aligned = {array.ctypes.data % 16 == 0 for array in (weight, *adapter, x, dy, bias)}
        assert aligned == {not layer.shifted}, layer.name
        suspect = backend.numpy(doraxp.prepare(*given).direction.suspects.suspect)
        rows = np.arange(layer.out) == (3 if layer.suspect else -1)
        np.testing.assert_array_equal(suspect, np.broadcast_to(rows, suspect.shape))


@pytest.mark.lanes("cuda-host")
def test_ncu_counts_each_pass_over_large_arrays(backend, emulated):
    """It counts the first launches of the kernels that device.sh names."""
    script = (BENCHMARKS / "device.sh").read_text("utf-8")
    (passes,) = re.findall(r"^passes='(.*)'$", script, re.MULTILINE)
    (count,) = re.findall(r"--launch-count (\d+)", script)
    names = set(passes.split("|"))
    assert names <= set(KERNELS)
    cuda, (layer,) = emulated.cuda, emulated.LARGE
    assert layer.tokens > FEW
    layer = layer._replace(out=96, inner=128, tokens=FEW + 1)
    backend.run(emulated.call_once, layer)
    launched = [name for name in cuda.launched if name in names]
    assert len(launched) <= int(count)
    assert set(launched) == names
    given, x, dy, _ = emulated.made(layer)
    prepared = doraxp.prepare(*given)
    cuda.launched.clear()
    cuda.moved.clear()
    backend.run(emulated.step, x, dy, prepared, contextlib.nullcontext)
    large = {name for name, moved in zip(cuda.launched, cuda.moved, strict=True) if moved > 0}
    assert large - {"gemm"} | {"gradient_a"} <= names  # the partial sums of dA are float32


def test_kernels_are_those_of_one_call_and_the_longest_is_first(scripts):
    def event(name, total, count):
        return types.SimpleNamespace(key=name, device_time_total=total, count=count)

    events = [event("a", 10, 5), event("cudaLaunchKernel", 0, 20), event("b", 30, 10)]
    kernels = scripts.gpu_kernels.kernels_of(events, 5)
    assert kernels == [("b", 6, 2), ("a", 2, 1)]


@pytest.mark.parametrize("capability", [80, 90])
def test_the_probes_own_kernels_compile(cupy, monkeypatch, capability):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    nvrtc = cupy.cuda.nvrtc
    for source in (
        importlib.import_module("probe_passes").COPIES,
        importlib.import_module("probe_launches").TINY,
    ):
        program = nvrtc.createProgram(source, "probe.cu", [], [])
        options = ["-std=c++17", f"--gpu-architecture=compute_{capability}"]
        nvrtc.compileProgram(program, options)
        assert b".entry" in nvrtc.getPTX(program)
