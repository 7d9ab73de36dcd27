"""PyTorch's overrides: tensors outside of autograd's graph, and results written in place.

PyTorch's allocator gives large arrays on the host back to the system at once, and the first write
to fresh memory takes several times as long as a later one. So each temporary (tokens, out) that is
not made saves a few percent of a step.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from doraxp.backends._generic import Operations, OutputGradients

Tensor: TypeAlias = Any
"""A `torch.Tensor`. mypy refuses that class as the type of an argument here, because the methods
override those of `Operations`, which take any `Array`."""
ConsumedTensor: TypeAlias = Tensor
"""A `Tensor` that the function may write to: its caller must not read it again."""


class TorchOperations(Operations):
    """The operations on PyTorch tensors."""

    def detached(self, array: Tensor) -> Tensor:
        """Return `array` without its graph. A layer would else keep the graphs of all its steps."""
        return array.detach()

    def accumulate(self, total: ConsumedTensor, left: Tensor, right: Tensor) -> Tensor:
        """Return total + left right. BLAS adds while it multiplies, so no temporary is made."""
        if total.ndim == 2:
            return total.addmm_(left, right)
        return super().accumulate(total, left, right)

    def output_gradients(
        self, d: Tensor, z: Tensor, gain: Tensor, norm: Tensor, scaled_b: Tensor,
        *, exact: bool, with_bias: bool,
    ) -> OutputGradients:  # fmt: skip
        """Return the gradients. One array holds dy⊙z first, and then dz and the rows below it.

        Saves that temporary and the copy that `concat` makes.
        """
        if _is_transformed(d, z, gain, norm, scaled_b):
            return super().output_gradients(
                d, z, gain, norm, scaled_b, exact=exact, with_bias=with_bias
            )
        xp = self.xp
        *stack, tokens, out = d.shape
        rank = scaled_b.shape[-1] if exact else 0
        rows = d.new_empty((*stack, tokens + rank, out))
        dz = rows[..., :tokens, :]
        dm = self.over_norm(xp.sum(xp.mul(d, z, out=dz), dim=-2), norm)
        xp.mul(gain[..., None, :], d, out=dz)
        p = gain * dm if exact else None
        if p is not None:
            below = self.over_norm(-p[..., None] * scaled_b, norm)  # (out, rank)
            rows[..., tokens:, :] = xp.matrix_transpose(below)
        dbias = xp.sum(d, dim=-2) if with_bias else None
        return OutputGradients(rows, rows @ scaled_b, dm, p, dbias)


def _is_transformed(*arrays: Tensor) -> bool:
    """Return whether PyTorch differentiates or maps over the arrays. It forbids `out=` then."""
    import torch

    if torch._C._are_functorch_transforms_active():
        return True
    if torch.is_grad_enabled() and any(array.requires_grad for array in arrays):
        return True
    duals = map(torch.autograd.forward_ad.unpack_dual, arrays)
    return any(dual.tangent is not None for dual in duals)
