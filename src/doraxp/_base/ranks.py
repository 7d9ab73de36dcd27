"""Sums over ranks, for a layer whose input axis is split among them."""

from __future__ import annotations

import math

from doraxp._base.types import Array, Namespace, Reduce


def check_reduce(reduce: Reduce | None) -> None:
    """Raise TypeError unless `reduce` is a callable or None."""
    if reduce is not None and not callable(reduce):
        raise TypeError(f"reduce must be a callable or None, got {reduce!r}")


def sums(reduce: Reduce | None, *parts: Array, xp: Namespace) -> tuple[Array, ...]:
    """Return the sums over the ranks of arrays of one dtype, by one call of `reduce`."""
    if reduce is None:
        return parts
    flat = xp.concat([xp.reshape(part, (-1,)) for part in parts])
    total = reduce(flat)
    if getattr(total, "shape", None) != flat.shape or total.dtype != flat.dtype:
        got = f"{total.dtype} {total.shape}" if hasattr(total, "dtype") else repr(total)
        raise ValueError(
            f"reduce must return an array of shape {flat.shape} and dtype {flat.dtype}, as "
            f"its argument has, got {got}"
        )
    result, start = [], 0
    for part in parts:
        stop = start + math.prod(part.shape)
        result.append(xp.reshape(total[start:stop], part.shape))
        start = stop
    return tuple(result)
