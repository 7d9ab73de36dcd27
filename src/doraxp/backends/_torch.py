"""PyTorch's own: what lies in the graph of autograd, and products that add."""

from __future__ import annotations

from doraxp._types import Array
from doraxp.backends._generic import Operations


class TorchOperations(Operations):
    """The operations on PyTorch tensors."""

    def detached(self, array: Array) -> Array:
        """Leave the graph: a layer that steps its own parameters would keep every step's."""
        return array.detach()

    def accumulate(self, total: Array, left: Array, right: Array) -> Array:
        """Saves the temporary of the product, and adding it: BLAS adds while it multiplies."""
        if total.ndim == 2:
            return total.addmm_(left, right)
        return super().accumulate(total, left, right)
