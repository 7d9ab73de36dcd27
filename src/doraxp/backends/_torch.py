"""PyTorch's own: what lies in the graph of autograd, and what is written in place.

Its host allocator gives large arrays back to the system at once, and the first write to fresh
memory costs several times that to memory in use: so an array of tokens less saves a few percent of
a step.
"""

from __future__ import annotations

from doraxp._base.types import Array
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

    def scale_and_sum(
        self, d: Array, z: Array, gain: Array, room: int, *, total: bool = False
    ) -> tuple[Array, Array, Array | None]:
        """Saves the temporary d⊙z, which is made where g⊙d will be, and what appending copies."""
        xp = self.xp
        if self._derived(d, z, gain):
            return super().scale_and_sum(d, z, gain, room, total=total)
        *stack, tokens, out = d.shape
        scaled = d.new_empty((*stack, tokens + room, out))[..., :tokens, :]
        along = xp.sum(xp.mul(d, z, out=scaled), dim=-2)
        totals = xp.sum(d, dim=-2) if total else None
        return xp.mul(gain[..., None, :], d, out=scaled), along, totals

    def append(self, scaled: Array, rows: Array) -> Array:
        """Saves the copy: there is room in the array that `scaled` is the head of."""
        if self._derived(rows):
            return super().append(scaled, rows)
        *stack, tokens, out = scaled.shape
        whole = scaled.as_strided((*stack, tokens + rows.shape[-2], out), scaled.stride())
        whole[..., tokens:, :] = rows
        return whole

    def _derived(self, *arrays: Array) -> bool:
        """Say whether PyTorch differentiates what is made of these, or maps it: not into `out`."""
        import torch

        if torch._C._are_functorch_transforms_active():
            return True
        if torch.is_grad_enabled() and any(array.requires_grad for array in arrays):
            return True
        duals = map(torch.autograd.forward_ad.unpack_dual, arrays)
        return any(dual.tangent is not None for dual in duals)
