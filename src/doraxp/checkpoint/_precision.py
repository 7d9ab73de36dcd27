"""The precision of the floating dtypes in a file, and their NaN and infinity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from doraxp._base.types import HostArray
from doraxp.checkpoint._safetensors import DTYPES


class Precision(NamedTuple):
    """The distances between the numbers of a dtype."""

    epsilon: float
    """From 1 to the next number."""
    normal: float
    """The smallest normal number: below it, the distance no longer shrinks."""


PRECISION = {
    "F64": Precision(2.0**-52, 2.0**-1022),
    "F32": Precision(2.0**-23, 2.0**-126),
    "F16": Precision(2.0**-10, 2.0**-14),
    "BF16": Precision(2.0**-7, 2.0**-126),
}
_INFINITY = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
"""The bits of infinity. Those of NaN are larger."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(array: HostArray) -> str:
    """Return the name that safetensors files have for the dtype of an array."""
    return _NAMES[array.dtype]


def coarsest(dtypes: Iterable[str]) -> Precision:
    """Return the precision of steps that may be rounded to any of some dtypes."""
    found = [PRECISION[dtype] for dtype in dtypes]
    epsilon = max(one.epsilon for one in found)
    return Precision(epsilon, max(one.epsilon * one.normal for one in found) / epsilon)


def with_epsilon(precision: Precision, epsilon: float) -> Precision:
    """Return a precision with another ε, whose smallest numbers have the same distance."""
    return Precision(epsilon, precision.epsilon * precision.normal / epsilon)


def narrowest(numbers: HostArray, dtype: str) -> str:
    """Return the narrowest dtype that has all of the numbers, which come from a file of `dtype`."""
    for name in ("BF16", "F16", "F32"):
        if DTYPES[name].itemsize < DTYPES[dtype].itemsize:
            with np.errstate(over="ignore"):
                narrow = numbers.astype(DTYPES[name])
            if np.array_equal(narrow.astype(numbers.dtype), numbers):
                return name
    return dtype


def count_infinite(numbers: HostArray) -> int:
    """Return how many numbers are NaN or infinity. Their dtype is one of `DTYPES`.

    Of the numbers of one sign, as integers, those are the largest. So this is faster than isfinite.
    """
    infinity, size = _INFINITY[dtype_name(numbers)], numbers.itemsize
    bits, sign = numbers.view(f"u{size}"), 1 << (8 * size - 1)
    # The integers of NumPy's own types would be wider here.
    one, both, rest = (bits.dtype.type(x) for x in (infinity, sign | infinity, sign - 1))
    largest = numbers.view(f"i{size}").max(initial=0)
    if largest < infinity and bits.max(initial=0) < both:
        return 0
    return int(np.count_nonzero((bits & rest) >= one))
