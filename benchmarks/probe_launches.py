"""The time of the host for each kind of call, and ways to launch a row of small kernels."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import cupy
import numpy as np
from gpu_kernels import adamw, draw, drawn_layer, step
from probe_lines import Call, Probe
from probe_products import gemm

import doraxp
from doraxp.backends import operations

CHAIN = 14
"""Launches in a row, as a step may have."""
BLOCKS, THREADS = 132, 128
TINY = r"""
extern "C" __global__ void tiny(float* numbers, int size) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) numbers[i] += 1;
}
"""


def hosts(probe: Probe) -> None:
    """The time that the host needs for each kind of call."""
    layer = drawn_layer(256, 256, 16, "bfloat16")
    weight, adapter, _ = layer
    prepared = doraxp.prepare(*layer)
    x, dy, one = (draw(rows, 256, dtype="bfloat16") for rows in (64, 64, 1))
    _, cache = doraxp.forward(x, *layer, prepared=prepared)
    layers = {str(number): adapter for number in range(8)}
    state = doraxp.adamw_init(layers)
    named = dict(zip(("lora_a", "lora_b", "magnitude"), adapter, strict=True))
    ops = operations(x=x)
    z, norm = draw(64, 256), draw(256)

    def times(count: int, call: Call) -> Callable[[], Call]:
        def repeated() -> None:
            for _ in range(count):
                call()

        return lambda: repeated

    many = 20
    for name, call in (
        ("cupy.empty", partial(cupy.empty, (64, 256), np.float32)),
        ("operations() of 5 arrays", partial(operations, x=x, weight=weight, **named)),
        ("empty and a launch, by over_norm", lambda: ops.passes.over_norm(norm, norm)),
        ("Cuda.gemm", lambda: ops.cuda.gemm(x, weight.T, z, 0.0)),
        ("cublasGemmEx", partial(gemm, x, weight.T, z, 0.0)),
        ("cupy.matmul", partial(cupy.matmul, x, weight.T)),
    ):
        probe.host(name, times(many, call), each=many)
    step_ = partial(step, x, dy, prepared, contextlib.nullcontext)
    for name, call in (
        ("norm", partial(doraxp.prepare, *layer, previous=prepared)),
        ("forward, norm reused", partial(doraxp.forward, x, *layer, prepared=prepared)),
        ("backward", partial(doraxp.backward, dy, cache)),
        ("step", step_),
        ("one token", partial(doraxp.forward, one, *layer, prepared=prepared)),
        ("merge, n known", partial(doraxp.merge, *layer, prepared=prepared)),
        ("AdamW of 24 leaves", partial(adamw, layers, state)),
    ):
        probe.host(name, times(1, call))


def launches(probe: Probe) -> None:
    """A row of small kernels, by each way to launch: time of one on the host and on the device."""
    numbers = draw(BLOCKS * THREADS)
    function = cupy.RawModule(code=TINY, options=("-std=c++17",)).get_function("tiny")
    ways = {
        "RawKernel": partial(by_raw_kernel, function, numbers),
        "driver.launchKernel": partial(by_driver, function, numbers),
        "cuda-core": partial(by_cuda_core, numbers),
        "cuda-core, dependent launch": partial(
            by_cuda_core, numbers, programmatic_stream_serialization=True
        ),
        "cuda-core, clusters of 2": partial(by_cuda_core, numbers, cluster=2),
    }
    reference = "launch by RawKernel"
    cupy.cuda.Device().synchronize()  # the other stream does not wait for the numbers
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for name, make in ways.items():

            def row(make: Callable[[], Call] = make) -> Call:
                launch = make()

                def launched() -> None:
                    for _ in range(CHAIN):
                        launch()

                return launched

            probe.host(f"launch by {name}", row, each=CHAIN)
            title = f"launch by {name}"
            probe.device(title, f"row of {CHAIN}", row, over=reference, each=CHAIN)
        stream.synchronize()


def by_raw_kernel(function: Any, numbers: Any) -> Call:
    """Return a launch by CuPy's RawKernel."""
    return partial(function, (BLOCKS,), (THREADS,), (numbers, np.int32(numbers.size)))


def by_driver(function: Any, numbers: Any) -> Call:
    """Return a launch by the driver's function, with arguments that are packed once."""
    pointer, size = np.array([numbers.data.ptr], "u8"), np.array([numbers.size], "i4")
    packed = np.array([pointer.ctypes.data, size.ctypes.data], "u8")
    handle, stream = function.kernel.ptr, cupy.cuda.get_current_stream().ptr
    launch = cupy.cuda.driver.launchKernel

    def call(kept: Any = (pointer, size, packed)) -> None:
        launch(handle, BLOCKS, 1, 1, THREADS, 1, 1, 0, stream, kept[2].ctypes.data, 0)

    return call


def by_cuda_core(numbers: Any, **options: Any) -> Call:
    """Return a launch by cuda-core, with options of its `LaunchConfig`."""
    try:
        core = importlib.import_module("cuda.core")
        core.LaunchConfig  # noqa: B018 - an older version has it elsewhere
    except (ImportError, AttributeError):
        core = importlib.import_module("cuda.core.experimental")
    device = core.Device()
    device.set_current()
    capability = cupy.cuda.Device().compute_capability
    built = core.ProgramOptions(std="c++17", arch=f"sm_{capability}")
    kernel = core.Program(TINY, "c++", built).compile("cubin").get_kernel("tiny")
    # With clusters the grid counts these.
    grid = BLOCKS // options.get("cluster", 1)
    config = core.LaunchConfig(grid=grid, block=THREADS, **options)
    pointer, size = int(numbers.data.ptr), np.int32(numbers.size)
    return partial(core.launch, CurrentStream(), config, kernel, pointer, size)


class CurrentStream:
    """CuPy's current stream, as cuda-core takes streams of other libraries."""

    def __init__(self) -> None:
        self.pointer = cupy.cuda.get_current_stream().ptr

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the version of the protocol, and the stream."""
        return 0, self.pointer
