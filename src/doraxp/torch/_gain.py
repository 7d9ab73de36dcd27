"""The gain of a layer as a tensor that PyTorch differentiates.

    D = ρ⊙W (out, in)      V = D + s B A      n = ‖V‖ by rows      g = m / n, 0 where n = 0

V is stored for a while, so its products lose nothing to cancellation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def gain(
    dense: Callable[[], Tensor], lora_a: Tensor, scaled_b: Tensor, magnitude: Tensor, *, exact: bool
) -> Tensor:
    """Return g, (out,), in the wider dtype of float32 and that of the arrays.

    Parameters
    ----------
    dense : callable
        Returns D. With `exact` the backward calls it again: V is not kept.
    lora_a : Tensor, shape (rank, in)
    scaled_b : Tensor, shape (out, rank)
        s B.
    magnitude : Tensor, shape (out,)
    exact : bool
        Let the gradient go through n.
    """
    # Autocast would make the product in fewer digits.
    with torch.autocast(magnitude.device.type, enabled=False):
        if exact and torch.is_grad_enabled():
            norm = checkpoint(
                _row_norms, dense, lora_a, scaled_b, use_reentrant=False, preserve_rng_state=False
            )
        else:
            with torch.no_grad():
                norm = _row_norms(dense, lora_a, scaled_b)
        positive = norm > 0
        return torch.where(positive, magnitude / torch.where(positive, norm, 1), 0)


def _row_norms(dense: Callable[[], Tensor], lora_a: Tensor, scaled_b: Tensor) -> Tensor:
    weight = dense()
    dtype = torch.promote_types(torch.promote_types(weight.dtype, lora_a.dtype), torch.float32)
    v = torch.addmm(weight.to(dtype), scaled_b.to(dtype), lora_a.to(dtype))
    norm: Tensor = torch.linalg.vector_norm(v, dim=-1)
    return norm
