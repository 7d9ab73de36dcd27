"""The part of an update that a merged weight keeps when it is rounded to its dtype on disk.

::

    kept   = ⟨stored − W, W' − W⟩ / ‖W' − W‖²
    cosine = ⟨stored − W, W' − W⟩ / (‖stored − W‖ ‖W' − W‖)

kept is 1 where the stored weight has moved as far along the update as W' does, and 0 where rounding
took the update back. In bfloat16 the distance of two numbers is up to 1/128 of the number: a
smaller update is mostly lost where W itself is in bfloat16.

A weight that is quantised again gets new scales, and then all numbers move by as much as the steps
of the format. In the mean they move along the update too, and kept is near 1, but the update drowns
in what rounding adds: the cosine is small.
"""

from __future__ import annotations

import math

import numpy as np

from doraxp._base.types import HostArray
from doraxp.checkpoint._engine import Reused
from doraxp.checkpoint._rows import Block

SAMPLE = 1 << 20
"""Elements of a large weight that are measured; of a smaller one all are."""
_GROUP = 64
"""Rows at a time that are measured in the same columns."""


class Survival:
    """Sums the products of `kept` and `cosine` while the blocks of one weight are written.

    Of a weight with p times 2²⁰ elements each group of rows is measured in one p-th of the columns,
    the next group in the next p-th: so no row and no column is left out. With an update of 3e-4 of
    a (4096, 4096) weight, its 2²⁰ elements give `kept` to about 0.001.

    Parameters
    ----------
    shape : tuple of int
        Of the weight as it is stored.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        rows, self._columns = shape[0], math.prod(shape[1:])
        self._parts = max(1, min(rows * self._columns // SAMPLE, rows))
        self._group = rows if self._parts == 1 else max(1, min(_GROUP, rows // self._parts))
        self._along, self._squares, self._moved = 0.0, 0.0, 0.0
        self._kept, self._update = Reused(), Reused()

    def add(self, block: Block, stored: HostArray) -> None:
        """Take a block before it is overwritten, and its rows as they are stored."""
        exact, stored = (rows.reshape(len(rows), -1) for rows in (block.merged, stored))
        first, last = block.rows.start, block.rows.stop
        for start in range(first - first % self._group, last, self._group):
            rows = slice(max(start - first, 0), min(start + self._group, last) - first)
            part = start // self._group % self._parts
            begin, end = (i * self._columns // self._parts for i in (part, part + 1))
            columns = slice(begin, end)
            self._measure(block.weight[rows, columns], exact[rows, columns], stored[rows, columns])

    def _measure(self, weight: HostArray, exact: HostArray, stored: HostArray) -> None:
        kept = self._kept(stored.shape, weight.dtype)
        np.copyto(kept, stored, casting="unsafe")
        update = self._update(exact.shape, weight.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            kept -= weight
            np.subtract(exact, weight, out=update)
            self._along += float(np.vdot(kept, update))
            self._squares += float(np.vdot(update, update))
            self._moved += float(np.vdot(kept, kept))

    @property
    def kept(self) -> float:
        """⟨stored − W, W' − W⟩ / ‖W' − W‖²; 1 where W' is W, NaN where the squares overflow."""
        if not self._squares:
            return 1.0
        return self._along / self._squares if math.isfinite(self._squares) else math.nan

    @property
    def cosine(self) -> float:
        """The cosine of the stored change and the update; 1 where W' is W, 0 where stored is W."""
        if not self._squares:
            return 1.0
        lengths = math.sqrt(self._squares) * math.sqrt(self._moved)
        if not math.isfinite(lengths):
            return math.nan
        return self._along / lengths if lengths else 0.0
