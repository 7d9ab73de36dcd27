"""The cells of docs/reference/support.md: a feature, run on one array library in one dtype.

    right          every number is within its bound of the reference in `doraxp.testing`
    refused        the package raises an error that says why
    not possible   the library lacks the dtype or a function

`limits` declares each cell that is not right, with its reason. The test of a cell fails where the
declaration and the run differ.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from backends import Lane
from test_row_weight import packed_arrays, values_of

import doraxp
from doraxp import Adapter, QuantisedWeight
from doraxp.backends import compute_dtype, exact_products, operations
from doraxp.testing import (
    Case,
    Expected,
    catalogue,
    expected,
    expected_of_operator,
    expected_steps,
    operator_catalogue,
    optimizer_catalogue,
)

DTYPES = ("float16", "bfloat16", "float32", "float64")
GRADIENTS = ("dx", "da", "db", "dm", "dw", "dbias")
PLAIN = ("tall", "direction form, detached")
HARD = ("cancelling rows", "zero row")
OPERATED = (
    "grouped convolution",
    "convolution, dropout",
    "scaled embedding",
    "embedding, detached",
)
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
LEAST = {"float16": 2.0**-24, "bfloat16": 2.0**-126}
CASES = {case.name: case for case in catalogue()}
PACKAGE = Path(doraxp.__file__).parent
Checks = Iterator[tuple[str, Any, Expected]]


def state(lane: Lane, feature: str, dtype: str) -> str:
    """Run a feature, and return the state of its cell.

    Raises
    ------
    AssertionError
        A result is wrong: its library, dtype, shape or a number.
    """
    try:
        checks = list(FEATURES[feature](lane, dtype))
        read = lane.read([actual for _, actual, _ in checks])
        for (name, _, want), values in zip(checks, read, strict=True):
            assert values.dtype.name == want.dtype, (name, values.dtype)
            assert want.share(values) <= 1, (name, want.share(values))
    except AssertionError:
        raise
    except Exception as error:  # of any type: a library's own one says that it lacks something
        last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        refused = isinstance(error, TypeError | ValueError) and last.is_relative_to(PACKAGE)
        return "refused" if refused else "not possible"
    return "right"


def version(lane: Lane) -> str:
    """Return the version of the lane's library."""
    return importlib.metadata.version(lane.distribution)


def decompose(lane: Lane, dtype: str) -> Checks:
    for case, want in chosen(lane, dtype, PLAIN[0], *HARD):
        weight = inputs(lane, case, dtype)["weight"]
        magnitude, _ = lane.run(doraxp.decompose, weight)
        yield "initial", magnitude, want["initial"]


def forward(lane: Lane, dtype: str) -> Checks:
    for case, want in chosen(lane, dtype, *PLAIN):
        yield from named(layer(lane, case, dtype, backward=False), want, "y", "norm")


def backward(lane: Lane, dtype: str) -> Checks:
    for case, want in chosen(lane, dtype, *PLAIN):
        yield from named(layer(lane, case, dtype), want, *GRADIENTS)


def dropout(lane: Lane, dtype: str) -> Checks:
    for case, want in chosen(lane, dtype, "dropout", "low-rank dropout, direction form"):
        yield from named(layer(lane, case, dtype), want, "y", *GRADIENTS)


def stacks(lane: Lane, dtype: str) -> Checks:
    for case, want in chosen(lane, dtype, "dropout, stack"):
        yield from named(layer(lane, case, dtype), want, "y", *GRADIENTS)


def hard_rows(lane: Lane, dtype: str) -> Checks:
    """Run rows whose parts cancel, rows of zeros and magnitudes below zero."""
    for case, want in chosen(lane, dtype, *HARD):
        yield from named(layer(lane, case, dtype), want, "norm", "y", *GRADIENTS)


def merge(lane: Lane, dtype: str) -> Checks:
    for case, want in chosen(lane, dtype, *PLAIN):
        arrays = inputs(lane, case, dtype)
        merged = lane.run(doraxp.merge, arrays["weight"], adapter_of(arrays), case.config)
        yield "merged", merged, want["merged"]


def optimizer(lane: Lane, dtype: str) -> Checks:
    """Step the adapter of a layer that is stored in `dtype`: it is in the compute dtype."""
    wide = wide_of(dtype)
    lane.asarray(np.ones(1, dtype))  # the layer's weight
    for case in optimizer_catalogue():
        if case.optimizer not in ("adamw", "sgd"):
            continue
        init, step = (getattr(doraxp, f"{case.optimizer}_{name}") for name in ("init", "step"))
        params, *grads = (
            Adapter(*(lane.asarray(given[name].astype(wide)) for name in Adapter._fields))
            for given in (case.params, *case.grads)
        )
        want, state = expected_steps(case, wide), lane.run(init, params)
        for t, gradient in enumerate(grads, start=1):
            params, state = lane.run(step, params, gradient, state, **case.numbers)
            found = {f"{name} {t}": leaf for name, leaf in params._asdict().items()}
            yield from named(found, want, *found)


def convolution(lane: Lane, dtype: str) -> Checks:
    yield from operated(lane, dtype, "convolution")


def embedding(lane: Lane, dtype: str) -> Checks:
    yield from operated(lane, dtype, "embedding")


def quantised(lane: Lane, dtype: str) -> Checks:
    """Compute around a weight that stays packed."""
    codes, table, scale, bias = packed_arrays(shape=(8, 24), bias=True)
    values = values_of(codes, table, scale, bias, 8)
    base = CASES["tall"]
    rng = np.random.default_rng(7)
    shapes = {"x": (4, 24), "lora_a": (len(base.arrays["lora_a"]), 24)}
    case = dataclasses.replace(
        base,
        arrays={
            **base.arrays,
            "weight": values.astype(float),
            **{name: rng.standard_normal(shape) for name, shape in shapes.items()},
        },
    )
    arrays = inputs(lane, case, dtype)
    weight = QuantisedWeight(
        *map(lane.asarray, (codes, table, scale)),
        group=8,
        bias=lane.asarray(bias),
        dtype=arrays["weight"].dtype,
    )
    want = expected(case, dtype, precision=precision(lane, dtype))
    found = layer(lane, case, dtype, weight=weight)
    yield from named(found, want, "norm", "y", *GRADIENTS[:4])
    merged = lane.run(doraxp.merge, weight, adapter_of(arrays), case.config)
    yield "merged", merged, want["merged"]


def graph(lane: Lane, dtype: str) -> Checks:
    """Trace a forward, a backward and a step without values, and compute the traced graph."""
    case = CASES["tall"]
    arrays = host_inputs(case, dtype)

    def traced(given: list[Any]) -> list[Any]:
        found = dict(zip(arrays, given, strict=True))
        y, cache = doraxp.forward(
            found["x"], found["weight"], adapter_of(found), case.config, bias=found["bias"]
        )
        grads = doraxp.backward(found["dy"], cache, train_base=True)
        return [y, grads.x, *grads.adapter, grads.weight, grads.bias]

    names = ("y", *GRADIENTS)
    want = expected(case, dtype, precision=precision(lane, dtype))
    outputs = lane.compiled(traced, list(arrays.values()))
    yield from named(dict(zip(names, outputs, strict=True)), want, *names)


FEATURES: dict[str, Callable[[Lane, str], Checks]] = {
    "decompose": decompose,
    "forward": forward,
    "backward": backward,
    "merge": merge,
    "optimizer step": optimizer,
    "rows that cancel": hard_rows,
    "stacks": stacks,
    "dropout": dropout,
    "convolution": convolution,
    "embedding": embedding,
    "quantised weight": quantised,
    "jit, graph": graph,
}


def chosen(lane: Lane, dtype: str, *names: str) -> Iterator[tuple[Case, dict[str, Expected]]]:
    """Yield cases of the catalogue with their expected results."""
    for name in names:
        case = CASES[name]
        want = expected(case, dtype, precision=precision(lane, dtype))
        yield case, want | expected(case, dtype, names=("initial",))


def named(found: dict[str, Any], want: dict[str, Expected], *names: str) -> Checks:
    for name in names:
        if name in want:
            yield name, found[name], want[name]


def precision(lane: Lane, dtype: str) -> Any:
    """Return the precision in which the library computes, as `doraxp.testing.Library` does."""
    weight = lane.asarray(np.zeros((1, 1), dtype))
    ops = operations(weight=weight)
    wide = compute_dtype(weight, xp=ops.xp)
    return "exact" if ops.operand_dtype(weight, weight, wide, masked=True) == wide else "mixed"


def host_inputs(case: Any, dtype: str) -> dict[str, Any]:
    """Return the NumPy arrays of a case: the adapter in the compute dtype, ids as they are."""
    found = {}
    for name, array in case.arrays.items():
        if array.dtype.kind == "i":
            found[name] = array
        elif name in Adapter._fields:
            found[name] = array.astype(wide_of(dtype))
        else:
            found[name] = array.astype(dtype)
    return found


def inputs(lane: Lane, case: Any, dtype: str) -> dict[str, Any]:
    """Return the arrays of a case, of the lane's library."""
    return {name: lane.asarray(array) for name, array in host_inputs(case, dtype).items()}


def adapter_of(arrays: dict[str, Any]) -> Adapter:
    return Adapter(*(arrays[name] for name in Adapter._fields))


def layer(
    lane: Lane, case: Any, dtype: str, *, backward: bool = True, weight: Any = None, **options: Any
) -> dict[str, Any]:
    """Return the results of a forward and a backward pass by their names in the catalogue."""
    arrays = inputs(lane, case, dtype)
    dense = weight is None
    weight = arrays["weight"] if dense else weight
    y, cache = lane.run(
        doraxp.forward,
        arrays["x"],
        weight,
        adapter_of(arrays),
        case.config,
        bias=arrays.get("bias"),
        dropout_mask=arrays.get("dropout_mask"),
        **options,
    )
    found = {"y": y, "norm": cache.prepared.norm}
    if backward:
        grads = lane.run(doraxp.backward, arrays["dy"], cache, train_base=dense)
        found |= dict(
            zip(GRADIENTS, (grads.x, *grads.adapter, grads.weight, grads.bias), strict=True)
        )
    return found


def operated(lane: Lane, dtype: str, kind: str) -> Checks:
    """Run the catalogue's convolutions or embeddings. Products of 16 bits are exact here."""
    for case in operator_catalogue():
        if case.kind != kind or case.name not in OPERATED:
            continue
        case = rounded(case, dtype)
        want = {
            name: narrowed(one, dtype) if name in ("y", "dx", "merged") else one
            for name, one in expected_of_operator(case, wide_of(dtype)).items()
        }
        with exact_products():
            found = layer(lane, case, dtype, operator=case.operator, kind=case.layer_kind)
            yield from named(found, want, "norm", "y", *GRADIENTS)


def rounded(case: Any, dtype: str) -> Any:
    """Return a case with the numbers of x, dy and the weight rounded to 16 bits."""
    if dtype not in ROUNDOFF:
        return case
    arrays = {
        name: array
        if name in Adapter._fields or array.dtype.kind == "i"
        else array.astype(dtype).astype(np.float64)
        for name, array in case.arrays.items()
    }
    return dataclasses.replace(case, arrays=arrays)


def wide_of(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def narrowed(want: Expected, dtype: str) -> Expected:
    """Return the expected result of an array that is rounded to the storage dtype."""
    if dtype not in ROUNDOFF:
        return want
    bound = want.bound + ROUNDOFF[dtype] * np.abs(want.value) + LEAST[dtype]
    return Expected(want.value, bound, dtype)
