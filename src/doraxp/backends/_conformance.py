"""The check of an array library that is not known: a small computation, compared with NumPy's.

array-api-compat takes each library whose arrays have `__array_namespace__`. Some such libraries
have the names of the array API standard, and give other results without an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import array_api_compat.numpy
import numpy as np

from doraxp._base.types import AdamWLeaves, AdamWNumbers, Adapter, Array, Namespace
from doraxp.backends._dtypes import dtype_name
from doraxp.backends._generic import LazyOperations, Norm, over_norm
from doraxp.backends._namespaces import device

_NUMPY: Any = array_api_compat.numpy
_Rule = Callable[[Namespace, Array, Array], object]

# x and y are (2, 3, 4). Each function that the package calls stands here as it calls it.
FUNCTIONS: dict[str, _Rule] = {
    "x.dtype, x.shape and x.ndim": lambda xp, x, y: (x.dtype == y.dtype, *x.shape, x.ndim),
    "asarray": lambda xp, x, y: xp.asarray(x, copy=True),
    "astype": lambda xp, x, y: xp.astype(x > 0, x.dtype, copy=False),
    "zeros": lambda xp, x, y: xp.zeros((2, 3), dtype=x.dtype, device=device(x)),
    "zeros_like": lambda xp, x, y: xp.zeros_like(x > 0, dtype=x.dtype),
    "ones_like": lambda xp, x, y: xp.ones_like(x),
    "reshape": lambda xp, x, y: xp.reshape(x, (-1,)),
    "matrix_transpose": lambda xp, x, y: xp.matrix_transpose(x),
    "broadcast_to": lambda xp, x, y: xp.broadcast_to(xp.reshape(x, (2, 3, 1, 4)), (2, 3, 5, 4)),
    "take": lambda xp, x, y: [
        xp.take(x[0, ...], _places(xp), axis=0),
        xp.take(x, _places(xp), axis=2),
    ],
    "concat": lambda xp, x, y: xp.concat([x, y[..., 1:, :]], axis=1),
    "x @ y": lambda xp, x, y: x @ xp.matrix_transpose(y),
    "vecdot": lambda xp, x, y: xp.vecdot(x, y),
    "sum": lambda xp, x, y: xp.sum(x, axis=-2),
    "mean": lambda xp, x, y: xp.mean(x, axis=-1),
    "max": lambda xp, x, y: xp.max(x, axis=-1),
    "min": lambda xp, x, y: xp.min(x),
    "permute_dims": lambda xp, x, y: xp.permute_dims(x, (1, 0, 2)),
    "all": lambda xp, x, y: xp.all(x > -9),
    "abs": lambda xp, x, y: xp.abs(x),
    "sqrt": lambda xp, x, y: xp.sqrt(xp.abs(x)),
    "eye": lambda xp, x, y: xp.astype(xp.eye(3, dtype=xp.bool), x.dtype),
    "expm1": lambda xp, x, y: xp.expm1(x),
    "maximum": lambda xp, x, y: xp.maximum(x, y),
    "where": lambda xp, x, y: xp.where(x > 0, 1.0, xp.where(y > 0, y, 0.0)),
    "isdtype": lambda xp, x, y: xp.isdtype(x.dtype, ("real floating", "integral")),
    "finfo": lambda xp, x, y: _limits(xp.finfo(x.dtype)),
    "arithmetic": lambda xp, x, y: 2 * x - y / 4.0 + -x / (9 - y),
    "comparisons": lambda xp, x, y: ((x < y) & (x != 0) | ~(x <= 0.5)) == (x > float("-inf")),
    "x[..., None]": lambda xp, x, y: x[..., None] * y[..., None, :],
    "slices": lambda xp, x, y: [x[..., :1, :], x[..., 1:, :], _diagonal(xp, x)],
    "x += y": lambda xp, x, y: _in_place(xp, x, y),
}


# The same for operations: x is the weight of two layers, and y its input. All rows of V are stored.
OPERATIONS: dict[str, _Rule] = {
    "row_norms": lambda xp, x, y: _row_norms(xp, x),
    "over_norm": lambda xp, x, y: over_norm(x, _row_norms(xp, x), xp=xp),
    "norm_and_direction": lambda xp, x, y: _norm(xp, x, y)[:3],
    "outputs": lambda xp, x, y: _outputs(xp, x, y),
    "gradients": lambda xp, x, y: _gradients(xp, x, y),
    "merge": lambda xp, x, y: LazyOperations(xp).merge(_norm(xp, x, y).direction, x[..., 0]),
    "adamw": lambda xp, x, y: _adamw(xp, x, y),
}


def check_conformance(xp: Namespace, name: str) -> None:
    """Raise TypeError unless the library of `xp` computes as the array API standard says.

    Every function and every generic operation of the package is called once, on a few numbers.
    The values are compared where NumPy can read them: a library may have no values yet.
    """
    for rule, function in {**FUNCTIONS, **OPERATIONS}.items():
        desired = _results(function, _NUMPY)
        try:
            actual = _results(function, xp)
        except Exception as error:  # any: the library is not known
            message = " ".join(str(error).split())[:200]
            raise _refusal(name, rule, f"{type(error).__name__}: {message}") from error
        for one, other in zip(actual, desired, strict=True):
            if difference := _difference(one, other):
                raise _refusal(name, rule, difference)


def _refusal(name: str, rule: str, reason: str) -> TypeError:
    return TypeError(
        f"arrays must be of a library that computes as the array API standard says, and {name} "
        f"does not: {rule}: {reason}. Convert the arrays to NumPy first"
    )


def _results(function: _Rule, xp: Namespace) -> list[Any]:
    """Return the results of a rule as a flat list of arrays and numbers."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # only results count
        return list(_flat(function(xp, *_numbers(xp))))


def _numbers(xp: Namespace) -> tuple[Array, Array]:
    """Return x and y, (2, 3, 4) each."""
    numbers = np.arange(48, dtype="float32") * 5 % 7 - 3  # no two rows or columns are the same
    x, y = np.reshape(numbers, (2, 2, 3, 4))
    return xp.asarray(x), xp.asarray(y)


def _flat(result: Any) -> Iterable[Any]:
    if not isinstance(result, tuple | list):
        return [result]
    return (leaf for part in result for leaf in _flat(part))


def _difference(actual: Any, desired: Any) -> str | None:
    """Return how an array or number differs from NumPy's; None where it does not."""
    if not isinstance(desired, np.ndarray | np.generic):
        return None if actual == desired else f"{actual!r} instead of {desired!r}"
    if tuple(actual.shape) != desired.shape:
        return f"shape {tuple(actual.shape)} instead of {desired.shape}"
    if dtype_name(actual) != desired.dtype.name:
        return f"dtype {dtype_name(actual)} instead of {desired.dtype.name}"
    values = _values(actual)
    if values is None or _is_close(values, desired):
        return None
    return f"{values.tolist()} instead of {desired.tolist()}"


def _is_close(values: Any, desired: Any) -> bool:
    wide = desired.astype("float64")
    return bool(np.all(np.abs(values - wide) <= 1e-5 * np.max(np.abs(wide))))


def _values(array: Array) -> Any:
    """Return the values as an array of NumPy; None where it cannot read them."""
    try:
        values = np.asarray(array)
    except Exception:  # lazy or traced
        return None
    return None if values.dtype == object else values


def _limits(info: Any) -> tuple[float, ...]:
    return float(info.eps), float(info.smallest_normal), float(info.max)


def _places(xp: Namespace) -> Array:
    codes = xp.asarray(np.array([[2, 0], [1, 2]], "uint8"))
    return xp.astype(xp.reshape(codes[1:, :], (-1,)), xp.int32)


def _diagonal(xp: Namespace, x: Array) -> Array:
    return xp.reshape(x @ xp.matrix_transpose(x), (2, 9))[..., ::4]


def _in_place(xp: Namespace, x: Array, y: Array) -> Array:
    total = x @ xp.matrix_transpose(y)
    total += y @ xp.matrix_transpose(x)
    total *= x[..., 0][..., None]
    total -= x[..., None, :, 0]
    return total


def _row_norms(xp: Namespace, x: Array) -> Array:
    ops = LazyOperations(xp)
    return ops.row_norms(x, ops.row_squares(x, x.dtype))


def _norm(xp: Namespace, x: Array, y: Array) -> Norm:
    """Return n, g, V Aᵀ / n and V for adapters of rank 2 and s = 1/2 in the direction form."""
    ops, adapter = LazyOperations(xp), Adapter(y[..., :2, :], y[..., 1:3], y[..., 0])
    return ops.norm_and_direction(x, adapter, 0.5, y[..., 1], x[..., 0])


def _outputs(xp: Namespace, x: Array, y: Array) -> tuple[Array, Array]:
    return _norm(xp, x, y).direction.outputs(
        y, y[..., 1:3], y[..., 0], x[..., 1], ops=LazyOperations(xp)
    )


def _gradients(xp: Namespace, x: Array, y: Array) -> tuple[Array | None, ...]:
    return LazyOperations(xp).gradients(
        y[..., :3], y, x[..., 1:3], x[..., 1:], _norm(xp, x, y), 0.5, x.dtype,
        exact=True, with_bias=True, round_later=False,
    )  # fmt: skip


def _adamw(xp: Namespace, x: Array, y: Array) -> object:
    numbers = AdamWNumbers(0.9, 0.1, 0.999, 0.001, 1e-8, 0.1, 0.001)
    leaves = AdamWLeaves([x], [y], [y], [y * y])
    return LazyOperations(xp).adamw(leaves, [0.1], [0.01], numbers, donate=False)
