"""Which array libraries there are, and the operations that each one runs.

`operations` is the public border: it takes the arrays of one call by name, and holds them to one
library, one device and a floating dtype before anything is computed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any, NamedTuple

import array_api_compat
import array_api_compat.numpy
import numpy as np

from doraxp._base.types import Array
from doraxp.backends._cupy import operations as _cupy
from doraxp.backends._cupy.operations import CupyOperations
from doraxp.backends._cupy.products import reduced_precision
from doraxp.backends._cupy.signatures import CudaKernels, cuda_kernels
from doraxp.backends._generic import Factors, Operations
from doraxp.backends._numpy import NumpyOperations
from doraxp.backends._torch import TorchOperations

__all__ = [
    "CudaKernels",
    "Factors",
    "Operations",
    "Status",
    "as_dtype",
    "available",
    "compute_dtype",
    "cuda_kernels",
    "operations",
    "reduced_precision",
]

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_LIBRARIES = {  # name: the module that must import
    "numpy": "numpy",
    "cupy": "cupy",
    "torch": "torch",
    "jax": "jax",
    "dask": "dask.array",
    "array_api_strict": "array_api_strict",
}


class Status(NamedTuple):
    """Whether an array library can be used here."""

    name: str
    """As in `pip install`, but array_api_strict as in `import`."""
    usable: bool
    """Whether it imports and, on a GPU, finds a device."""
    detail: str
    """The version, or the reason why not."""


def available() -> list[Status]:
    """List the array libraries that doraxp is tested on, and whether each can be used here.

    Returns
    -------
    list of Status
        numpy, cupy, torch, jax, dask and array_api_strict, in that order. Any other library that
        array-api-compat knows may work too.

    Examples
    --------
    >>> available()[0].name, available()[0].usable
    ('numpy', True)
    """
    return [_status(name) for name in _LIBRARIES]


def _status(name: str) -> Status:
    reason = _cupy.why_not() if name == "cupy" else _why_not(name)
    if reason is not None:
        return Status(name, False, reason)
    return Status(name, True, str(importlib.import_module(name).__version__))


def _why_not(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return f"not installed: pip install {name.replace('_', '-')}"
    try:
        importlib.import_module(_LIBRARIES[name])
    except Exception as error:  # a broken installation raises more than ImportError
        return f"installed, but the import failed: {type(error).__name__}: {error}"
    return None


@functools.cache
def _operations_of(xp: Any) -> Operations:
    if array_api_compat.is_numpy_namespace(xp):
        return NumpyOperations(xp)
    if array_api_compat.is_cupy_namespace(xp):
        return CupyOperations(xp)
    if array_api_compat.is_torch_namespace(xp):
        return TorchOperations(xp)
    return Operations(xp)


def _dtype_name(dtype: Any) -> str:
    # The type goes into the key because array-api-strict warns where its dtypes meet NumPy's.
    return _dtype_name_of((type(dtype), dtype))


@functools.cache
def _dtype_name_of(key: tuple[Any, Any]) -> str:
    # numpy and jax: "float32"; torch: "torch.float32"; strict: "array_api_strict.float32".
    return str(key[1]).rpartition(".")[-1]


def operations(*, bias: Array | None = None, **arrays: Array) -> Operations:
    """Return the operations for arrays, given by the names that the caller knows them by.

    The bias alone may be None.

    Raises
    ------
    TypeError
        One is no array, two are of different libraries, or a dtype is not one of float16,
        bfloat16, float32 and float64.
    ValueError
        Two are on different devices, or CuPy's are on another than its current one.
    """
    given = arrays if bias is None else {**arrays, "bias": bias}
    if any(type(array) is not np.ndarray for array in given.values()):
        xp = _one_library(given)
        _check_devices(given)
    else:  # NumPy's own, which need no search: saves 20 µs a call
        xp = array_api_compat.numpy
    for name, array in given.items():
        if _dtype_name(array.dtype) not in _DTYPES:
            raise TypeError(f"{name} must be of dtype {', '.join(_DTYPES)}, got {array.dtype}")
    ops = _operations_of(xp)
    ops.check_current(*next(iter(given.items())))
    return ops


def _one_library(given: dict[str, Array]) -> Any:
    namespaces = {name: _namespace(name, array) for name, array in given.items()}
    (first, xp), *others = namespaces.items()
    for name, other in others:
        if other is not xp:
            raise TypeError(
                f"all arrays must be of one library: {first} is of {_library(xp)}, "
                f"{name} of {_library(other)}"
            )
    return xp


def _check_devices(given: dict[str, Array]) -> None:
    devices = {name: _device(array) for name, array in given.items()}
    first = next(iter(given))
    for name, device in devices.items():
        # A traced JAX array has no device.
        if None not in (device, devices[first]) and device != devices[first]:
            raise ValueError(
                f"all arrays must be on one device: {first} is on {devices[first]}, "
                f"{name} on {device}"
            )


def _namespace(name: str, array: Array) -> Any:
    try:
        return array_api_compat.array_namespace(array)
    except TypeError:
        raise TypeError(
            f"{name} must be an array of a library that array-api-compat knows, got "
            f"{type(array).__name__}"
        ) from None


def _device(array: Array) -> Any:
    device = array_api_compat.device(array)
    return getattr(device, "device_set", device)  # JAX: arrays may lie across the same devices


def _library(xp: Any) -> str:
    return str(xp.__name__).removeprefix("array_api_compat.")


def as_dtype(array: Array, dtype: Any, *, xp: Any) -> Array:
    """Return `array` in `dtype`: itself where it has that already."""
    return array if array.dtype == dtype else xp.astype(array, dtype)


def compute_dtype(*arrays: Array, xp: Any) -> Any:
    """Return the dtype to compute in: float64 where any array has it, else float32."""
    wide = any(_dtype_name(array.dtype) == "float64" for array in arrays)
    return xp.float64 if wide else xp.float32
