"""`doraxp.forward` and `doraxp.backward` as one function of torch.autograd.

x (*stack, ..., in)   W (*stack, out, in)   A (*stack, rank, in)   B (*stack, out, rank)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from doraxp._base.scalars import check_kind
from doraxp._base.types import Adapter, Config
from doraxp.torch._ops import backward_op, forward_op


class _DoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor,
        bias: Tensor | None, *rules: Any,
    ) -> Tensor:  # fmt: skip
        y, z, low_rank = forward_op(x, weight, lora_a, lora_b, magnitude, bias, *rules)
        ctx.save_for_backward(x, weight, lora_a, lora_b, magnitude, z, low_rank)
        ctx.rules = rules
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        arrays = ctx.saved_tensors
        weight, z = arrays[1], arrays[5]
        train_base, train_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[5]
        dx, da, db, dm, dweight = backward_op(dy, *arrays, train_base, *ctx.rules)
        dbias = None
        if train_bias:
            tokens = tuple(range(weight.ndim - 2, dy.ndim - 1))
            wide = dy.to(z.dtype)  # sum(()) would sum over all axes
            dbias = (wide.sum(tokens) if tokens else wide).to(ctx.bias_dtype)
        dweight = dweight if train_base else None
        return dx, dweight, da, db, dm, dbias, None, None, None, None


def dora_linear(
    x: Tensor, weight: Tensor, adapter: Adapter, config: Config, bias: Tensor | None = None
) -> Tensor:
    """Return y = g⊙(x Vᵀ) + bias, differentiable once by each tensor among the arguments.

    ::

        V = ρ⊙W + s B A      n = ‖V‖ by rows      g = m / n

    The computation is in float64 where the weight or the adapter is float64, else in float32.
    Under autocast x is first cast to autocast's dtype, and y has that dtype; the adapter stays in
    float32.

    ‖w‖² and the rest of `doraxp.prepare` are kept as long as the weight lives. The function
    notices writes to the weight, except writes in place through ``weight.data``.

    Parameters
    ----------
    x : Tensor, shape (*stack, ..., in)
    weight : Tensor, shape (*stack, out, in)
    adapter : Adapter
        Its arrays are tensors.
    config : Config
        ``norm_gradient`` says whether gradients go through n.
    bias : Tensor, shape (*stack, out), optional

    Returns
    -------
    Tensor, shape (*stack, ..., out), in x's dtype or autocast's

    Raises
    ------
    TypeError
        An array is not a tensor, or a dtype is not floating.
    ValueError
        The shapes do not fit, or the devices differ.

    References
    ----------
    arXiv:2402.09353, equations 5 to 11.

    Examples
    --------
    >>> import torch
    >>> import doraxp
    >>> weight, config = torch.tensor([[3.0, 4.0], [0.0, 5.0]]), doraxp.Config(rank=1)
    >>> adapter = doraxp.init(weight, config, seed=0)
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> dora_linear(x, weight, adapter, config).sum().backward()
    >>> x.grad
    tensor([3., 9.])
    """
    check_kind("adapter", adapter, Adapter)
    check_kind("config", config, Config)
    tensors = {"x": x, "weight": weight, **adapter._asdict()}
    for name, array in tensors.items() if bias is None else (*tensors.items(), ("bias", bias)):
        check_kind(name, array, torch.Tensor)
    kind = x.device.type
    # is_autocast_enabled raises for a device without autocast, such as meta.
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    rules = config.rank, config.scaling, config.form, config.norm_gradient
    return _DoRA.apply(x, weight, *adapter, bias, *rules)
