"""Make arrays of a library in a storage dtype, and read them back."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import array_api_compat
import numpy as np

from doraxp._base.types import Array, Namespace
from doraxp.backends import compute_dtype, operations
from doraxp.testing._rounding import Precision

# The module that makes arrays of each library that `doraxp.backends.available` lists.
MODULES = {
    "numpy": "numpy",
    "cupy": "cupy",
    "torch": "torch",
    "jax": "jax.numpy",
    "dask": "dask.array",
    "array_api_strict": "array_api_strict",
}


class Library:
    """An array library, by its name in `doraxp.backends.available`.

    Parameters
    ----------
    name : str

    Raises
    ------
    ValueError
        `name` is not one of these libraries.
    """

    def __init__(self, name: str) -> None:
        if name not in MODULES:
            raise ValueError(f"name must be one of {', '.join(MODULES)}, got {name!r}")
        self.name = name
        self.module = importlib.import_module(MODULES[name])

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the library computes: with float64 enabled in JAX."""
        if self.name != "jax":
            return contextlib.nullcontext()
        # Otherwise JAX makes float32 of float64 without a warning.
        enabled: contextlib.AbstractContextManager[None] = importlib.import_module(
            "jax"
        ).enable_x64(True)
        return enabled

    def dtype(self, name: str) -> Any:
        """Return the library's dtype of a name; None if the library does not have it."""
        if (own := getattr(self.module, name, None)) is not None:
            return own
        if name == "float16" and self.name == "dask":
            return np.dtype(name)
        if name == "bfloat16" and self.name in ("numpy", "cupy"):
            with contextlib.suppress(ImportError):
                return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
        return None

    def precision(self, dtype: str) -> Precision:
        """Return the precision in which the library computes layers stored in a dtype.

        Parameters
        ----------
        dtype : str
            The dtype of x, dy and the weight. The library must have it.

        Returns
        -------
        {"exact", "mixed"}
            For the argument of `expected` with the same name. "mixed" for float16 and bfloat16 on
            CuPy and PyTorch, outside of `doraxp.backends.exact_products`. On a CPU that does not
            multiply such numbers itself, PyTorch is "exact".

        Examples
        --------
        >>> Library("numpy").precision("float16")
        'exact'
        """
        weight = self.module.zeros((1, 1), dtype=self.dtype(dtype))
        ops = operations(weight=weight)
        wide = compute_dtype(weight, xp=ops.xp)
        # Only mixed precision rounds the product of x and a dropout mask.
        taken = ops.operand_dtype(weight, weight, wide, masked=True)
        return "exact" if taken == wide else "mixed"

    def asarray(self, values: Any, dtype: str) -> Array:
        """Return values of NumPy as a new array of this library, in a dtype given by name."""
        array = self.module.asarray(np.array(values))
        xp: Namespace = array_api_compat.array_namespace(array)
        return xp.astype(array, self.dtype(dtype), copy=False)


def dtype_name(array: Array) -> str:
    """Return the name of an array's dtype without the name of its library."""
    return str(array.dtype).rpartition(".")[-1]


def as_numpy(array: Array) -> Any:
    """Return the values as a NumPy array on the host; float16 and bfloat16 become float32."""
    xp = array_api_compat.array_namespace(array)
    if dtype_name(array) in ("float16", "bfloat16"):
        array = xp.astype(array, xp.float32)
    read: Callable[[], Any] | None = getattr(array, "get", None)  # CuPy's
    return np.asarray(array if read is None else read())
