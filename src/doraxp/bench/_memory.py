"""The peak memory of a call beyond the memory in use before it, as Linux counts it.

It is measured in a fresh process, whose C library returns every freed array to the system at once.
Otherwise a call would reuse the memory that an earlier call freed, and seem to need no memory.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from doraxp.bench._contestants import contestants
from doraxp.bench._workloads import Workload

PROCESS = Path("/proc/self")
THRESHOLD = 1 << 16
"""Bytes: a freed allocation at least as large goes back to the system."""
_M_MMAP_THRESHOLD = -3


def fresh_process() -> ProcessPoolExecutor:
    """Return a process to measure memory in: `with fresh_process() as process`."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit what the parent freed
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=return_what_is_freed)


def return_what_is_freed() -> None:
    """Tell the GNU C library to return freed memory to the system at once.

    Do nothing with another C library, or where memory cannot be measured, as on Windows.
    """
    if not (PROCESS / "clear_refs").exists():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, THRESHOLD)


def peaks(task: str, workload: Workload, names: list[tuple[str, str]]) -> list[int | None]:
    """Return the peak bytes of each contestant, given by library and name."""
    libraries = dict.fromkeys(library for library, _ in names)
    present = {(c.library, c.name): c for c in contestants(task, workload, libraries)}
    return [peak_bytes(present[name].call, present[name].reset) for name in names]


def peak_bytes(call: Callable[[], Any], reset: Callable[[], None]) -> int | None:
    """Return the rise of the memory in use during a call, result included; None if unknown."""
    clear = PROCESS / "clear_refs"
    if not clear.exists():
        return None
    reset()
    call()  # the first call also makes buffers of BLAS and compiled code
    reset()
    gc.collect()
    clear.write_text("5")  # resets the peak to the memory in use
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(field: str) -> int:
    text = (PROCESS / "status").read_text()
    (kilobytes,) = re.findall(rf"^{field}:\s*(\d+) kB$", text, re.MULTILINE)
    return 1024 * int(kilobytes)
