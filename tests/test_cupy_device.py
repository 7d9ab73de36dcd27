"""Tests that need a GPU: no call waits for the queue, and the caller chooses stream and device."""

from __future__ import annotations

import contextlib
import threading
import time

import ml_dtypes
import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config
from doraxp.backends import exact_products, reduced_precision

HOLD = 'extern "C" __global__ void hold(volatile int* released) { while (*released == 0) {} }'
PATIENCE = 6.0  # seconds, after which the queue runs on and the test fails
MODES = pytest.mark.parametrize(
    "mode",
    [contextlib.nullcontext, exact_products, reduced_precision],
    ids=["default", "exact products", "reduced precision"],
)
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@pytest.fixture
def gpu(cupy):
    if not cupy.cuda.is_available():
        pytest.fail("no NVIDIA device was found", pytrace=False)
    return cupy


@pytest.fixture
def held(gpu):
    """Return a function that calls another and returns whether it waits for a blocked queue."""
    import cupyx

    hold = gpu.RawKernel(HOLD, "hold")

    def waits(function, patience=PATIENCE):
        for _ in range(2):  # compiles, and fills the memory pool
            function()
        gpu.cuda.get_current_stream().synchronize()
        released = cupyx.empty_pinned((1,), np.int32)
        released[0] = 0
        timer = threading.Timer(patience, released.fill, (1,))
        timer.start()
        hold((1,), (1,), (np.uintp(released.ctypes.data),))
        began = time.monotonic()
        result = function()
        waited = time.monotonic() - began > patience / 2
        timer.cancel()
        released[0] = 1
        gpu.cuda.get_current_stream().synchronize()
        del result
        return waited

    return waits


@pytest.fixture(params=DTYPES)
def layer(request, gpu):
    rng = np.random.default_rng(0)

    def draw(*shape, dtype="float32"):
        return gpu.asarray(rng.standard_normal(shape).astype(dtype))

    dtype = DTYPES[request.param]
    weight, x, dy = (draw(*s, dtype=dtype) for s in ((96, 128), (40, 128), (40, 96)))
    return weight, Adapter(draw(8, 128), draw(96, 8), draw(96)), x, dy


def step(weight, adapter, x, dy, config):
    y, cache = doraxp.forward(x, weight, adapter, config, bias=adapter.magnitude)
    gradients = doraxp.backward(dy, cache, train_base=True)
    params = {"layer": adapter}
    state = doraxp.adamw_init(params)
    grads = {"layer": gradients.adapter}
    stepped, _ = doraxp.adamw_step(params, grads, state, learning_rate=1e-3)
    merged = doraxp.merge(weight, adapter, config)
    return y, gradients.x, *gradients.adapter, *stepped["layer"], merged


def test_the_fixture_notices_a_hidden_read(gpu, held):
    one = gpu.ones(3)
    assert held(lambda: float(one[0]), patience=2.0)
    assert not held(lambda: one + 1)


@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
@MODES
def test_forward_backward_step_and_merge_do_not_wait_for_the_queue(
    held, layer, form, norm_gradient, mode
):
    config = Config(8, form=form, norm_gradient=norm_gradient)
    with mode():
        assert not held(lambda: step(*layer, config))


@MODES
def test_work_goes_to_the_callers_stream(gpu, layer, mode):
    config = Config(8)
    with mode():
        expected = [array.get() for array in step(*layer, config)]
    gpu.cuda.get_current_stream().synchronize()
    with gpu.cuda.Stream(non_blocking=True) as stream, mode():
        actual = step(*layer, config)
        stream.synchronize()
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(one.get(), other)


def test_work_goes_to_the_callers_device(gpu, layer):
    """Runs on each device of the machine."""
    config = Config(8)
    expected = [array.get() for array in step(*layer, config)]
    weight, adapter, x, dy = layer
    for number in range(gpu.cuda.runtime.getDeviceCount()):
        with gpu.cuda.Device(number):
            there = [gpu.asarray(array.get()) for array in (weight, *adapter, x, dy)]
            actual = step(there[0], Adapter(*there[1:4]), *there[4:], config)
            for one, other in zip(actual, expected, strict=True):
                assert one.device.id == number
                np.testing.assert_array_equal(one.get(), other)


def test_a_memory_error_names_the_bytes_and_leaves_the_arguments_unchanged(gpu, layer):
    weight, adapter, *_ = layer
    before = weight.get()
    pool = gpu.get_default_memory_pool()
    limit = pool.get_limit()
    pool.free_all_blocks()
    try:
        pool.set_limit(size=pool.used_bytes() + 1024)
        with pytest.raises(MemoryError, match=r"allocating [\d,]+ bytes"):
            doraxp.merge(weight, adapter, Config(8))
    finally:
        pool.set_limit(size=limit)
    np.testing.assert_array_equal(weight.get(), before)
    assert doraxp.merge(weight, adapter, Config(8)).shape == weight.shape
