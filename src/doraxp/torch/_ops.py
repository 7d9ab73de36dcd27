"""The two calls under `dora_linear` that torch.compile does not look into.

    x (*stack, ..., in)   W (*stack, out, in)   A (*stack, rank, in)   B (*stack, out, rank)

Both need what `doraxp.prepare` makes. The last of each weight is kept: for its ‖w‖², for the
backward of the same forward, and for the next forward while the adapter has not changed.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from doraxp._base.types import Adapter, Array, Config
from doraxp._core.checks import check_call
from doraxp._core.linear import Cache, backward, forward
from doraxp._core.prepared import Prepared, prepare
from doraxp.backends import operations


class _State(NamedTuple):
    """Equal while a tensor has the same memory, and nobody wrote to it but through `.data`."""

    storage: Any  # weak, but while it is held its address is given to no other
    offset: int
    stride: tuple[int, ...]
    version: int


class _Kept(NamedTuple):
    weight: _State
    adapter: tuple[_State, ...]
    prepared: Prepared  # without the weight, so that the weight may go


_kept: MutableMapping[Array, _Kept] = WeakTensorKeyDictionary()


def _state(tensor: Array) -> _State:
    version = -1 if tensor.is_inference() else tensor._version
    storage = StorageWeakRef(tensor.untyped_storage())
    return _State(storage, tensor.storage_offset(), tensor.stride(), version)


def _with_weight(prepared: Prepared, weight: Array | None) -> Prepared:
    return prepared._replace(direction=prepared.direction.with_weight(weight))


class _Known(NamedTuple):
    """A layer outside of autograd, with what is known of it: the one or the other, or neither."""

    weight: Array
    adapter: Adapter
    prepared: Prepared | None
    previous: Prepared | None  # of another adapter or config


def _recall(weight: Array, adapter: Adapter, config: Config, *, known: bool) -> _Known:
    """Return the layer with what is kept of its last call.

    The adapter is held to the kept one by value. Where values cannot be looked at cheaply, it is
    prepared anew in a forward; in a backward, with `known`, autograd has seen to it that nobody
    wrote to the arrays of the forward. Of a weight that is trained nothing is kept.
    """
    base = weight.detach()
    plain = Adapter(*(leaf.detach() for leaf in adapter))  # else their graph would be kept
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


def _keep(weight: Array, adapter: Adapter, prepared: Prepared) -> None:
    if _may_keep(weight):
        states = _state(weight), tuple(map(_state, adapter))
        _kept[weight] = _Kept(*states, _with_weight(prepared, None))


def _may_keep(weight: Array) -> bool:
    return not (weight.requires_grad or weight.is_inference())  # the latter counts no writes


def _config(rank: int, scaling: float, form: Any, norm_gradient: Any) -> Config:
    return Config(rank, scaling * rank, form=form, norm_gradient=norm_gradient)


# What is in `rules` is a Config's: rank, scaling, form and norm gradient.


@torch.library.custom_op(
    "doraxp::forward",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor magnitude, "
    "Tensor? bias, int rank, float scaling, str form, str norm_gradient) "
    "-> (Tensor, Tensor, Tensor)",
)
def forward_op(
    x: Array, weight: Array, lora_a: Array, lora_b: Array, magnitude: Array, bias: Array | None,
    *rules: Any,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Return y, z = x Vᵀ and L = x Aᵀ; x is computed with in the compute dtype."""
    adapter, config = Adapter(lora_a, lora_b, magnitude), _config(*rules)
    with torch.autocast(x.device.type, enabled=False):
        base, plain, prepared, previous = _recall(weight, adapter, config, known=False)
        if previous is not None and 2 * x.numel() >= weight.numel():
            # W Aᵀ out of one product with x takes a copy of x, which then costs more.
            prepared = prepare(base, plain, config, previous=previous)
        y, cache = forward(x, base, plain, config, bias=bias, prepared=prepared, previous=previous)
        _keep(weight, adapter, cache.prepared)
    return y, cache.z.contiguous(), cache.low_rank  # of a stack, z is a part of a product


@forward_op.register_fake
def _forward_shapes(
    x: Array, weight: Array, lora_a: Array, lora_b: Array, magnitude: Array, bias: Array | None,
    *rules: Any,
) -> tuple[Array, Array, Array]:  # fmt: skip
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
    dy: Array, x: Array, weight: Array, lora_a: Array, lora_b: Array, magnitude: Array,
    z: Array, low_rank: Array, train_base: bool, *rules: Any,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """Return the gradients of x, A, B, m and W, in their dtypes; W's is empty unless trained."""
    adapter, config = Adapter(lora_a, lora_b, magnitude), _config(*rules)
    with torch.autocast(x.device.type, enabled=False):
        base, plain, prepared, previous = _recall(weight, adapter, config, known=True)
        if prepared is None:
            prepared = prepare(base, plain, config, previous=previous)
            _keep(weight, adapter, prepared)
        gradients = backward(dy, Cache(x, None, low_rank, z, prepared), train_base=train_base)
    dweight = weight.new_empty(0) if gradients.weight is None else gradients.weight
    da, db, dm = (d.to(leaf.dtype) for d, leaf in zip(gradients.adapter, adapter, strict=True))
    dx = gradients.x.contiguous()  # of a stack, it is a part of a product
    return dx, da, db, dm, dweight.to(weight.dtype)


@backward_op.register_fake
def _backward_shapes(
    dy: Array, x: Array, weight: Array, lora_a: Array, lora_b: Array, magnitude: Array,
    z: Array, low_rank: Array, train_base: bool, *rules: Any,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    like = (x, lora_a, lora_b, magnitude, weight if train_base else weight.new_empty(0))
    dx, da, db, dm, dweight = (array.new_empty(array.shape) for array in like)
    return dx, da, db, dm, dweight
