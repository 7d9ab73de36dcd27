"""The contestants of PyTorch on a CUDA device: its bare products, and PEFT's layers.

Accelerated layers take part too, by PyTorch's operations and by CuPy's kernels.

Each contestant uses several sets of inputs in turn: no call finds its inputs in the device's cache.
Time is the device's, see `_clock`. Memory is that of PyTorch's allocator.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from doraxp.bench import _clock, _device, _peft, _torch
from doraxp.bench._contestant import Contestant
from doraxp.bench._truth import Truth
from doraxp.bench._workloads import Workload, stored

ROTATED = 1 << 28
"""Bytes of all sets of weight, x and dy, at least one: more than the device's cache has."""
SETS = 32
"""The most sets of inputs: a layer of PEFT's takes milliseconds to make. 32 sets of a layer below
2048×2048 in bfloat16 may lie in the cache."""
CYCLES = 2e9
"""Cycles of the device in a second, about."""


class Queue:
    """PyTorch's current stream, as a `_clock.Queue`."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda

    def event(self) -> Any:
        """Return an event, put at the end of the stream."""
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def has_passed(self, event: Any) -> bool:
        """Return whether the device has come to the event."""
        return bool(event.query())

    def wait(self, event: Any) -> None:
        """Wait until the device has come to the event."""
        event.synchronize()

    def seconds(self, first: Any, last: Any) -> float:
        """Return the time of the device from one event to another."""
        return float(first.elapsed_time(last)) / 1e3

    def hold(self, seconds: float) -> None:
        """Let the device count cycles for about so long."""
        self._cuda._sleep(int(CYCLES * seconds))


def why_not() -> str | None:
    """Return the reason why PyTorch cannot compute on a CUDA device, or None if it can."""
    if importlib.import_module("torch").cuda.is_available():
        return None
    return "PyTorch finds no CUDA device here: install its build for CUDA, or leave out --device"


def description() -> dict[str, Any]:
    """Return the name, the size and the drivers of the device, for the report."""
    torch = importlib.import_module("torch")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "bytes": properties.total_memory,
        "driver": _device.driver(),
        "runtime_cuda": torch.version.cuda,
    }


def contestants(task: str, workload: Workload, libraries: Iterable[str]) -> Iterator[Contestant]:
    """Yield PyTorch's bare products, then PEFT's contestants if PEFT is among the libraries."""
    host = stored(workload)
    numbers = sum(math.prod(array.shape) for array in (host.weight, host.x, host.dy))
    count = min(SETS, math.ceil(ROTATED / (numbers * host.weight.dtype.itemsize)))
    queue = Queue(importlib.import_module("torch").cuda)
    makers = [_torch.contestants, *([_peft.contestants] if _peft.LIBRARY in libraries else [])]
    for made in makers:
        for one in _peft.in_turn([made(task, workload) for _ in range(count)]):
            yield one._replace(
                seconds=partial(_clock.seconds, queue, one.call, reset=one.reset),
                host_seconds=partial(_clock.host_seconds, queue, one.call, one.reset),
            )


def truth(workload: Workload) -> Truth:
    """Return the right answers, computed on the device in float64."""
    inputs: Any = _torch.tensors(workload)
    return Truth(inputs, workload.config.scaling)
