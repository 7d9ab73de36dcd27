"""The windows of a convolution: which numbers of x each output reads.

    x (batch, in, *size)    kernel offsets K = ∏ kernel    positions P = ∏ positions
    position p and offset k read  x[p·stride − padding + k·dilation]  in each dimension,
    and 0 where that is outside of x

`places` and `sources` are tables of indices. With them a convolution is a gather and a product,
which every array library has.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from doraxp._base.types import Array, HostArray, Namespace
from doraxp.backends._namespaces import device

_KEPT = 16  # tables in memory: a network has a few shapes of convolutions


class Windows(NamedTuple):
    """The shape of a convolution. Each field has a number for each of one to three dimensions."""

    size: tuple[int, ...]
    """The size of x without batch and channels."""
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    """Zeros on each side of x."""
    dilation: tuple[int, ...]

    @property
    def extents(self) -> tuple[int, ...]:
        """The numbers of x from the first that a window reads to the last, both included."""
        return _sizes(self).extents

    @property
    def padded(self) -> tuple[int, ...]:
        """The size of x with its zeros."""
        return _sizes(self).padded

    @property
    def positions(self) -> tuple[int, ...]:
        """The size of y without batch and channels."""
        return _sizes(self).positions


class _Sizes(NamedTuple):
    """The properties of `Windows` of these names."""

    extents: tuple[int, ...]
    padded: tuple[int, ...]
    positions: tuple[int, ...]


@functools.lru_cache(maxsize=_KEPT)
def _sizes(windows: Windows) -> _Sizes:
    """Return the sizes. Kept, because a small convolution asks for them more often than it adds."""
    pairs = zip(windows.kernel, windows.dilation, strict=True)
    extents = tuple((kernel - 1) * dilation + 1 for kernel, dilation in pairs)
    sides = zip(windows.size, windows.padding, strict=True)
    padded = tuple(size + 2 * padding for size, padding in sides)
    each = zip(padded, extents, windows.stride, strict=True)
    positions = tuple((length - extent) // stride + 1 for length, extent, stride in each)
    return _Sizes(extents, padded, positions)


def unfolded(x: Array, windows: Windows, groups: int, *, xp: Namespace) -> Array:
    """Return the windows of x as rows.

    ::

        (batch, in, *size) -> (groups, batch·positions, in/groups·kernel)
    """
    batch, channels = x.shape[:2]
    flat = xp.reshape(x, (batch, channels, math.prod(windows.size)))
    taken = _taken(flat, places(windows), xp=xp)  # (batch, in, K·P)
    kernel, positions = math.prod(windows.kernel), math.prod(windows.positions)
    split = xp.reshape(taken, (batch, groups, channels // groups, kernel, positions))
    by_position = xp.permute_dims(split, (1, 0, 4, 2, 3))
    return xp.reshape(by_position, (groups, batch * positions, channels // groups * kernel))


def folded(columns: Array, windows: Windows, *, xp: Namespace) -> Array:
    """Return the sum of windows where they came from: the transpose of `unfolded`.

    (groups, batch·positions, in/groups·kernel) -> (batch, in, *size)
    """
    groups, tokens, width = columns.shape
    kernel, positions = math.prod(windows.kernel), math.prod(windows.positions)
    batch, inner = tokens // positions, width // kernel
    split = xp.reshape(columns, (groups, batch, positions, inner, kernel))
    by_channel = xp.permute_dims(split, (1, 0, 3, 4, 2))
    flat = xp.reshape(by_channel, (batch, groups * inner, kernel * positions))
    taken = _taken(flat, sources(windows), xp=xp)
    each = xp.reshape(taken, (batch, groups * inner, kernel, math.prod(windows.size)))
    return xp.reshape(xp.sum(each, axis=2), (batch, groups * inner, *windows.size))


def _taken(flat: Array, table: HostArray, *, xp: Namespace) -> Array:
    """Return the numbers of the last axis at the indices of a table; 0 at the index behind it."""
    batch, channels, _ = flat.shape
    zero = xp.zeros((batch, channels, 1), dtype=flat.dtype, device=device(flat))
    indices = xp.asarray(table.reshape(-1), device=device(flat))
    return xp.take(xp.concat([flat, zero], axis=2), indices, axis=2)


@functools.lru_cache(maxsize=_KEPT)
def places(windows: Windows) -> HostArray:
    """Return where each window reads, (K, P): an index into x; the size of x stands for a zero."""
    index, inside = np.zeros((1, 1), np.int64), np.ones((1, 1), bool)
    for size, kernel, stride, padding, dilation, positions in zip(
        *windows, windows.positions, strict=True
    ):
        steps = stride * np.arange(positions) - padding
        here = dilation * np.arange(kernel)[:, None] + steps  # (kernel, positions)
        index = _crossed(index * size, here, np.add)
        inside = _crossed(inside, (here >= 0) & (here < size), np.logical_and)
    return np.where(inside, index, math.prod(windows.size)).astype(np.int32)


@functools.lru_cache(maxsize=_KEPT)
def sources(windows: Windows) -> HostArray:
    """Return who reads each number, (K, S): for each offset an index into K·P; K·P for nobody."""
    read = places(windows)  # (K, P)
    kernel, positions = read.shape
    size = math.prod(windows.size)
    table = np.full((kernel, size + 1), kernel * positions, np.int32)
    np.put_along_axis(table, read, np.arange(kernel * positions).reshape(read.shape), axis=1)
    return table[:, :size]


def _crossed(outer: HostArray, inner: HostArray, function: np.ufunc) -> HostArray:
    """Return `function` of each pair, (k, p) (l, q) -> (k·l, p·q), in row-major order."""
    pairs: HostArray = function(outer[:, None, :, None], inner[None, :, None, :])
    return pairs.reshape(outer.shape[0] * inner.shape[0], -1)


def inside(windows: Windows) -> tuple[Any, ...]:
    """Return the place of x in its padded array (channels, samples, *padded)."""
    pairs = zip(windows.padding, windows.size, strict=True)
    return (..., *(slice(padding, padding + size) for padding, size in pairs))


@functools.lru_cache(maxsize=_KEPT)
def offsets(windows: Windows) -> tuple[tuple[tuple[int, ...], tuple[Any, ...]], ...]:
    """Return each offset of the kernel, and the numbers of the padded x that it reads."""
    found = []
    for offset in itertools.product(*map(range, windows.kernel)):
        each = zip(offset, windows.dilation, windows.stride, windows.positions, strict=True)
        place = (
            slice(k * dilation, k * dilation + stride * (positions - 1) + 1, stride)
            for k, dilation, stride, positions in each
        )
        found.append((offset, (slice(None), slice(None), *place)))
    return tuple(found)
