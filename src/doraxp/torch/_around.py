"""A DoRA layer around a base that multiplies by W itself, such as a quantised one.

    h = base(x) = x Wᵀ + bias      x̃ = dropout(x)      g = m / ‖W + s B A‖ by rows

    y = g⊙(h + s (x Aᵀ) Bᵀ) + (1 − g)⊙bias              without dropout
    y = h + (g − 1)⊙(x̃ Wᵀ) + g⊙(s (x̃ Aᵀ) Bᵀ)           with dropout

The graph keeps no plain W, unless that is small: the backward makes it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from doraxp.torch._gain import gain

SMALL = 2**18
"""Numbers of a weight that take less memory than their second making takes time."""


def around_base(
    x: Tensor, dropped: Tensor | None, base: Any, dense: Callable[[], Tensor],
    lora_a: Tensor, scaled_b: Tensor, magnitude: Tensor, *, exact: bool,
) -> Tensor:  # fmt: skip
    """Return y in the dtype of base(x). The product x Wᵀ is the base's own.

    Parameters
    ----------
    x : Tensor, shape (..., in)
    dropped : Tensor, shape (..., in), or None
        x̃, or None for x.
    base : module
    dense : callable
        Returns W without a graph, for the norm.
    lora_a, scaled_b, magnitude : Tensor
        A (rank, in), s B (out, rank) and m (out,).
    exact : bool
        Let the gradient go through the norm.
    """
    # Read W before the base is called: bitsandbytes may store it in another way then.
    w = dense()
    remake = dense if w.numel() > SMALL else lambda: w
    g = gain(w, lora_a, scaled_b, magnitude, exact=exact, remake=remake)
    h: Tensor = base(x)
    seen = x if dropped is None else dropped
    update = functional.linear(functional.linear(seen.to(lora_a.dtype), lora_a), scaled_b)
    if dropped is None:
        y = g * (h + update)
        if base.bias is not None:
            y = y + (1 - g) * base.bias
    else:
        apply: Any = _Product.apply  # PyTorch gives it no type
        product: Tensor = apply(dropped, w, remake)
        y = h + (g - 1) * product + g * update
    return y.to(h.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ, whose graph keeps no W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, remake: Callable[[], Tensor]) -> Tensor:
        ctx.remake = remake
        return functional.linear(x, w.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy @ ctx.remake().to(dy.dtype), None, None
