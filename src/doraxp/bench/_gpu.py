"""The contestants on a GPU: CuPy's bare products, doraxp on CuPy, and PEFT on PyTorch.

x and dy are in the weight's dtype, as they are in training. Each contestant uses several sets of
inputs in turn: no call finds its inputs in the GPU's cache. `_device` has the clock.

    default            a 16-bit weight: z and g⊙dy are stored in 16 bits. float32: all in float32
    , exact products   a 16-bit weight, in `exact_products`
    , TF32             a float32 weight, in `reduced_precision`
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from doraxp._base.types import Adapter
from doraxp.backends import exact_products, reduced_precision
from doraxp.bench import _device, _peft
from doraxp.bench._contestant import Contestant
from doraxp.bench._truth import Truth
from doraxp.bench._ways import Way, bare, ways
from doraxp.bench._workloads import IN_PRODUCTS, ROUNDINGS, UNITS, Inputs, Workload, stored

LIBRARY = "cupy"
ROTATED = 1 << 28
"""Bytes of all sets of weight, x and dy, at least one: more than the GPU's cache has."""
SHAPES = [(4096, 4096, 16), (4096, 11008, 16), (8192, 28672, 64), (8192, 28672, 256)]
"""out, in and rank of the default workloads."""
DTYPES, TOKENS = ("bfloat16", "float32"), (1, 128, 4096)
TF32_UNIT = 2.0**-11
"""The unit roundoff of TF32."""
CUT = 2.0**-23
"""Tensor cores cut off at most so much of a float32 sum with each 16 terms that they add."""


class Mode(NamedTuple):
    """A precision of the products: the end of a contestant's name, and a block to call it in."""

    suffix: str
    block: Callable[[], contextlib.AbstractContextManager[None]]


DEFAULT = Mode("", contextlib.nullcontext)
EXACT = Mode(", exact products", exact_products)
TF32 = Mode(", TF32", reduced_precision)


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
    made = [list(_ways(task, inputs, workload)) for inputs in sets]
    for of_all in zip(*made, strict=True):
        mode, way = of_all[0]
        call = _in_turn([partial(one.function, *one.arrays) for _, one in of_all])
        yield Contestant(
            way.name,
            LIBRARY,
            way.kind,
            call,
            way.answer,
            seconds=partial(_device.seconds, cupy, call),
            host_seconds=partial(_device.host_seconds, cupy, call),
            peak=partial(_device.peak, cupy, call),
            tolerance=_tolerance(task, workload, way.kind, mode),
        )
    if _peft.why_not() is None and importlib.import_module("torch").cuda.is_available():
        for theirs in _peft.on_cuda(task, workload, count):
            yield theirs._replace(
                seconds=partial(_device.seconds, cupy, theirs.call, reset=theirs.reset),
                host_seconds=partial(_device.host_seconds, cupy, theirs.call, theirs.reset),
            )


def truth(workload: Workload) -> Truth:
    """Return the right answers, computed on the device in float64."""
    inputs = _on_device(importlib.import_module("cupy"), stored(workload))
    return Truth(inputs, workload.config.scaling)


def _tolerance(task: str, workload: Workload, kind: str, mode: Mode) -> float | None:
    """Return the error to allow, or None for the usual one."""
    if workload.roundings is None:
        return ROUNDINGS * TF32_UNIT if mode is TF32 else None
    # A bare W Aᵀ rounds A to the weight's dtype.
    if kind == "bare" or (mode is DEFAULT and task in IN_PRODUCTS):
        return workload.roundings
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


def _ways(task: str, inputs: Inputs, workload: Workload) -> Iterator[tuple[Mode, Way]]:
    """Yield each way to do a task with one set of inputs, and its mode; the default mode first."""
    own = bare(task, inputs, _copied)
    if own is not None:
        yield DEFAULT, own
    for mode in _modes(task, workload.dtype):
        with mode.block():  # a backward belongs to a forward of its mode
            made = list(ways(task, inputs, workload.config))
        for way in made:
            if way.kind != "bare":
                function = partial(_call, mode, way.function)
                yield mode, way._replace(name=way.name + mode.suffix, function=function)


def _modes(task: str, dtype: str) -> list[Mode]:
    """Return the modes in which a task differs for a weight of this dtype."""
    other = {**dict.fromkeys(UNITS, EXACT), "float32": TF32}.get(dtype)
    return [DEFAULT, other] if other is not None and task in IN_PRODUCTS else [DEFAULT]


def _call(mode: Mode, function: Callable[..., Any], *arrays: Any) -> Any:
    with mode.block():
        return function(*arrays)


def _copied(weight: Any) -> Any:
    """Return a copy by the device's own copy: CuPy's kernel takes several times as long."""
    copy = weight.__class__(weight.shape, weight.dtype)
    copy.data.copy_from_device_async(weight.data, weight.nbytes)
    return copy
