"""The queue and the memory of a GPU, by CuPy, and the description of the device.

Time is the device's, see `_clock`. Memory is the memory of CuPy's pool.
"""

from __future__ import annotations

import contextlib
import importlib
import subprocess
from typing import Any

import numpy as np

from doraxp.bench import _clock
from doraxp.bench._clock import Call

HOLD = r"""
extern "C" __global__ void hold(unsigned long long nanoseconds) {
    unsigned long long began, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(began));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (now - began < nanoseconds);
}
"""


class Queue:
    """CuPy's current stream, as a `_clock.Queue`."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy

    def event(self) -> Any:
        """Return an event, put at the end of the stream."""
        event = self._cupy.cuda.Event()
        event.record()
        return event

    def has_passed(self, event: Any) -> bool:
        """Return whether the device has come to the event."""
        return bool(event.done)

    def wait(self, event: Any) -> None:
        """Wait until the device has come to the event."""
        event.synchronize()

    def seconds(self, first: Any, last: Any) -> float:
        """Return the time of the device from one event to another."""
        return float(self._cupy.cuda.get_elapsed_time(first, last)) / 1e3

    def hold(self, seconds: float) -> None:
        """Let the device look at its clock for so long."""
        self._cupy.RawKernel(HOLD, "hold")((1,), (1,), (np.uint64(1e9 * seconds),))


def seconds(cupy: Any, call: Call, repeats: int, reset: Call | None = None) -> float:
    """Return the mean seconds of a call on the device, whose queue is never empty between calls."""
    return _clock.seconds(Queue(cupy), call, repeats, reset)


def host_seconds(cupy: Any, call: Call, reset: Call | None = None) -> float:
    """Return the median seconds that the host needs to put a call into the queue."""
    return _clock.host_seconds(Queue(cupy), call, reset)


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
