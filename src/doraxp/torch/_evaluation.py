"""The forwards of an evaluation, one after the other with the same weight and adapter.

    y = g⊙(x Wᵀ + L (s B)ᵀ) + bias        x (tokens, in)    L = x Aᵀ (tokens, rank)

A token of a language model takes as long in Python as in its products. So what the first forward
has found is planned once: each later one looks whether a sample of the numbers is unchanged, and
multiplies. A forward in training drops the plan.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from doraxp._base.types import Adapter, Config
from doraxp._core.prepared import Prepared
from doraxp.backends import as_dtype, transpose
from doraxp.torch._kept import RELEASED, sample, with_weight
from doraxp.torch._ops import Call


class _Seen(NamedTuple):
    """A tensor when the plan was made."""

    tensor: Callable[[], Any]  # a weak reference
    state: tuple[Any, ...]
    sample: Any  # an array of NumPy in the tensor's memory: it is there as long as `state` holds
    bytes: bytes  # of the sample, then


class _Plan(NamedTuple):
    call: Call
    seen: tuple[_Seen, ...]  # of the weight and of the adapter
    bias: Callable[[], Any]  # a weak reference to the bias, which has been checked
    dtypes: tuple[Any, Any]  # of x, and in which products take it
    prepared: Prepared  # with `RELEASED` for the weight, which may then be freed


_plans: MutableMapping[Tensor, _Plan] = WeakTensorKeyDictionary()


def evaluated(
    x: Tensor, weight: Tensor, adapter: Adapter, config: Config, bias: Tensor | None
) -> Tensor | None:
    """Return y without a graph, or None if no plan fits these arguments."""
    plan = _plans.get(weight)
    if plan is None or not _fits(plan, x, weight, adapter, config, bias):
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


def plan(
    x: Tensor, weight: Tensor, adapter: Adapter, bias: Tensor | None, call: Call, prepared: Prepared
) -> None:
    """Plan later evaluations, if they can tell whether the weight and the adapter have changed."""
    arrays: tuple[Any, ...] = weight, *adapter
    ops = call.ops
    # An inference tensor does not count its writes.
    plain = all(ops.has_memory(array) and not array.is_inference() for array in arrays)
    if weight.ndim != 2 or not plain or call.narrow:
        return
    kind = ops.operand_dtype(x, weight, call.dtype)
    seen = tuple(_see(array, ops.bits(array)) for array in arrays)
    of_bias = _nothing if bias is None else weakref.ref(bias)
    released = with_weight(prepared, RELEASED)
    _plans[weight] = _Plan(call, seen, of_bias, (x.dtype, kind), released)


def drop_plan(weight: Tensor) -> None:
    """Forget the plan of a weight whose adapter is about to change."""
    _plans.pop(weight, None)


def _fits(
    plan: _Plan, x: Tensor, weight: Tensor, adapter: Adapter, config: Config, bias: Tensor | None
) -> bool:
    """Return whether a plan is of these arguments, and no number of the samples has changed."""
    dtype, kind = plan.dtypes
    ops, wide = plan.call.ops, plan.call.dtype
    if plan.call.config is not config or plan.bias() is not bias:
        return False
    if x.dtype != dtype or x.shape[-1:] != weight.shape[1:] or x.device.type != "cpu":
        return False
    if dtype.itemsize == 2 and kind != ops.operand_dtype(x, weight, wide):
        return False  # `exact_products` held there and not here, or the other way round
    arrays: Any = weight, *adapter
    for array, then in zip(arrays, plan.seen, strict=True):
        if then.tensor() is not array or _state(array) != then.state:
            return False
    return all(then.sample.tobytes() == then.bytes for then in plan.seen)


def _see(tensor: Tensor, bits: Any) -> _Seen:
    shared = bits[:: sample(tensor).stride(0)]
    return _Seen(weakref.ref(tensor), _state(tensor), shared, shared.tobytes())


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Return where a tensor lies, how, and how often PyTorch has written to it."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version


def _nothing() -> None:
    """Stand for the weak reference to a bias of None."""
