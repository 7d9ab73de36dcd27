"""Time each kernel on a GPU with PyTorch's profiler. `doraxp bench` times whole calls.

    python benchmarks/gpu_kernels.py                  print a line for each shape and call
    python benchmarks/gpu_kernels.py --folder FOLDER  also add them to FOLDER/figures.jsonl
    python benchmarks/gpu_kernels.py --calls SIZE     make the calls once, for ncu ("large") or for
                                                      compute-sanitizer ("small"), without PyTorch;
                                                      no layer is begun after `--seconds`

It needs a GPU, CuPy, PyTorch and ml_dtypes. For each shape and call, it prints the time of all
kernels in µs, the number of launches, and the longest ones.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import cupy
import ml_dtypes
import numpy as np
from device_figures import append

import doraxp
from doraxp.backends import exact_products, operations, reduced_precision

BFLOAT16 = "bfloat16"
SHAPES = [
    (4096, 4096, 16, BFLOAT16),
    (4096, 11008, 16, BFLOAT16),
    (8192, 28672, 64, BFLOAT16),
    (4096, 4096, 16, "float32"),
    (8192, 28672, 256, BFLOAT16),
]
TOKENS, REPEATS, SHOWN = (4096, 128), 5, 12


class Layer(NamedTuple):
    """A layer of which `--calls` makes each call once."""

    name: str
    out: int
    inner: int
    rank: int
    tokens: int
    dtype: str = BFLOAT16
    dy: str | None = None
    """The dtype of dy, if it is not that of x and W."""
    stack: tuple[int, ...] = ()
    suspect: bool = False
    """Whether the update cancels nine tenths of a row of W: the kernels then form this row."""
    shifted: bool = False
    """Whether each array begins one number after its memory: its address fits only one number."""
    by_columns: bool = False
    """Whether W is the transpose of an array in C order."""
    form: Literal["weight", "direction"] = "weight"
    norm_gradient: Literal["exact", "detached"] = "exact"


LARGE = (Layer("large", 4096, 4096, 16, 4096),)
SMALL = (
    Layer("aligned", 96, 128, 8, 40),
    Layer("ragged", 97, 131, 19, 37, suspect=True, form="direction"),
    Layer("at odd addresses", 96, 128, 8, 24, shifted=True, suspect=True),
    Layer("dy of float32", 64, 96, 8, 20, dy="float32", suspect=True),
    Layer("rank 40", 64, 96, 40, 20, norm_gradient="detached"),
    Layer("stack of 2", 64, 96, 8, 20, stack=(2,), suspect=True),
    Layer("no tokens", 64, 96, 8, 0),
    Layer("W by columns", 64, 96, 8, 20, by_columns=True, suspect=True),
    Layer("float16", 64, 96, 8, 20, dtype="float16", suspect=True),
    Layer("float32", 64, 96, 8, 20, dtype="float32", suspect=True),
    Layer("ragged, float32", 35, 37, 5, 11, dtype="float32", form="direction"),
    Layer("float64", 35, 37, 5, 11, dtype="float64"),
)
"""compute-sanitizer is slow, so it needs small layers."""
CALLED = {"large": LARGE, "small": SMALL}


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
    parser.add_argument("--seconds", type=float, default=float("inf"))
    arguments = parser.parse_args()
    if arguments.calls:
        with separate_arrays():
            call_all(CALLED[arguments.calls], arguments.seconds, arguments.folder)
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


@contextlib.contextmanager
def separate_arrays() -> Iterator[None]:
    """Give each array an allocation of its own size: a tool then sees any access beyond its end.

    Else CuPy's pool rounds sizes up, and the backend makes several arrays in one allocation.
    """
    cupy.cuda.set_allocator(None)
    cuda: Any = operations(x=cupy.empty(1, np.float32)).cuda  # it allocates the arrays
    with mock.patch.object(type(cuda), "empties", separately):
        yield


def separately(cuda: Any, together: Any) -> list[Any]:
    """Return the arrays that the backend makes together, each in its own allocation."""
    return [each and cuda.empty(each.shape, each.kind) for each in together.places]


def call_all(layers: tuple[Layer, ...], seconds: float, folder: Path | None) -> None:
    """Make each call of each layer once. After so many seconds, end without the other layers."""
    began = time.monotonic()
    for number, layer in enumerate(layers):
        if time.monotonic() - began > seconds:
            names = "calls of layers: " + ", ".join(each.name for each in layers[number:])
            if folder is not None:
                append(folder, "skipped", name=names, reason="no time was left")
            sys.exit(f"No time was left for the {names}")
        call_once(layer)
        cupy.cuda.Device().synchronize()
        print(f"All calls were made: {layer.name}", flush=True)


def call_once(layer: Layer) -> None:
    """Make each call of a layer once."""
    given, x, dy, bias = made(layer)
    weight, adapter, _ = given
    prepared = doraxp.prepare(*given)
    for _, block in modes(layer.dtype):
        step(x, dy, prepared, block, bias=bias)
    doraxp.forward(x[..., :1, :], *given, bias=bias, prepared=prepared)
    doraxp.merge(*given, prepared=prepared)
    doraxp.merge(*given)
    doraxp.decompose(weight)
    layers = {"layer": adapter}
    adamw(layers, doraxp.adamw_init(layers))


def made(layer: Layer) -> tuple[tuple[Any, doraxp.Adapter, doraxp.Config], Any, Any, Any]:
    """Return weight, adapter and config of a layer, and x, dy and a bias."""
    out, inner, stack, dtype = layer.out, layer.inner, layer.stack, layer.dtype
    options = {"form": layer.form, "norm_gradient": layer.norm_gradient}
    weight, adapter, config = drawn_layer(out, inner, layer.rank, dtype, stack, **options)
    x = draw(*stack, layer.tokens, inner, dtype=dtype)
    dy = draw(*stack, layer.tokens, out, dtype=layer.dy or dtype)
    bias = draw(*stack, out)
    if layer.suspect:
        weight, row = weight.astype("float32"), adapter.lora_b[..., 3:4, :]
        norm, unit = doraxp.decompose(config.scaling * row @ adapter.lora_a)
        row[...] = 0.9 / norm[..., None] * row
        weight[..., 3:4, :] = -unit
        weight = weight.astype(x.dtype)
    if layer.by_columns:
        weight = weight.swapaxes(-1, -2).copy().swapaxes(-1, -2)
    if layer.shifted:
        weight, x, dy, bias = map(shifted, (weight, x, dy, bias))
        adapter = doraxp.Adapter(*map(shifted, adapter))
    return (weight, adapter, config), x, dy, bias


def shifted(array: Any) -> Any:
    """Return a copy that begins one number after its memory, so not at a multiple of 16 bytes."""
    view = cupy.empty((array.size + 1,), array.dtype)[1:].reshape(array.shape)
    view[...] = array
    return view


def drawn_layer(
    out: int, inner: int, rank: int, dtype: str, stack: tuple[int, ...] = (), **options: Any
) -> tuple[Any, doraxp.Adapter, doraxp.Config]:
    """Return a weight, an adapter as after some training, and a config with these options."""
    weight = draw(*stack, out, inner, dtype=dtype, scale=inner**-0.5)
    config = doraxp.Config(rank, **options)
    adapter = doraxp.init(weight, config, seed=0)
    lora_b = draw(*stack, out, rank, dtype=str(adapter.lora_a.dtype), scale=0.01)
    return weight, adapter._replace(lora_b=lora_b), config


def draw(*shape: int, dtype: str = "float32", scale: float = 1.0) -> Any:
    """Return normal numbers on the device."""
    stored = ml_dtypes.bfloat16 if dtype == BFLOAT16 else dtype
    if 0 in shape:  # no generator is asked for 0 numbers
        return cupy.empty(shape, stored)
    return (scale * cupy.random.standard_normal(shape, dtype="float32")).astype(stored)


def copied(weight: Any) -> Any:
    """Return a copy that CuPy makes from device to device."""
    copy = cupy.empty_like(weight)
    copy.data.copy_from_device_async(weight.data, weight.nbytes)
    return copy


def products(x: Any, dy: Any, weight: Any) -> tuple[Any, Any]:
    """Return y = x Wᵀ and dx = dy W."""
    return x @ weight.T, dy @ weight


def step(
    x: Any, dy: Any, previous: doraxp.Prepared, block: Callable[[], Any], bias: Any = None
) -> Any:
    """Return the gradients of a step: norm, forward and backward."""
    with block():
        weight, adapter, config = previous.weight, previous.adapter, previous.config
        _, cache = doraxp.forward(x, weight, adapter, config, bias=bias, previous=previous)
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
