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
from doraxp.checkpoint._errors import CheckpointError
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


@functools.cache
def fp4_pairs() -> HostArray:
    """Return the two numbers of every byte in e2m1, the low half first, for `halves`."""
    return pairs(fp4_numbers(), high_first=False)


def fp4_numbers() -> HostArray:
    """Return the number of every code of e2m1, float32."""
    return np.concatenate([FP4, -FP4])


def pairs(numbers: HostArray, high_first: bool) -> HostArray:
    """Return the two numbers of every byte as one element, for `halves`.

    `numbers` are those of the 16 codes.
    """
    return byte_table(numbers, 4, high_first).view(np.uint64)[:, 0]


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


def unpack(packed: HostArray, bits: int) -> HostArray:
    """Return the codes in bytes (rows, n) as float32 numbers, (rows, 8·n / bits); low bits first.

    8 codes must fill whole bytes.
    """
    if bits == 8:
        return packed.astype(np.float32)
    if bits == 4:
        return halves(_plain_pairs(), packed)
    groups = packed.reshape(-1, bits)
    codes = np.empty((len(groups), 8), np.uint8)
    for code in range(8):
        byte, shift = divmod(code * bits, 8)
        column = groups[:, byte] >> shift
        if shift + bits > 8:
            column |= groups[:, byte + 1] << (8 - shift)
        np.bitwise_and(column, (1 << bits) - 1, out=codes[:, code])
    return codes.reshape(len(packed), -1).astype(np.float32)


def pack(codes: HostArray, bits: int) -> HostArray:
    """Return the bytes of rows of codes, uint8; the inverse of `unpack`."""
    groups = codes.reshape(-1, 8)
    packed = np.zeros((len(groups), bits), np.uint8)
    for code in range(8):
        byte, shift = divmod(code * bits, 8)
        packed[:, byte] |= groups[:, code] << shift
        if shift + bits > 8:
            packed[:, byte + 1] |= groups[:, code] >> (8 - shift)
    return packed.reshape(len(codes), -1)


@functools.cache
def _plain_pairs() -> HostArray:
    return pairs(np.arange(16), high_first=False)


def by_group(operation: np.ufunc, values: HostArray, numbers: HostArray, group: int) -> None:
    """Apply an operation to values (rows, columns) in place, with a number for each `group`.

    `numbers` are (rows, groups) or (1, groups). The last group may have fewer columns.
    """
    rows, columns = values.shape
    whole = columns // group
    grouped = values[:, : whole * group].reshape(rows, whole, group)  # a view
    rest = values[:, whole * group :]
    with np.errstate(over="ignore", invalid="ignore"):  # infinity, as in the format's own reader
        operation(grouped, numbers[:, :whole, None], out=grouped)
        operation(rest, numbers[:, whole:], out=rest)


def byte_table(numbers: HostArray, bits: int, high_first: bool = False) -> HostArray:
    """Return the float32 numbers of every byte that has 8 / bits codes, (256, 8 / bits).

    `numbers` are those of the codes of so many bits.
    """
    places = np.arange(0, 8, bits)[:: -1 if high_first else 1]
    codes = np.arange(256)[:, None] >> places & (1 << bits) - 1
    table: HostArray = numbers.astype(np.float32)[codes]
    return np.ascontiguousarray(table)


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


def mx_scales(largest: HostArray, top: float) -> HostArray:
    """Return the bytes of the least powers of 2 with which no number is above `top`, int64.

    `largest` has the largest number of each group.
    """
    part, exponent = np.frexp(largest / np.float32(top))
    exponent = np.where(part == 0.5, exponent - 1, exponent)  # the logarithm, rounded up
    scales: HostArray = np.where(largest == 0, 0, np.clip(exponent, -127, 127)) + 127
    return scales


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


def fp4(values: HostArray, ties_to_even: bool) -> HostArray:
    """Return the nearest code in e2m1; a larger number becomes 6.

    Ties go to the even code, or else to the smaller number, and then a zero has no sign.
    """
    size = np.abs(values)
    bounds = (FP4[1:] + FP4[:-1]) / 2
    codes = np.zeros(values.shape, np.uint8)
    for lower, bound in enumerate(bounds):
        codes += size >= bound if ties_to_even and lower % 2 else size > bound
    is_negative = np.signbit(values)
    if not ties_to_even:
        is_negative &= codes > 0
    return codes | is_negative.astype(np.uint8) << 3


def check_finite(name: str, fetch: Fetch) -> None:
    """Raise CheckpointError unless all scales are finite."""
    if not np.isfinite(fetch(name).astype(np.float32)).all():
        raise CheckpointError(f"{name}: the scales must be finite")
