"""Variants of the passes over large arrays: widths of stores, and tokens of a thread."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import cupy
import numpy as np
from gpu_kernels import copied, draw, drawn_layer
from probe_lines import PRIVATE, SHAPES, TOKENS, Call, Probe, sizes

import doraxp

COPIES = r"""
template <typename T> __device__ void copy(const T* from, T* to, long long size) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += stride)
        to[i] = from[i];
}
#define COPY(name, T) \
    extern "C" __global__ void name(const T* from, T* to, long long size) { copy(from, to, size); }
COPY(copy_2, unsigned short)
COPY(copy_4, unsigned)
COPY(copy_8, uint2)
COPY(copy_16, uint4)
"""


def stores(probe: Probe) -> None:
    """The merge beside copies of the weight whose threads store 2, 4, 8 and 16 bytes at a time."""
    module = cupy.RawModule(code=COPIES, options=("-std=c++17",))
    for out, inner, rank in SHAPES:
        shape, size = sizes(out, inner, rank=rank), 4 * out * inner

        def make(act: Callable[..., Any], out: int = out, inner: int = inner) -> Call:
            return partial(act, draw(out, inner, dtype="bfloat16"))

        probe.device("copy by the device", shape, partial(make, copied), size=size)
        reference = "copy by the device"
        for width in (2, 4, 8, 16):
            act = partial(copied_by, module.get_function(f"copy_{width}"), width)
            name = f"copy, {width} bytes a thread"
            probe.device(name, shape, partial(make, act), size=size, over=reference)

        def merged(known: bool, sizes: tuple[int, int, int] = (out, inner, rank)) -> Call:
            layer = drawn_layer(*sizes, "bfloat16")
            prepared = doraxp.prepare(*layer) if known else None
            return partial(doraxp.merge, *layer, prepared=prepared)

        for known, name in ((True, "merge, n known"), (False, "merge, from nothing")):
            probe.device(name, shape, partial(merged, known), size=size, over=reference)


def copied_by(function: Any, width: int, weight: Any) -> Any:
    """Return a copy that a kernel makes with loads and stores of `width` bytes."""
    copy = cupy.empty_like(weight)
    count = weight.nbytes // width
    blocks = min(-(-count // 256), 132 * 64)
    function((blocks,), (256,), (weight, copy, np.int64(count)))
    return copy


def runs(probe: Probe) -> None:
    """The pass `outputs` with 1 to 16 tokens for each thread."""
    for out, inner, rank in SHAPES:
        shape = sizes(out, inner, rank=rank)
        layer = drawn_layer(out, inner, rank, "bfloat16")
        prepared, x = doraxp.prepare(*layer), draw(TOKENS, inner, dtype="bfloat16")
        forward = partial(doraxp.forward, x, *layer, prepared=prepared)
        with probe.reported("outputs: tokens of a thread", shape):
            passes = importlib.import_module(f"{PRIVATE}.passes")
            given = passes.RUN
            for run in (given, *(run for run in (1, 2, 4, 8, 16) if run != given)):
                passes.RUN = run
                forget()
                name, over = (f"outputs, tokens of a thread: {each}" for each in (run, given))
                probe.kernel(name, shape, lambda call=forward: call, of="outputs", over=over)
            passes.RUN = given
            forget()


def forget() -> None:
    """Empty all caches of the backend: a plan may hold what a constant was before."""
    for name, module in list(sys.modules.items()):
        if name.startswith("doraxp.backends"):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
