"""Who takes part on any array library: its bare products, and doraxp on it.

A contestant's functions are pure, of arrays alone, so that a library with a compiler compiles
them. PEFT and torch.optim are in `peft`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from array_api_compat import array_namespace

import doraxp
from doraxp import Adapter, Config, Prepared
from doraxp._base.types import Array, NormGradient
from doraxp.backends import compute_dtype
from doraxp.cli._bench.cases import LEARNING_RATE, Case, Inputs, draw
from doraxp.cli._libraries import Library, library

LAYERS = 8
"""How many adapters AdamW steps at once."""
DORA: tuple[NormGradient, ...] = ("exact", "detached")


class Contestant(NamedTuple):
    """A way to do a task."""

    name: str
    library: str
    kind: str
    """What its answer is held to: see `cases.Dense`."""
    call: Callable[[], Any]
    """Does the task and waits for it."""
    answer: Callable[[Any], dict[str, Array]]
    """Names what `call` returned, as `cases.Dense.answers` does."""
    reset: Callable[[], None] = lambda: None
    """Called before each call, untimed."""
    seconds: Callable[[int], float] | None = None
    """Returns the mean seconds of so many calls, where the host's clock is not the one to ask."""
    host_seconds: Callable[[], float] | None = None
    """Returns what a call takes of the host, where that is not the time of the call."""
    peak: Callable[[], int] | None = None
    """Returns the peak bytes of a call, where the memory is not the host's."""
    tolerance: float | None = None
    """Of answers that are stored wider than they are computed; never less than their dtype's."""


def contestants(task: str, case: Case, name: str) -> Iterator[Contestant]:
    """Yield those of an array library, the bare product first."""
    lib = library(name)
    inputs = _taken_over(draw(case), lib)

    def enter(
        label: str, kind: str, function: Callable[..., Any], *arrays: Any, answer: Any
    ) -> Contestant:
        compiled = lib.compiled(function)
        return Contestant(label, name, kind, lambda: lib.wait(compiled(*arrays)), answer)

    return entries(task, enter, inputs, case.config)


def entries(task: str, enter: Any, inputs: Inputs, config: Config) -> Iterator[Any]:
    """Yield what `enter` makes of each way to do a task: name, kind, function, arrays, answer."""
    return _ENTRIES[task](enter, inputs, config)


def _taken_over(inputs: Inputs, lib: Library) -> Inputs:
    weight, adapter, x, dy = inputs
    taken = lib.asarray(weight)
    if not str(taken.dtype).endswith(str(weight.dtype)):
        raise ValueError(
            f"{lib.name} made {taken.dtype} of {weight.dtype}: JAX needs JAX_ENABLE_X64=1 for it"
        )
    return Inputs(taken, Adapter(*map(lib.asarray, adapter)), lib.asarray(x), lib.asarray(dy))


def _forward(enter: Any, inputs: Inputs, config: Config) -> Iterator[Contestant]:
    weight, adapter, x, _ = inputs
    prepared = doraxp.prepare(weight, adapter, config)
    enter = partial(enter, answer=lambda y: {"y": y})
    yield enter("bare product", "bare", product, x, weight)
    yield enter("norm reused", "exact", norm_reused, x, prepared)
    yield enter("norm computed", "exact", norm_computed, x, adapter, prepared)
    yield enter("from nothing", "exact", partial(from_nothing, config), x, weight, adapter)


def _backward(enter: Any, inputs: Inputs, config: Config) -> Iterator[Contestant]:
    weight, adapter, x, dy = inputs
    enter = partial(enter, answer=_name_gradients)
    yield enter("bare product", "bare", product_back, dy, weight)
    for kind in DORA:
        _, cache = doraxp.forward(x, weight, adapter, replace(config, norm_gradient=kind))
        yield enter(kind, kind, doraxp.backward, dy, cache)


def _evaluation(enter: Any, inputs: Inputs, config: Config) -> Iterator[Contestant]:
    bare, reused, *_ = _forward(enter, inputs, config)
    yield from (bare, reused)


def _step(enter: Any, inputs: Inputs, config: Config) -> Iterator[Contestant]:
    weight, adapter, x, dy = inputs
    enter = partial(enter, answer=_name_gradients)
    yield enter("bare products", "bare", products, x, dy, weight)
    for kind in DORA:
        config = replace(config, norm_gradient=kind)
        prepared = doraxp.prepare(weight, adapter, config)
        yield enter(kind, kind, step, x, dy, adapter, prepared)


def _norm(enter: Any, inputs: Inputs, config: Config) -> Iterator[Contestant]:
    weight, adapter, *_ = inputs
    prepared = doraxp.prepare(weight, adapter, config)
    yield enter("bare W Aᵀ", "bare", product, weight, adapter.lora_a, answer=lambda u: {"W Aᵀ": u})
    enter = partial(enter, answer=lambda made: {"n": made.norm})
    yield enter("‖w‖² reused", "exact", norm_again, adapter, prepared)
    yield enter("from nothing", "exact", partial(norm_first, config), weight, adapter)


def _merge(enter: Any, inputs: Inputs, config: Config) -> Iterator[Contestant]:
    weight, adapter, *_ = inputs
    prepared = doraxp.prepare(weight, adapter, config)
    enter = partial(enter, answer=lambda merged: {"W'": merged})
    yield enter("bare copy", "bare", copied, weight)
    yield enter("norm reused", "exact", merge_again, prepared)
    yield enter("from nothing", "exact", partial(doraxp.merge, config=config), weight, adapter)


def _adamw(enter: Any, inputs: Inputs, config: Config) -> Iterator[Contestant]:
    params, grads = ({str(i): _copy(inputs.adapter) for i in range(LAYERS)} for _ in range(2))
    state = doraxp.adamw_init(params)
    yield enter("adamw_step", "exact", adamw, params, grads, state, answer=_last_of)


_ENTRIES = {
    "forward": _forward,
    "backward": _backward,
    "step": _step,
    "evaluation": _evaluation,
    "norm": _norm,
    "merge": _merge,
    "adamw": _adamw,
}


def product(x: Array, weight: Array) -> Array:
    """Return x Wᵀ; a weight of another dtype is cast first, as one does by hand."""
    xp = array_namespace(x, weight)
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


def copied(weight: Array) -> Array:
    """Return a copy."""
    xp = array_namespace(weight)
    return xp.asarray(weight, copy=True)


def norm_reused(x: Array, prepared: Prepared) -> Array:
    """Return y, as each forward after the first."""
    weight, adapter, config, *_ = prepared
    return doraxp.forward(x, weight, adapter, config, prepared=prepared)[0]


def norm_computed(x: Array, adapter: Adapter, previous: Prepared) -> Array:
    """Return y, as the first forward after a step of the optimizer."""
    return _first_forward(x, adapter, previous)[0]


def from_nothing(config: Config, x: Array, weight: Array, adapter: Adapter) -> Array:
    """Return y, with nothing known of the weight."""
    return doraxp.forward(x, weight, adapter, config)[0]


def norm_again(adapter: Adapter, previous: Prepared) -> Prepared:
    """Return what a forward needs, as after a step of the optimizer."""
    return doraxp.prepare(previous.weight, adapter, previous.config, previous=previous)


def norm_first(config: Config, weight: Array, adapter: Adapter) -> Prepared:
    """Return what a forward needs, with nothing known of the weight."""
    return doraxp.prepare(weight, adapter, config)


def step(x: Array, dy: Array, adapter: Adapter, previous: Prepared) -> Any:
    """Return y and the gradients, as one step of training: norm, forward and backward."""
    y, cache = _first_forward(x, adapter, previous)
    return y, doraxp.backward(dy, cache)


def merge_again(prepared: Prepared) -> Array:
    """Return W', with the norm known."""
    return doraxp.merge(*prepared[:3], prepared=prepared)


def adamw(params: Any, grads: Any, state: doraxp.AdamWState) -> Any:
    """Return what one step makes of the parameters."""
    return doraxp.adamw_step(params, grads, state, learning_rate=LEARNING_RATE, weight_decay=0)


def _first_forward(x: Array, adapter: Adapter, previous: Prepared) -> tuple[Array, doraxp.Cache]:
    return doraxp.forward(x, previous.weight, adapter, previous.config, previous=previous)


def _name_gradients(result: Any) -> dict[str, Array]:
    if isinstance(result, doraxp.Gradients):
        da, db, dm = result.adapter
        return {"dx": result.x, "dA": da, "dB": db, "dm": dm}
    if not isinstance(result, tuple):
        return {"dx": result}
    y, gradients = result
    return {"y": y, **_name_gradients(gradients)}


def _last_of(result: Any) -> dict[str, Array]:
    params, _ = result
    return dict(params[str(LAYERS - 1)]._asdict())


def _copy(adapter: Adapter) -> Adapter:
    return Adapter(*map(copied, adapter))


def _in_one_dtype(x: Array, weight: Array, *, xp: Any) -> tuple[Array, Array]:
    dtype = compute_dtype(x, weight, xp=xp)
    return xp.astype(x, dtype, copy=False), xp.astype(weight, dtype, copy=False)
