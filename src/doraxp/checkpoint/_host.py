"""Arrays of any library to NumPy on the host, and back beside an array of the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import array_api_compat
import ml_dtypes
import numpy as np

from doraxp._base.types import Array, HostArray
from doraxp.backends import array_namespace, as_dtype, operations

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def on_host(array: Any) -> HostArray:
    """Return the values in the array's dtype. The bfloat16 of NumPy is that of ml_dtypes.

    Raises
    ------
    TypeError
        array-api-compat does not know the library.
    """
    if type(array) is np.ndarray:
        return array
    array = array.detach().cpu() if array_api_compat.is_torch_array(array) else array
    xp = array_namespace(array)
    is_bfloat16 = str(array.dtype).rpartition(".")[-1] == "bfloat16"
    if is_bfloat16:  # not every library gives an array of it to NumPy
        array = xp.astype(array, xp.float32)
    read: Callable[[], Any] | None = getattr(array, "get", None)  # CuPy's
    values = np.asarray(array if read is None else read())
    return values.astype(_BFLOAT16) if is_bfloat16 else values


def beside(values: HostArray, like: Array) -> Array:
    """Return values of the host as an array of the library and on the device of `like`."""
    ops = operations(like=like)
    xp = ops.xp
    is_bfloat16 = values.dtype == _BFLOAT16
    given = values.astype(np.float32) if is_bfloat16 else np.array(values)
    array = xp.asarray(cast(Array, given), device=ops.device(like))
    if not is_bfloat16:
        return array
    return as_dtype(array, getattr(xp, "bfloat16", _BFLOAT16), xp=xp)
