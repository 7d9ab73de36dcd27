"""The gain of a layer as a tensor that PyTorch differentiates.

    D = ρ⊙W (out, in)      V = D + s B A      n = ‖V‖ by rows      g = m / n, 0 where n = 0

    c = −g⊙dg / n²      dm = dg / n      d(s B) = c⊙(V Aᵀ)      dA = (c⊙s B)ᵀ V      dD = c⊙V

V is stored for a while, so n loses nothing to cancellation. The graph does not keep V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from doraxp._base.types import Adapter, Config
from doraxp.backends import compute_dtype, operations
from doraxp.torch._definition import over, row_norms
from doraxp.torch._kept import prepare_kept
from doraxp.torch._modes import is_transformed, without_autocast


def gain(
    dense: Tensor, lora_a: Tensor, scaled_b: Tensor, magnitude: Tensor,
    *, exact: bool, remake: Callable[[], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return g, (out,), in the wider dtype of float32 and those of the arrays.

    Parameters
    ----------
    dense : Tensor, shape (out, in)
        D.
    lora_a : Tensor, shape (rank, in)
    scaled_b : Tensor, shape (out, rank)
        s B.
    magnitude : Tensor, shape (out,)
    exact : bool
        Let the gradient go through n.
    remake : callable, optional
        Returns D again. The backward calls it, and the graph does not keep D.
    """
    # Autocast would make the products in fewer digits.
    with without_autocast(dense):
        if exact and is_transformed():
            return over(magnitude, _direction_and_norm(dense, lora_a, scaled_b)[1])
        if exact:
            apply: Any = _Gain.apply  # PyTorch gives it no type
            g: Tensor = apply(lora_a, scaled_b, magnitude, dense, remake, None)
            return g
        with torch.no_grad():
            _, norm = _direction_and_norm(dense, lora_a, scaled_b)
        return over(magnitude, norm.detach())  # no_grad does not stop forward mode


def kept_gain(
    weight: Tensor, matrix: Tensor, lora_a: Tensor, scaled_b: Tensor, magnitude: Tensor,
    *, exact: bool,
) -> Tensor:  # fmt: skip
    """Return the `gain` of a weight that is stored in another way than its matrix, (out, in).

    V is not stored, and what does not change between calls is kept, as for `dora_linear`.
    """
    if torch.compiler.is_compiling() or is_transformed():
        return gain(matrix, lora_a, scaled_b, magnitude, exact=exact)
    ops = operations(weight=weight)
    dtype = compute_dtype(weight, lora_a, scaled_b, magnitude, xp=ops.xp)
    with torch.no_grad(), without_autocast(weight):
        adapter = Adapter(*(leaf.detach() for leaf in (lora_a, scaled_b, magnitude)))
        config = Config(lora_a.shape[0])
        prepared = prepare_kept(weight, adapter, config, dtype, matrix=matrix, ops=ops)
        norm: Any = prepared.norm
    if not exact:
        return over(magnitude, norm)
    known = norm, norm[:, None] * prepared.unit_projection
    apply: Any = _Gain.apply  # PyTorch gives it no type
    g: Tensor = apply(lora_a, scaled_b, magnitude, matrix, None, known)
    return g


class _Gain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, lora_a: Tensor, scaled_b: Tensor, magnitude: Tensor, dense: Tensor,
        remake: Callable[[], Tensor] | None, known: tuple[Tensor, Tensor] | None,
    ) -> Tensor:  # fmt: skip
        if known is None:
            v, norm = _direction_and_norm(dense, lora_a, scaled_b)
            projection = v @ lora_a.to(v.dtype).mT  # V Aᵀ, (out, rank)
        else:
            norm, projection = known
        g = over(magnitude, norm)
        kept = dense if remake is None else None
        ctx.save_for_backward(lora_a, scaled_b, magnitude, kept, norm, g, projection)
        ctx.remake = remake
        return g

    @staticmethod
    def backward(ctx: Any, dg: Tensor) -> Any:
        lora_a, scaled_b, magnitude, dense, norm, g, projection = ctx.saved_tensors
        arrays = lora_a, scaled_b, magnitude, ctx.remake() if dense is None else dense
        with without_autocast(dg):  # as in `gain`
            if torch.is_grad_enabled():  # `create_graph`: a second derivative may follow
                return *_differentiable(ctx, dg, *arrays), None, None
            return *_gradients(ctx, dg, *arrays, norm, g, projection), None, None


def _gradients(
    ctx: Any, dg: Tensor, lora_a: Tensor, scaled_b: Tensor, magnitude: Tensor, dense: Tensor,
    norm: Tensor, g: Tensor, projection: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients by A, s B, m and D, in their dtypes."""
    dm = over(dg, norm)
    c = over(-g * dm, norm)[:, None]
    a, b, d = (array.to(norm.dtype) for array in (lora_a, scaled_b, dense))
    scaled = c * b
    da = scaled.mT @ d + (scaled.mT @ b) @ a
    ddense = (c * torch.addmm(d, b, a)).to(dense.dtype) if ctx.needs_input_grad[3] else None
    db = (c * projection).to(scaled_b.dtype)
    return da.to(lora_a.dtype), db, dm.to(magnitude.dtype), ddense


def _differentiable(ctx: Any, dg: Tensor, *arrays: Tensor) -> list[Tensor | None]:
    """Return the gradients by A, s B, m and D, of which PyTorch knows the gradients."""
    # As views: an array may be a function of another one, and that path is not this function's.
    lora_a, scaled_b, magnitude, dense = views = [array.view_as(array) for array in arrays]
    g = over(magnitude, _direction_and_norm(dense, lora_a, scaled_b)[1])
    needs = ctx.needs_input_grad[:4]
    wanted = [view for view, needed in zip(views, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(g, wanted, dg, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def _direction_and_norm(dense: Tensor, lora_a: Tensor, scaled_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return V and n."""
    dtype = torch.promote_types(torch.promote_types(dense.dtype, lora_a.dtype), torch.float32)
    v = torch.addmm(dense.to(dtype), scaled_b.to(dtype), lora_a.to(dtype))
    return v, row_norms(v)[0]
