"""A quantised weight in memory: bytes that stand for numbers, and their scales.

W (out, in)      W[i, j] = table[code] · scale + bias
"""

from __future__ import annotations

import math
from typing import Any

from doraxp._base.pytrees import register_tree
from doraxp._base.scalars import check_count
from doraxp._base.types import Array, DType, Namespace
from doraxp.backends import Packed, array_namespace, device, operations


class QuantisedWeight:
    """A frozen weight W (out, in) that stays packed. It is a `RowWeight`.

    ::

        W[i, j] = table[codes[i, j // count], j % count] · scale + bias

    The product and the sum are each rounded to float32, and W is then rounded to `dtype`.

    Parameters
    ----------
    codes : array of uint8, shape (out, in / count)
        Each byte stands for `count` neighbours of a row: 1, 2 or 4.
    table : array of float32, shape (256, count)
        The numbers that each byte stands for, in the order of the row. It says which half of a byte
        comes first: for 16 numbers `t`, ``table[b] = t[b >> 4], t[b & 15]`` has the high half
        first, as in nf4, and ``t[b & 15], t[b >> 4]`` the low half, as in MXFP4.
    scale : array of float32
        One number for each group.
    group : (int, int) or int
        Rows and columns of a group, (r, c): `scale` is (out / r, in / c), both rounded up. (1, in)
        is one scale for each row, (out, in) one for all. An int is the length of groups that
        follow one another along the flattened matrix: `scale` is (out · in / group,), rounded up.
    bias : array of float32, optional
        One number for each group, in the shape of `scale`.
    dtype : dtype of the library, optional
        The floating dtype of W. None means float32.

    Raises
    ------
    TypeError
        The arrays are not of one library, or a dtype is another one.
    ValueError
        The shapes do not fit each other, or the devices differ.

    Examples
    --------
    >>> import numpy as np
    >>> four = np.arange(-8, 8, dtype=np.float32)
    >>> table = np.stack([np.repeat(four, 16), np.tile(four, 16)], axis=1)  # the high half first
    >>> codes = np.array([[0x9A, 0x70]], np.uint8)
    >>> weight = QuantisedWeight(codes, table, np.ones((1, 2), np.float32), group=(1, 2))
    >>> weight.rows(slice(0, 1))
    array([[ 1.,  2., -1., -8.]], dtype=float32)
    """

    def __init__(
        self,
        codes: Array,
        table: Array,
        scale: Array,
        *,
        group: tuple[int, int] | int,
        bias: Array | None = None,
        dtype: DType | None = None,
    ) -> None:
        xp = operations(table=table, scale=scale, bias=bias).xp
        if array_namespace(codes) is not xp or codes.dtype != xp.uint8:
            raise TypeError(f"codes must be uint8 in the library of table, got {codes.dtype}")
        if device(codes) != device(table):
            raise ValueError(f"codes must be on {device(table)}, where table is")
        for name, array in (("table", table), ("scale", scale), ("bias", bias)):
            if array is not None and array.dtype != xp.float32:
                raise TypeError(f"{name} must be of dtype float32, got {array.dtype}")
        count = table.shape[1] if len(table.shape) == 2 else 0
        if count not in (1, 2, 4) or table.shape[0] != 256:
            raise ValueError(f"table must have shape (256, 1, 2 or 4), got {tuple(table.shape)}")
        if len(codes.shape) != 2 or 0 in codes.shape:
            raise ValueError(
                f"codes must have shape (out, in / {count}) with no axis of length 0, got "
                f"{tuple(codes.shape)}"
            )
        shape = codes.shape[0], count * codes.shape[1]
        scale, bias, block = _grouped(scale, bias, group, shape, xp=xp)
        dtype = xp.float32 if dtype is None else dtype
        example = xp.zeros((1,), dtype=dtype, device=device(table))
        operations(dtype=example)  # it must be floating
        self.packed = Packed(codes, table, scale, bias, block, shape, example.dtype)
        """The arrays, as the backends read them."""
        register_tree(QuantisedWeight, _arrays, _of_arrays)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.packed.shape

    @property
    def dtype(self) -> DType:
        """The dtype of W."""
        return self.packed.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of the codes, the table, the scales and the biases."""
        codes, *floats = self.packed[:4]
        sizes = [math.prod(array.shape) for array in floats if array is not None]
        return math.prod(codes.shape) + 4 * sum(sizes)

    def rows(self, rows: slice) -> Array:
        """Return some rows of W, (k, in), as a new array in `dtype`."""
        start, stop, _ = rows.indices(self.shape[0])
        return operations(table=self.packed.table).unpacked(self.packed, slice(start, stop))

    def __repr__(self) -> str:
        """Return the shape, the dtype and the group."""
        return f"QuantisedWeight(shape={self.shape}, dtype={self.dtype}, group={self.packed.block})"


def _arrays(weight: QuantisedWeight) -> tuple[tuple[Array | None, ...], tuple[Any, ...]]:
    """Return the arrays of a weight, and the rest."""
    return weight.packed[:4], weight.packed[4:]


def _of_arrays(rest: tuple[Any, ...], arrays: tuple[Any, ...]) -> QuantisedWeight:
    """Return the weight of which `_arrays` made these. JAX may put other objects for the arrays."""
    weight = object.__new__(QuantisedWeight)
    weight.packed = Packed(*arrays, *rest)
    return weight


def _grouped(
    scale: Array, bias: Array | None, group: tuple[int, int] | int, shape: tuple[int, int],
    *, xp: Namespace,
) -> tuple[Array, Array | None, tuple[int, int] | int]:  # fmt: skip
    """Return the scales and biases by rows where no group crosses a row, and the group."""
    out, inner = shape
    if isinstance(group, tuple):
        height, width = (check_count("each number of group", each, least=1) for each in group)
        wanted: tuple[int, ...] = -(-out // height), -(-inner // width)
    else:
        height, width = 1, check_count("group", group, least=1)
        wanted = (-(-out * inner // width),)
    for name, array in (("scale", scale), ("bias", bias)):
        if array is not None and tuple(array.shape) != wanted:
            raise ValueError(
                f"{name} must have shape {wanted} for a weight of shape {shape} and group {group}, "
                f"got {tuple(array.shape)}"
            )
    if isinstance(group, tuple):
        return scale, bias, (height, width)
    if inner % width:
        return scale, bias, width
    by_row = out, inner // width
    bias = None if bias is None else xp.reshape(bias, by_row)
    return xp.reshape(scale, by_row), bias, (1, width)
