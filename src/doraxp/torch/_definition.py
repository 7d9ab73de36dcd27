"""The layer by its definition, in PyTorch's own operations, which PyTorch differentiates itself.

    V = ρ⊙W + s B A (out, in)    n = ‖V‖ by rows (out,)    g = m / n    y = g⊙(x Vᵀ) + bias

V is stored, and so is its gradient. In a small layer that takes less time than the calls from
Python which avoid it. `torch.func` goes through this form, and so do second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from doraxp._base.types import Adapter, Config, DType
from doraxp.torch._modes import is_transformed

LEAST, MOST = 1e-15, 1e15
"""The squares of norms between these bounds neither overflow nor underflow in float32."""
_SMALL, _FEW = 2**18, 2**24
"""Numbers of the weight, and products of a forward in training, up to which V is stored."""


def by_definition(
    x: Tensor, weight: Tensor, adapter: Adapter, config: Config, bias: Tensor | None, dtype: DType
) -> Tensor:
    """Return y in x's dtype, for arguments that have been checked; `dtype` is the compute dtype."""
    rows, scale = rows_and_scale(weight, adapter, config, dtype)
    return _cast(of_rows(x, rows, scale, bias), x.dtype)


def of_rows(x: Tensor, rows: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return y = g⊙(x Vᵀ) + bias in the dtype of V."""
    x = _cast(x, rows.dtype)
    *stack, out, inner = rows.shape
    if stack:
        y = scale[..., None, :] * (x.reshape(*stack, -1, inner) @ rows.mT)
        if bias is not None:
            y = y + _cast(bias, y.dtype)[..., None, :]
        return y.reshape(*x.shape[:-1], out)
    y = scale * functional.linear(x, rows)
    return y if bias is None else y + _cast(bias, y.dtype)


def is_small(weight: Tensor, tokens: int = 0) -> bool:
    """Return whether V may be stored, and a step with so many tokens takes less time then."""
    numbers: int = weight.numel()
    return numbers <= _SMALL and numbers * tokens <= _FEW


def rows_and_scale(
    weight: Tensor, adapter: Adapter, config: Config, dtype: DType
) -> tuple[Tensor, Tensor]:
    """Return V and g, or V / n and m: by rows, W' is their product."""
    leaves: tuple[Any, ...] = adapter  # tensors
    weight, a, b, m = (_cast(array, dtype) for array in (weight, *leaves))
    if config.form == "direction":
        weight = over(weight, row_norms(weight)[0][..., None])
    v = _plus_product(weight, config.scaling, b, a)
    n, in_range = row_norms(v)
    if config.norm_gradient == "detached":
        n = n.detach()
    # The gradient of m / n by n overflows where n² underflows. That of V / n does not.
    return (v, m / n) if in_range else (over(v, n[..., None]), m)


def _cast(array: Tensor, dtype: DType) -> Tensor:
    return array if array.dtype == dtype else array.to(dtype)


def _plus_product(weight: Tensor, scaling: float, b: Tensor, a: Tensor) -> Tensor:
    """Return W + s B A, (*stack, out, in)."""
    if weight.ndim == 2:
        return torch.addmm(weight, b, a, alpha=scaling)
    return weight + scaling * (b @ a)


def _in_range(norm: Tensor) -> bool:
    """Return whether the squares of all rows are known to be in range. NaN is not.

    Only where the host may look: not on a GPU, nor where PyTorch maps, compiles or uses fake
    tensors.
    """
    if (
        norm.__class__ is not Tensor
        or norm.device.type != "cpu"
        or torch.compiler.is_compiling()
        or is_transformed()
    ):
        return False
    least, most = torch.aminmax(norm.detach())
    return bool(least.item() > LEAST and most.item() < MOST)


def row_norms(rows: Tensor) -> tuple[Tensor, bool]:
    """Return ‖vᵢ‖, (*stack, out, in) -> (*stack, out), and whether all squares are in range.

    The norms neither overflow nor underflow.
    """
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    if _in_range(norms):
        return norms, True
    peak = rows.detach().abs().amax(dim=-1, keepdim=True)
    scale = torch.where(peak > 0, peak, 1)
    norms = scale[..., 0] * torch.linalg.vector_norm(rows / scale, dim=-1)
    return norms, False


def over(values: Tensor, norm: Tensor) -> Tensor:
    """Return values / n, and 0 where n = 0. The gradient is 0 there too."""
    positive = norm > 0
    return torch.where(positive, values / torch.where(positive, norm, 1), 0)
