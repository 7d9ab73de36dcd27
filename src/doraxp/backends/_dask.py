"""Dask's overrides: a write into an adapter's array is noticed by the array's name.

A name stands for the graph that makes the numbers, and Dask gives an array another one when it is
written to.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from doraxp._base.types import Adapter, Snapshot
from doraxp.backends._generic import Operations, solve_by_elimination

DaskArray: TypeAlias = Any
"""A `dask.array.Array`. mypy refuses that class as the type of an argument here, because the
methods override those of `Operations`, which take any `Array`."""


class DaskOperations(Operations):
    """The operations on Dask's arrays."""

    def solve(self, matrix: DaskArray, right: DaskArray) -> DaskArray:
        """Return M⁻¹ right. Dask's own `solve` refuses a stack, and chunks that are not square."""
        return solve_by_elimination(matrix, right, xp=self.xp)

    def snapshot(self, adapter: Adapter) -> tuple[str, ...]:
        """Return the names of A, B and m. No graph is computed."""
        return _names(adapter)

    def unchanged(self, snapshot: Snapshot | None, then: Adapter, now: Adapter) -> bool:
        """Return whether the arrays have the names that they had: their graphs are the same."""
        return snapshot == _names(now)


def _names(adapter: Adapter) -> tuple[str, ...]:
    leaves: tuple[DaskArray, ...] = adapter
    return tuple(leaf.name for leaf in leaves)
