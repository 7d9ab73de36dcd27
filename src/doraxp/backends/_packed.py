"""A packed weight: bytes that stand for numbers, and their scales, in the array API standard.

W[i, j] = table[code] · scale + bias       a scale and a bias for each group of numbers
"""

from __future__ import annotations

from typing import NamedTuple

from doraxp._base.types import Array, DType, Namespace
from doraxp.backends._dtypes import as_dtype


class Packed(NamedTuple):
    """The arrays of a packed weight W (out, in)."""

    codes: Array
    """uint8, (out, in / count): each byte stands for `count` neighbours of a row."""
    table: Array
    """float32, (256, count): the numbers that each byte stands for."""
    scale: Array
    """float32. With a block (r, c) it is (out / r, in / c), both rounded up; see `block`."""
    bias: Array | None
    """float32, in the shape of `scale`; None for 0."""
    block: tuple[int, int] | int
    """Rows and columns of a group. Or the numbers of a group where groups follow one another along
    the flattened matrix and may cross rows: `scale` then has one axis."""
    shape: tuple[int, int]
    """(out, in)."""
    dtype: DType
    """The dtype of W. The product and the sum are made in float32, and then rounded to it."""


def unpacked(packed: Packed, rows: slice, *, xp: Namespace) -> Array:
    """Return some rows of W, (k, in), in its dtype."""
    codes, table, scale, bias, _, (_, inner), dtype = packed
    count = rows.stop - rows.start
    numbers = xp.astype(xp.reshape(codes[rows, :], (-1,)), xp.int32)
    each = xp.reshape(xp.take(table, numbers, axis=0), (count, codes.shape[1], table.shape[1]))
    values = xp.reshape(each, (count, inner))
    values = values * spread(scale, packed, rows, xp=xp)
    if bias is not None:
        values = values + spread(bias, packed, rows, xp=xp)
    return as_dtype(values, dtype, xp=xp)


def spread(array: Array, packed: Packed, rows: slice, *, xp: Namespace) -> Array:
    """Return the scale or the bias of each number of some rows, (k, in)."""
    block, inner = packed.block, packed.shape[1]
    if not isinstance(block, tuple):  # groups cross rows
        first, last = rows.start * inner // block, -(-rows.stop * inner // block)
        flat = _repeated(array[first:last], block, xp=xp)
        begin = rows.start * inner - first * block
        return xp.reshape(flat[begin : begin + (rows.stop - rows.start) * inner], (-1, inner))
    by_row = row_groups(array, block[0], rows, xp=xp)
    if block[1] == 1:
        return by_row
    return _repeated(by_row, block[1], xp=xp)[:, :inner]


def row_groups(array: Array, height: int, rows: slice, *, xp: Namespace) -> Array:
    """Return the scale or the bias of each group of some rows, (k, in / c), for blocks (r, c)."""
    if height == 1:
        return array[rows, :]
    first, last = rows.start // height, -(-rows.stop // height)
    some = array[first:last, :][:, None, :]
    tall = xp.broadcast_to(some, (last - first, height, array.shape[1]))
    begin = rows.start - first * height
    tall = xp.reshape(tall, ((last - first) * height, array.shape[1]))
    return tall[begin : begin + rows.stop - rows.start, :]


def _repeated(array: Array, count: int, *, xp: Namespace) -> Array:
    """Return an array with each element `count` times along the last axis."""
    *leading, length = array.shape
    wide = xp.broadcast_to(array[..., None], (*leading, length, count))
    return xp.reshape(wide, (*leading, length * count))
