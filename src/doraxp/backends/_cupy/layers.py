"""CuPy's convolutions: the windows as a view, which one kernel copies, and sums of strided slices.

x (batch, in, *size)    weight (*stack, out, in·kernel)    y (*stack, batch·positions, out)
"""

from __future__ import annotations

import math
from typing import Any

from doraxp.backends._cupy.arrays import DeviceArray
from doraxp.backends._layers import LayerOperations
from doraxp.backends._windows import Windows, inside, offsets


class CupyLayerOperations(LayerOperations):
    """The operations of convolutions on CuPy's arrays. Saves the tables of indices."""

    def convolve_transposed(
        self, d: DeviceArray, weight: DeviceArray, windows: Windows
    ) -> DeviceArray:
        """Return the transpose of `convolve` by x: a launch for each offset of the kernel."""
        xp, groups, positions = self.xp, math.prod(d.shape[:-2]), math.prod(windows.positions)
        columns: DeviceArray = d @ weight.astype(d.dtype, copy=False)
        batch, kernel = d.shape[-2] // positions, math.prod(windows.kernel)
        inner = columns.shape[-1] // kernel
        # (in, *kernel, batch, *positions), each group beside the one before it
        split = columns.reshape(groups, batch, positions, inner, kernel)
        split = split.transpose(0, 3, 4, 1, 2).reshape(
            groups * inner, *windows.kernel, batch, *windows.positions
        )
        padded: DeviceArray = xp.zeros((groups * inner, batch, *windows.padded), dtype=d.dtype)
        for offset, place in offsets(windows):
            padded[place] += split[(slice(None), *offset)]
        return padded[inside(windows)].swapaxes(0, 1)

    def _columns(self, x: DeviceArray, windows: Windows, stack: list[int]) -> DeviceArray:
        """Return the windows of x, (*stack, tokens, in·kernel)."""
        xp: Any = self.xp
        batch, channels = x.shape[:2]
        padded: DeviceArray = xp.zeros((channels, batch, *windows.padded), dtype=x.dtype)
        padded[inside(windows)] = x.swapaxes(0, 1)
        steps = padded.strides
        # Not `sliding_window_view`: CuPy's reads the shape of the window from the device.
        view: DeviceArray = xp.lib.stride_tricks.as_strided(
            padded,
            (batch, *windows.positions, channels, *windows.kernel),
            (
                steps[1],
                *(stride * step for stride, step in zip(windows.stride, steps[2:], strict=True)),
                steps[0],
                *(size * step for size, step in zip(windows.dilation, steps[2:], strict=True)),
            ),
        )
        groups, dims = math.prod(stack), len(windows.size)
        split = view.reshape(*view.shape[: 1 + dims], groups, -1)  # the copy
        by_group = split.reshape(-1, groups, split.shape[-1]).swapaxes(0, 1)
        return by_group.reshape(*stack, *by_group.shape[1:])
