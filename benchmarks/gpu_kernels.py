"""Time each kernel on a GPU with PyTorch's profiler. `doraxp bench` times whole calls.

    python benchmarks/gpu_kernels.py                  print a line for each shape and call
    python benchmarks/gpu_kernels.py --folder FOLDER  also add them to FOLDER/figures.jsonl
    python benchmarks/gpu_kernels.py --calls SIZE     make the calls once, for ncu ("large") or for
                                                      compute-sanitizer ("small"), without PyTorch

It needs a GPU, CuPy, PyTorch and ml_dtypes. For each shape and call, it prints the time of all
kernels in µs, the number of launches, and the longest ones.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cupy
import ml_dtypes
from device_figures import append

import doraxp
from doraxp.backends import exact_products, reduced_precision

BFLOAT16 = "bfloat16"
SHAPES = [
    (4096, 4096, 16, BFLOAT16),
    (4096, 11008, 16, BFLOAT16),
    (8192, 28672, 64, BFLOAT16),
    (4096, 4096, 16, "float32"),
    (8192, 28672, 256, BFLOAT16),
]
TOKENS, REPEATS, SHOWN = (4096, 128), 5, 12
CALLED = {"large": (4096, 4096, 16, 4096), "small": (96, 128, 8, 40)}
"""out, in, rank and tokens of `--calls`: compute-sanitizer needs a small layer."""


class Kernel(NamedTuple):
    """A kernel of a call: the time of all its launches together, and their number."""

    name: str
    microseconds: float
    launches: float


def main() -> None:
    """Print a line for each call."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--calls", choices=CALLED)
    arguments = parser.parse_args()
    if arguments.calls:
        call_once(*CALLED[arguments.calls])
        return
    for shape in SHAPES:
        show_shape(*shape, arguments.folder)


def show_shape(out: int, inner: int, rank: int, dtype: str, folder: Path | None) -> None:
    """Print the kernels of each call on a layer, and keep them as figures."""
    sizes = {"out": out, "inner": inner, "rank": rank, "dtype": dtype}
    weight, adapter, _ = layer = drawn_layer(out, inner, rank, dtype)
    prepared = doraxp.prepare(*layer)
    print(f"{out}×{inner} {dtype}, rank {rank}")

    def show(name: str, tokens: int, call: Callable[[], Any]) -> None:
        kernels = profiled(call)
        total = sum(kernel.microseconds for kernel in kernels)
        launches = sum(kernel.launches for kernel in kernels)
        shown = ", ".join(f"{one.name[:24]} {one.microseconds:.1f}" for one in kernels[:SHOWN])
        ending = f", {tokens} token{'s' if tokens > 1 else ''}" if tokens else ""
        print(
            f"  {name + ending:30} {total:8.1f} µs, {launches:3.0f} launches: {shown}", flush=True
        )
        if folder is not None:
            case = {**sizes, "tokens": tokens}
            longest = [one._asdict() for one in kernels[:SHOWN]]
            figure = {"microseconds": total, "launches": launches, "longest": longest}
            append(folder, "kernels", case=case, call=name, **figure)

    for tokens in TOKENS:
        x, dy = draw(tokens, inner, dtype=dtype), draw(tokens, out, dtype=dtype)
        show("bare products", tokens, partial(products, x, dy, weight))
        for name, block in modes(dtype):
            show(name, tokens, partial(step, x, dy, prepared, block))
    x = draw(1, inner, dtype=dtype)
    show("bare product", 1, partial(cupy.matmul, x, weight.T))
    show("forward", 1, partial(doraxp.forward, x, *layer, prepared=prepared))
    show("copy of W", 0, partial(copied, weight))
    show("norm", 0, partial(doraxp.prepare, *layer, previous=prepared))
    show("merge", 0, partial(doraxp.merge, *layer, prepared=prepared))
    show("merge, from nothing", 0, partial(doraxp.merge, *layer))
    layers = {str(number): adapter for number in range(8)}
    show("adamw", 0, partial(adamw, layers, doraxp.adamw_init(layers)))


def modes(dtype: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name of a step, and the block that it runs in, for each mode of a dtype."""
    yield "step", contextlib.nullcontext
    if dtype == "float32":
        yield "step, TF32", reduced_precision
    else:
        yield "step, exact products", exact_products


def call_once(out: int, inner: int, rank: int, tokens: int) -> None:
    """Make each call once. Each array has memory of its own: a tool sees a write beyond its end."""
    cupy.cuda.set_allocator(None)
    layer = drawn_layer(out, inner, rank, BFLOAT16)
    prepared = doraxp.prepare(*layer)
    x, dy = (draw(tokens, size, dtype=BFLOAT16) for size in (inner, out))
    for _, block in modes(BFLOAT16):
        step(x, dy, prepared, block)
    doraxp.forward(x[:1], *layer, prepared=prepared)
    doraxp.merge(*layer, prepared=prepared)
    doraxp.merge(*layer)
    layers = {"layer": layer[1]}
    adamw(layers, doraxp.adamw_init(layers))
    cupy.cuda.Device().synchronize()
    print("All calls were made.", flush=True)


def drawn_layer(
    out: int, inner: int, rank: int, dtype: str
) -> tuple[Any, doraxp.Adapter, doraxp.Config]:
    """Return a weight and an adapter as after some training."""
    weight = draw(out, inner, dtype=dtype, scale=inner**-0.5)
    config = doraxp.Config(rank)
    adapter = doraxp.init(weight, config, seed=0)
    return weight, adapter._replace(lora_b=draw(out, rank, scale=0.01)), config


def draw(*shape: int, dtype: str = "float32", scale: float = 1.0) -> Any:
    """Return normal numbers on the device."""
    stored = ml_dtypes.bfloat16 if dtype == BFLOAT16 else dtype
    return (scale * cupy.random.standard_normal(shape, dtype="float32")).astype(stored)


def copied(weight: Any) -> Any:
    """Return a copy that CuPy makes from device to device."""
    copy = cupy.empty_like(weight)
    copy.data.copy_from_device_async(weight.data, weight.nbytes)
    return copy


def products(x: Any, dy: Any, weight: Any) -> tuple[Any, Any]:
    """Return y = x Wᵀ and dx = dy W."""
    return x @ weight.T, dy @ weight


def step(x: Any, dy: Any, previous: doraxp.Prepared, block: Callable[[], Any]) -> Any:
    """Return the gradients of an exact step: norm, forward and backward."""
    with block():
        weight, adapter, config = previous.weight, previous.adapter, previous.config
        _, cache = doraxp.forward(x, weight, adapter, config, previous=previous)
        return doraxp.backward(dy, cache)


def adamw(layers: dict[str, doraxp.Adapter], state: doraxp.AdamWState) -> Any:
    """Return adapters after a step of AdamW, with the adapters as their own gradients."""
    return doraxp.adamw_step(layers, layers, state, learning_rate=1e-3)


def profiled(call: Callable[[], Any], repeats: int = REPEATS) -> list[Kernel]:
    """Return the kernels and copies of a call, the longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.zeros(1, device="cuda")  # the profiler needs a context
    for _ in range(2):
        call()
    cupy.cuda.Device().synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as measured:
        for _ in range(repeats):
            call()
        cupy.cuda.Device().synchronize()
    return kernels_of(measured.key_averages(), repeats)


def kernels_of(events: Any, repeats: int) -> list[Kernel]:
    """Return the kernels among a profiler's averaged events, for one of `repeats` calls."""
    found = [
        Kernel(event.key, event.device_time_total / repeats, event.count / repeats)
        for event in events
        if event.device_time_total > 0
    ]
    return sorted(found, key=lambda kernel: -kernel.microseconds)


if __name__ == "__main__":
    main()
