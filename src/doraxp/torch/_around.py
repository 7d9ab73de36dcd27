"""A DoRA layer around a base that multiplies by W itself, such as a quantised one.

    h = base(x) = x Wᵀ + bias      x̃ = dropout(x)      h̃ = base(x̃)      g = m / ‖W + s B A‖

    y = h − h̃ + g⊙(h̃ + s (x̃ Aᵀ) Bᵀ) + (1 − g)⊙bias

Without dropout h̃ is h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from doraxp.torch._gain import gain


def around_base(
    x: Tensor, dropped: Tensor | None, base: Any, dense: Callable[[], Tensor],
    lora_a: Tensor, scaled_b: Tensor, magnitude: Tensor, *, exact: bool,
) -> Tensor:  # fmt: skip
    """Return y in the dtype of base(x). The products with W are the base's own, and so is dx.

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
    # The weight is read before the base is called, which may change how the weight is stored.
    g = gain(dense, lora_a, scaled_b, magnitude, exact=exact)
    if dropped is None:
        whole = own = base(x)
    else:
        # One call for both: the base unpacks its weight once.
        rows = torch.cat([x.reshape(-1, x.shape[-1]), dropped.reshape(-1, x.shape[-1]).to(x.dtype)])
        whole, own = base(rows).reshape(2, *x.shape[:-1], -1)
    low = functional.linear((x if dropped is None else dropped).to(lora_a.dtype), lora_a)
    y = g * (own + functional.linear(low, scaled_b))
    if dropped is not None:
        y = y + (whole - own)
    if base.bias is not None:
        y = y + (1 - g) * base.bias
    rounded: Tensor = y.to(whole.dtype)
    return rounded
