"""The array API names of MLX: those of `mlx.core`, and the few that it lacks.

array-api-compat takes `mlx.core` as it is. In MLX 0.32, three functions lack an argument of the
standard, and bool has another name. Its arrays are on no device: each operation chooses one, and
memory is shared.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from doraxp._base.types import Array, DType


def asarray(
    values: Any, /, *, dtype: DType | None = None, device: None = None, copy: bool | None = None
) -> Array:
    """Return `values` as an array. Values of NumPy keep their dtype: `mlx.core` narrows float64."""
    if dtype is None and not isinstance(values, mx.array) and hasattr(values, "dtype"):
        dtype = getattr(mx, values.dtype.name)
    array: Array = mx.asarray(values, dtype, copy=copy)
    return array


def astype(array: Array, dtype: DType, /, *, copy: bool = True, device: None = None) -> Array:
    """Return `array` in `dtype`; without `copy`, the same object if it has that dtype."""
    if not copy and array.dtype == dtype:
        return array
    cast: Array = mx.astype(array, dtype)
    return cast


def zeros(
    shape: int | tuple[int, ...], *, dtype: DType | None = None, device: None = None
) -> Array:
    """Return zeros, float32 by default."""
    array: Array = mx.zeros(shape, mx.float32 if dtype is None else dtype)
    return array


def __getattr__(name: str) -> Any:
    """Return everything else as `mlx.core` has it."""
    return getattr(mx, "bool_" if name == "bool" else name)
