"""PyTorch's own convolutions and lookups, for tokens by rows.

    x (batch, in, *size)    weight (*stack, out, in·kernel)    y (*stack, batch·positions, out)

Memory has the channels last, so a view of PyTorch's (batch, out, *positions) is y. One dimension is
a convolution of two whose first has the size 1: the format needs two or three.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias, cast

from doraxp.backends._layers import LayerOperations
from doraxp.backends._windows import Windows

Tensor: TypeAlias = Any
"""A `torch.Tensor`; see `doraxp.backends._torch`."""


class TorchLayerOperations(LayerOperations):
    """The operations of convolutions and lookups on PyTorch's tensors."""

    def convolve(self, x: Tensor, weight: Tensor, windows: Windows) -> Tensor:
        """Return X weightᵀ by one convolution of PyTorch's."""
        *stack, out, _ = weight.shape
        windows = _at_least_2d(windows)
        stored = _stored(weight.to(x.dtype), windows)
        rules = _rules(windows, math.prod(stack))
        y = self.xp.convolution(_channels_last(x, windows), stored, None, *rules)
        return _by_token(y, stack, out)

    def convolve_transposed(self, d: Tensor, weight: Tensor, windows: Windows) -> Tensor:
        """Return the transpose of `convolve` by x, by PyTorch's."""
        size, windows, groups = windows.size, _at_least_2d(windows), math.prod(weight.shape[:-2])
        stored, by_channel = _stored(weight.to(d.dtype), windows), _by_channel(d, windows)
        shape = by_channel.shape[0], stored.shape[1] * groups
        like = d.new_empty(shape[0], *windows.size, shape[1]).movedim(-1, 1)  # nothing reads it
        dx, _, _ = self._backward(by_channel, like, stored, windows, groups, 0)
        return dx.reshape(*shape, *size)

    def convolve_gradient(self, d: Tensor, x: Tensor, windows: Windows) -> Tensor:
        """Return dᵀ X, by PyTorch's."""
        windows = _at_least_2d(windows)
        *stack, _, out = d.shape
        groups = math.prod(stack)
        like = d.new_empty(groups * out, x.shape[1] // groups, *windows.kernel)
        by_channel, x = _by_channel(d, windows), _channels_last(x, windows)
        _, gradient, _ = self._backward(by_channel, x, like, windows, groups, 1)
        return gradient.reshape(*stack, out, -1)

    def _backward(
        self, d: Tensor, x: Tensor, weight: Tensor, windows: Windows, groups: int, which: int
    ) -> Any:
        """Return the gradients of PyTorch's convolution, of which one is made."""
        backward = cast(Any, self.xp).ops.aten.convolution_backward
        mask = [place == which for place in range(3)]
        return backward(d, x, weight, None, *_rules(windows, groups), mask)

    def rows_at(self, ids: Tensor, table: Tensor) -> Tensor:
        """Return the rows of a table."""
        return self.xp.index_select(table, 0, ids)

    def sums_at(self, ids: Tensor, rows: Tensor, count: int) -> Tensor:
        """Return the sums of the rows that have one id. Saves the one-hot matrix."""
        return rows.new_zeros((count, rows.shape[1])).index_add(0, ids, rows)


def _at_least_2d(windows: Windows) -> Windows:
    """Return the shape of a convolution over two dimensions or three."""
    if len(windows.size) > 1:
        return windows
    first = Windows((1,), (1,), (1,), (0,), (1,))
    return Windows(*(one + given for one, given in zip(first, windows, strict=True)))


def _rules(windows: Windows, groups: int) -> tuple[Any, ...]:
    """Return stride, padding, dilation and groups as PyTorch takes them."""
    none = (0,) * len(windows.size)
    return windows.stride, windows.padding, windows.dilation, False, none, groups


def _channels_last(x: Tensor, windows: Windows) -> Tensor:
    """Return x (batch, in, *size) with two sizes or three, in memory with its channels last."""
    x = x.reshape(*x.shape[:2], *windows.size)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _stored(weight: Tensor, windows: Windows) -> Tensor:
    """Return a weight (*stack, out, in·kernel) as PyTorch has it, (groups·out, in, *kernel)."""
    width = weight.shape[-1] // math.prod(windows.kernel)
    return weight.reshape(-1, width, *windows.kernel)


def _by_token(y: Tensor, stack: list[int], out: int) -> Tensor:
    """Return (batch, groups·out, *positions) as (*stack, tokens, out)."""
    split = y.reshape(y.shape[0], math.prod(stack), out, math.prod(y.shape[2:]))
    return split.permute(1, 0, 3, 2).reshape(*stack, -1, out)


def _by_channel(d: Tensor, windows: Windows) -> Tensor:
    """Return (*stack, tokens, out) as (batch, groups·out, *positions): a view of one group."""
    *stack, tokens, out = d.shape
    groups, positions = math.prod(stack), math.prod(windows.positions)
    split = d.reshape(groups, tokens // positions, positions, out)
    shape = tokens // positions, groups * out, *windows.positions
    return split.permute(1, 0, 3, 2).reshape(shape)
