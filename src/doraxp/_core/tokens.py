"""Arrays of layers as tokens: (stack, tokens, channels), and back.

axis    where an array has its channels: (batch, channels, *positions) has them on axis 1
groups  the channels are groups·k, those of one group beside each other
"""

from __future__ import annotations

import math

from doraxp._base.types import Array, Namespace


def by_token(array: Array, axis: int, groups: int, *, xp: Namespace) -> Array:
    """Return (..., groups·k, ...) as (groups, tokens, k): a view where the memory allows it."""
    shape = tuple(array.shape)
    axis %= len(shape)
    before, after = shape[:axis], shape[axis + 1 :]
    each, tokens = shape[axis] // groups, math.prod(before + after)
    if groups == 1 and not after:  # the channels are last already
        return xp.reshape(array, (1, tokens, each))
    split = xp.reshape(array, (math.prod(before), groups, each, math.prod(after)))
    return xp.reshape(xp.permute_dims(split, (1, 0, 3, 2)), (groups, tokens, each))


def by_channel(tokens: Array, shape: tuple[int, ...], axis: int, *, xp: Namespace) -> Array:
    """Return (groups, tokens, k) in `shape`, which has groups·k on `axis`: undo `by_token`."""
    axis %= len(shape)
    before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    groups, _, each = tokens.shape
    if groups == 1 and axis == len(shape) - 1:
        return xp.reshape(tokens, shape)
    split = xp.reshape(tokens, (groups, before, after, each))
    return xp.reshape(xp.permute_dims(split, (1, 0, 3, 2)), shape)


def with_tokens(array: Array, depth: int, *, xp: Namespace) -> Array:
    """Return (*stack, ..., k) as (*stack, tokens, k), for a stack of `depth` axes."""
    if array.ndim == depth + 2:
        return array
    shape = tuple(array.shape)
    count = math.prod(shape[depth:-1])
    return xp.reshape(array, (*shape[:depth], count, shape[-1]))
