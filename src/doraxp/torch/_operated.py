"""A convolution with DoRA as one function of torch.autograd, with PyTorch's own convolutions.

    x (batch, in, *size)    W (out, in, *kernel)    A (rank, in, *kernel)    s B (out, rank)
    V = W + s B A           g = m / ‖V‖ by rows     y = g⊙apply(x, V) + bias

    z = apply(x, V)         L = apply(x, A)         dg = Σ dy⊙z      d(s B) = (g⊙dy) Lᵀ
    dL = (s B)ᵀ (g⊙dy)      dA = weight_gradient(dL, x)              dx = transpose(dy, g⊙V)

So a step makes one convolution with W's shape in each direction, and two with `rank` channels. An x
of 16 bits meets W itself, not V, which would lose a small update; the sums of rank are in the
compute dtype then. `doraxp.torch._gain` has the gradients by g.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from doraxp._core.kinds import LayerKind
from doraxp.backends import operations
from doraxp.torch._gain import kept_gain
from doraxp.torch._modes import is_autocast, is_recorded, is_transformed, without_autocast


@dataclass(frozen=True)
class TorchConvolution:
    """`doraxp.Convolution` by PyTorch's own function, which PyTorch differentiates."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    kind: ClassVar[LayerKind] = LayerKind("conv")
    channel_axis: ClassVar[int] = 1

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return y, (batch, out, *positions)."""
        return torch.convolution(x, weight, bias, *self._rules)

    def transpose(self, dy: Tensor, weight: Tensor, x_shape: tuple[int, ...]) -> Tensor:
        """Return the gradient by x."""
        like = dy.new_empty(1).expand(x_shape)
        dx: Tensor = self._gradients(dy, like, weight, [True, False, False])[0]
        return dx

    def weight_gradient(self, dy: Tensor, x: Tensor, weight_shape: tuple[int, ...]) -> Tensor:
        """Return the gradient by the weight."""
        like = dy.new_empty(1).expand(weight_shape)
        dweight: Tensor = self._gradients(dy, x, like, [False, True, False])[1]
        return dweight

    @property
    def _rules(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, False, (0,) * len(self.stride), 1

    def _gradients(self, dy: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> Any:
        backward = torch.ops.aten.convolution_backward
        return backward(dy, x, weight, None, *self._rules, mask)


def dora_convolution(
    x: Tensor, weight: Tensor, lora_a: Tensor, scaled_b: Tensor, magnitude: Tensor,
    bias: Tensor | None, operator: TorchConvolution, *, exact: bool,
) -> Tensor:  # fmt: skip
    """Return y in x's dtype, or in that of autocast.

    Parameters
    ----------
    x : Tensor, shape (batch, in, *size)
    weight : Tensor, shape (out, in, *kernel)
    lora_a : Tensor, shape (rank, in, *kernel)
    scaled_b : Tensor, shape (out, rank)
        s B.
    magnitude : Tensor, shape (out,)
    bias : Tensor, shape (out,), or None
    operator : TorchConvolution
    exact : bool
        Let the gradient go through the norm.
    """
    if is_autocast(x) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with without_autocast(x):
        a = lora_a.flatten(1)
        gain = kept_gain(weight, weight.flatten(1), a, scaled_b, magnitude, exact=exact)
        arrays = x, weight, lora_a, scaled_b, gain, bias
        if torch.compiler.is_compiling() or is_transformed():
            return _by_factors(*arrays, operator)
        if is_recorded(*arrays):
            apply: Any = _Convolution.apply  # PyTorch gives it no type
            y: Tensor = apply(*arrays, operator)
            return y
        return _evaluated(*arrays, operator)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, scaled_b: Tensor, gain: Tensor,
        bias: Tensor | None, operator: TorchConvolution,
    ) -> Tensor:  # fmt: skip
        z, low = _products(x, weight, lora_a, scaled_b, gain.dtype, operator)
        ctx.save_for_backward(x, weight, lora_a, scaled_b, gain, bias, z, low)
        ctx.operator = operator
        return _scaled(z, gain, bias, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        *arrays, z, low = ctx.saved_tensors
        with without_autocast(dy):
            if torch.is_grad_enabled():  # `create_graph`: a second derivative may follow
                return *_differentiable(ctx, dy, *arrays), None
            return *_gradients(ctx, dy, *arrays, z, low), None


def _gradients(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, scaled_b: Tensor,
    gain: Tensor, bias: Tensor | None, z: Tensor, low: Tensor,
) -> list[Tensor | None]:  # fmt: skip
    """Return the gradients by x, W, A, s B, g and the bias, where they are needed."""
    operator, dtype, needs = ctx.operator, gain.dtype, ctx.needs_input_grad
    wide, d = dy.to(dtype), dy.to(dtype).flatten(2)  # (batch, out, positions)
    b = gain[:, None] * scaled_b.to(dtype)
    dlow = (b.mT @ d).view(low.shape)
    dx = dweight = None
    if needs[0]:
        if _is_narrow(x, dtype):
            dz = (gain[:, None] * d).to(x.dtype).view(dy.shape)
            dx = operator.transpose(dz, weight.to(x.dtype), x.shape).to(dtype)
            dx = dx + operator.transpose(dlow, lora_a.to(dtype), x.shape)
        else:
            v = gain[:, None] * _v(weight, lora_a, scaled_b, dtype)
            dx = operator.transpose(wide, v.view(weight.shape), x.shape)
        dx = dx.to(x.dtype)
    if needs[1]:
        slopes = operator.weight_gradient(wide, x.to(dtype), weight.shape)
        dweight = (gain[:, None] * slopes.flatten(1)).view(weight.shape).to(weight.dtype)
    da = operator.weight_gradient(dlow, x.to(dtype), lora_a.shape).to(lora_a.dtype)
    db = (gain[:, None] * (d @ low.flatten(2).mT).sum(0)).to(scaled_b.dtype)
    dgain = torch.linalg.vecdot(d, z.flatten(2)).sum(0)
    dbias = d.sum((0, 2)).to(bias.dtype) if bias is not None and needs[5] else None
    return [dx, dweight, da, db, dgain, dbias]


def _differentiable(ctx: Any, dy: Tensor, *arrays: Tensor | None) -> list[Tensor | None]:
    """Return the gradients of which PyTorch knows the gradients."""
    # As views: an array may be a function of another one, and that path is not this function's.
    views: Any = [None if array is None else array.view_as(array) for array in arrays]
    y, needs = _by_factors(*views, ctx.operator), ctx.needs_input_grad
    wanted = [view for view, needed in zip(views, needs, strict=False) if needed]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(found) if needed else None for needed in needs[:6]]


def _by_factors(
    x: Tensor, weight: Tensor, lora_a: Tensor, scaled_b: Tensor, gain: Tensor,
    bias: Tensor | None, operator: TorchConvolution,
) -> Tensor:  # fmt: skip
    """Return y by operations that PyTorch differentiates."""
    z, _ = _factored(x, weight, lora_a, scaled_b, gain.dtype, operator)
    return _scaled(z, gain, bias, x)


def _evaluated(
    x: Tensor, weight: Tensor, lora_a: Tensor, scaled_b: Tensor, gain: Tensor,
    bias: Tensor | None, operator: TorchConvolution,
) -> Tensor:  # fmt: skip
    """Return y alone: by one convolution, where x may meet V."""
    if _is_narrow(x, gain.dtype):
        return _by_factors(x, weight, lora_a, scaled_b, gain, bias, operator)
    dtype = gain.dtype
    v = gain[:, None] * _v(weight, lora_a, scaled_b, dtype)
    wide_bias = None if bias is None else bias.to(dtype)
    return operator.apply(x.to(dtype), v.view(weight.shape), wide_bias).to(x.dtype)


def _products(
    x: Tensor, weight: Tensor, lora_a: Tensor, scaled_b: Tensor, dtype: Any,
    operator: TorchConvolution,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return z = apply(x, V) and L = apply(x, A)."""
    if _is_narrow(x, dtype):
        return _factored(x, weight, lora_a, scaled_b, dtype, operator)
    x = x.to(dtype)
    v = _v(weight, lora_a, scaled_b, dtype).view(weight.shape)
    return operator.apply(x, v), operator.apply(x, lora_a.to(dtype))


def _factored(
    x: Tensor, weight: Tensor, lora_a: Tensor, scaled_b: Tensor, dtype: Any,
    operator: TorchConvolution,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return z = apply(x, W) + s B L and L = apply(x, A)."""
    kind = x.dtype if _is_narrow(x, dtype) else dtype
    low = operator.apply(x.to(dtype), lora_a.to(dtype))
    base = operator.apply(x.to(kind), weight.to(kind)).to(dtype)
    return base + (scaled_b.to(dtype) @ low.flatten(2)).view_as(base), low


def _v(weight: Tensor, lora_a: Tensor, scaled_b: Tensor, dtype: Any) -> Tensor:
    """Return V (out, in·kernel)."""
    rows, a, b = (array.flatten(1).to(dtype) for array in (weight, lora_a, scaled_b))
    return torch.addmm(rows, b, a)


def _scaled(z: Tensor, gain: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return g⊙z + bias in x's dtype."""
    ones = (1,) * (z.ndim - 2)
    g = gain.view(-1, *ones)
    y = g * z if bias is None else torch.addcmul(bias.to(z.dtype).view(-1, *ones), g, z)
    return y.to(x.dtype)


def _is_narrow(x: Tensor, dtype: Any) -> bool:
    """Return whether x, of 16 bits, meets W in its own dtype."""
    if torch.compiler.is_compiling():  # it cannot ask the processor
        return x.dtype.itemsize < 4 and dtype == torch.float32
    narrow: bool = operations(x=x).operand_dtype(x, x, dtype) != dtype
    return narrow
