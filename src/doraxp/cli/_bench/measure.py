"""How it is measured: answers first, then times, then memory.

Times: all contestants of a task in one process, in random order, round by round, so that a machine
that slows down does so for all of them. Memory: one more process, see `memory`.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace

from doraxp._base.types import Array
from doraxp.cli._bench import gpu, memory
from doraxp.cli._bench.cases import Case, Dense, draw
from doraxp.cli._bench.contestants import Contestant
from doraxp.cli._bench.entrants import entrants

SECONDS = 0.02
"""A sample is as many calls as take this long."""
SETTLE = 0.03
"""Before each sample: the threads of the library before wait for work as long, on all cores."""
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 4e-2}
"""Largest error over largest value, by the dtype of the answer. It has accumulated where PEFT
computes in low precision; the others only store in it."""


class WrongAnswerError(Exception):
    """A contestant that computes something else: its time says nothing."""


@dataclass(frozen=True)
class Measured:
    """What a contestant took."""

    case: Case
    task: str
    name: str
    library: str
    kind: str
    seconds: list[float]
    """Of one call, in each round."""
    peak_bytes: int | None
    """Beyond the inputs; None where it cannot be measured."""
    host_seconds: float | None = None
    """Of one call; None where it is the host that is measured."""

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile of the seconds."""
        return quartiles(self.seconds)

    def over(self, other: Measured) -> tuple[float, float, float]:
        """Return the quartiles of seconds ÷ the other's, round by round."""
        return quartiles([a / b for a, b in zip(self.seconds, other.seconds, strict=True)])


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def measure(
    task: str,
    case: Case,
    libraries: Iterable[str],
    *,
    rounds: int,
    child: Executor,
    on_part: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """Return the time and memory of each contestant; `on_part` is called `rounds` + 2 times."""
    present = entrants(task, case, libraries)
    check_all(task, case, present)
    on_part()
    times = time_all(present, rounds, on_part)
    names = [(entrant.library, entrant.name) for entrant in present]
    if present[0].peak is None:
        peaks = child.submit(memory.peaks, task, case, names).result()
    else:
        peaks = [entrant.peak() if entrant.peak else None for entrant in present]
    hosts = [entrant.host_seconds() if entrant.host_seconds else None for entrant in present]
    on_part()
    return [
        Measured(case, task, entrant.name, entrant.library, entrant.kind, seconds, peak, host)
        for entrant, seconds, peak, host in zip(present, times, peaks, hosts, strict=True)
    ]


def check_all(task: str, case: Case, present: list[Contestant]) -> None:
    """Hold every contestant to the dense formulas; WrongAnswerError names the first that errs."""
    on_gpu = any(entrant.library == gpu.LIBRARY for entrant in present)
    dense = gpu.dense(case) if on_gpu else Dense(draw(case), case.config.scaling)
    truths = {kind: dense.answers(task, kind) for kind in {entrant.kind for entrant in present}}
    for entrant in present:
        entrant.reset()
        answer = entrant.answer(entrant.call())
        for name, truth in truths[entrant.kind].items():
            what = f"{task}, {entrant.library}, {entrant.name}: {name}"
            _check(what, answer[name], truth, entrant.tolerance)


def _check(what: str, array: Array, truth: Array, tolerance: float | None) -> None:
    tolerance = max(tolerance or 0.0, TOLERANCES[str(array.dtype).rpartition(".")[-1]])
    error = _error(array, truth)
    if not error <= tolerance:  # NaN too
        raise WrongAnswerError(f"{what} must be within {tolerance} of the dense one, got {error}")


def _error(array: Array, truth: Array) -> float:
    """Return the largest error over the largest value; where the truth is on a GPU, made there."""
    if hasattr(truth, "get"):  # CuPy
        array = array.double() if hasattr(array, "double") else array  # PyTorch's bfloat16
        array = array_namespace(truth).asarray(array, dtype=truth.dtype)
    else:
        array, truth = on_host(array), on_host(truth)
    return float(abs(array - truth).max()) / float(abs(truth).max())


def on_host(array: Array) -> Array:
    """Return an array of a library on the host as NumPy's, in float64."""
    array = array.double() if hasattr(array, "double") else array  # PyTorch's bfloat16
    return np.asarray(array).astype(np.float64)


def time_all(
    present: list[Contestant], rounds: int, on_round: Callable[[], None]
) -> list[list[float]]:
    """Return the seconds of a call, of each contestant in each round."""
    rng = np.random.default_rng(0)
    times: list[list[float]] = [[] for _ in present]
    with without_collections():
        repeats = [math.ceil(SECONDS / seconds_of(entrant, 1)) for entrant in present]
        for _ in range(rounds):
            for index in rng.permutation(len(present)):
                time.sleep(SETTLE)
                times[index].append(seconds_of(present[index], repeats[index]))
            on_round()
    return times


def seconds_of(entrant: Contestant, repeats: int) -> float:
    """Return the mean seconds of a call, the release of its result included."""
    if entrant.seconds is not None:
        return entrant.seconds(repeats)
    total = 0.0
    for _ in range(repeats):
        entrant.reset()
        began = time.perf_counter()
        entrant.call()
        total += time.perf_counter() - began
    return total / repeats


@contextmanager
def without_collections() -> Iterator[None]:
    """Keep the garbage collector from running within."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
