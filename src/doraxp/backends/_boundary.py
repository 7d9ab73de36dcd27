"""The check of the arrays of one call: one library, one device, floating dtypes.

`operations` is called once in each public function, before anything is computed.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import attrgetter
from types import ModuleType
from typing import Any, cast

import array_api_compat
import array_api_compat.numpy
import numpy as np

from doraxp._base.types import Array, DType, Namespace, RowWeight
from doraxp.backends._conformance import check_conformance
from doraxp.backends._cupy.operations import CupyOperations
from doraxp.backends._dask import DaskOperations
from doraxp.backends._dtypes import DTYPES, dtype_name
from doraxp.backends._generic import LazyOperations, Operations
from doraxp.backends._jax import JaxOperations
from doraxp.backends._namespaces import array_namespace, device
from doraxp.backends._numpy import NumpyOperations
from doraxp.backends._rows import by_rows, is_by_rows
from doraxp.backends._torch import TorchOperations

_XP: ModuleType = array_api_compat.numpy
_NUMPY = NumpyOperations(_XP)
_DTYPE, _DEVICE = attrgetter("dtype"), attrgetter("data.device_id")
_TENSOR_DEVICE = attrgetter("device")
_TENSORS: set[type] = set()
"""PyTorch's own classes of tensors, once a tensor was seen."""
_KNOWN: tuple[Callable[..., bool], ...] = (
    array_api_compat.is_array_api_strict_namespace,
    array_api_compat.is_pydata_sparse_namespace,
    array_api_compat.is_ndonnx_namespace,
)
"""The libraries that array-api-compat and the tests of this project know."""
_LAZY = ("doraxp.backends._mlx", "cubed")
"""The namespaces that only the tests know. Their arrays are lazy."""
_NUMPY_DTYPES = {np.dtype(name) for name in ("float16", "float32", "float64")}


def operations(*, bias: Array | None = None, **arrays: Array) -> Operations:
    """Return the operations for the arrays of one call. Errors call an array by its keyword.

    Only the bias may be None.

    Raises
    ------
    TypeError
        An argument is not an array, or is a masked array or an `np.matrix`; two arrays are of
        different libraries; a dtype is not one of float16, bfloat16, float32 and float64; or the
        library computes in another way than the array API standard says.
    ValueError
        Two arrays are on different devices, or CuPy's are not on its current device.
    """
    given = arrays if bias is None else {**arrays, "bias": bias}
    return operations_of_plain(given.values()) or _operations_of_any(given)


def operations_of_plain(arrays: Collection[Array]) -> Operations | None:
    """Return the operations if all arrays are NumPy's own, PyTorch's, or CuPy's on one device.

    None means that the arrays must be looked at one by one, and may have to be refused. The search
    for the library of an array takes 4 µs, and for five arrays 20.
    """
    for array in arrays:
        if type(array) is not np.ndarray or array.dtype not in _NUMPY_DTYPES:
            break
    else:
        return _NUMPY
    kinds = set(map(type, arrays))
    if kinds <= _TENSORS:
        one_device = len(set(map(_TENSOR_DEVICE, arrays))) == 1
        plain = one_device and all(map(_is_floating, set(map(_DTYPE, arrays))))
        return _torch_operations() if plain else None
    if kinds != {getattr(sys.modules.get("cupy"), "ndarray", None)}:
        return None
    ops = _cupy_operations()
    devices = list(map(_DEVICE, arrays))
    here = devices.count(ops.cuda.device()) == len(devices)
    return ops if here and all(map(_is_floating, set(map(_DTYPE, arrays)))) else None


@functools.cache
def _torch_operations() -> TorchOperations:
    ops = _operations_of(importlib.import_module("array_api_compat.torch"))
    assert isinstance(ops, TorchOperations)
    return ops


@functools.cache
def _cupy_operations() -> CupyOperations:
    ops = _operations_of(importlib.import_module("array_api_compat.cupy"))
    assert isinstance(ops, CupyOperations)
    return ops


@functools.cache
def _is_floating(dtype: DType) -> bool:
    return str(dtype).removeprefix("torch.") in DTYPES


def _operations_of_any(given: dict[str, Array]) -> Operations:
    sampled = {
        name: _sample(name, cast(Any, each)) for name, each in given.items() if is_by_rows(each)
    }
    if sampled:
        return by_rows(operations(**{**given, **sampled}))
    ops = _operations_of(_one_library(given))
    _check_devices(given)
    for name, array in given.items():
        _check_dtype(name, array)
    ops.check_device(*next(iter(given.items())))
    return ops


@functools.cache
def _operations_of(xp: Namespace) -> Operations:
    if array_api_compat.is_numpy_namespace(xp):
        return _NUMPY
    if array_api_compat.is_cupy_namespace(xp):
        return CupyOperations(xp)
    if array_api_compat.is_torch_namespace(xp):
        torch = sys.modules["torch"]
        _TENSORS.update({torch.Tensor, torch.nn.Parameter})
        return TorchOperations(xp)
    if array_api_compat.is_jax_namespace(cast(ModuleType, xp)):
        return JaxOperations(xp)
    if array_api_compat.is_dask_namespace(cast(ModuleType, xp)):
        return DaskOperations(xp)
    if any(is_known(xp) for is_known in _KNOWN):
        return Operations(xp)
    if str(xp.__name__) not in _LAZY:
        check_conformance(xp, _library(xp))
    return LazyOperations(xp)


def _sample(name: str, weight: RowWeight) -> Array:
    """Return the first row of a weight that is given by rows, as an array (1, in)."""
    shape = tuple(weight.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"{name} must have shape (out, in) with no axis of length 0 where it is given by rows, "
            f"got {shape}"
        )
    row = weight.rows(slice(0, 1))
    if tuple(row.shape) != (1, shape[1]) or row.dtype != weight.dtype:
        raise ValueError(
            f"{name}.rows(slice(0, 1)) must have shape {(1, shape[1])} and dtype {weight.dtype}, "
            f"got {tuple(row.shape)} and {row.dtype}"
        )
    return row


def _check_dtype(name: str, array: Array) -> None:
    if dtype_name(array) not in DTYPES:
        raise TypeError(f"{name} must be of dtype {', '.join(DTYPES)}, got {array.dtype}")


def _one_library(given: dict[str, Array]) -> Namespace:
    namespaces = {name: _namespace(name, array, given) for name, array in given.items()}
    (first, xp), *others = namespaces.items()
    for name, other in others:
        if other is not xp:
            raise TypeError(
                f"all arrays must be of one library: {first} is of {_library(xp)}, "
                f"{name} of {_library(other)}"
            )
    return xp


def _check_class(name: str, array: Array) -> None:
    """Refuse the two subclasses of NumPy's array whose operators compute something else."""
    if not isinstance(array, np.ndarray):
        return
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be a plain array, got a masked array: choose the numbers that stand for "
            f"masked ones, and give {name}.filled(number)"
        )
    if isinstance(array, np.matrix):
        raise TypeError(f"{name} must be a plain array, got an np.matrix: give np.asarray({name})")


def _check_devices(given: dict[str, Array]) -> None:
    found = {name: _device(array) for name, array in given.items()}
    devices = {name: where for name, where in found.items() if where is not None}
    first = next(iter(devices), None)
    for name, other in devices.items():
        if first is not None and other != devices[first]:
            raise ValueError(
                f"all arrays must be on one device: {first} is on {devices[first]}, "
                f"{name} on {other}"
            )


def _namespace(name: str, array: Array, given: Mapping[str, Array]) -> Namespace:
    _check_class(name, array)
    try:
        return array_namespace(array)
    except TypeError:
        raise _not_an_array(name, array, given.values()) from None


def check_shaped(name: str, value: object) -> None:
    """Raise TypeError where a value that must be an array has no shape, such as a list.

    For functions that read the shape before they call `operations`.
    """
    if not hasattr(value, "shape"):
        raise _not_an_array(name, value)


def _not_an_array(name: str, value: object, others: Iterable[object] = ()) -> TypeError:
    """Return the error for a value that is not an array; numbers get a function that makes one."""
    advice = ""
    if type(value) in (list, tuple, int, float) or hasattr(value, "__array__"):
        library = next(filter(None, map(_library_of, others)), "numpy")
        make = "mlx.core.array" if library == "mlx" else f"{library}.asarray"
        advice = f": give {make}({name})"
    return TypeError(
        f"{name} must be an array of a library that array-api-compat knows, got "
        f"{type(value).__name__}{advice}"
    )


def _library_of(array: object) -> str | None:
    try:
        return _library(array_namespace(cast(Array, array)))
    except TypeError:
        return None


def _device(array: Array) -> object:
    """Return the device; None for an array of JAX that is traced, or that goes where others are."""
    found = device(array)
    if found is None or not getattr(array, "committed", True):
        return None
    return getattr(found, "device_set", found)  # JAX: compare the sets of devices


def _library(xp: Namespace) -> str:
    return str(xp.__name__).removeprefix("array_api_compat.").removeprefix("doraxp.backends._")
