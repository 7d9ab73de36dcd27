"""Forwards without a graph, one after the other with the same weight and adapter.

    x (tokens, in)   W (out, in)   A (rank, in)   B (out, rank)   g (out,)   ρ (out,)

    y = g⊙(x Vᵀ) + bias                              V is stored in a small layer
    y = g⊙(ρ⊙(x Wᵀ) + (x Aᵀ) (s B)ᵀ) + bias          in a large one

A token of a language model takes as long in Python as in its products. So all that does not depend
on x is planned by the first forward. Each later one looks whether a sample of the numbers is
unchanged, and multiplies. A forward in training drops the plan.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from doraxp._base.types import Adapter, Config
from doraxp._core.prepared import Prepared
from doraxp.backends import Factored, transpose
from doraxp.torch._definition import is_small, of_rows, rows_and_scale
from doraxp.torch._kept import RELEASED, sample, with_weight
from doraxp.torch._modes import is_fake, is_recorded, is_transformed
from doraxp.torch._ops import Call, detached, forward_layer


class _ByRows(NamedTuple):
    """The layer by one product with V, or with V / n, which is stored."""

    rows: Tensor
    """V, (out, in), in the compute dtype."""
    scale: Tensor
    """g, (out,)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return g⊙(x Vᵀ) + bias."""
        return of_rows(x, self.rows, self.scale, bias)


class _ByFactors(NamedTuple):
    """The layer by products with W and with the adapter, as a forward in training makes them."""

    ops: Any
    row_scale: Tensor | None
    """ρ, (out,)."""
    gain: Tensor
    """g, (out,)."""
    down: Tensor
    """Aᵀ, (in, rank)."""
    up: Tensor
    """(s B)ᵀ, (rank, out)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return g⊙(ρ⊙(x Wᵀ) + (x Aᵀ) (s B)ᵀ) + bias, with W and the bias in any dtype."""
        ops, row_scale, gain, down, up = self
        out, inner = weight.shape
        tokens = x if x.ndim == 2 else x.reshape(-1, inner)
        if tokens.dtype != down.dtype:
            tokens = tokens.to(down.dtype)
        y: Tensor = ops.product(tokens, weight.mT)
        if row_scale is not None:
            y *= row_scale
        y = ops.accumulate(y, ops.product(tokens, down), up)
        y *= gain
        if bias is not None:
            y += bias.to(y.dtype)
        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], out)


class _InMixedPrecision(NamedTuple):
    """The layer with the roundings of a forward in training, which are specified."""

    ops: Any
    prepared: Prepared
    """With `RELEASED` for the weight, which may then be freed."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return y for x and W of one 16-bit dtype."""
        ops, prepared = self.ops, self.prepared
        out, inner = weight.shape
        tokens: Any = x.reshape(-1, inner)
        base: Any = weight.detach()
        low = ops.product(tokens, transpose(prepared.direction.factors.lora_a))
        y: Any  # the arrays are tensors
        _, y = prepared.direction.with_weight(base).outputs(
            tokens, low, prepared.gain, None if bias is None else bias.to(low.dtype), ops=ops
        )
        evaluation: Tensor = y.reshape(*x.shape[:-1], out)
        return evaluation


_Multiplication: TypeAlias = _ByRows | _ByFactors | _InMixedPrecision
"""Makes y, (..., out), from x, (..., in), W and the bias."""


class _Plan(NamedTuple):
    arrays: tuple[Callable[[], Any], ...]  # weak references to the weight, A, B and m
    bias: Callable[[], Any] | None  # a weak reference
    call: Call
    dtypes: tuple[Any, Any]  # of x, and in which products with W take it
    state: tuple[Any, ...]  # of the weight and of the adapter
    samples: tuple[Any, ...]  # in the memory of each: it is there as long as `state` holds
    numbers: list[bytes]  # of the samples, then
    multiply: _Multiplication


FEWER = 4
"""An evaluation compares so many times fewer numbers of a weight than a forward in training. Else a
token of a language model would take some 4 % longer."""
_plans: dict[int, _Plan] = {}
"""By the id of the weight. A WeakTensorKeyDictionary takes several times as long."""


def evaluated(
    x: Tensor, weight: Tensor, adapter: Adapter, config: Config, bias: Tensor | None
) -> Tensor | None:
    """Return y without a graph, or None if no plan fits. The arguments may be of any class."""
    plan = _plans.get(id(weight))
    if plan is None or not _fits(plan, x, weight, adapter, config, bias):
        return None
    y = plan.multiply(x, weight, bias)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def evaluated_anew(
    x: Tensor, weight: Tensor, adapter: Adapter, bias: Tensor | None, call: Call
) -> Tensor | None:
    """Return y without a graph, for arguments that have been checked, and plan the next ones.

    None where a later forward could not tell if the weight and the adapter have changed.
    """
    arrays: tuple[Any, ...] = weight, *adapter
    ops = call.ops
    # An inference tensor does not count its writes.
    plain = (ops.has_memory(array) and not array.is_inference() for array in arrays)
    if weight.ndim != 2 or not all(plain) or is_fake():
        return None
    kind = ops.operand_dtype(x, weight, call.dtype)
    y: Tensor
    multiply: _Multiplication
    # Many tokens take less time in 16 bits, where the device multiplies these.
    tokens = 0 if kind == call.dtype else x.numel() // x.shape[-1]
    if is_small(weight, tokens):
        multiply = _ByRows(*rows_and_scale(weight, detached(adapter), call.config, call.dtype))
        y = multiply(x, weight, bias)
    else:
        y, *_, prepared = forward_layer(x, weight, adapter, bias, call)
        multiply = _multiplication(prepared, call, kind)
    samples = tuple(
        ops.bits(array)[:: sample(array, FEWER if array is weight else 1).stride(0)]
        for array in arrays
    )
    key = id(weight)

    def forget(_: Any) -> None:
        _plans.pop(key, None)

    _plans[key] = _Plan(
        tuple(weakref.ref(array, forget) for array in arrays),
        None if bias is None else weakref.ref(bias), call, (x.dtype, kind),
        _state(arrays), samples, [numbers.tobytes() for numbers in samples], multiply,
    )  # fmt: skip
    return y.to(x.dtype)


def drop_plan(weight: Tensor) -> None:
    """Forget the plan of a weight whose adapter is about to change."""
    _plans.pop(id(weight), None)


def _multiplication(prepared: Prepared, call: Call, kind: Any) -> _Multiplication:
    """Return the function that makes y in a large layer; products with W take x as a `kind`."""
    _, _, ops, dtype = call
    direction, gain = prepared.direction, prepared.gain
    arrays: Any  # tensors
    if not isinstance(direction, Factored):
        arrays = direction.dense(ops=ops), gain  # V is stored already
        return _ByRows(*arrays)
    if kind != dtype:
        return _InMixedPrecision(ops, with_weight(prepared, RELEASED))
    _, a, scaled_b, row_scale = direction.factors
    arrays = row_scale, gain, transpose(a), transpose(scaled_b)
    return _ByFactors(ops, *arrays)


def _fits(
    plan: _Plan, x: Tensor, weight: Tensor, adapter: Adapter, config: Config, bias: Tensor | None
) -> bool:
    """Return whether a plan is of these arguments, and no number of the samples has changed."""
    (of_weight, of_a, of_b, of_m), of_bias, call, (dtype, kind), state, samples, numbers, _ = plan
    if of_weight() is not weight or adapter.__class__ is not Adapter or call.config is not config:
        return False
    arrays: Any = weight, *adapter
    _, a, b, m = arrays
    if of_a() is not a or of_b() is not b or of_m() is not m:
        return False
    if bias is not (None if of_bias is None else of_bias()) or not isinstance(x, Tensor):
        return False
    if x.dtype != dtype or x.shape[-1:] != weight.shape[1:] or not x.is_cpu:
        return False
    if dtype.itemsize == 2 and kind != call.ops.operand_dtype(x, weight, call.dtype):
        return False  # `exact_products` held there and not here, or the other way round
    if is_transformed() or torch.is_autocast_enabled("cpu") or is_recorded(x, bias, *arrays):
        return False
    return _state(arrays) == state and [sample.tobytes() for sample in samples] == numbers


def _state(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Return where tensors lie, how, and how often PyTorch has written to them."""
    return tuple(
        (each.data_ptr(), each._version, each.dtype, each.shape, each.stride()) for each in tensors
    )
