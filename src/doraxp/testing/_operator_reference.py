"""The expected results of convolutions and embeddings, by the dense formulas.

Each is a linear layer of other inputs. The windows of x are the tokens of a convolution. The tokens
of an embedding are rows of zeros with `scale` at the id. A weight of groups is a stack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import array_api_compat.numpy
import numpy as np

from doraxp.backends import Windows, sources, unfolded
from doraxp.testing._formulas import QUANTITIES, DenseFormulas, Formula, deviating
from doraxp.testing._operator_cases import Arrays, OperatorCase
from doraxp.testing._reference import Expected, Results, bounded
from doraxp.testing._rounding import Rounded

_NUMPY: Any = array_api_compat.numpy
NAMES = (*QUANTITIES, "initial", "gain")


class OperatorFormulas(DenseFormulas):
    """The linear layer that a convolution or an embedding is."""

    kernel = 1
    """The number of places in a convolution's kernel."""
    scale = 1.0
    """The number that multiplies the rows of an embedding."""
    base_scale = update_scale = 1.0
    """Factors beside `scale`, for deviations that scale W and the update apart."""


def expected_of_operator(
    case: OperatorCase, dtype: str, number: Formula = Rounded.exact
) -> dict[str, Expected]:
    """Return the expected results of a case with bounds on their rounding errors.

    Parameters
    ----------
    case : OperatorCase
    dtype : {"float32", "float64"}
    number : callable, optional
        Returns the numbers in which the formulas are evaluated.

    Returns
    -------
    dict of str to Expected
        norm, merged, y, dx, da, db, dm, dw, dbias, initial and gain; an embedding has no dx, and
        only a case with a bias has dbias. merged and dw are as the weight is stored.

    Examples
    --------
    >>> from doraxp.testing import operator_catalogue
    >>> found = expected_of_operator(operator_catalogue()[0], "float32")
    >>> found["y"].value.shape
    (2, 6, 5, 5)
    """
    results = operator_results(case, dtype, number=number)
    return {name: results.of(name) for name in results.names}


def operator_results(
    case: OperatorCase,
    dtype: str,
    changes: Mapping[str, Formula] | None = None,
    number: Formula = Rounded.exact,
) -> Results:
    """Return the results of a case, by the reference or by one that deviates."""
    inputs = case.stored(dtype)
    reference = deviating(OperatorFormulas, changes) if changes else OperatorFormulas
    layer = reference(case.config, _as_linear(case, inputs), number)
    if case.kind == "convolution":
        layer.kernel = math.prod(inputs["weight"].shape[2:])
    else:
        layer.scale = case.numbers["scale"]

    def of(name: str) -> Expected:
        value, shape = _as_stored(case, name, getattr(layer, name), inputs)
        return bounded(name, value, shape, dtype)

    absent = {"dx"} if case.kind == "embedding" else set()
    absent |= set() if "bias" in inputs else {"dbias"}
    return Results(tuple(name for name in NAMES if name not in absent), of)


def _as_linear(case: OperatorCase, inputs: Arrays) -> Arrays:
    """Return the inputs of the linear layer."""
    matrix = case.layer_kind.matrix(inputs["weight"])
    *stack, out, inner = matrix.shape
    linear = {**inputs, "weight": matrix}
    if case.kind == "embedding":
        tokens = np.zeros((inputs["x"].size, inner))
        tokens[np.arange(len(tokens)), inputs["x"].ravel()] = case.numbers["scale"]
        return {**linear, "x": tokens, "dy": inputs["dy"].reshape(-1, out)}
    groups = case.numbers["groups"]
    for name in {"x", "dropout_mask"} & inputs.keys():
        columns = unfolded(inputs[name], case.windows, groups, xp=_NUMPY)
        linear[name] = _NUMPY.reshape(columns, (*stack, *columns.shape[1:]))
    dy = inputs["dy"]
    by_group = dy.reshape(len(dy), groups, out, -1).transpose(1, 0, 3, 2)
    linear["dy"] = by_group.reshape(*stack, -1, out)
    linear["bias"] = inputs["bias"].reshape(*stack, out)
    return linear


def _as_stored(
    case: OperatorCase, name: str, value: Any, inputs: Arrays
) -> tuple[Any, tuple[int, ...]]:
    """Return a quantity of the linear layer as the operator has it, and its shape."""
    like = {
        "merged": "weight", "dw": "weight", "y": "dy", "dx": "x", "da": "lora_a", "db": "lora_b",
        "dbias": "bias",
    }  # fmt: skip
    shape = inputs[like.get(name, "magnitude")].shape
    if case.kind == "embedding":
        return (value.mT if name in ("merged", "dw") else value), shape
    if name == "y":
        batch, groups, out = shape[0], case.numbers["groups"], shape[1] // case.numbers["groups"]
        split = value.reshape(groups, batch, math.prod(shape[2:]), out)
        return _permuted(split, (1, 0, 3, 2)), shape
    if name == "dx":
        return _folded(value, case.windows, shape), shape
    return value, shape


def _permuted(number: Any, axes: tuple[int, ...]) -> Any:
    return type(number)(number.value.transpose(axes), number.error.transpose(axes))


def _folded(columns: Any, windows: Windows, shape: tuple[int, ...]) -> Any:
    """Return the sum of windows where they came from, in the shape of x."""
    batch, channels, kernel = *shape[:2], math.prod(windows.kernel)
    positions = math.prod(windows.positions)
    inner = columns.value.shape[-1] // kernel
    groups = channels // inner
    split = columns.reshape(groups, batch, positions, inner, kernel)
    flat = _permuted(split, (1, 0, 3, 4, 2)).reshape(batch, channels, kernel * positions)
    pad = ((0, 0), (0, 0), (0, 1))
    with_zero = type(flat)(np.pad(flat.value, pad), np.pad(flat.error, pad))
    return with_zero[..., sources(windows)].sum(2)
