"""The part of an update that a merged weight keeps when it is rounded to its dtype on disk.

::

    kept = ⟨stored − W, W' − W⟩ / ‖W' − W‖²

It is 1 where the stored weight has moved as far along the update as W' does, and 0 where rounding
took the update back. In bfloat16 the distance of two numbers is up to 1/128 of the number: a
smaller update is mostly lost where W itself is in bfloat16.
"""

from __future__ import annotations

import math

import numpy as np

from doraxp._base.types import HostArray
from doraxp.checkpoint._engine import Reused
from doraxp.checkpoint._rows import Block

WHOLE = 1 << 20
"""Elements of the largest weight of which every number is measured."""
PARTS = 8
"""Of a larger weight one number in eight is measured."""
_GROUP = 64


class Survival:
    """Sums the two products of `kept` while the blocks of one weight are written.

    Of a large weight each group of rows is measured in an eighth of the columns, the next group in
    the next eighth: so no row and no column is left out. With an update of 3e-4 of the weight, 2
    million of the 16 million numbers of a (4096, 4096) weight give `kept` to about 0.003.

    Parameters
    ----------
    shape : tuple of int
        Of the weight as it is stored.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._columns = math.prod(shape[1:])
        self._parts = 1 if math.prod(shape) <= WHOLE else PARTS
        self._group = max(1, min(_GROUP, shape[0] // PARTS**2))
        self._along, self._squares = 0.0, 0.0
        self._kept, self._update = Reused(), Reused()

    def add(self, block: Block, stored: HostArray) -> None:
        """Take a block before it is overwritten, and its rows as they are stored."""
        exact, stored = (rows.reshape(len(rows), -1) for rows in (block.merged, stored))
        first, last = block.rows.start, block.rows.stop
        step = last - first if self._parts == 1 else self._group
        for start in range(first - first % step if self._parts > 1 else first, last, step):
            rows = slice(max(start, first) - first, min(start + step, last) - first)
            part = start // step % self._parts if self._parts > 1 else 0
            columns = slice(
                part * self._columns // self._parts, (part + 1) * self._columns // self._parts
            )
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

    @property
    def kept(self) -> float:
        """⟨stored − W, W' − W⟩ / ‖W' − W‖²; 1 where W' is W, NaN where the squares overflow."""
        if not self._squares:
            return 1.0
        return self._along / self._squares if math.isfinite(self._squares) else math.nan
