"""The blocks of a matrix, or of each matrix of a stack, that have one scale each.

::

    shape   (*stack, rows, columns)
    size    (height, width) of a block; the last block of a side may be smaller
    grid    (*stack, lines, groups): the number of blocks along each axis

A line is a row of the grid, and the lines of all matrices follow one another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from doraxp._base.types import HostArray


@dataclass(frozen=True)
class Blocks:
    """A weight's shape and the size of its blocks."""

    shape: tuple[int, ...]
    size: tuple[int, int]

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of blocks along each axis."""
        *stack, rows, columns = self.shape
        return (*stack, -(-rows // self.size[0]), -(-columns // self.size[1]))

    @property
    def step(self) -> int:
        """The fewest rows that have whole blocks, also where the matrices of a stack follow."""
        if self.passes == 2:
            return 1
        rows = self.shape[-2]
        return self.size[0] if len(self.shape) == 2 or rows % self.size[0] == 0 else rows

    @property
    def passes(self) -> int:
        """2 where one line has all rows of a matrix: then its scales are measured first."""
        return 2 if len(self.shape) == 2 and self.grid[0] == 1 else 1

    def words(self) -> str:
        """The blocks for tables: "32" columns, "16×16", "rows", or the whole "tensor"."""
        height, width = self.size
        if math.prod(self.grid) == 1:
            return "tensor"
        if self.grid[-2:] == (1, 1):
            return "matrix"
        if height > 1:
            return f"{height}×{width}"
        return "rows" if self.grid[-1] == 1 else f"{width}"

    def lines(self, rows: slice) -> HostArray:
        """Return the line of each row."""
        row, height = np.arange(rows.start, rows.stop), self.shape[-2]
        lines: HostArray = row // height * self.grid[-2] + row % height // self.size[0]
        return lines

    def part(self, rows: slice) -> slice:
        """Return the lines of some rows, of which there is at least one."""
        lines = (
            self.lines(slice(rows.start, rows.start + 1)),
            self.lines(slice(rows.stop - 1, rows.stop)),
        )
        return slice(int(lines[0][0]), int(lines[1][0]) + 1)

    def reduced(self, operation: np.ufunc, values: HostArray, rows: slice) -> HostArray:
        """Return `operation`, such as np.maximum, over the blocks of some rows, (lines, groups)."""
        lines = self.lines(rows)
        starts = np.flatnonzero(np.diff(lines, prepend=-1))
        if len(starts) < len(lines):
            values = operation.reduceat(values, starts)
        columns, width = self.shape[-1], self.size[1]
        reduced: HostArray
        if columns % width == 0:
            reduced = operation.reduce(values.reshape(len(values), -1, width), axis=-1)
        else:
            reduced = operation.reduceat(values, np.arange(0, columns, width), axis=1)
        return reduced
