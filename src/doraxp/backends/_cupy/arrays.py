"""Dtypes by name, and how arrays lie in memory."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from doraxp._base.types import DType, Namespace
from doraxp.backends._cupy.source import THREADS, Types, blocks
from doraxp.backends._dtypes import transpose

LOW = ("float16", "bfloat16")

DeviceArray: TypeAlias = Any
"""A `cupy.ndarray`. CuPy has no types for mypy."""


class PlainWeight(NamedTuple):
    """The `Factors` of a weight without an adapter: V = W."""

    weight: DeviceArray
    lora_a: None = None
    scaled_b: None = None
    row_scale: None = None


ALIGNED = 512
"""Arrays that share an allocation begin at multiples of this number of bytes, as CuPy's pool."""


class Place(NamedTuple):
    """An array to be made, in an allocation."""

    shape: tuple[int, ...]
    kind: type
    """The type of its numbers: CuPy finds it faster than a dtype."""
    offset: int


class Together(NamedTuple):
    """Arrays to be made in one allocation."""

    size: int
    """The bytes of all."""
    places: tuple[Place | None, ...]


@functools.lru_cache(maxsize=256)
def together(*wanted: tuple[tuple[int, ...], DType] | None) -> Together:
    """Return the places of arrays of these shapes and dtypes, side by side. None stays None."""
    size, places = 0, list[Place | None]()
    for each in wanted:
        if each is None:
            places.append(None)
            continue
        shape, dtype = each[0], np.dtype(each[1])
        places.append(Place(shape, dtype.type, size))
        size += blocks(math.prod(shape) * dtype.itemsize, ALIGNED) * ALIGNED
    return Together(size, tuple(places))


@functools.cache
def dtype_name(dtype: DType) -> str:
    """Return the name of a dtype. NumPy needs a microsecond or two to build it."""
    return str(dtype)


def name_of(array: DeviceArray) -> str:
    """Return the name of the array's dtype."""
    return dtype_name(array.dtype)


@functools.cache
def common_dtype(left: DType, right: DType) -> DType:
    """Return the compute dtype of the product of arrays of two dtypes: at least float32."""
    return np.promote_types(np.promote_types(left, np.float32), right)


def types_of(storage: DeviceArray, product: DeviceArray, compute: DeviceArray) -> Types:
    """Return the types of a kernel from an array of each."""
    return typed(storage.dtype, product.dtype, compute.dtype)


def typed(storage: DType, product: DType, compute: DType) -> Types:
    """Return the types of a kernel from its dtypes."""
    return Types(*(dtype_name(np.dtype(dtype)) for dtype in (storage, product, compute)))


def one_type(array: DeviceArray) -> Types:
    """Return the types of a kernel whose arrays all have the dtype of `array`."""
    return types_of(array, array, array)


def in_c_order(array: DeviceArray) -> bool:
    """Return whether an array is in C order."""
    try:
        order: bool = array._c_contiguous  # CuPy's `flags` take ten times as long
    except AttributeError:
        order = array.flags.c_contiguous
    return order


def _in_fortran_order(array: DeviceArray) -> bool:
    """Return whether an array is the transpose of one in C order."""
    try:
        order: bool = array._f_contiguous
    except AttributeError:
        order = array.flags.f_contiguous
    return order


def packed(array: DeviceArray | None, xp: Namespace) -> DeviceArray:
    """Return an array in C order: itself, or a copy. None stays None."""
    if array is None or in_c_order(array):
        return array
    return xp.asarray(array, copy=True, order="C")


def as_stored(weight: DeviceArray, xp: Namespace) -> tuple[DeviceArray, bool]:
    """Return a weight in C order, or its transpose if that is in C order already.

    The second value is True for the transpose. A weight in neither order is copied.
    """
    if in_c_order(weight):
        return weight, False
    turned: DeviceArray = transpose(weight)
    return (turned, True) if in_c_order(turned) else (packed(weight, xp), False)


def for_blas(matrix: DeviceArray, xp: Namespace) -> DeviceArray:
    """Return a matrix that `layout` accepts: itself, or a copy in C order."""
    if in_c_order(matrix) or _in_fortran_order(matrix):
        return matrix
    try:
        layout(matrix)
    except ValueError:
        return packed(matrix, xp)
    return matrix


def layout(matrix: DeviceArray) -> tuple[int, int]:
    """Return cuBLAS's number for how a matrix lies, and the step between its rows or columns.

    The number is 0 if the rows are contiguous, and 1 if the columns are. A matrix where neither are
    is a ValueError.
    """
    rows, columns = matrix.shape
    if in_c_order(matrix):
        return 0, max(columns, 1)
    if _in_fortran_order(matrix):
        return 1, max(rows, 1)
    down, across = matrix.strides
    down, across = down // matrix.itemsize, across // matrix.itemsize
    if (across == 1 or columns == 1) and (down >= columns or rows == 1):
        return 0, max(down if rows > 1 else columns, 1)
    if (down == 1 or rows == 1) and (across >= rows or columns == 1):
        return 1, max(across if columns > 1 else rows, 1)
    raise ValueError(f"a matrix must be of unit stride along one axis, got {matrix.strides}")


def column_blocks(length: int, stored: DeviceArray | DType) -> int:
    """Return how many blocks cover `length` columns of a dtype, if a thread takes 16 bytes."""
    return blocks(length * int(stored.itemsize), 16 * THREADS)
