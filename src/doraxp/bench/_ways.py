"""The ways to do each task on any array library: its bare products, and doraxp.

The functions are pure and take arrays alone: a library with a compiler can compile them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from operator import matmul
from typing import Any, NamedTuple

from array_api_compat import array_namespace

import doraxp
from doraxp import Adapter, Config, Prepared
from doraxp._base.types import Array, Namespace, NormGradient
from doraxp.backends import compute_dtype
from doraxp.bench._workloads import LEARNING_RATE, Inputs

LAYERS = 8
"""The number of adapters that AdamW steps at once."""
DORA: tuple[NormGradient, ...] = ("exact", "detached")


class Way(NamedTuple):
    """A way to do a task: `function(*arrays)`."""

    name: str
    kind: str
    """The kind of its answer: see `Truth`."""
    function: Callable[..., Any]
    arrays: tuple[Any, ...]
    answer: Callable[[Any], dict[str, Array]]
    """Names the arrays that `function` returned, as `Truth.answers` does."""


def ways(task: str, inputs: Inputs, config: Config) -> Iterator[Way]:
    """Yield each way to do a task, the bare product first."""
    return _WAYS[task](inputs, config)


def _forward(inputs: Inputs, config: Config) -> Iterator[Way]:
    weight, adapter, x, _ = inputs
    prepared = doraxp.prepare(weight, adapter, config)
    yield Way("bare product", "bare", product, (x, weight), _name_y)
    yield Way("norm reused", "exact", norm_reused, (x, prepared), _name_y)
    yield Way("norm computed", "exact", norm_computed, (x, adapter, prepared), _name_y)
    first = partial(from_nothing, config)
    yield Way("from nothing", "exact", first, (x, weight, adapter), _name_y)


def _backward(inputs: Inputs, config: Config) -> Iterator[Way]:
    weight, adapter, x, dy = inputs
    yield Way("bare product", "bare", product_back, (dy, weight), _name_gradients)
    for kind in DORA:
        _, cache = doraxp.forward(x, weight, adapter, replace(config, norm_gradient=kind))
        yield Way(kind, kind, doraxp.backward, (dy, cache), _name_gradients)


def _evaluation(inputs: Inputs, config: Config) -> Iterator[Way]:
    bare, reused, *_ = _forward(inputs, config)
    yield from (bare, reused)


def _step(inputs: Inputs, config: Config) -> Iterator[Way]:
    weight, adapter, x, dy = inputs
    yield Way("bare products", "bare", products, (x, dy, weight), _name_gradients)
    for kind in DORA:
        config = replace(config, norm_gradient=kind)
        prepared = doraxp.prepare(weight, adapter, config)
        yield Way(kind, kind, step, (x, dy, adapter, prepared), _name_gradients)


def _norm(inputs: Inputs, config: Config) -> Iterator[Way]:
    weight, adapter, *_ = inputs
    prepared = doraxp.prepare(weight, adapter, config)
    yield Way("bare W Aᵀ", "bare", product, (weight, adapter.lora_a), lambda u: {"W Aᵀ": u})
    yield Way("‖w‖² reused", "exact", norm_again, (adapter, prepared), _name_norm)
    yield Way("from nothing", "exact", partial(norm_first, config), (weight, adapter), _name_norm)


def _merge(inputs: Inputs, config: Config) -> Iterator[Way]:
    weight, adapter, *_ = inputs
    prepared = doraxp.prepare(weight, adapter, config)
    yield Way("bare copy", "bare", copied, (weight,), _name_merged)
    yield Way("norm reused", "exact", merge_again, (prepared,), _name_merged)
    first = partial(doraxp.merge, config=config)
    yield Way("from nothing", "exact", first, (weight, adapter), _name_merged)


def _adamw(inputs: Inputs, config: Config) -> Iterator[Way]:
    params, grads = ({str(i): _copy(inputs.adapter) for i in range(LAYERS)} for _ in range(2))
    state = doraxp.adamw_init(params)
    yield Way("adamw_step", "exact", adamw, (params, grads, state), _name_last)


_WAYS = {
    "forward": _forward,
    "backward": _backward,
    "step": _step,
    "evaluation": _evaluation,
    "norm": _norm,
    "merge": _merge,
    "adamw": _adamw,
}


def copied(weight: Array) -> Array:
    """Return a copy of the weight."""
    xp: Namespace = array_namespace(weight)
    return xp.asarray(weight, copy=True)


def bare(task: str, inputs: Inputs, copy: Callable[[Array], Array] = copied) -> Way | None:
    """Return the library's own products in the weight's dtype, or its own copy; None for adamw."""
    weight, adapter, x, dy = inputs
    xp: Namespace = array_namespace(weight)
    transposed = xp.matrix_transpose
    if task == "merge":
        return Way("bare copy", "bare", copy, (weight,), _name_merged)
    if task == "norm":
        a = transposed(xp.astype(adapter.lora_a, weight.dtype))
        return Way("bare W Aᵀ", "bare", matmul, (weight, a), lambda u: {"W Aᵀ": u})
    if task == "backward":
        return Way("bare product", "bare", matmul, (dy, weight), _name_gradients)
    if task == "step":
        return Way("bare products", "bare", _own_products, (x, dy, weight), dict)
    if task == "adamw":
        return None
    return Way("bare product", "bare", matmul, (x, transposed(weight)), _name_y)


def product(x: Array, weight: Array) -> Array:
    """Return x Wᵀ. A weight in another dtype is cast first, as one does by hand."""
    xp: Namespace = array_namespace(x, weight)
    x, weight = _in_one_dtype(x, weight, xp=xp)
    return x @ xp.matrix_transpose(weight)


def product_back(dy: Array, weight: Array) -> Array:
    """Return dx = dy W."""
    dy, weight = _in_one_dtype(dy, weight, xp=array_namespace(dy, weight))
    return dy @ weight


def products(x: Array, dy: Array, weight: Array) -> tuple[Array, Array]:
    """Return y = x Wᵀ and dx = dy W."""
    _, wide = _in_one_dtype(dy, weight, xp=array_namespace(dy, weight))
    return product(x, wide), product_back(dy, wide)


def norm_reused(x: Array, prepared: Prepared) -> Array:
    """Return y, as each forward after the first does."""
    weight, adapter, config = prepared.weight, prepared.adapter, prepared.config
    return doraxp.forward(x, weight, adapter, config, prepared=prepared)[0]


def norm_computed(x: Array, adapter: Adapter, previous: Prepared) -> Array:
    """Return y, as the first forward after a step of the optimizer does."""
    return _first_forward(x, adapter, previous)[0]


def from_nothing(config: Config, x: Array, weight: Array, adapter: Adapter) -> Array:
    """Return y when nothing is known of the weight."""
    return doraxp.forward(x, weight, adapter, config)[0]


def norm_again(adapter: Adapter, previous: Prepared) -> Prepared:
    """Prepare a forward, as after a step of the optimizer."""
    return doraxp.prepare(previous.weight, adapter, previous.config, previous=previous)


def norm_first(config: Config, weight: Array, adapter: Adapter) -> Prepared:
    """Prepare a forward when nothing is known of the weight."""
    return doraxp.prepare(weight, adapter, config)


def step(x: Array, dy: Array, adapter: Adapter, previous: Prepared) -> Any:
    """Return y and the gradients of one step of training: norm, forward and backward."""
    y, cache = _first_forward(x, adapter, previous)
    return y, doraxp.backward(dy, cache)


def merge_again(prepared: Prepared) -> Array:
    """Return W' when the norm is known."""
    weight, adapter, config = prepared.weight, prepared.adapter, prepared.config
    return doraxp.merge(weight, adapter, config, prepared=prepared)


def adamw(params: Any, grads: Any, state: doraxp.AdamWState) -> Any:
    """Return the parameters and the state after one step of AdamW."""
    return doraxp.adamw_step(params, grads, state, learning_rate=LEARNING_RATE, weight_decay=0)


def _own_products(x: Array, dy: Array, weight: Array) -> dict[str, Array]:
    return {"y": x @ array_namespace(weight).matrix_transpose(weight), "dx": dy @ weight}


def _first_forward(x: Array, adapter: Adapter, previous: Prepared) -> tuple[Array, doraxp.Cache]:
    return doraxp.forward(x, previous.weight, adapter, previous.config, previous=previous)


def _name_y(y: Array) -> dict[str, Array]:
    return {"y": y}


def _name_norm(prepared: Prepared) -> dict[str, Array]:
    return {"n": prepared.norm}


def _name_merged(merged: Array) -> dict[str, Array]:
    return {"W'": merged}


def _name_gradients(result: Any) -> dict[str, Array]:
    if isinstance(result, doraxp.Gradients):
        da, db, dm = result.adapter
        return {"dx": result.x, "dA": da, "dB": db, "dm": dm}
    if not isinstance(result, tuple):
        return {"dx": result}
    y, gradients = result
    return {"y": y, **_name_gradients(gradients)}


def _name_last(result: Any) -> dict[str, Array]:
    params, _ = result
    return dict(params[str(LAYERS - 1)]._asdict())


def _copy(adapter: Adapter) -> Adapter:
    return Adapter(*map(copied, adapter))


def _in_one_dtype(x: Array, weight: Array, *, xp: Namespace) -> tuple[Array, Array]:
    dtype = compute_dtype(x, weight, xp=xp)
    return xp.astype(x, dtype, copy=False), xp.astype(weight, dtype, copy=False)
