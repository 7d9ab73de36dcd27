"""The forward and the backward of a layer outside of autograd, and as operators for torch.compile.

    x (*stack, ..., in)   W (*stack, out, in)   A (*stack, rank, in)   B (*stack, out, rank)

torch.compile does not trace into the operators. Both passes need a `doraxp.Prepared`: without
compiling the forward hands its own to the backward, and the operators find the one that is kept.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from doraxp._base.types import Adapter, Config, Gradients
from doraxp._core.checks import check_call
from doraxp._core.matrix import Cache, backward_checked, forward_checked
from doraxp._core.prepared import Prepared, prepare_checked
from doraxp.backends import Operations, operations
from doraxp.torch._kept import keep, prepare_kept, recall, with_weight


class Forward(NamedTuple):
    """The results of `forward_layer`."""

    y: Tensor
    """In x's dtype."""
    z: Tensor
    """x Vᵀ, (*stack, tokens, out), in the dtype of the products."""
    low_rank: Tensor
    """x Aᵀ, (*stack, tokens, rank), in the compute dtype."""
    prepared: Prepared
    """For the backward."""


class Call(NamedTuple):
    """The arguments of a call that are not tensors, and what the check of it found."""

    config: Config
    narrow: bool
    """Whether W is rounded to a narrower dtype of x for its products with x and dz, if the device
    multiplies numbers of that dtype. The norm is that of W itself."""
    ops: Any
    """The operations for the tensors."""
    dtype: Any
    """The compute dtype."""


def forward_layer(
    x: Tensor, weight: Tensor, adapter: Adapter, bias: Tensor | None, call: Call
) -> Forward:
    """Return y, and all that the backward needs, for arguments that have been checked."""
    base, plain = weight.detach(), detached(adapter)
    config, narrow, ops, dtype = call
    stored = _narrowed(base, x, dtype, ops=ops) if narrow else base
    given: Any
    prepared, previous = recall(weight, plain, config, ops=ops)
    if prepared is None and (
        previous is None or stored is not base or 2 * x.numel() >= weight.numel()
    ):
        # To get W Aᵀ from one product with x takes a copy of x, which costs more here.
        prepared = prepare_checked(base, plain, config, previous, None, dtype, ops=ops)
        keep(weight, prepared)
    given = prepared if stored is base or prepared is None else with_weight(prepared, stored)
    y: Any  # the arrays are tensors
    cache: Any
    y, cache = forward_checked(
        x, stored, plain, config, bias, given, previous, None, None, dtype, ops=ops
    )
    if prepared is None:
        keep(weight, cache.prepared)
    return Forward(y, cache.z, cache.low_rank, cache.prepared)


def backward_layer(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor, low_rank: Tensor, prepared: Prepared,
    *, train_base: bool,
) -> Gradients:  # fmt: skip
    """Return the gradients by x, A, B, m and W, given the results of the forward."""
    base: Any = weight.detach()
    if z.dtype not in (base.dtype, low_rank.dtype):  # the forward has rounded W to z's dtype
        base = base.to(z.dtype)
    cache: Any = Cache(x, None, low_rank, z, with_weight(prepared, base))
    return backward_checked(dy, cache, train_base=train_base, ops=operations(weight=base))


def _narrowed(weight: Tensor, x: Tensor, dtype: Any, *, ops: Operations) -> Tensor:
    """Return W rounded to x's dtype, if that is narrower and products take x as it is."""
    narrower = x.dtype.itemsize < weight.dtype.itemsize
    return weight.to(x.dtype) if narrower and ops.operand_dtype(x, x, dtype) == x.dtype else weight


def detached(adapter: Adapter) -> Adapter:
    """Return the adapter outside of autograd's graph."""
    leaves: tuple[Any, ...] = adapter
    return Adapter(*(leaf.detach() for leaf in leaves))  # so that their graph is not kept


@functools.lru_cache
def _config(rank: int, scaling: float, form: Any, norm_gradient: Any) -> Config:
    return Config(rank, scaling * rank, form=form, norm_gradient=norm_gradient)


# `rules` are the numbers and choices of a Config: rank, scaling, form and norm gradient.


@torch.library.custom_op(
    "doraxp::forward",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor magnitude, "
    "Tensor? bias, bool narrow, int rank, float scaling, str form, str norm_gradient) "
    "-> (Tensor, Tensor, Tensor)",
)
def forward_op(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor,
    bias: Tensor | None, narrow: bool, *rules: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y in x's dtype, and z = x Vᵀ and L = x Aᵀ in the dtypes of `Forward`."""
    adapter = Adapter(lora_a, lora_b, magnitude)
    ops, dtype = check_call(x, weight, adapter, _config(*rules), bias)
    call = Call(_config(*rules), narrow, ops, dtype)
    with torch.autocast(x.device.type, enabled=False):
        y, z, low_rank, _ = forward_layer(x, weight, adapter, bias, call)
    return y, z.contiguous(), low_rank  # for a stack, z is a view of a product


@forward_op.register_fake
def _forward_shapes(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor,
    bias: Tensor | None, narrow: bool, *rules: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    adapter = Adapter(lora_a, lora_b, magnitude)
    ops, dtype = check_call(x, weight, adapter, _config(*rules), bias)
    *stack, out, _ = weight.shape
    tokens = math.prod(x.shape[len(stack) : -1])
    stored = _narrowed(weight, x, dtype, ops=ops) if narrow else weight
    return (
        x.new_empty((*x.shape[:-1], out)),
        x.new_empty((*stack, tokens, out), dtype=ops.operand_dtype(x, stored, dtype)),
        x.new_empty((*stack, tokens, lora_a.shape[-2]), dtype=dtype),
    )


@torch.library.custom_op(
    "doraxp::backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor magnitude, "
    "Tensor z, Tensor low_rank, bool train_base, int rank, float scaling, str form, "
    "str norm_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor,
    z: Tensor, low_rank: Tensor, train_base: bool, *rules: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients by x, A, B, m and W, in their dtypes; that by W is empty if frozen."""
    adapter, config = Adapter(lora_a, lora_b, magnitude), _config(*rules)
    plain, ops = detached(adapter), operations(weight=weight)
    gradients: Any  # the arrays are tensors
    with torch.autocast(x.device.type, enabled=False):
        prepared = prepare_kept(weight, plain, config, low_rank.dtype, ops=ops)
        gradients = backward_layer(dy, x, weight, z, low_rank, prepared, train_base=train_base)
    dweight = weight.new_empty(0) if gradients.weight is None else gradients.weight
    da, db, dm = (d.to(leaf.dtype) for d, leaf in zip(gradients.adapter, adapter, strict=True))
    dx = gradients.x.contiguous()  # for a stack, it is a view of a product
    return dx, da, db, dm, dweight.to(weight.dtype)


@backward_op.register_fake
def _backward_shapes(
    dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor,
    z: Tensor, low_rank: Tensor, train_base: bool, *rules: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = (x, lora_a, lora_b, magnitude, weight if train_base else weight.new_empty(0))
    dx, da, db, dm, dweight = (array.new_empty(array.shape) for array in like)
    return dx, da, db, dm, dweight
