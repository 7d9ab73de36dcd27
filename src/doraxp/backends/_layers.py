"""The products of convolutions and the rows of tables, in the array API standard alone.

    convolution   x (batch, in, *size)    weight (*stack, out, in·kernel)    y (*stack, tokens, out)
    lookup        ids (tokens,)           table (rows, dim)                  y (tokens, dim)

The tokens of a convolution are batch·positions, and its stack has an element for each group. Then
in and out are those of one group. A weight without a stack is one group.
"""

from __future__ import annotations

import math

import numpy as np

from doraxp._base.types import Array, Namespace
from doraxp.backends._dtypes import as_dtype, transpose
from doraxp.backends._namespaces import device
from doraxp.backends._windows import Windows, folded, unfolded

ONE_HOT = 1 << 22
"""Numbers of a block of the one-hot matrix that adds rows to a table: 16 MiB in float32."""


class LayerOperations:
    """The operations of convolutions and lookups. `Operations` has the others."""

    xp: Namespace

    def convolve(self, x: Array, weight: Array, windows: Windows) -> Array:
        """Return X weightᵀ for the windows X of x, (*stack, tokens, out)."""
        *stack, _, _ = weight.shape
        columns = self._columns(x, windows, stack)
        return columns @ transpose(as_dtype(weight, x.dtype, xp=self.xp))

    def convolve_transposed(self, d: Array, weight: Array, windows: Windows) -> Array:
        """Return the transpose of `convolve` by x: (*stack, tokens, out) -> (batch, in, *size)."""
        columns = d @ as_dtype(weight, d.dtype, xp=self.xp)
        return folded(_with_groups(columns, xp=self.xp), windows, xp=self.xp)

    def convolve_gradient(self, d: Array, x: Array, windows: Windows) -> Array:
        """Return dᵀ X, (*stack, out, in·kernel): the transpose of `convolve` by the weight."""
        *stack, _, _ = d.shape
        return transpose(d) @ self._columns(x, windows, stack)

    def _columns(self, x: Array, windows: Windows, stack: list[int]) -> Array:
        """Return the windows of x, (*stack, tokens, in·kernel)."""
        groups = math.prod(stack)
        columns = unfolded(x, windows, groups, xp=self.xp)
        return self.xp.reshape(columns, (*stack, *columns.shape[1:]))

    def rows_at(self, ids: Array, table: Array) -> Array:
        """Return the rows of a table: (tokens,) -> (tokens, dim), in the table's dtype."""
        return self.xp.take(table, ids, axis=0)

    def sums_at(self, ids: Array, rows: Array, count: int) -> Array:
        """Return a table of `count` rows, each the sum of the rows that have its id.

        (tokens,), (tokens, dim) -> (count, dim). The standard cannot write to places that an array
        gives. So a product with a one-hot matrix adds the rows, by blocks of the table.
        """
        xp, tokens = self.xp, rows.shape[0]
        step = max(1, ONE_HOT // max(1, tokens))
        parts = []
        for start in range(0, count, step):
            stop = min(start + step, count)
            block = xp.asarray(np.arange(start, stop, dtype=np.int32), device=device(ids))
            hot = xp.astype(xp.astype(block, ids.dtype)[:, None] == ids[None, :], rows.dtype)
            parts.append(hot @ rows)
        return parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)


def _with_groups(array: Array, *, xp: Namespace) -> Array:
    """Return an array (*stack, k, l) with one axis for the groups: (groups, k, l)."""
    *stack, rows, columns = array.shape
    return xp.reshape(array, (math.prod(stack), rows, columns))
