"""The forwards of an evaluation, one after the other with the same weight and adapter.

    y = g⊙(x Wᵀ + L (s B)ᵀ) + bias        x (tokens, in)    L = x Aᵀ (tokens, rank)

A token of a language model takes as long in Python as in its products. So what the first forward
has found is planned once: each later one looks whether a sample of the numbers is unchanged, and
multiplies. A forward in training drops the plan.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from doraxp._base.types import Adapter, Config
from doraxp._core.prepared import Prepared
from doraxp.backends import as_dtype, transpose
from doraxp.torch._kept import RELEASED, may_keep, sample, with_weight
from doraxp.torch._ops import Call


class _Seen(NamedTuple):
    """A tensor when the plan was made."""

    address: int
    version: int
    sample: Any  # an array of NumPy, which shares the tensor's memory
    bytes: bytes  # of the sample, then


class _Plan(NamedTuple):
    call: Call
    seen: tuple[_Seen, ...]  # of the weight and of the adapter
    dtypes: tuple[Any, Any]  # of x, and in which products take it
    prepared: Prepared  # with `RELEASED` for the weight, which may then be freed


_plans: MutableMapping[Tensor, _Plan] = WeakTensorKeyDictionary()


def evaluated(
    x: Tensor, weight: Tensor, adapter: Adapter, config: Config, bias: Tensor | None
) -> Tensor | None:
    """Return y without a graph, or None if there is no plan for these arguments."""
    plan = _plans.get(weight)
    if plan is None or not _fits(plan, x, weight, adapter, config):
        return None
    dtype, kind = plan.dtypes
    out, inner = weight.shape
    ops, prepared = plan.call.ops, plan.prepared
    tokens: Any = x if x.ndim == 2 else x.reshape(-1, inner)
    if kind != dtype:
        tokens = tokens.to(kind)
    direction = prepared.direction.with_weight(weight.detach())
    wide_bias: Any = None if bias is None else as_dtype(bias, plan.call.dtype, xp=ops.xp)
    low = ops.product(tokens, transpose(prepared.direction.factors.lora_a))
    y: Any = direction.outputs(tokens, low, prepared.gain, wide_bias, ops=ops)[1]
    if y.dtype != dtype:
        y = y.to(dtype)
    evaluation: Tensor = y if x.ndim == 2 else y.reshape(*x.shape[:-1], out)
    return evaluation


def plan(x: Tensor, weight: Tensor, adapter: Adapter, call: Call, prepared: Prepared) -> None:
    """Plan later evaluations, if they can tell whether the weight and the adapter have changed."""
    arrays: tuple[Any, ...] = weight, *adapter
    kept = all(array.is_contiguous() and not array.is_inference() for array in arrays)
    if weight.ndim != 2 or not may_keep(weight) or not kept or call.narrow:
        return
    kind = call.ops.operand_dtype(x, weight, call.dtype)
    seen = tuple(map(_see, arrays))
    _plans[weight] = _Plan(call, seen, (x.dtype, kind), with_weight(prepared, RELEASED))


def drop_plan(weight: Tensor) -> None:
    """Forget the plan of a weight whose adapter is about to change."""
    _plans.pop(weight, None)


def _fits(plan: _Plan, x: Tensor, weight: Tensor, adapter: Adapter, config: Config) -> bool:
    """Return whether a plan is of these arguments, and no number of the samples has changed."""
    dtype, kind = plan.dtypes
    ops, wide = plan.call.ops, plan.call.dtype
    if plan.call.config is not config or x.dtype != dtype or x.shape[-1] != weight.shape[1]:
        return False
    if dtype.itemsize == 2 and kind != ops.operand_dtype(x, weight, wide):
        return False  # `exact_products` held there and not here, or the other way round
    arrays: Any = weight, *adapter
    for array, then in zip(arrays, plan.seen, strict=True):
        if array.data_ptr() != then.address or array._version != then.version:
            return False
    return all(then.sample.tobytes() == then.bytes for then in plan.seen)


def _see(tensor: Tensor) -> _Seen:
    numbers = sample(tensor)
    if numbers.dtype.itemsize == 2:  # NumPy has no bfloat16
        numbers = numbers.view(torch.int16)
    shared = numbers.numpy()
    return _Seen(tensor.data_ptr(), tensor._version, shared, shared.tobytes())
