"""The name of an array's dtype, the cast of an array, the dtype to compute in, the transpose."""

from __future__ import annotations

import functools

from doraxp._base.types import Array, DType, Namespace
from doraxp.backends._namespaces import array_namespace

DTYPES = ("float16", "bfloat16", "float32", "float64")
"""The dtypes that arrays may have."""


def dtype_name(array: Array) -> str:
    """Return the name of the dtype of `array` as NumPy writes it: "float32"."""
    dtype = array.dtype
    # The type is a part of the key: array-api-strict warns if its dtypes are compared to NumPy's.
    return _name_of(dtype.__class__, dtype)


@functools.cache
def _name_of(kind: type, dtype: DType) -> str:
    # numpy and jax: "float32"; torch: "torch.float32"; strict: "array_api_strict.float32".
    # The dtype of a `RowWeight` may be a class, such as np.float32.
    name: str = getattr(dtype, "__name__", str(dtype))
    return name.rpartition(".")[-1]


def is_integer(array: Array) -> bool:
    """Return whether `array` is of an integer dtype, as ids are."""
    return dtype_name(array).startswith(("int", "uint"))


def as_dtype(array: Array, dtype: DType, *, xp: Namespace) -> Array:
    """Return `array` in `dtype`: the same object if it has that dtype already."""
    return array if array.dtype == dtype else xp.astype(array, dtype)


def compute_dtype(*arrays: Array, xp: Namespace) -> DType:
    """Return the dtype to compute in: float64 if any of the arrays has it, else float32."""
    return xp.float64 if "float64" in map(dtype_name, arrays) else xp.float32


def transpose(array: Array) -> Array:
    """Return `array` with its last two axes swapped."""
    # NumPy's mT takes a sixth of the time of `matrix_transpose`. Dask's arrays have no mT.
    transposed: Array | None = getattr(array, "mT", None)
    if transposed is None:
        transposed = array_namespace(array).matrix_transpose(array)
    return transposed
