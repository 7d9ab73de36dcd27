"""Forward and backward as two custom operators, which torch.compile does not trace into.

    x (*stack, ..., in)   W (*stack, out, in)   A (*stack, rank, in)   B (*stack, out, rank)

Both need a `doraxp.Prepared`. The last one of each weight is kept for three uses: its ‖w‖², the
backward of the same forward, and the next forward while the adapter has not changed.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from doraxp._base.types import Adapter, Config
from doraxp._core.checks import check_call
from doraxp._core.linear import Cache, backward, forward
from doraxp._core.prepared import Prepared, prepare
from doraxp.backends import operations


class _State(NamedTuple):
    """Equal while a tensor has the same memory and is not written to, except through `.data`."""

    storage: Any  # a weak reference; while it exists, no other storage gets its address
    offset: int
    stride: tuple[int, ...]
    version: int


class _Kept(NamedTuple):
    weight: _State
    adapter: tuple[_State, ...]
    prepared: Prepared  # with `_RELEASED` for the weight, which may then be freed


_RELEASED = torch.empty(0)
"""Stands for the weight in what is kept."""
_kept: MutableMapping[Tensor, _Kept] = WeakTensorKeyDictionary()


def _state(tensor: Any) -> _State:
    version = -1 if tensor.is_inference() else tensor._version
    storage = StorageWeakRef(tensor.untyped_storage())
    return _State(storage, tensor.storage_offset(), tensor.stride(), version)


def _with_weight(prepared: Prepared, weight: Tensor) -> Prepared:
    return prepared._replace(direction=prepared.direction.with_weight(weight))


class _Known(NamedTuple):
    """The arrays of a layer outside of autograd, with at most one `Prepared` of the weight."""

    weight: Tensor
    adapter: Adapter
    prepared: Prepared | None  # of this adapter and config
    previous: Prepared | None  # of another adapter or config


def _recall(weight: Tensor, adapter: Adapter, config: Config, *, known: bool) -> _Known:
    """Return the layer with the `Prepared` of its last call.

    The adapter is compared with the kept one by value. Where reading values is expensive, a
    forward prepares anew. A backward passes `known`: autograd has checked that nobody wrote to the
    arrays of the forward. Nothing is kept of a weight that is trained.
    """
    base = weight.detach()
    leaves: tuple[Any, ...] = adapter
    plain = Adapter(*(leaf.detach() for leaf in leaves))  # so that their graph is not kept
    kept = _kept.get(weight) if _may_keep(weight) else None
    if kept is None or kept.weight != _state(weight):
        return _Known(base, plain, None, None)
    last = _with_weight(kept.prepared, base)
    if last.snapshot is not None:
        same = operations(weight=base).unchanged(last.snapshot, last.adapter, plain)
    else:
        same = known and kept.adapter == tuple(map(_state, adapter))
    if same and last.config == config:
        return _Known(base, last.adapter, last, None)
    return _Known(base, plain, None, last)


def _keep(weight: Tensor, adapter: Adapter, prepared: Prepared) -> None:
    if _may_keep(weight):
        states = _state(weight), tuple(map(_state, adapter))
        _kept[weight] = _Kept(*states, _with_weight(prepared, _RELEASED))


def _may_keep(weight: Tensor) -> bool:
    return not (weight.requires_grad or weight.is_inference())  # inference tensors have no version


def _config(rank: int, scaling: float, form: Any, norm_gradient: Any) -> Config:
    return Config(rank, scaling * rank, form=form, norm_gradient=norm_gradient)


# `rules` are the numbers and choices of a Config: rank, scaling, form and norm gradient.


@torch.library.custom_op(
    "doraxp::forward",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor magnitude, "
    "Tensor? bias, int rank, float scaling, str form, str norm_gradient) "
    "-> (Tensor, Tensor, Tensor)",
)
def forward_op(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor,
    bias: Tensor | None, *rules: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y in x's dtype, and z = x Vᵀ and L = x Aᵀ in the compute dtype."""
    adapter, config = Adapter(lora_a, lora_b, magnitude), _config(*rules)
    y: Any  # the arrays are tensors
    cache: Any
    with torch.autocast(x.device.type, enabled=False):
        base, plain, prepared, previous = _recall(weight, adapter, config, known=False)
        if previous is not None and 2 * x.numel() >= weight.numel():
            # To get W Aᵀ from one product with x takes a copy of x, which costs more here.
            prepared = prepare(base, plain, config, previous=previous)
        y, cache = forward(x, base, plain, config, bias=bias, prepared=prepared, previous=previous)
        _keep(weight, adapter, cache.prepared)
    return y, cache.z.contiguous(), cache.low_rank  # for a stack, z is a view of a product


@forward_op.register_fake
def _forward_shapes(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor,
    bias: Tensor | None, *rules: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    adapter = Adapter(lora_a, lora_b, magnitude)
    _, dtype = check_call(x, weight, adapter, _config(*rules), bias)
    *stack, out, _ = weight.shape
    tokens = math.prod(x.shape[len(stack) : -1])
    return (
        x.new_empty((*x.shape[:-1], out)),
        x.new_empty((*stack, tokens, out), dtype=dtype),
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
    gradients: Any  # the arrays are tensors
    with torch.autocast(x.device.type, enabled=False):
        base, plain, prepared, previous = _recall(weight, adapter, config, known=True)
        if prepared is None:
            prepared = prepare(base, plain, config, previous=previous)
            _keep(weight, adapter, prepared)
        gradients = backward(dy, Cache(x, None, low_rank, z, prepared), train_base=train_base)
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
