"""The expected results of a case, and a bound on their rounding errors.

    |actual − value| ≤ (u + u₆₄)·error + uₛ·|value| + tiny

u is the unit roundoff of the compute dtype, and u₆₄ that of float64, in which `value` was computed.
uₛ is that of the storage dtype, where it is narrower than the compute dtype. `error` is the sum of
all rounding errors of the dense formulas, see `_rounding`. In mixed precision, `error` is that of
`MixedFormulas`, and includes every rounding to the storage dtype::

    |actual − value| ≤ (u + u₆₄)·error + tiny
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from doraxp.testing._cases import HALF, Case, OptimizerCase, compute_dtype_name, rounded
from doraxp.testing._formulas import (
    QUANTITIES,
    RETURNED,
    DenseFormulas,
    Formula,
    deviating,
)
from doraxp.testing._mixed import MixedFormulas
from doraxp.testing._rounding import UNIT_ROUNDOFF, Plain, Precision, Rounded
from doraxp.testing._step_formulas import OPTIMIZERS, ScaledGradients

TINY = {"float64": 2.0**-1022, "float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-24}
BELOW_NORMAL = {"bfloat16": 2.0**-126, "float16": 2.0**-25}
"""The largest error of a rounding below the normal range. float16 keeps its subnormal numbers; a
device may flush those of bfloat16 to zero."""
STORED = ("y", "dx", "merged")  # in the storage dtype; the others are in the compute dtype


class Expected(NamedTuple):
    """The expected numbers of one quantity of a case, in float64."""

    value: Any
    """The result of the formulas."""
    bound: Any
    """The largest error that rounding may cause, for each number."""
    dtype: str
    """The dtype in which the quantity must be returned."""

    def share(self, actual: Any) -> float:
        """Return the largest error in units of its bound. Up to 1 the numbers are right.

        Raises
        ------
        ValueError
            `actual` has another shape. NumPy would broadcast a single row without an error.
        """
        if np.shape(actual) != self.value.shape:
            raise ValueError(f"actual must have shape {self.value.shape}, got {np.shape(actual)}")
        with np.errstate(invalid="ignore", over="ignore"):
            shares = np.abs(np.asarray(actual, np.float64) - self.value) / self.bound
        return float(np.max(np.nan_to_num(shares, nan=np.inf), initial=0.0))

    def relative(self, actual: Any) -> float:
        """Return the largest error over the largest number.

        The result is NaN if every number is below its bound: a sum that cancels to 0 has no
        relative error.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(np.asarray(actual, np.float64) - self.value)
        if not np.any(np.abs(self.value) > self.bound):
            return np.nan
        with np.errstate(over="ignore"):
            return float(np.max(np.nan_to_num(error, nan=np.inf)) / np.max(np.abs(self.value)))


class Results(NamedTuple):
    """The quantities of a case. Each is computed when it is asked for."""

    names: tuple[str, ...]
    of: Callable[[str], Expected]


def expected(
    case: Case,
    dtype: str,
    changes: Mapping[str, Formula] | None = None,
    names: Collection[str] = QUANTITIES,
    *,
    precision: Precision = "exact",
) -> dict[str, Expected]:
    """Return the expected results of a case, by the reference or by one that deviates.

    The values are the same in every precision. Only the bounds differ.

    Parameters
    ----------
    case : Case
    dtype : str
        The storage dtype. It determines the bounds and the dtypes of the results.
    changes : mapping of str to formula, optional
        The formulas of a deviation from the reference.
    names : collection of str
        The quantities to return. The default is norm, merged, y, dx, da, db, dm, dw and, if the
        case has a bias, dbias.
    precision : {"exact", "mixed"}
        "exact": x, dy and the weight are stored in `dtype`, and all else is in the compute dtype.
        "mixed": for float16 and bfloat16, z, dz and the other arrays that `MixedFormulas` names are
        rounded to `dtype` too. `Library.precision` returns the one that a library computes in.

    Returns
    -------
    dict of str to Expected

    Raises
    ------
    ValueError
        `dtype` is not one of float16, bfloat16, float32 and float64; or `precision` is "mixed", and
        `dtype` has more than 16 bits or `changes` are given.

    Examples
    --------
    >>> from doraxp.testing import catalogue
    >>> case = catalogue()[0]
    >>> norm = expected(case, "float32")["norm"]
    >>> norm.share(norm.value), norm.share(1.001 * norm.value) > 1
    (0.0, True)
    """
    results = layer_results(case, dtype, changes, precision)
    return {name: results.of(name) for name in results.names if name in names}


def layer_results(
    case: Case,
    dtype: str,
    changes: Mapping[str, Formula] | None = None,
    precision: Precision = "exact",
) -> Results:
    """Return the results of a layer, by the reference or by one that deviates."""
    arrays = case.stored(dtype)
    layer: DenseFormulas
    if precision == "mixed":
        _check_mixed(dtype, changes)
        layer = MixedFormulas(case.config, arrays, Rounded.exact, _rounding_to(dtype))
    else:
        reference = deviating(DenseFormulas, changes) if changes else DenseFormulas
        layer = reference(case.config, arrays, Rounded.exact)
    like = shapes(case)

    def of(name: str) -> Expected:
        return bounded(name, getattr(layer, name), like[name], dtype, precision)

    return Results(tuple(like), of)


def _check_mixed(dtype: str, changes: Mapping[str, Formula] | None) -> None:
    if dtype not in HALF:
        raise ValueError(f"dtype must be float16 or bfloat16 in mixed precision, got {dtype!r}")
    if changes:
        raise ValueError(f"changes must be None in mixed precision, got {', '.join(changes)}")


def _rounding_to(dtype: str) -> Formula:
    """Return the function that adds the rounding of a float32 number to a storage dtype."""
    return partial(
        Rounded.narrowed,
        roundoff=UNIT_ROUNDOFF[dtype],
        least=BELOW_NORMAL[dtype],
        unit=UNIT_ROUNDOFF["float32"],
    )


def expected_steps(
    case: OptimizerCase, dtype: str, changes: Mapping[str, Formula] | None = None
) -> dict[str, Expected]:
    """Return the expected parameters after each step of a case of an optimizer.

    Parameters
    ----------
    case : OptimizerCase
    dtype : str
        The dtype of parameters and gradients.
    changes : mapping of str to formula, optional
        The formulas of a deviation from the reference.

    Returns
    -------
    dict of str to Expected
        By parameter and step, as in "lora_a 1" and "magnitude 3".

    Raises
    ------
    ValueError
        `dtype` is not one of float16, bfloat16, float32 and float64.

    Examples
    --------
    >>> from doraxp.testing import optimizer_catalogue
    >>> case = optimizer_catalogue()[0]
    >>> len(expected_steps(case, "float32")) == 3 * len(case.grads)
    True
    """
    results = step_results(case, dtype, changes)
    return {name: results.of(name) for name in results.names}


def step_results(
    case: OptimizerCase,
    dtype: str,
    changes: Mapping[str, Formula] | None = None,
    number: Formula = Rounded.exact,
) -> Results:
    """Return the results of an optimizer, by the reference or by one that deviates."""
    found = steps(case, dtype, number, changes)
    return Results(
        tuple(found), lambda name: bounded(name, found[name], found[name].value.shape, dtype)
    )


def in_the_dtype(case: Case | OptimizerCase, dtype: str) -> dict[str, Any]:
    """Return the results of the dense formulas, computed by NumPy in the compute dtype."""

    def plain(array: Any) -> Any:
        return np.asarray(array, compute_dtype_name(dtype)).view(Plain)

    if isinstance(case, OptimizerCase):
        return {name: np.asarray(p) for name, p in steps(case, dtype, plain, None).items()}
    layer = DenseFormulas(case.config, case.stored(dtype), plain)
    found = {name: np.asarray(getattr(layer, name)) for name in shapes(case)}
    return {
        name: (rounded(array, dtype) if name in STORED else array).reshape(shape)
        for (name, array), shape in zip(found.items(), shapes(case).values(), strict=True)
    }


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Return the shape of each quantity. A case without a bias does not have dbias."""
    like = {name: array.shape for name, array in case.arrays.items()}
    found = {
        "norm": like["magnitude"],
        "merged": like["weight"],
        "y": like["dy"],
        "dx": like["x"],
        "da": like["lora_a"],
        "db": like["lora_b"],
        "dm": like["magnitude"],
        "dw": like["weight"],
        "dbias": like.get("bias"),
        "initial": like["magnitude"],
    }
    return {name: shape for name in RETURNED if (shape := found[name]) is not None}


def steps(
    case: OptimizerCase, dtype: str, number: Formula, changes: Mapping[str, Formula] | None
) -> dict[str, Any]:
    """Return the parameters after each step, in the kind of numbers that `number` makes."""
    reference, kept = OPTIMIZERS[case.optimizer]
    scaled = deviating(ScaledGradients, changes) if changes else ScaledGradients
    reference = deviating(reference, changes) if changes else reference
    params = {name: number(values) for name, values in case.params.items()}
    state = {name: (number(np.zeros_like(p)),) * kept for name, p in case.params.items()}
    found = {}
    for t, given in enumerate(case.grads, start=1):
        grads = {name: number(values) for name, values in given.items()}
        if case.optimizer == "scaled_adamw":
            grads |= scaled(params, grads, case.numbers["damping"]).gradients
        for name, p in params.items():
            step = reference(name, p, grads[name], state[name], t, case.numbers)
            params[name], state[name] = step.stepped, step.state
            found[f"{name} {t}"] = step.stepped
    return found


def bounded(
    name: str, number: Any, shape: tuple[int, ...], dtype: str, precision: Precision = "exact"
) -> Expected:
    """Return the value of a quantity with its bound, in a shape."""
    compute = compute_dtype_name(dtype)
    value = number.value.reshape(shape)
    bound = (UNIT_ROUNDOFF[compute] + UNIT_ROUNDOFF["float64"]) * number.error.reshape(shape)
    bound = bound + TINY[compute]
    if name not in STORED or dtype == compute:
        return Expected(value, bound, compute)
    if precision == "mixed":  # the formulas have rounded it
        return Expected(value, bound, dtype)
    return Expected(value, bound + UNIT_ROUNDOFF[dtype] * np.abs(value) + TINY[dtype], dtype)
