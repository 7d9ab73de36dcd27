"""Codes of a few bits, the numbers that they stand for, and the products with their scales.

::

    FP8 (e4m3)      a byte is a number                 a table of 256 numbers
    FP4 (e2m1)      half a byte                        a table of 256 pairs, one for each byte
    b bits          code i at the bits i·b of a row    unpack, pack

NumPy reads a pair of float32 numbers as one element of 8 bytes, so a byte with two codes takes one
look-up.
"""

from __future__ import annotations

import functools
import math

import ml_dtypes
import numpy as np

from doraxp._base.types import HostArray
from doraxp.checkpoint._quantised.protocol import Fetch
from doraxp.checkpoint._safetensors import RAW, Empty

FP8_MAX = 448.0
"""The largest number of e4m3."""
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
"""The numbers of e2m1 for the codes from 0 to 7; the codes from 8 to 15 are their negatives."""


@functools.cache
def fp8_numbers() -> HostArray:
    """Return the number of every byte in e4m3, float32."""
    numbers: HostArray = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    return numbers.astype(np.float32)


@functools.cache
def powers() -> HostArray:
    """Return 2^(byte - 127) for every byte, float32; 255 is NaN."""
    patterns = np.arange(256, dtype=np.uint32) << 23  # a byte is the exponent of float32
    patterns[0], patterns[255] = 1 << 22, 0x7FC00000
    return patterns.view(np.float32)


def fp4_numbers() -> HostArray:
    """Return the number of every code of e2m1, float32."""
    return np.concatenate([FP4, -FP4])


def pairs(numbers: HostArray, high_first: bool) -> HostArray:
    """Return the two numbers of every byte as one element, for `halves`.

    `numbers` are those of the 16 codes.
    """
    byte = np.arange(256)
    order = (byte >> 4, byte & 15) if high_first else (byte & 15, byte >> 4)
    both = np.stack([numbers.astype(np.float32)[code] for code in order], axis=-1)
    return both.view(np.uint64)[:, 0]


def bytes_to(numbers: HostArray, codes: HostArray, out: HostArray | None = None) -> HostArray:
    """Return the float32 number of each byte of `codes`, in `out` if there is one."""
    out = np.empty(codes.shape, np.float32) if out is None else out
    # Without "clip", NumPy writes to a copy of `out` first.
    return np.take(numbers, codes, out=out, mode="clip")


def halves(table: HostArray, codes: HostArray) -> HostArray:
    """Return the float32 numbers of bytes (..., n) with two codes each, (..., 2·n)."""
    out = np.empty((*codes.shape[:-1], 2 * codes.shape[-1]), np.float32)
    np.take(table, codes, out=out.view(np.uint64), mode="clip")
    return out


def by_group(operation: np.ufunc, values: HostArray, numbers: HostArray, group: int) -> None:
    """Apply an operation to values (rows, columns) in place, with a number for each `group`.

    `numbers` are (rows, groups) or (1, groups). The last group may have fewer columns.
    """
    rows, columns = values.shape
    whole = columns // group
    grouped = values[:, : whole * group].reshape(rows, whole, group)  # a view
    operation(grouped, numbers[:, :whole, None], out=grouped)
    rest = values[:, whole * group :]
    operation(rest, numbers[:, whole:], out=rest)


def multiply(values: HostArray, scale: HostArray, group: int) -> None:
    """Multiply values (rows, columns) in place by a scale for each `group` columns."""
    by_group(np.multiply, values, scale, group)


def flat_rows(name: str, shape: tuple[int, ...], rows: slice, fetch: Fetch) -> HostArray:
    """Return some rows of a tensor (*stack, rows, columns) that is seen as one matrix.

    Whole entries along the tensor's first axis are read.
    """
    unit = max(math.prod(shape[1:-1]), 1)
    first, last = rows.start // unit, -(-rows.stop // unit)
    entries = fetch(name, slice(first, last))
    flat = entries.reshape(-1, entries.shape[-1])
    return flat[rows.start - first * unit : rows.stop - first * unit]


def rounded(values: HostArray, dtype: str, empty: Empty) -> HostArray:
    """Return float32 values in a dtype of `RAW`, in an array that `empty` allocates."""
    out = empty(values.shape, RAW[dtype])
    with np.errstate(over="ignore", invalid="ignore"):  # infinity, as in the format's own reader
        out[...] = values
    return out


@functools.cache
def _fp8_codes() -> HostArray:
    """Return the code in e4m3 for the upper 16 bits of every float32 number."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    with np.errstate(invalid="ignore"):  # of NaN
        codes: HostArray = np.clip(numbers, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
    return codes.view(np.uint8)


def fp8(values: HostArray) -> HostArray:
    """Return the nearest code in e4m3 of float32 values; ties go to the even code."""
    return _by_upper_half(_fp8_codes(), values)


def _by_upper_half(table: HostArray, values: HostArray) -> HostArray:
    """Return the entry of `table` for the upper 16 bits of float32 numbers.

    The lowest of these bits is also set where the lower 16 bits are not all 0. So the 16 bits are
    on the same side as the number of every midpoint between two codes.
    """
    parts = np.ascontiguousarray(values).view(np.uint16).reshape(*values.shape, 2)
    upper = parts[..., 1] | (parts[..., 0] != 0)
    out = np.empty(values.shape, table.dtype)
    return np.take(table, upper, out=out, mode="clip")
