"""A probe measures calls on a GPU, prints a line for each, and keeps it as a figure."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import cupy
from device_figures import append
from gpu_kernels import profiled

from doraxp import bench

SHAPES = ((4096, 4096, 16), (4096, 11008, 16), (8192, 28672, 64))
TOKENS = 4096
PRIVATE = "doraxp.backends._cupy"
"""A probe reaches into the backend, whose parts it measures."""
ROTATED = 1 << 28
"""Bytes of all sets of arrays that a call uses in turn: more than the GPU's cache has."""
SECONDS, SAMPLES = 0.01, 3
"""Seconds of a sample, and samples. A figure is their median."""
Call: TypeAlias = Callable[[], Any]


class Probe:
    """Measures calls, prints a line for each, and keeps it as a figure."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[tuple[str, str], float] = {}

    def device(
        self, name: str, shape: str, make: Callable[[], Call], *,
        size: int = ROTATED, over: str | None = None, each: int = 1,
    ) -> None:  # fmt: skip
        """Time a call on the device. `make` makes it, with arrays of `size` bytes of its own.

        A call that does `each` equal things is one that takes an `each`th of the time.
        """
        with self.reported(name, shape):
            calls = itertools.cycle([make() for _ in range(max(1, math.ceil(ROTATED / size)))])

            def call() -> Any:
                return next(calls)()

            call()
            once = bench.gpu_seconds(cupy, call, 1)
            repeats = min(100, max(3, math.ceil(SECONDS / once)))
            samples = [bench.gpu_seconds(cupy, call, repeats) for _ in range(SAMPLES)]
            self._show(name, shape, 1e6 * statistics.median(samples) / each, over)

    def host(self, name: str, make: Callable[[], Call], *, each: int = 1) -> None:
        """Time a call on the host: its launches go into a queue that is not full."""
        with self.reported(f"host: {name}", ""):
            call = make()
            call()
            cupy.cuda.get_current_stream().synchronize()
            self._show(f"host: {name}", "", 1e6 * bench.gpu_host_seconds(cupy, call) / each, None)

    def kernel(
        self, name: str, shape: str, make: Callable[[], Call], of: str = "",
        over: str | None = None,
    ) -> None:  # fmt: skip
        """Time the kernels of a call whose names begin with `of`, by PyTorch's profiler."""
        with self.reported(name, shape):
            kernels = [one for one in profiled(make()) if one.name.startswith(of)]
            if not kernels:
                raise LookupError(f"the call has no kernel {of}")
            names = {one.name[:60]: round(one.microseconds, 2) for one in kernels}
            self._show(name, shape, sum(one.microseconds for one in kernels), over, kernels=names)

    def _show(
        self, name: str, shape: str, microseconds: float, over: str | None, **more: Any
    ) -> None:
        self.found[name, shape] = microseconds
        reference = self.found.get((over, shape)) if over not in (None, name) else None
        ratio = microseconds / reference if reference else None
        beside = f"  {ratio:6.2f} ÷ {over}" if ratio is not None else ""
        print(f"  {name:52} {shape:20} {microseconds:10.2f} µs{beside}", flush=True)
        for kernel, of_kernel in more.get("kernels", {}).items():
            print(f"      {of_kernel:10.2f} µs  {kernel}", flush=True)
        figure = {"microseconds": microseconds, "over": over, "ratio": ratio, **more}
        append(self.folder, "probe", name=name, shape=shape, **figure)

    @contextlib.contextmanager
    def reported(self, name: str, shape: str) -> Iterator[None]:
        """Report an error as the line of its variant: the others are measured all the same."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            print(f"  {name:52} {shape:20} could not run: {reason}", flush=True)
            append(self.folder, "probe", name=name, shape=shape, reason=reason)


def sizes(*shape: int, rank: int | None = None) -> str:
    """Return a shape as it is printed."""
    return "×".join(map(str, shape)) + (f" r{rank}" if rank is not None else "")
