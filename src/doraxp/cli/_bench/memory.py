"""Peak memory of a call, beyond what was there before: that of the process, as Linux counts it.

It is measured in a process of its own, in which the C library returns every freed array at once:
otherwise a call would be given what an earlier one left, and seem to need nothing.
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

from doraxp.cli._bench.cases import Case
from doraxp.cli._bench.entrants import entrants

PROCESS = Path("/proc/self")
THRESHOLD = 1 << 16
"""Bytes from which on an allocation is returned to the system when freed."""
_M_MMAP_THRESHOLD = -3


def child() -> ProcessPoolExecutor:
    """Return a process to measure in: `with child() as process`."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit what the parent freed
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=return_what_is_freed)


def return_what_is_freed() -> None:
    """Tell the C library to; one that is not GNU's is left as it is.

    So is that of a system where nothing is measured: Windows has no name for it.
    """
    if not (PROCESS / "clear_refs").exists():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, THRESHOLD)


def peaks(task: str, case: Case, names: list[tuple[str, str]]) -> list[int | None]:
    """Return the peak of each contestant, given by library and name."""
    libraries = dict.fromkeys(library for library, _ in names)
    present = {(e.library, e.name): e for e in entrants(task, case, libraries)}
    return [peak_bytes(present[name].call, present[name].reset) for name in names]


def peak_bytes(call: Callable[[], Any], reset: Callable[[], None]) -> int | None:
    """Return how far the memory in use rises in a call, its result included; None if unknown."""
    clear = PROCESS / "clear_refs"
    if not clear.exists():
        return None
    reset()
    call()  # what is made once, buffers of BLAS and compiled code, is no call's
    reset()
    gc.collect()
    clear.write_text("5")  # sets the peak back to what is in use
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(field: str) -> int:
    text = (PROCESS / "status").read_text()
    (kilobytes,) = re.findall(rf"^{field}:\s*(\d+) kB$", text, re.MULTILINE)
    return 1024 * int(kilobytes)
