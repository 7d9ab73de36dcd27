"""Dispatch, shapes, dtypes and devices with CuPy's own arrays, on memory that does not exist.

No device is needed: `nox -s cuda-compile` runs this file with CuPy installed and no driver.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from doraxp import (
    AdamWState,
    Adapter,
    Config,
    adamw_step,
    backends,
    backward,
    forward,
    merge,
    prepare,
)
from doraxp.backends import reduced_precision
from doraxp.backends._cupy.arrays import in_c_order, together
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.operations import CupyOperations
from doraxp.backends._cupy.parameters import kernel_name
from doraxp.backends._cupy.source import THREADS
from doraxp.bench._device import HOLD

DTYPES = ("float16", ml_dtypes.bfloat16, "float32", "float64")


@pytest.fixture
def array(cupy, monkeypatch):
    monkeypatch.setattr(Cuda, "device", lambda _: 0)

    def make(*shape, dtype="float32", device=0):
        dtype = np.dtype(dtype)
        size = max(1, int(np.prod(shape)) * dtype.itemsize)
        memory = cupy.cuda.UnownedMemory(1 << 20, size, None, device)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))

    return make


class Recorder:
    """A device that records launches and products instead of running them."""

    device = staticmethod(lambda: 0)

    def __init__(self, array):
        self.array, self.calls = array, []

    def empty(self, shape, dtype):
        return self.array(*shape, dtype=dtype)

    def empties(self, together):
        return [each and self.empty(each.shape, each.kind) for each in together.places]

    addresses, in_c_order = Cuda.addresses, Cuda.in_c_order

    def launch(self, arguments, types, grid, *, threads=THREADS):
        assert all(0 < size < 2**16 for size in grid)
        self.calls.append((kernel_name(type(arguments)), types))

    def gemm(self, left, right, out, beta, *, tf32=False):
        assert left.shape[1] == right.shape[0]
        assert out.shape == (left.shape[0], right.shape[1])
        self.calls.append(("tf32" if tf32 else "gemm", str(left.dtype), str(out.dtype)))


@pytest.fixture
def ops(array):
    return CupyOperations(backends.operations(x=array(1)).xp, Recorder(array))


def test_cupy_arrays_select_the_cupy_operations(array):
    assert type(backends.operations(x=array(3, 4))) is CupyOperations


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "magnitude", "bias"])
def test_an_array_on_another_device_is_named(array, name):
    given = {
        "x": (3, 6), "weight": (7, 6), "lora_a": (2, 6), "lora_b": (7, 2), "magnitude": (7,),
        "bias": (7,),
    }  # fmt: skip
    arrays = {key: array(*shape, device=int(key == name)) for key, shape in given.items()}
    x, weight, *leaves, bias = arrays.values()
    with pytest.raises(ValueError, match=rf"one device: .*{name}( is)? on <CUDA Device \d>"):
        forward(x, weight, Adapter(*leaves), Config(2), bias=bias)


def test_an_array_off_the_current_device_is_refused_with_the_remedy(array):
    message = r"weight is on CUDA device 1, but the current one is 0: use `with cupy.cuda.Device\(1"
    with pytest.raises(ValueError, match=message):
        backends.operations(weight=array(7, 6, device=1))


def test_a_numpy_array_among_cupy_arrays_is_named(array):
    leaves = array(2, 6), np.ones((7, 2), "float32"), array(7)
    with pytest.raises(TypeError, match=r"weight is of cupy, lora_b of numpy"):
        prepare(array(7, 6), Adapter(*leaves), Config(2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_arrays_need_no_search_for_their_library(array, monkeypatch, dtype):
    arrays = {"x": array(3, 4, dtype=dtype), "weight": array(2, 4), "bias": array(2)}
    monkeypatch.setattr(backends._boundary, "_operations_of_any", None)
    assert type(backends.operations(**arrays)) is CupyOperations
    assert backends.operations(**arrays) is backends.operations(x=arrays["x"])


@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool", "uint8"])
def test_an_unsupported_dtype_is_named(array, dtype):
    with pytest.raises(TypeError, match=f"weight must be of dtype .*, got {dtype}"):
        backends.operations(weight=array(7, 6, dtype=dtype))


@pytest.fixture
def recorded(ops, monkeypatch):
    """Public calls use the recording operations. Any kernel of CuPy's own would need a device."""
    monkeypatch.setattr("doraxp.backends._boundary._operations_of", lambda _: ops)
    monkeypatch.setattr("doraxp.backends._boundary._cupy_operations", lambda: ops)
    return ops.cuda.calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stack", [(), (3,)])
def test_a_step_starts_no_kernel_of_cupys_own(array, recorded, dtype, stack):
    """Nor does a norm, a merge or one token. Checks the shapes and dtypes of all results."""
    wide = "float64" if dtype == "float64" else "float32"
    weight, x, dy, one = (
        array(*stack, *shape, dtype=dtype) for shape in ((7, 40), (5, 40), (5, 7), (1, 40))
    )
    shapes = (2, 40), (7, 2), (7,)
    adapter = Adapter(*(array(*stack, *shape, dtype=wide) for shape in shapes))
    bias, config = array(*stack, 7, dtype=wide), Config(2)
    previous = prepare(weight, adapter, config)
    recorded.clear()
    y, cache = forward(x, weight, adapter, config, bias=bias, previous=previous)
    gradients = backward(dy, cache)
    assert (cache.z.shape, cache.z.dtype) == ((*stack, 5, 7), np.dtype(dtype))
    for actual, desired in (y, dy), (gradients.x, x):
        assert (actual.shape, actual.dtype) == (desired.shape, np.dtype(dtype))
    for actual, desired in zip(gradients.adapter, adapter, strict=True):
        assert (actual.shape, actual.dtype) == (desired.shape, np.dtype(wide))
    merged = merge(weight, adapter, config, prepared=cache.prepared)
    assert (merged.shape, merged.dtype) == (weight.shape, np.dtype(dtype))
    y, _ = forward(one, weight, adapter, config, bias=bias, prepared=cache.prepared)
    assert (y.shape, y.dtype) == ((*stack, 1, 7), np.dtype(dtype))


@pytest.fixture
def pool(cupy):
    """Count allocations; each gets memory that does not exist, aligned as CuPy's pool is."""
    sizes = []

    def allocate(size):
        sizes.append(size)
        memory = cupy.cuda.UnownedMemory(len(sizes) << 20, size, None, 0)
        return cupy.cuda.MemoryPointer(memory, 0)

    with cupy.cuda.using_allocator(allocate):
        yield sizes


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_share_one_allocation_and_are_aligned_in_it(pool, dtype):
    shapes = (5, 7), (300,), (0, 4), (), (129,)
    dtypes = np.dtype(dtype), np.float32, np.dtype("int32"), np.dtype("bool"), np.dtype(dtype)
    *arrays, absent = Cuda().empties(together(*zip(shapes, dtypes, strict=True), None))
    assert absent is None
    assert [array.shape for array in arrays] == [*shapes]
    assert [array.dtype for array in arrays] == [*map(np.dtype, dtypes)]
    assert all(array.flags.c_contiguous for array in arrays)
    ends = [array.data.ptr + array.nbytes for array in arrays]
    starts = [array.data.ptr for array in arrays]
    assert all(start % 512 == 0 for start in starts)
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    (size,) = pool
    assert ends[-1] <= starts[0] + size


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype("float32"), np.float64])
def test_an_empty_array_has_the_shape_and_dtype(cupy, pool, dtype):
    array = Cuda().empty([3, 4], dtype)
    assert type(array) is cupy.ndarray
    assert (array.shape, array.dtype) == ((3, 4), np.dtype(dtype))
    assert pool == [12 * np.dtype(dtype).itemsize]


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (1, 4), (3, 1), (0, 4), (2, 3, 4)])
def test_the_order_of_an_array_is_the_one_of_its_flags(array, shape):
    """CuPy's own attribute has no documentation. It must mean the same as `flags`."""
    whole = array(*shape)
    for view in (whole, whole.T, whole[..., None], whole[None][..., ::2]):
        assert view._c_contiguous == view.flags.c_contiguous
        assert view._f_contiguous == view.flags.f_contiguous
        assert in_c_order(view) == view.flags.c_contiguous


@pytest.mark.parametrize("donate", [False, True])
def test_adamw_of_24_leaves_takes_one_launch_and_two_allocations(
    array, ops, pool, monkeypatch, donate
):
    monkeypatch.setattr(backends._boundary, "_cupy_operations", lambda: ops)
    monkeypatch.setattr(Recorder, "empties", Cuda.empties)
    monkeypatch.setattr(Recorder, "cupy", Cuda.cupy, raising=False)
    params, grads, mu, nu = (
        {str(i): Adapter(array(2, 6), array(7, 2), array(7)) for i in range(8)} for _ in range(4)
    )
    state = AdamWState(1, mu, nu)
    stepped, after = adamw_step(params, grads, state, learning_rate=0.1, donate=donate)
    assert [name for name, _ in ops.cuda.calls] == ["adamw"]
    assert len(pool) == (0 if donate else 2)
    assert (stepped is params) == donate
    for tree in (stepped, after.mu, after.nu):
        assert [leaf.shape for leaf in tree["7"]] == [(2, 6), (7, 2), (7,)]


def test_tf32_is_used_only_inside_reduced_precision(ops, array):
    left, right = array(5, 6), array(6, 7)
    ops.product(left, right)

    def fail():
        with reduced_precision():
            ops.product(left, right)
            raise RuntimeError("inside the block")

    with pytest.raises(RuntimeError, match="inside the block"):
        fail()
    ops.product(left, right)
    assert [name for name, *_ in ops.cuda.calls] == ["gemm", "tf32", "gemm"]


def test_the_kernel_that_holds_the_queue_compiles(cupy):
    """`doraxp bench` launches it; `benchmarks/kernels.py` compiles the package's own."""
    nvrtc = cupy.cuda.nvrtc
    program = nvrtc.createProgram(HOLD, "hold.cu", [], [])
    nvrtc.compileProgram(program, ["--gpu-architecture=compute_80"])
    assert b"globaltimer" in nvrtc.getPTX(program)
