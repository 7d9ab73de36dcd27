"""Who takes part on a GPU: CuPy's bare products, doraxp on CuPy, and PEFT on PyTorch there.

x and dy are in the weight's dtype, as they are in training. Each contestant goes round several sets
of inputs, so that none is found in the cache. Time is the device's, between two events: its queue
is held while the host fills it, so that a short call does not take as long as Python needs for it.
What the host needs is measured too. Memory is that of the library's pool.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from array_api_compat import array_namespace

from doraxp._base.types import Adapter, Array, Config
from doraxp.backends import reduced_precision
from doraxp.cli._bench import contestants as on_any
from doraxp.cli._bench import peft
from doraxp.cli._bench.cases import Case, Dense, Inputs, draw
from doraxp.cli._bench.contestants import Contestant

LIBRARY = "cupy"
ROTATED = 1 << 28
"""Bytes of weight, x and dy that a contestant goes round, or one set: more than a cache holds."""
CASES = [(4096, 4096, 16), (4096, 11008, 16), (8192, 28672, 64), (8192, 28672, 256)]
"""What is measured where nothing else is asked for: out, in, rank."""
QUEUED = 8
"""Calls that are made while the queue is held: it takes some thousand launches."""
HOLD = r"""
extern "C" __global__ void hold(unsigned long long nanoseconds) {
    unsigned long long began, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(began));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (now - began < nanoseconds);
}
"""
DTYPES, TOKENS = ("bfloat16", "float32"), (1, 128, 4096)
REDUCED = {"float64": 1e-12, "float32": 4e-3, "float16": 4e-3, "bfloat16": 4e-2}
"""Largest error over largest value of what is in float32, by the weight's dtype."""
CUT = 2.0**-23
"""What tensor cores cut off a sum in float32 with each 16 terms that they add, at most."""


def suite() -> Iterator[Case]:
    """Yield the cases that are measured where nothing else is asked for."""
    for (out, inner, rank), dtype, tokens in itertools.product(CASES, DTYPES, TOKENS):
        yield Case(out, inner, tokens, rank, dtype)


def contestants(task: str, case: Case) -> Iterator[Contestant]:
    """Yield CuPy's, the bare product first; and PEFT's where PyTorch finds the device."""
    cupy = importlib.import_module("cupy")
    host = stored(case)
    count = max(1, math.ceil(ROTATED / sum(a.nbytes for a in (host.weight, host.x, host.dy))))
    sets = [_on_device(cupy, host) for _ in range(count)]
    rows = [list(_rows(task, inputs, case.config)) for inputs in sets]
    for of_all in zip(*rows, strict=True):
        (name, kind, _, answer), tolerance = of_all[0], exact_tolerance(case)
        # A bare W Aᵀ rounds A to the weight's dtype.
        if name.endswith("reduced") or (kind == "bare" and host.weight.dtype.itemsize == 2):
            tolerance = REDUCED[case.dtype]
        calls = itertools.cycle([call for _, _, call, _ in of_all])
        call = partial(_next, calls)
        yield Contestant(
            name, LIBRARY, kind, call, answer, seconds=partial(seconds, cupy, call),
            host_seconds=partial(host_seconds, cupy, call), peak=partial(peak, cupy, call),
            tolerance=tolerance,
        )  # fmt: skip
    if peft.why_not() is None and importlib.import_module("torch").cuda.is_available():
        for theirs in peft.on_cuda(task, case, count):
            yield theirs._replace(
                seconds=partial(seconds, cupy, theirs.call, reset=theirs.reset),
                host_seconds=partial(host_seconds, cupy, theirs.call, theirs.reset),
            )


def exact_tolerance(case: Case) -> float | None:
    """Return that of products whose factors lose nothing, or None for the usual one."""
    terms = max(case.out, case.inner, case.tokens)
    return CUT * terms / 16 if case.dtype in ("float16", "bfloat16") else None


def stored(case: Case) -> Inputs:
    """Return the inputs with x and dy in the weight's dtype."""
    weight, adapter, x, dy = draw(case)
    return Inputs(weight, adapter, x.astype(weight.dtype), dy.astype(weight.dtype))


def dense(case: Case) -> Dense:
    """Return the answers, computed on the device in float64."""
    return Dense(_on_device(importlib.import_module("cupy"), stored(case)), case.config.scaling)


def device() -> dict[str, Any]:
    """Return what the figures were measured on."""
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
    """Return the version of NVIDIA's driver, or None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        if said.returncode == 0:
            return said.stdout.split()[0]
    return None


Call: TypeAlias = Callable[[], Any]


def seconds(cupy: Any, call: Call, repeats: int, reset: Call | None = None) -> float:
    """Return the seconds of a call on the device, whose queue is never empty between two."""
    _, host = _timed(cupy, call, reset, 1, 0.0)
    total, left = 0.0, repeats
    while left > 0:
        count = min(QUEUED, left)
        total += _timed(cupy, call, reset, count, 2 * host + 1e-5)[0]
        left -= count
    return total / repeats


def host_seconds(cupy: Any, call: Call, reset: Call | None = None) -> float:
    """Return the seconds that the host needs to put a call into the queue, the median of some."""
    samples = [_timed(cupy, call, reset, QUEUED, 0.0)[1] / QUEUED for _ in range(5)]
    return statistics.median(samples)


def _timed(
    cupy: Any, call: Call, reset: Call | None, count: int, hold: float
) -> tuple[float, float]:
    """Return the seconds of `count` calls, on the device and on the host.

       The queue is held for `hold` times as many.
    With `reset` there are two events to each call,
       else two around them all.
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


def peak(cupy: Any, call: Callable[[], Any]) -> int:
    """Return the most bytes that a call holds at once, its result included."""

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


def _next(calls: Iterator[Callable[[], Any]]) -> Any:
    return next(calls)()


def _on_device(cupy: Any, inputs: Inputs) -> Inputs:
    weight, adapter, x, dy = inputs
    leaves = Adapter(*map(cupy.asarray, adapter))
    return Inputs(cupy.asarray(weight), leaves, cupy.asarray(x), cupy.asarray(dy))


Row = tuple[str, str, Callable[[], Any], Callable[[Any], dict[str, Array]]]


def _rows(task: str, inputs: Inputs, config: Config) -> Iterator[Row]:
    """Yield name, kind, call and answer of each way to do a task, with one set of inputs."""
    bare = _bare(task, inputs)
    if bare is not None:
        yield bare
    for reduced in (False, True) if task in ("forward", "backward", "step") else (False,):
        enter = partial(_enter, reduced)
        with _precision(reduced):  # the forward that a backward belongs to, too
            rows = list(on_any.entries(task, enter, inputs, config))
        yield from (row for row in rows if row[1] != "bare")


def _precision(reduced: bool) -> contextlib.AbstractContextManager[None]:
    return reduced_precision() if reduced else contextlib.nullcontext()


def _enter(
    reduced: bool, label: str, kind: str, function: Callable[..., Any], *arrays: Any,
    answer: Callable[[Any], dict[str, Array]],
) -> Row:  # fmt: skip
    def call() -> Any:
        with _precision(reduced):
            return function(*arrays)

    return f"{label}, reduced" if reduced else label, kind, call, answer


def _copied(weight: Array) -> Array:
    """Return a copy by the device's own copy: CuPy's kernel for it takes several times as long."""
    copy = weight.__class__(weight.shape, weight.dtype)
    copy.data.copy_from_device_async(weight.data, weight.nbytes)
    return copy


def _bare(task: str, inputs: Inputs) -> Row | None:
    """Return the library's own products, in the weight's dtype, or its copy."""
    weight, adapter, x, dy = inputs
    transposed = array_namespace(weight).matrix_transpose
    if task == "merge":
        return "bare copy", "bare", partial(_copied, weight), lambda copy: {"W'": copy}
    if task == "norm":
        a = transposed(adapter.lora_a.astype(weight.dtype))
        return "bare W Aᵀ", "bare", lambda: weight @ a, lambda u: {"W Aᵀ": u}
    if task == "backward":
        return "bare product", "bare", lambda: dy @ weight, lambda dx: {"dx": dx}
    if task == "step":

        def products() -> tuple[Array, Array]:
            return x @ transposed(weight), dy @ weight

        return "bare products", "bare", products, lambda made: {"y": made[0], "dx": made[1]}
    if task == "adamw":
        return None
    return "bare product", "bare", lambda: x @ transposed(weight), lambda y: {"y": y}
