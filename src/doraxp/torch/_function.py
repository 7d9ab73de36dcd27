"""`doraxp.forward` and `doraxp.backward` as one function of torch.autograd.

x (*stack, ..., in)   W (*stack, out, in)   A (*stack, rank, in)   B (*stack, out, rank)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from doraxp._base.scalars import check_kind
from doraxp._base.types import Adapter, Config
from doraxp._core.checks import check_call
from doraxp.torch._cupy import backward_on_cupy, forward_on_cupy, is_chosen
from doraxp.torch._definition import by_definition, is_small
from doraxp.torch._evaluation import drop_plan, evaluated, evaluated_anew
from doraxp.torch._kept import RELEASED, with_weight
from doraxp.torch._modes import is_autocast, is_recorded, is_transformed, without_autocast
from doraxp.torch._ops import (
    Call,
    backward_layer,
    backward_op,
    forward_layer,
    forward_op,
)


class _DoRA(torch.autograd.Function):
    """The layer with the backward of `doraxp.backward`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor,
        bias: Tensor | None, call: Call,
    ) -> Tensor:  # fmt: skip
        y: Tensor
        adapter = Adapter(lora_a, lora_b, magnitude)
        ctx.config, ctx.prepared, ctx.on_cupy = call.config, None, False
        if torch.compiler.is_compiling():
            y, z, low_rank = forward_op(x, weight, *adapter, bias, call.narrow, *rules_of(call))
        else:
            ctx.on_cupy = is_chosen(x)
            run = forward_on_cupy if ctx.on_cupy else forward_layer
            y, z, low_rank, ctx.prepared = run(x, weight, adapter, bias, call)
            if not ctx.on_cupy:  # autograd keeps the weight
                ctx.prepared = with_weight(ctx.prepared, RELEASED)
        ctx.save_for_backward(x, weight, lora_a, lora_b, magnitude, z, low_rank)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, *leaves, z, low_rank = ctx.saved_tensors
        train_base, train_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[5]
        if ctx.prepared is None:
            dx, *dleaves, dweight = backward_op(
                dy, x, weight, *leaves, z, low_rank, train_base, *rules_of(ctx)
            )
        elif torch.is_grad_enabled():  # `create_graph`: a second derivative may follow
            dx, dweight, *dleaves = _differentiable(ctx, dy, x, weight, *leaves)
        else:
            run = backward_on_cupy if ctx.on_cupy else backward_layer
            with without_autocast(x):
                found: Any = run(dy, x, weight, z, low_rank, ctx.prepared, train_base=train_base)
            dx, adapter, dweight, _ = found
            pairs: Any = zip(adapter, leaves, strict=True)
            dleaves = (d.to(leaf.dtype) for d, leaf in pairs)
        dbias = None
        if train_bias:
            tokens = tuple(range(weight.ndim - 2, dy.ndim - 1))
            wide = dy.to(low_rank.dtype)  # sum(()) would sum over all axes
            dbias = (wide.sum(tokens) if tokens else wide).to(ctx.bias_dtype)
        dweight = dweight.to(weight.dtype) if train_base else None
        return dx, dweight, *dleaves, dbias, None


def _differentiable(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, *leaves: Tensor
) -> list[Tensor | None]:
    """Return the gradients by x, W, A, B and m, of which PyTorch knows the gradients."""
    # As views: an array may be a function of another one, and that path is not this layer's.
    arrays: tuple[Any, ...] = tuple(array.view_as(array) for array in (x, weight, *leaves))
    needs, dtype = ctx.needs_input_grad[:5], ctx.prepared.gain.dtype
    with without_autocast(x):
        y = by_definition(arrays[0], arrays[1], Adapter(*arrays[2:]), ctx.config, None, dtype)
        wanted = [array for array, needed in zip(arrays, needs, strict=True) if needed]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def dora_linear(
    x: Tensor, weight: Tensor, adapter: Adapter, config: Config, bias: Tensor | None = None
) -> Tensor:
    """Return y = g⊙(x Vᵀ) + bias, differentiable by each tensor among the arguments.

    ::

        V = ρ⊙W + s B A      n = ‖V‖ by rows      g = m / n

    The computation is in float64 where the weight or the adapter is float64, else in float32. With
    a 16-bit x and W of one dtype, the two products with W are made in it where the device has
    instructions for that, and dA, dB and dm have float32's errors. Under autocast x is first cast
    to autocast's dtype, in which y and the products are; the norm and the adapter stay in float32.

    A second derivative, and any derivative under `torch.func` or in forward mode, stores V.

    On a CPU, ‖w‖² and the rest of `doraxp.prepare` are kept as long as a frozen weight lives. Each
    call compares the adapter number by number, and a number of each row and column of the weight;
    of evaluations in a row, each compares m, a number of each row and column of A and B, and fewer
    of the weight. A write through ``.data`` that changes none of these is not noticed.

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
    if not torch.compiler.is_compiling():
        known = evaluated(x, weight, adapter, config, bias)
        if known is not None:
            return known
    check_kind("adapter", adapter, Adapter)
    check_kind("config", config, Config)
    tensors = {"x": x, "weight": weight, **adapter._asdict()}
    for name, array in tensors.items() if bias is None else (*tensors.items(), ("bias", bias)):
        check_kind(name, array, torch.Tensor)
    if not is_autocast(x):
        return _dora_linear(x, weight, adapter, config, bias, narrow=False)
    narrow = x.dtype != torch.float64
    if narrow:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with without_autocast(x):
        return _dora_linear(x, weight, adapter, config, bias, narrow=narrow)


def _dora_linear(
    x: Tensor, weight: Tensor, adapter: Adapter, config: Config, bias: Tensor | None,
    *, narrow: bool,
) -> Tensor:  # fmt: skip
    """Return the result of `dora_linear` for arguments of the right classes, without autocast."""
    apply: Any = _DoRA.apply  # PyTorch gives it no type
    arrays: tuple[Any, ...] = (x, weight, *adapter, bias)
    y: Tensor
    if torch.compiler.is_compiling():  # the compiler's operators check their arguments
        y = apply(x, weight, *adapter, bias, Call(config, narrow, None, None))
        return y
    ops, dtype = check_call(x, weight, adapter, config, bias)
    call = Call(config, narrow, ops, dtype)
    transformed = is_transformed()
    recorded = is_recorded(*arrays)
    if recorded:
        drop_plan(weight)
    elif not narrow and not transformed:
        known = evaluated_anew(x, weight, adapter, bias, call)
        if known is not None:
            return known
    if transformed or (not narrow and is_small(weight, x.numel() // x.shape[-1])):
        return by_definition(x, weight, adapter, config, bias, dtype)
    if recorded:
        y = apply(*arrays, call)
        return y
    run = forward_on_cupy if is_chosen(x) else forward_layer
    return run(x, weight, adapter, bias, call).y


def rules_of(call: Any) -> tuple[Any, ...]:
    """Return the numbers and choices of a Config as an operator takes them."""
    config = call.config
    return config.rank, config.scaling, config.form, config.norm_gradient
