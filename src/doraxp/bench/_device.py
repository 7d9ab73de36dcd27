"""The clock and the memory of a GPU, by CuPy, and the description of the device.

Time is the device's, between two events. A kernel holds the device's queue while the host fills it:
otherwise a short call would take as long as Python needs for it. The time that the host needs is
measured too. Memory is the memory of CuPy's pool.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

QUEUED = 8
"""The number of calls made while the queue is held. The queue has room for about a thousand
launches."""
HOLD = r"""
extern "C" __global__ void hold(unsigned long long nanoseconds) {
    unsigned long long began, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(began));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (now - began < nanoseconds);
}
"""
Call: TypeAlias = Callable[[], Any]


def description() -> dict[str, Any]:
    """Return the name, the size and the drivers of the device, for the report."""
    runtime = importlib.import_module("cupy").cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    return {
        "name": properties["name"].decode(),
        "multiprocessors": properties["multiProcessorCount"],
        "bytes": properties["totalGlobalMem"],
        "driver": driver(),
        "driver_cuda": runtime.driverGetVersion(),
        "runtime_cuda": runtime.runtimeGetVersion(),
    }


def driver() -> str | None:
    """Return the version of NVIDIA's driver, or None if nvidia-smi does not tell it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        if said.returncode == 0:
            return said.stdout.split()[0]
    return None


def seconds(cupy: Any, call: Call, repeats: int, reset: Call | None = None) -> float:
    """Return the mean seconds of a call on the device, whose queue is never empty between calls."""
    _, host = _timed(cupy, call, reset, 1, 0.0)
    total, left = 0.0, repeats
    while left > 0:
        count = min(QUEUED, left)
        total += _timed(cupy, call, reset, count, 2 * host + 1e-5)[0]
        left -= count
    return total / repeats


def host_seconds(cupy: Any, call: Call, reset: Call | None = None) -> float:
    """Return the median seconds that the host needs to put a call into the queue."""
    samples = [_timed(cupy, call, reset, QUEUED, 0.0)[1] / QUEUED for _ in range(5)]
    return statistics.median(samples)


def _timed(
    cupy: Any, call: Call, reset: Call | None, count: int, hold: float
) -> tuple[float, float]:
    """Return the seconds of `count` calls, on the device and on the host.

    The queue is first held for `hold` seconds a call. With `reset` two events enclose each call;
    without, two events enclose all of them.
    """
    cuda, host, pairs = cupy.cuda, 0.0, []
    if hold:
        held = np.uint64(1e9 * hold * count)
        cupy.RawKernel(HOLD, "hold")((1,), (1,), (held,))
    for number in range(count):
        if reset is not None:
            reset()
        if reset is not None or number == 0:
            pairs.append((cuda.Event(), cuda.Event()))
            pairs[-1][0].record()
        began = time.perf_counter()
        call()
        host += time.perf_counter() - began
        if reset is not None or number == count - 1:
            pairs[-1][1].record()
    pairs[-1][1].synchronize()
    device = sum(float(cuda.get_elapsed_time(*pair)) for pair in pairs) / 1e3
    return device, host


def peak(cupy: Any, call: Call) -> int:
    """Return the largest number of bytes that a call holds at once, its result included."""

    class Count(cupy.cuda.MemoryHook):  # type: ignore[misc]
        name = "doraxp bench"
        held = most = 0

        def __init__(self) -> None:
            self.own: dict[int, int] = {}

        def malloc_postprocess(self, **of: Any) -> None:
            self.own[of["mem_ptr"]] = of["mem_size"]
            self.held += of["mem_size"]
            self.most = max(self.most, self.held)

        def free_postprocess(self, **of: Any) -> None:
            self.held -= self.own.pop(of["mem_ptr"], 0)

    call()
    with Count() as hook:
        result = call()
    del result
    return int(hook.most)
