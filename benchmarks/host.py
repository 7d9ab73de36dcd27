"""Time the host's part of CuPy's public calls, without a GPU, against a fixed piece of Python.

    python benchmarks/host.py               prints a line for each call; the exit status is 1 if
                                            one is above its budget
    python benchmarks/host.py --profile     prints the functions that take most of each call too

It needs CuPy and no driver. The arrays are CuPy's own, on memory that does not exist. The functions
that would need a device are replaced at the lowest level, and return at once: the driver's launch,
cuBLAS's product, the pool's allocation and the kernels that CuPy has for its operators. All other
Python of this package and of CuPy runs as it does on a device.

Each figure is a ratio: the time of a call over the time of `piece`, both in the processor's time of
one process. The two take turns, and each time is the least of its turns: other processes only add
to it. So the ratio depends little on the machine.

The goals of a step and of AdamW are in microseconds, on the machine of an H200. There a step of 8.7
units, with 22 launches, 13 products and 4 operators, took 1200 µs on the host. The driver needs
about 4 µs for each of these 39, so a unit is (1200 − 39·4) / 8.7 = 120 µs there.

    step     300 µs, 14 launches and products     (300 − 14·4) / 120 = 2.0 units
    AdamW    150 µs, 1 launch                     (150 − 4) / 120 = 1.2 units

A budget is the time that a call reached, and a little more: it keeps the call from growing. Where
there is a goal, it stands beside it, and neither the step nor AdamW has reached it. A step makes 24
arrays, 12 launches and products and about 200 small checks and views. The step of 24 leaves looks
at 96 arrays, and CuPy takes about 0.5 µs to tell the type, dtype, device, shape, order and address
of each: 0.6 units before any other work. Without `donate`, CuPy makes 72 arrays too, 1.2 µs each.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import gc
import importlib
import itertools
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import ml_dtypes
import numpy as np

import doraxp
from doraxp import Adapter, Config

OUT, IN, RANK, TOKENS, LAYERS = 4096, 4096, 16, 4096, 8
ROUNDS, SECONDS = 1001, 0.0005
"""Turns of each of the two, and the length of a turn, which has at least one call."""
ADDRESS, ALIGNED = 1 << 20, 512


class Budget(NamedTuple):
    """The most time of a call, as a ratio to `piece`, and the most launches with products."""

    ratio: float
    launches: int
    goal: float | None = None
    """The ratio that the project wants."""


BUDGETS = {
    "step": Budget(3.2, 12, goal=2.0),
    "one token": Budget(0.75, 2),
    "norm": Budget(0.75, 2),
    "merge": Budget(0.6, 2),
    "AdamW": Budget(3.4, 1, goal=1.2),
    "AdamW, donate": Budget(1.7, 1, goal=1.2),
}


class Point(NamedTuple):
    """An object of `piece`."""

    name: str
    place: tuple[int, int]


def moved(point: Point, by: int) -> Point:
    """Return a point further on."""
    row, column = point.place
    return Point(name=point.name, place=(row + by, column))


def piece() -> int:
    """Run the kinds of Python that a call consists of: tuples, attributes, look-ups, calls."""
    names, seen, total = ("weight", "lora_a", "lora_b", "magnitude"), {}, 0
    for i in range(16):
        for name in names:
            point = moved(Point(name, (i, total)), by=1)
            key = point.name, i
            if key not in seen and isinstance(point, tuple):
                seen[key] = point
            total += seen[key].place[0]
    return total + sum(point.place[1] for point in seen.values() if point.name == "lora_a")


class Counts:
    """The calls that would have reached the device."""

    def __init__(self) -> None:
        self.launches = self.products = self.operators = 0

    def launch(self, *_: object) -> None:
        """Stand for the driver's launch of a kernel."""
        self.launches += 1

    def product(self, *_: object) -> None:
        """Stand for cuBLAS's gemmEx."""
        self.products += 1

    def total(self) -> int:
        """Return the number of all kernels. A product is at least one."""
        return self.launches + self.products + self.operators


class Blas:
    """cuBLAS without a device."""

    CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F, CUBLAS_COMPUTE_32F_FAST_TF32 = 68, 70, 77
    CUBLAS_POINTER_MODE_HOST, CUBLAS_POINTER_MODE_DEVICE = 0, 1
    CUBLAS_GEMM_DEFAULT = -1

    def __init__(self, counts: Counts) -> None:
        self.gemmEx = counts.product
        self.create = self.getPointerMode = self.getMathMode = lambda *_: 1
        self.destroy = self.setPointerMode = self.setMathMode = lambda *_: None


class Stream(NamedTuple):
    """The current stream."""

    ptr: int = 0


class Kernel:
    """A kernel of a module, which both ways to launch it can find."""

    ptr = 1

    def __init__(self, counts: Counts) -> None:
        self.kernel, self.counts = self, counts

    def __call__(self, *_: object) -> None:
        """Stand for CuPy's own launch."""
        self.counts.launch()


@contextlib.contextmanager
def without_device(cupy: Any) -> Iterator[Counts]:
    """Replace the functions of CuPy that need a device."""
    counts, cuda = Counts(), cupy.cuda
    libraries = importlib.import_module("cupy_backends.cuda.libs")
    addresses = itertools.count(ADDRESS, ALIGNED)

    def allocate(size: int) -> Any:
        return cuda.MemoryPointer(cuda.UnownedMemory(next(addresses), size, None, 0), 0)

    def operated(array: Any, *_: object) -> Any:
        counts.operators += 1
        return cupy.empty(array.shape, array.dtype)

    def cast(array: Any, dtype: Any, **_: object) -> Any:
        counts.operators += 1
        return cupy.empty(array.shape, dtype)

    def written(array: Any, *_: object) -> Any:
        counts.operators += 1
        return array

    kernel, stream = Kernel(counts), Stream()
    module = mock.Mock(get_function=lambda _: kernel)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (cuda.runtime, "getDevice", lambda: 0),
            (cuda.runtime, "memGetInfo", lambda: (1, 1)),
            (cuda, "get_current_stream", lambda: stream),
            (cuda.driver, "launchKernel", counts.launch),
            (cuda.device, "get_cublas_handle", lambda: 1),
            (cupy, "RawModule", lambda **_: module),
            (cupy, "array", lambda array, **_: operated(array)),
            (cuda, "Device", lambda *_: contextlib.nullcontext()),
            *((cupy.ndarray, f"__{name}__", operated) for name in ("mul", "rmul", "add")),
            *((cupy.ndarray, f"__i{name}__", written) for name in ("mul", "add")),
            (cupy.ndarray, "astype", cast),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(vars(libraries), cublas=Blas(counts)))
        stack.enter_context(cuda.using_allocator(allocate))
        yield counts


def calls(cupy: Any) -> dict[str, Callable[[], object]]:
    """Return the public calls, on a layer in bfloat16."""
    wide, stored = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)

    def adapter() -> Adapter:
        shapes = (RANK, IN), (OUT, RANK), (OUT,)
        return Adapter(*(cupy.empty(shape, wide) for shape in shapes))

    config, weight, leaves = Config(RANK), cupy.empty((OUT, IN), stored), adapter()
    x, dy, one = (cupy.empty((count, IN), stored) for count in (TOKENS, TOKENS, 1))
    prepared = doraxp.prepare(weight, leaves, config)
    params, grads, mu, nu = ({str(i): adapter() for i in range(LAYERS)} for _ in range(4))
    trees = params, grads, doraxp.AdamWState(1, mu, nu)

    def step() -> object:
        _, cache = doraxp.forward(x, weight, leaves, config, previous=prepared)
        return doraxp.backward(dy, cache)

    return {
        "step": step,
        "one token": lambda: doraxp.forward(one, weight, leaves, config, prepared=prepared),
        "norm": lambda: doraxp.prepare(weight, leaves, config, previous=prepared),
        "merge": lambda: doraxp.merge(weight, leaves, config, prepared=prepared),
        "AdamW": lambda: doraxp.adamw_step(*trees, learning_rate=1e-4),
        "AdamW, donate": lambda: doraxp.adamw_step(*trees, learning_rate=1e-4, donate=True),
    }


def ratio_to_piece(call: Callable[[], object]) -> float:
    """Return the time of `call` over that of `piece`."""
    functions = call, piece
    repeats = [max(1, round(SECONDS / spent(function, 3))) for function in functions]
    turns = [*zip(functions, repeats, strict=True)]
    gc.collect()
    gc.disable()  # as timeit does
    try:
        times = [[spent(*turn) for turn in turns] for _ in range(ROUNDS)]
    finally:
        gc.enable()
    of_call, of_piece = (min(each) for each in zip(*times, strict=True))
    return of_call / of_piece


def spent(function: Callable[[], object], repeats: int) -> float:
    """Return the processor's seconds for one call, a mean."""
    start = time.process_time()
    for _ in range(repeats):
        function()
    return (time.process_time() - start) / repeats


def profile(call: Callable[[], object]) -> None:
    """Print the functions in which most of the time is spent."""
    with cProfile.Profile() as found:
        for _ in range(200):
            call()
    pstats.Stats(found).sort_stats("tottime").print_stats(20)


def main() -> None:
    """Print the ratios, and exit with 1 if one is above its budget."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", action="store_true", help="print where the time is spent")
    arguments, broken = parser.parse_args(), False
    cupy = importlib.import_module("cupy")
    print(f"`piece` takes {1e6 * min(spent(piece, 100) for _ in range(20)):.1f} µs here\n")
    print(f"{'call':14}{'ratio':>8}{'budget':>8}{'goal':>6}{'launches':>10}", end="")
    print(f"{'products':>10}{'operators':>11}")
    with without_device(cupy) as counts:
        for name, call in calls(cupy).items():
            call()
            counts.launches = counts.products = counts.operators = 0
            call()
            kinds, total = (counts.launches, counts.products, counts.operators), counts.total()
            ratio, budget = ratio_to_piece(call), BUDGETS[name]
            above = ratio > budget.ratio or total > budget.launches
            broken = broken or above
            goal = "" if budget.goal is None else f"{budget.goal:.1f}"
            cells = f"{ratio:8.2f}{budget.ratio:8.2f}{goal:>6}"
            cells += f"{kinds[0]:10}{kinds[1]:10}{kinds[2]:11}"
            print(f"{name:14}{cells}{'   above' if above else ''}", flush=True)
            if arguments.profile:
                profile(call)
    sys.exit(broken)


if __name__ == "__main__":
    main()
