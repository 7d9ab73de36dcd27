"""The check of the arrays of one call: one library, one device, floating dtypes.

`operations` is called once in each public function, before anything is computed.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Collection
from operator import attrgetter
from types import ModuleType
from typing import cast

import array_api_compat
import array_api_compat.numpy
import numpy as np

from doraxp._base.types import Array, DType, Namespace
from doraxp.backends._cupy.operations import CupyOperations
from doraxp.backends._dtypes import DTYPES, dtype_name
from doraxp.backends._generic import Operations
from doraxp.backends._jax import JaxOperations
from doraxp.backends._numpy import NumpyOperations
from doraxp.backends._torch import TorchOperations

_XP: ModuleType = array_api_compat.numpy
_NUMPY = NumpyOperations(_XP)
_DTYPE, _DEVICE = attrgetter("dtype"), attrgetter("data.device_id")
_NUMPY_DTYPES = {np.dtype(name) for name in ("float16", "float32", "float64")}


def operations(*, bias: Array | None = None, **arrays: Array) -> Operations:
    """Return the operations for the arrays of one call. Errors call an array by its keyword.

    Only the bias may be None.

    Raises
    ------
    TypeError
        An argument is not an array, two arrays are of different libraries, or a dtype is not one of
        float16, bfloat16, float32 and float64.
    ValueError
        Two arrays are on different devices, or CuPy's are not on its current device.
    """
    given = arrays if bias is None else {**arrays, "bias": bias}
    return operations_of_plain(given.values()) or _operations_of_any(given)


def operations_of_plain(arrays: Collection[Array]) -> Operations | None:
    """Return the operations if all arrays are NumPy's own, or CuPy's on the current device.

    None means that the arrays must be looked at one by one, and may have to be refused. The search
    for the library of an array takes 4 µs, and for five arrays 20.
    """
    for array in arrays:
        if type(array) is not np.ndarray or array.dtype not in _NUMPY_DTYPES:
            break
    else:
        return _NUMPY
    if set(map(type, arrays)) != {getattr(sys.modules.get("cupy"), "ndarray", None)}:
        return None
    ops = _cupy_operations()
    devices = list(map(_DEVICE, arrays))
    here = devices.count(ops.cuda.device()) == len(devices)
    return ops if here and all(map(_is_floating, set(map(_DTYPE, arrays)))) else None


@functools.cache
def _cupy_operations() -> CupyOperations:
    ops = _operations_of(importlib.import_module("array_api_compat.cupy"))
    assert isinstance(ops, CupyOperations)
    return ops


@functools.cache
def _is_floating(dtype: DType) -> bool:
    return str(dtype) in DTYPES


def _operations_of_any(given: dict[str, Array]) -> Operations:
    xp = _one_library(given)
    _check_devices(given)
    for name, array in given.items():
        _check_dtype(name, array)
    ops = _operations_of(xp)
    ops.check_device(*next(iter(given.items())))
    return ops


@functools.cache
def _operations_of(xp: Namespace) -> Operations:
    if array_api_compat.is_numpy_namespace(xp):
        return _NUMPY
    if array_api_compat.is_cupy_namespace(xp):
        return CupyOperations(xp)
    if array_api_compat.is_torch_namespace(xp):
        return TorchOperations(xp)
    if array_api_compat.is_jax_namespace(cast(ModuleType, xp)):
        return JaxOperations(xp)
    return Operations(xp)


def _check_dtype(name: str, array: Array) -> None:
    if dtype_name(array) not in DTYPES:
        raise TypeError(f"{name} must be of dtype {', '.join(DTYPES)}, got {array.dtype}")


def _one_library(given: dict[str, Array]) -> Namespace:
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
    found = {name: _device(array) for name, array in given.items()}
    devices = {name: device for name, device in found.items() if device is not None}
    first = next(iter(devices), None)
    for name, device in devices.items():
        if first is not None and device != devices[first]:
            raise ValueError(
                f"all arrays must be on one device: {first} is on {devices[first]}, "
                f"{name} on {device}"
            )


def _namespace(name: str, array: Array) -> Namespace:
    try:
        namespace: Namespace = array_api_compat.array_namespace(array)
    except TypeError:
        raise TypeError(
            f"{name} must be an array of a library that array-api-compat knows, got "
            f"{type(array).__name__}"
        ) from None
    return namespace


def _device(array: Array) -> object:
    """Return the device; None for an array of JAX that is traced, or that goes where others are."""
    device: object = array_api_compat.device(array)
    if device is None or not getattr(array, "committed", True):
        return None
    return getattr(device, "device_set", device)  # JAX: compare the sets of devices


def _library(xp: Namespace) -> str:
    return str(xp.__name__).removeprefix("array_api_compat.")
