"""Measure the contestants of a task: answers first, then times, then memory.

All contestants are timed in one process, in random order, round by round: if the machine slows
down, it does so for all of them. Memory is measured in a fresh process, see `_memory`.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from array_api_compat import array_namespace

from doraxp._base.types import Array, HostArray, Namespace
from doraxp.bench import _cuda, _gpu, _memory
from doraxp.bench._contestant import Contestant
from doraxp.bench._contestants import contestants
from doraxp.bench._truth import Truth
from doraxp.bench._workloads import UNITS, Workload, draw, stored

SECONDS = 0.02
"""Seconds of a sample, which is the mean of as many calls as it takes to fill it."""
SETTLE = 0.03
"""Seconds of sleep before each sample: until then threads of the previous library may spin."""
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 4e-2}
"""The largest error to allow, relative to the largest value, by the dtype of the answer. PEFT
computes in low precision, where errors add up; the others only store in it."""


class WrongAnswerError(Exception):
    """A contestant computes something else, and its time would mean nothing."""


@dataclass(frozen=True)
class Measured:
    """The time and the memory of a contestant."""

    workload: Workload
    task: str
    name: str
    library: str
    kind: str
    seconds: list[float]
    """Of one call, in each round."""
    peak_bytes: int | None
    """Beyond the inputs; None where it cannot be measured."""
    host_seconds: float | None = None
    """Of one call; None where `seconds` are the host's too."""
    errors: dict[str, float] = field(default_factory=dict)
    """The largest error of each array of the answer, relative to the largest right value."""

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
    workload: Workload,
    libraries: Iterable[str],
    *,
    rounds: int,
    process: Executor,
    on_part: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """Return the time and memory of each contestant; `on_part` is called `rounds` + 2 times."""
    present = contestants(task, workload, libraries)
    errors = check_all(task, workload, present)
    on_part()
    times = time_all(present, rounds, on_part)
    names = [(one.library, one.name) for one in present]
    if present[0].peak is None:
        peaks = process.submit(_memory.peaks, task, workload, names).result()
    else:
        peaks = [one.peak() if one.peak else None for one in present]
    hosts = [one.host_seconds() if one.host_seconds else None for one in present]
    on_part()
    return [
        Measured(workload, task, one.name, one.library, one.kind, seconds, peak, host, wrong)
        for one, seconds, peak, host, wrong in zip(
            present, times, peaks, hosts, errors, strict=True
        )
    ]


def check_all(task: str, workload: Workload, present: list[Contestant]) -> list[dict[str, float]]:
    """Compare all contestants with the dense formulas; return the errors of each, by array.

    WrongAnswerError names the first that is too large. A contestant on a GPU is compared there: to
    copy its arrays to the host takes longer.
    """
    truths = _truths(workload, present)
    pairs = {(one.is_stored, one.kind) for one in present}
    right = {pair: truths[pair[0]].answers(task, pair[1]) for pair in pairs}
    found = []
    for one in present:
        one.reset()
        answer, errors = one.answer(one.call()), {}
        for name, array in right[one.is_stored, one.kind].items():
            what = f"{task}, {one.library}, {one.name}: {name}"
            errors[name] = _check(what, answer[name], array, one.tolerance)
        found.append(errors)
    return found


def _truths(workload: Workload, present: list[Contestant]) -> dict[bool, Truth]:
    """Return the right answers by `Contestant.is_stored`."""
    if any(one.library == _gpu.LIBRARY for one in present):
        return dict.fromkeys((False, True), _gpu.truth(workload))
    if workload.device == "cuda":
        return {True: _cuda.truth(workload)}
    inputs = {False: draw, True: stored}
    rounds = workload.dtype in UNITS
    of = {one.is_stored for one in present} if rounds else {False}
    made = {key: Truth(inputs[key](workload), workload.config.scaling) for key in of}
    return made if rounds else dict.fromkeys((False, True), made[False])


def _check(what: str, array: Array, right: Array, tolerance: float | None) -> float:
    tolerance = max(tolerance or 0.0, TOLERANCES[str(array.dtype).rpartition(".")[-1]])
    error = _error(array, right)
    if not error <= tolerance:  # NaN too
        raise WrongAnswerError(f"{what} must be within {tolerance} of the dense one, got {error}")
    return error


def _error(array: Array, right: Array) -> float:
    """Return the largest error over the largest right value, computed where `right` is."""
    if type(right) is not np.ndarray:  # on a GPU
        array = array.double() if hasattr(array, "double") else array  # PyTorch's bfloat16
        array = array_namespace(right).asarray(array, dtype=right.dtype)
    else:
        array, right = on_host(array), on_host(right)
    xp: Namespace = array_namespace(right)
    return float(xp.max(xp.abs(array - right))) / float(xp.max(xp.abs(right)))


def on_host(array: Array) -> HostArray:
    """Return an array in host memory, of any library, as a NumPy array in float64."""
    array = array.double() if hasattr(array, "double") else array  # PyTorch's bfloat16
    return np.asarray(array).astype(np.float64)


def time_all(
    present: list[Contestant], rounds: int, on_round: Callable[[], None]
) -> list[list[float]]:
    """Return the seconds of a call, of each contestant in each round."""
    rng = np.random.default_rng(0)
    times: list[list[float]] = [[] for _ in present]
    with without_collections():
        repeats = [math.ceil(SECONDS / seconds_of(one, 1)) for one in present]
        for _ in range(rounds):
            for index in rng.permutation(len(present)):
                time.sleep(SETTLE)
                times[index].append(seconds_of(present[index], repeats[index]))
            on_round()
    return times


def seconds_of(contestant: Contestant, repeats: int) -> float:
    """Return the mean seconds of a call, the release of its result included."""
    if contestant.seconds is not None:
        return contestant.seconds(repeats)
    total = 0.0
    for _ in range(repeats):
        contestant.reset()
        began = time.perf_counter()
        contestant.call()
        total += time.perf_counter() - began
    return total / repeats


@contextmanager
def without_collections() -> Iterator[None]:
    """Keep the garbage collector from running inside the `with` block."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
