"""Ranks of a parallel computation, which run one after the other in one process.

A rank that needs a sum over all ranks is stopped, and started again when all ranks have computed
their parts of it. This needs no threads, and works for lazy arrays and under `jax.jit`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any


class NeedsSumError(Exception):
    pass


class Ranks:
    """`size` ranks, and the sums that they needed."""

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
    """Returns the known sums in their order, and stores a rank's part of the first unknown sum."""

    def __init__(self, sums: list[Any], parts: list[Any]) -> None:
        self.known, self.parts = iter(tuple(sums)), parts

    def __call__(self, part: Any) -> Any:
        for known in self.known:
            return known
        self.parts.append(part)
        raise NeedsSumError
