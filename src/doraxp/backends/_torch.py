"""PyTorch's own: what lies in the graph of autograd."""

from __future__ import annotations

from doraxp._types import Array
from doraxp.backends._generic import Operations


class TorchOperations(Operations):
    """The operations on PyTorch tensors."""

    def detached(self, array: Array) -> Array:
        """Leave the graph: a layer that steps its own parameters would keep every step's."""
        return array.detach()
