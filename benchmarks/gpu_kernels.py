"""Time each kernel on a GPU with PyTorch's profiler. `doraxp bench` times whole calls.

    python benchmarks/gpu_kernels.py

It needs a GPU, CuPy, PyTorch and ml_dtypes. For each shape and call, it prints the time of all
kernels in µs, the number of kernels, and the longest ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import cupy
import ml_dtypes
import torch
from torch.profiler import ProfilerActivity, profile

import doraxp
from doraxp.backends import reduced_precision

SHAPES = [
    (4096, 4096, 16, ml_dtypes.bfloat16),
    (4096, 11008, 16, ml_dtypes.bfloat16),
    (8192, 28672, 64, ml_dtypes.bfloat16),
    (8192, 28672, 256, ml_dtypes.bfloat16),
    (4096, 4096, 16, "float32"),
]
TOKENS, REPEATS, SHOWN = (4096, 128), 5, 12


def main() -> None:
    """Print a line for each call."""
    torch.zeros(1, device="cuda")  # the profiler needs a context
    for out, inner, rank, dtype in SHAPES:
        weight = draw(out, inner, dtype=dtype, scale=inner**-0.5)
        config = doraxp.Config(rank)
        adapter = doraxp.init(weight, config, seed=0)
        adapter = adapter._replace(lora_b=draw(out, rank, scale=0.01))
        layer = weight, adapter, config
        prepared = doraxp.prepare(*layer)
        print(f"{out}×{inner} {weight.dtype}, rank {rank}")
        show("copy of W", partial(copied, weight))
        for tokens in TOKENS:
            x, dy = draw(tokens, inner, dtype=dtype), draw(tokens, out, dtype=dtype)
            show(f"bare products, {tokens} tokens", partial(products, x, dy, weight))
            for reduced in (True, False):
                name = f"step{', reduced' if reduced else ''}, {tokens} tokens"
                show(name, partial(step, x, dy, prepared, reduced=reduced))
        x = draw(1, inner, dtype=dtype)
        show("bare product, 1 token", partial(cupy.matmul, x, weight.T))
        show("forward, 1 token", partial(doraxp.forward, x, *layer, prepared=prepared))
        show("norm", partial(doraxp.prepare, *layer, previous=prepared))
        show("merge", partial(doraxp.merge, *layer, prepared=prepared))
        show("merge, from nothing", partial(doraxp.merge, *layer))


def draw(*shape: int, dtype: Any = "float32", scale: float = 1.0) -> Any:
    """Return normal numbers on the device."""
    return (scale * cupy.random.standard_normal(shape, dtype="float32")).astype(dtype)


def copied(weight: Any) -> Any:
    """Return a copy that CuPy makes from device to device."""
    copy = cupy.empty_like(weight)
    copy.data.copy_from_device_async(weight.data, weight.nbytes)
    return copy


def products(x: Any, dy: Any, weight: Any) -> tuple[Any, Any]:
    """Return y = x Wᵀ and dx = dy W."""
    return x @ weight.T, dy @ weight


def step(x: Any, dy: Any, previous: doraxp.Prepared, *, reduced: bool) -> Any:
    """Return the gradients of an exact step: norm, forward and backward."""
    with reduced_precision() if reduced else contextlib.nullcontext():
        weight, adapter, config = previous.weight, previous.adapter, previous.config
        _, cache = doraxp.forward(x, weight, adapter, config, previous=previous)
        return doraxp.backward(dy, cache)


def show(name: str, call: Callable[[], Any]) -> None:
    """Print the times of the kernels of a call."""
    for _ in range(2):
        call()
    cupy.cuda.Device().synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as measured:
        for _ in range(REPEATS):
            call()
        cupy.cuda.Device().synchronize()
    kernels = [event for event in measured.key_averages() if event.device_time_total > 0]
    kernels.sort(key=lambda event: -event.device_time_total)
    total = sum(event.device_time_total for event in kernels) / REPEATS
    count = sum(event.count for event in kernels) / REPEATS
    longest = [f"{e.key[:24]} {e.device_time_total / REPEATS:.1f}" for e in kernels[:SHOWN]]
    print(f"  {name:28} {total:8.1f} µs, {count:3.0f} kernels: {', '.join(longest)}", flush=True)


if __name__ == "__main__":
    main()
