"""NumPy's convolutions and lookups: blocks of samples whose windows stay in cache.

    x (batch, in, *size)    weight (*stack, out, in·kernel)    y (*stack, batch·positions, out)

The windows of a block are written into one buffer, (in, *kernel, samples, *positions), which BLAS
then reads. So no array has the size of all windows, which is `kernel` times that of x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from doraxp.backends._layers import LayerOperations
from doraxp.backends._windows import Windows, inside, offsets

NumpyArray: TypeAlias = Any
"""An `np.ndarray`; see `doraxp.backends._numpy`."""

WINDOW_BLOCK = 1 << 19
"""Numbers of the windows of one block, 2 MiB in float32."""


class NumpyLayerOperations(LayerOperations):
    """The operations of convolutions and lookups on NumPy's arrays."""

    def convolve(self, x: NumpyArray, weight: NumpyArray, windows: Windows) -> NumpyArray:
        """Return X weightᵀ, one block of samples after another."""
        (*stack, out, width), groups = weight.shape, math.prod(weight.shape[:-2])
        positions = math.prod(windows.positions)
        y = np.empty((groups, len(x) * positions, out), x.dtype)
        by_group = weight.astype(x.dtype, copy=False).reshape(groups, out, width)
        for samples, columns in _column_blocks(x, windows, groups):
            tokens = slice(samples.start * positions, samples.stop * positions)
            np.matmul(columns.mT, by_group.mT, out=y[:, tokens])
        return y.reshape(*stack, *y.shape[1:])

    def convolve_transposed(
        self, d: NumpyArray, weight: NumpyArray, windows: Windows
    ) -> NumpyArray:
        """Return the transpose of `convolve` by x, one block of samples after another."""
        groups, (*_, out, width) = math.prod(weight.shape[:-2]), weight.shape
        positions, kernel = math.prod(windows.positions), math.prod(windows.kernel)
        d = d.reshape(groups, -1, out)
        batch, channels = d.shape[1] // positions, groups * (width // kernel)
        by_group = weight.astype(d.dtype, copy=False).reshape(groups, out, width)
        x = np.empty((batch, channels, *windows.size), d.dtype)
        step = _samples(windows, channels, batch)
        buffer = np.empty(step * channels * kernel * positions, d.dtype)
        padded = np.empty((channels, step, *windows.padded), d.dtype)
        for samples in _slices(batch, step):
            count = samples.stop - samples.start
            part = d[:, samples.start * positions : samples.stop * positions]
            shape = channels, *windows.kernel, count, *windows.positions
            columns = buffer[: math.prod(shape)].reshape(groups, width, count * positions)
            np.matmul(by_group.mT, part.mT, out=columns)
            total = padded[:, :count]
            _add_windows(columns.reshape(shape), total, windows)
            x[samples] = total[inside(windows)].swapaxes(0, 1)
        return x

    def convolve_gradient(self, d: NumpyArray, x: NumpyArray, windows: Windows) -> NumpyArray:
        """Return dᵀ X, one block of samples after another.

        Of d and x, that with fewer channels is spread over the kernel: for dA these are the `rank`
        channels of d.
        """
        *stack, tokens, out = d.shape
        groups, positions = math.prod(stack), math.prod(windows.positions)
        width = x.shape[1] // groups * math.prod(windows.kernel)
        d = d.reshape(groups, tokens, out)
        total = np.zeros((groups, out, width), d.dtype)
        if 2 * out * math.prod(windows.padded) <= x.shape[1] // groups * positions:
            for each, spread in _spread_blocks(d, x, windows):
                product = spread @ each.mT  # (groups, out·kernel, in)
                by_offset = product.reshape(groups, out, -1, each.shape[1])
                total += by_offset.mT.reshape(total.shape)
        else:
            for samples, columns in _column_blocks(x, windows, groups):
                part = d[:, samples.start * positions : samples.stop * positions]
                total += part.mT @ columns.mT
        return total.reshape(*stack, out, width)

    def rows_at(self, ids: NumpyArray, table: NumpyArray) -> NumpyArray:
        """Return the rows of a table. `take` would copy a table that is a transposed view."""
        return np.take(table, ids, axis=0) if table.flags.c_contiguous else table[ids]

    def sums_at(self, ids: NumpyArray, rows: NumpyArray, count: int) -> NumpyArray:
        """Return the sums of the rows that have one id. Saves the one-hot matrix."""
        total = np.zeros((count, rows.shape[1]), rows.dtype)
        if ids.size:
            order = np.argsort(ids, kind="stable")
            kept = ids[order]
            starts = np.flatnonzero(np.concatenate([[True], kept[1:] != kept[:-1]]))
            total[kept[starts]] = np.add.reduceat(rows[order], starts, axis=0)
        return total


def _samples(windows: Windows, channels: int, batch: int) -> int:
    """Return how many samples a block has."""
    each = channels * math.prod(windows.kernel) * math.prod(windows.positions)
    return max(1, min(batch, WINDOW_BLOCK // each))


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _column_blocks(
    x: NumpyArray, windows: Windows, groups: int
) -> Iterator[tuple[slice, NumpyArray]]:
    """Yield blocks of samples and their windows, (groups, in/groups·kernel, samples·positions).

    Each overwrites the one before it.
    """
    batch, channels = x.shape[:2]
    step = _samples(windows, channels, batch)
    shape = channels, *windows.kernel, step, *windows.positions
    buffer = np.empty(math.prod(shape), x.dtype)
    for samples, padded in _padded_blocks(x, windows, step):
        view = _windows_of(padded, windows)  # (in, *kernel, samples, *positions)
        columns = buffer[: view.size].reshape(view.shape)
        np.copyto(columns, view)
        width = channels // groups * math.prod(windows.kernel)
        yield samples, columns.reshape(groups, width, view.size // (groups * width))


def _padded_blocks(
    x: NumpyArray, windows: Windows, step: int
) -> Iterator[tuple[slice, NumpyArray]]:
    """Yield blocks of samples with their zeros around, (in, samples, *padded)."""
    padded = np.zeros((x.shape[1], step, *windows.padded), x.dtype)
    middle = padded[inside(windows)]
    for samples in _slices(len(x), step):
        count = samples.stop - samples.start
        middle[:, :count] = x[samples].swapaxes(0, 1)
        yield samples, padded[:, :count]


def _windows_of(padded: NumpyArray, windows: Windows) -> NumpyArray:
    """Return a view of the windows, (in, *kernel, samples, *positions)."""
    dims = len(windows.size)
    axes = tuple(range(2, 2 + dims))
    view = sliding_window_view(padded, windows.extents, axis=axes)
    steps = [slice(None, None, step) for step in (*windows.stride, *windows.dilation)]
    view = view[(slice(None), slice(None), *steps)]  # (in, samples, *positions, *kernel)
    kernel = range(2 + dims, 2 + 2 * dims)
    return view.transpose(0, *kernel, 1, *axes)


def _add_windows(columns: NumpyArray, total: NumpyArray, windows: Windows) -> None:
    """Write the sum of the windows into `total`, (channels, samples, *padded)."""
    total[...] = 0
    for offset, place in offsets(windows):
        total[place] += columns[(slice(None), *offset)]


def _spread_blocks(
    d: NumpyArray, x: NumpyArray, windows: Windows
) -> Iterator[tuple[NumpyArray, NumpyArray]]:
    """Yield blocks of samples of x, and d at the places that each offset of the kernel reads.

    x is (groups, in/groups, samples·padded), d is (groups, out·kernel, samples·padded).
    """
    groups, _, out = d.shape
    channels, positions = x.shape[1], math.prod(windows.positions)
    step = _samples(windows, channels, len(x))
    shape = groups, out, *windows.kernel, step, *windows.padded
    spread = np.zeros(shape, d.dtype)  # the other places stay 0
    for samples, padded in _padded_blocks(x, windows, step):
        count = samples.stop - samples.start
        part = d[:, samples.start * positions : samples.stop * positions]
        part = part.mT.reshape(groups, out, count, *windows.positions)
        here = spread[(*(slice(None),) * (2 + len(windows.kernel)), slice(0, count))]
        for offset, place in offsets(windows):
            here[(slice(None), slice(None), *offset, *place[1:])] = part
        each = padded.reshape(groups, channels // groups, -1)
        yield each, here.reshape(groups, out * math.prod(windows.kernel), -1)
