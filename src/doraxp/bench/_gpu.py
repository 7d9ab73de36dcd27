"""The contestants on a GPU: CuPy's bare products, doraxp on CuPy, and PEFT on PyTorch.

x and dy are in the weight's dtype, as they are in training. Each contestant uses several sets of
inputs in turn: no call finds its inputs in the GPU's cache. `_device` has the clock.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from operator import matmul
from typing import Any

from array_api_compat import array_namespace

from doraxp._base.types import Adapter, Array, Config, Namespace
from doraxp.backends import reduced_precision
from doraxp.bench import _device, _peft
from doraxp.bench._contestant import Contestant
from doraxp.bench._truth import Truth
from doraxp.bench._ways import Way, ways
from doraxp.bench._workloads import Inputs, Workload, draw

LIBRARY = "cupy"
ROTATED = 1 << 28
"""Bytes of all sets of weight, x and dy, at least one: more than the GPU's cache has."""
SHAPES = [(4096, 4096, 16), (4096, 11008, 16), (8192, 28672, 64), (8192, 28672, 256)]
"""out, in and rank of the default workloads."""
DTYPES, TOKENS = ("bfloat16", "float32"), (1, 128, 4096)
REDUCED = {"float64": 1e-12, "float32": 4e-3, "float16": 4e-3, "bfloat16": 4e-2}
"""The largest error to allow in reduced precision, relative to the largest value, by the weight's
dtype. The answers are float32."""
CUT = 2.0**-23
"""Tensor cores cut off at most so much of a float32 sum with each 16 terms that they add."""


def suite() -> Iterator[Workload]:
    """Yield the default workloads."""
    for (out, inner, rank), dtype, tokens in itertools.product(SHAPES, DTYPES, TOKENS):
        yield Workload(out, inner, tokens, rank, dtype)


def contestants(task: str, workload: Workload) -> Iterator[Contestant]:
    """Yield CuPy's contestants, the bare product first; then PEFT's if PyTorch finds the device."""
    cupy = importlib.import_module("cupy")
    host = stored(workload)
    numbers = sum(math.prod(array.shape) for array in (host.weight, host.x, host.dy))
    count = max(1, math.ceil(ROTATED / (numbers * host.weight.dtype.itemsize)))
    sets = [_on_device(cupy, host) for _ in range(count)]
    made = [list(_ways(task, inputs, workload.config)) for inputs in sets]
    for of_all in zip(*made, strict=True):
        way = of_all[0]
        call = _in_turn([partial(one.function, *one.arrays) for one in of_all])
        yield Contestant(
            way.name,
            LIBRARY,
            way.kind,
            call,
            way.answer,
            seconds=partial(_device.seconds, cupy, call),
            host_seconds=partial(_device.host_seconds, cupy, call),
            peak=partial(_device.peak, cupy, call),
            tolerance=_tolerance(way, workload),
        )
    if _peft.why_not() is None and importlib.import_module("torch").cuda.is_available():
        for theirs in _peft.on_cuda(task, workload, count):
            yield theirs._replace(
                seconds=partial(_device.seconds, cupy, theirs.call, reset=theirs.reset),
                host_seconds=partial(_device.host_seconds, cupy, theirs.call, theirs.reset),
            )


def stored(workload: Workload) -> Inputs:
    """Return the inputs with x and dy in the weight's dtype."""
    weight, adapter, x, dy = draw(workload)
    xp: Namespace = array_namespace(weight)
    return Inputs(weight, adapter, *(xp.astype(array, weight.dtype) for array in (x, dy)))


def truth(workload: Workload) -> Truth:
    """Return the right answers, computed on the device in float64."""
    inputs = _on_device(importlib.import_module("cupy"), stored(workload))
    return Truth(inputs, workload.config.scaling)


def _tolerance(way: Way, workload: Workload) -> float | None:
    """Return the error to allow, or None for the usual one."""
    if workload.dtype not in ("float16", "bfloat16"):
        return REDUCED[workload.dtype] if way.name.endswith("reduced") else None
    # A bare W Aᵀ rounds A to the weight's dtype.
    if way.name.endswith("reduced") or way.kind == "bare":
        return REDUCED[workload.dtype]
    # The factors lose nothing: the tensor cores cut off parts of the sums alone.
    return CUT * max(workload.out, workload.inner, workload.tokens) / 16


def _in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """Return a function that makes the next of the calls each time, the first after the last."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def _on_device(cupy: Any, inputs: Inputs) -> Inputs:
    weight, adapter, x, dy = inputs
    leaves = Adapter(*map(cupy.asarray, adapter))
    return Inputs(cupy.asarray(weight), leaves, cupy.asarray(x), cupy.asarray(dy))


def _ways(task: str, inputs: Inputs, config: Config) -> Iterator[Way]:
    """Yield each way to do a task with one set of inputs, those in reduced precision last."""
    bare = _bare(task, inputs)
    if bare is not None:
        yield bare
    for reduced in (False, True) if task in ("forward", "backward", "step") else (False,):
        with _precision(reduced):  # a backward in reduced precision belongs to such a forward
            made = list(ways(task, inputs, config))
        for way in made:
            if way.kind != "bare":
                name = f"{way.name}, reduced" if reduced else way.name
                yield way._replace(name=name, function=partial(_call, reduced, way.function))


def _precision(reduced: bool) -> contextlib.AbstractContextManager[None]:
    return reduced_precision() if reduced else contextlib.nullcontext()


def _call(reduced: bool, function: Callable[..., Any], *arrays: Any) -> Any:
    with _precision(reduced):
        return function(*arrays)


def _bare(task: str, inputs: Inputs) -> Way | None:
    """Return the library's own products in the weight's dtype, or its own copy."""
    weight, adapter, x, dy = inputs
    xp: Namespace = array_namespace(weight)
    transposed = xp.matrix_transpose
    if task == "merge":
        return Way("bare copy", "bare", _copied, (weight,), lambda copy: {"W'": copy})
    if task == "norm":
        a = transposed(xp.astype(adapter.lora_a, weight.dtype))
        return Way("bare W Aᵀ", "bare", matmul, (weight, a), lambda u: {"W Aᵀ": u})
    if task == "backward":
        return Way("bare product", "bare", matmul, (dy, weight), lambda dx: {"dx": dx})
    if task == "step":
        return Way("bare products", "bare", _products, (x, dy, weight), dict)
    if task == "adamw":
        return None
    return Way("bare product", "bare", matmul, (x, transposed(weight)), lambda y: {"y": y})


def _products(x: Array, dy: Array, weight: Array) -> dict[str, Array]:
    return {"y": x @ array_namespace(weight).matrix_transpose(weight), "dx": dy @ weight}


def _copied(weight: Any) -> Any:
    """Return a copy by the device's own copy: CuPy's kernel takes several times as long."""
    copy = weight.__class__(weight.shape, weight.dtype)
    copy.data.copy_from_device_async(weight.data, weight.nbytes)
    return copy
