"""Ranks of a parallel computation, one after the other in one process.

A rank that needs a sum it cannot know yet is broken off, and begun anew once all ranks have come
there. So no threads are needed, and it works for lazy arrays and under `jax.jit`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any


class NeedsSumError(Exception):
    pass


class Ranks:
    """`size` ranks; counts the sums that they make."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sums: list[Any] = []

    def run(self, function: Callable[..., Any]) -> list[Any]:
        """Return function(rank, reduce) of each rank."""
        while True:
            parts: list[Any] = []
            results = []
            for rank in range(self.size):
                with contextlib.suppress(NeedsSumError):
                    results.append(function(rank, _Reduce(self.sums, parts)))
            if not parts:
                return results
            assert len(parts) == self.size, "some ranks need a sum that others do not"
            assert len({(part.shape, part.dtype) for part in parts}) == 1
            self.sums.append(sum(parts[1:], start=parts[0]))


class _Reduce:
    """Replays the sums that are known, and leaves its part of the first that is not."""

    def __init__(self, sums: list[Any], parts: list[Any]) -> None:
        self.known, self.parts = iter(tuple(sums)), parts

    def __call__(self, part: Any) -> Any:
        for known in self.known:
            return known
        self.parts.append(part)
        raise NeedsSumError
