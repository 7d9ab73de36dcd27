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

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from doraxp._base.types import Adapter, Config
from doraxp._core.kinds import LayerKind
from doraxp.backends import compute_dtype, operations
from doraxp.torch._definition import is_small, rows_and_scale
from doraxp.torch._gain import gain as gain_of
from doraxp.torch._gain import kept_gain
from doraxp.torch._modes import is_autocast, is_recorded, is_transformed, without_autocast

MOST = 2
"""Numbers of the products of `apply_few` for each number of x: above, they take too much memory."""


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

    def apply_few(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return `apply` for a weight with few outputs, outside of autograd's graph.

        ::

            y[p] = Σ_k (W_k x)[p − padding + k·dilation]      for stride 1

        On the host PyTorch's convolution takes twice as long for a few outputs: it first copies x
        to another order.
        """
        out, inner, *kernel = weight.shape
        few = math.prod(kernel) * out <= MOST * inner
        if not few or set(self.stride) != {1} or x.device.type != "cpu":
            return self.apply(x, weight)
        rows = weight.flatten(2).permute(2, 0, 1).flatten(0, 1)  # (offsets·out, in)
        size, dims = x.shape[2:], range(len(kernel))
        products = (rows @ x.flatten(2)).view(len(x), -1, out, *size)
        extents = [(kernel[i] - 1) * self.dilation[i] for i in dims]
        y = x.new_zeros((len(x), out, *(size[i] + 2 * self.padding[i] - extents[i] for i in dims)))
        for k, offset in enumerate(itertools.product(*map(range, kernel))):
            moves = [offset[i] * self.dilation[i] - self.padding[i] for i in dims]
            starts = [max(0, -move) for move in moves]
            stops = [max(starts[i], min(y.shape[2 + i], size[i] - moves[i])) for i in dims]
            here: Any = [slice(starts[i], stops[i]) for i in dims]
            there: Any = [slice(starts[i] + moves[i], stops[i] + moves[i]) for i in dims]
            y[(..., *here)] += products[:, k][(..., *there)]
        return y

    def transpose(self, dy: Tensor, weight: Tensor, x_shape: tuple[int, ...]) -> Tensor:
        """Return the gradient by x."""
        like = dy.new_empty(x_shape)  # nothing reads it; PyTorch would fill an expanded tensor
        dx: Tensor = self._gradients(dy, like, weight, [True, False, False])[0]
        return dx

    def weight_gradient(self, dy: Tensor, x: Tensor, weight_shape: tuple[int, ...]) -> Tensor:
        """Return the gradient by the weight."""
        like = dy.new_empty(weight_shape)
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
    narrow = is_autocast(x) and x.dtype != torch.float64
    if narrow:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with without_autocast(x):
        matrix, a = weight.flatten(1), lora_a.flatten(1)
        transformed = torch.compiler.is_compiling() or is_transformed()
        if not transformed and not narrow and is_small(weight, x.numel() // x.shape[1]):
            return _by_definition(x, weight, Adapter(a, scaled_b, magnitude), bias, operator, exact)
        if is_small(matrix):  # to measure n on V takes less time than to look for a kept norm
            gain = gain_of(matrix, a, scaled_b, magnitude, exact=exact)
        else:
            gain = kept_gain(weight, matrix, a, scaled_b, magnitude, exact=exact)
        arrays = _Arrays(x, weight, lora_a, scaled_b, gain, bias)
        if transformed:
            return _by_factors(arrays, operator)
        if is_recorded(*arrays):
            apply: Any = _Convolution.apply  # PyTorch gives it no type
            y: Tensor = apply(operator, *arrays)
            return y
        return _evaluated(arrays, operator)


def _by_definition(
    x: Tensor, weight: Tensor, adapter: Adapter, bias: Tensor | None, operator: TorchConvolution,
    exact: bool,
) -> Tensor:  # fmt: skip
    """Return y by the definition of V, for B with its s. Fewer calls make it."""
    leaves: tuple[Any, ...] = adapter
    dtype: Any = compute_dtype(weight, *leaves, xp=operations(weight=weight).xp)
    config = Config(adapter.lora_b.shape[1], norm_gradient="exact" if exact else "detached")
    rows, scale = rows_and_scale(weight.flatten(1), adapter, config, dtype)
    v = (scale[:, None] * rows).view(weight.shape)
    return operator.apply(x.to(dtype), v, None if bias is None else bias.to(dtype)).to(x.dtype)


class _Arrays(NamedTuple):
    """The arguments that have gradients."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    scaled_b: Tensor
    gain: Tensor
    """g, (out,), in the compute dtype."""
    bias: Tensor | None

    @property
    def is_narrow(self) -> bool:
        """Whether x, of 16 bits, meets W in its own dtype."""
        x, dtype = self.x, self.gain.dtype
        narrow: bool
        if torch.compiler.is_compiling():  # it cannot ask the processor
            narrow = x.dtype.itemsize < 4 and dtype == torch.float32
        else:
            narrow = operations(x=x).operand_dtype(x, x, dtype) != dtype
        return narrow

    def v(self) -> Tensor:
        """Return V, (out, in, *kernel)."""
        dtype = self.gain.dtype
        w, a, b = (each.flatten(1).to(dtype) for each in (self.weight, self.lora_a, self.scaled_b))
        return torch.addmm(w, b, a).view(self.weight.shape)

    def scaled_v(self) -> Tensor:
        """Return g⊙V, (out, in, *kernel)."""
        g, dtype = self.gain[:, None], self.gain.dtype
        v = g * self.weight.flatten(1)
        v.addmm_(g * self.scaled_b.to(dtype), self.lora_a.flatten(1).to(dtype))
        return v.view(self.weight.shape)

    def y(self, z: Tensor) -> Tensor:
        """Return g⊙z + bias in x's dtype."""
        g = _by_channels(self.gain, z)
        if self.bias is None:
            return (g * z).to(self.x.dtype)
        return torch.addcmul(_by_channels(self.bias.to(z.dtype), z), g, z).to(self.x.dtype)


def _by_channels(numbers: Tensor, z: Tensor) -> Tensor:
    """Return (out,) for a product with z, (batch, out, *positions)."""
    return numbers.view(-1, *(1,) * (z.ndim - 2))


def _by_rows(numbers: Tensor, weight: Tensor) -> Tensor:
    """Return (out,) for a product with a weight, (out, in, *kernel)."""
    return numbers.view(-1, *(1,) * (weight.ndim - 1))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: TorchConvolution, *tensors: Any) -> Tensor:
        arrays = _Arrays(*tensors)
        z, low = _products(arrays, operator)
        ctx.save_for_backward(*arrays, z, low)
        ctx.operator = operator
        return arrays.y(z)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        *tensors, z, low = ctx.saved_tensors
        arrays, needs = _Arrays(*tensors), _Arrays(*ctx.needs_input_grad[1:])
        with without_autocast(dy):
            if torch.is_grad_enabled():  # `create_graph`: a second derivative may follow
                return None, *_differentiable(dy, arrays, needs, ctx.operator)
            return None, *_gradients(dy, arrays, z, low, needs, ctx.operator)


def _gradients(
    dy: Tensor, arrays: _Arrays, z: Tensor, low: Tensor, needs: Any, operator: TorchConvolution
) -> _Arrays:
    """Return the gradients by the arrays, and None where one is not needed."""
    x, weight, lora_a, scaled_b, gain, bias = arrays
    dtype, dx, dweight = gain.dtype, None, None
    wide = dy.to(dtype)
    d = wide.flatten(2)  # (batch, out, positions)
    b = gain[:, None] * scaled_b.to(dtype)
    dlow = (b.mT @ d).view(low.shape)
    if needs.x and arrays.is_narrow:
        dz = (wide * _by_channels(gain, dy)).to(x.dtype)
        dx = operator.transpose(dz, weight.to(x.dtype), x.shape).to(dtype)
        dx = (dx + operator.transpose(dlow, lora_a.to(dtype), x.shape)).to(x.dtype)
    elif needs.x:
        dx = operator.transpose(wide, arrays.scaled_v(), x.shape).to(x.dtype)
    if needs.weight:
        slopes = operator.weight_gradient(wide, x.to(dtype), weight.shape)
        dweight = (slopes * _by_rows(gain, weight)).to(weight.dtype)
    da = operator.weight_gradient(dlow, x.to(dtype), lora_a.shape).to(lora_a.dtype)
    db = (gain[:, None] * (d @ low.flatten(2).mT).sum(0)).to(scaled_b.dtype)
    dgain = torch.linalg.vecdot(d, z.flatten(2)).sum(0)
    dbias = d.sum((0, 2)).to(bias.dtype) if bias is not None and needs.bias else None
    found: Any = dx, dweight, da, db, dgain, dbias
    return _Arrays(*found)


def _differentiable(
    dy: Tensor, arrays: _Arrays, needs: Any, operator: TorchConvolution
) -> list[Tensor | None]:
    """Return the gradients of which PyTorch knows the gradients."""
    # As views: an array may be a function of another one, and that path is not this function's.
    views: Any = [None if array is None else array.view_as(array) for array in arrays]
    y = _by_factors(_Arrays(*views), operator)
    wanted = [view for view, needed in zip(views, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def _by_factors(arrays: _Arrays, operator: TorchConvolution) -> Tensor:
    """Return y by operations that PyTorch differentiates."""
    z, _ = _factored(arrays, operator)
    return arrays.y(z)


def _evaluated(arrays: _Arrays, operator: TorchConvolution) -> Tensor:
    """Return y alone: by one convolution, where x may meet V."""
    if arrays.is_narrow:
        return _by_factors(arrays, operator)
    x, bias, dtype = arrays.x, arrays.bias, arrays.gain.dtype
    wide = None if bias is None else bias.to(dtype)
    return operator.apply(x.to(dtype), arrays.scaled_v(), wide).to(x.dtype)


def _products(arrays: _Arrays, operator: TorchConvolution) -> tuple[Tensor, Tensor]:
    """Return z = apply(x, V) and L = apply(x, A)."""
    if arrays.is_narrow or arrays.weight.numel() > arrays.x.numel():  # V costs more than s B L
        return _factored(arrays, operator, few=True)
    x, a = (array.to(arrays.gain.dtype) for array in (arrays.x, arrays.lora_a))
    return operator.apply(x, arrays.v()), operator.apply_few(x, a)


def _factored(
    arrays: _Arrays, operator: TorchConvolution, *, few: bool = False
) -> tuple[Tensor, Tensor]:
    """Return z = apply(x, W) + s B L and L = apply(x, A), for `few` outside of autograd's graph."""
    x, weight, lora_a, scaled_b, gain, _ = arrays
    dtype = gain.dtype
    kind = x.dtype if arrays.is_narrow else dtype
    low = (operator.apply_few if few else operator.apply)(x.to(dtype), lora_a.to(dtype))
    base = operator.apply(x.to(kind), weight.to(kind)).to(dtype)
    return base + (scaled_b.to(dtype) @ low.flatten(2)).view_as(base), low
