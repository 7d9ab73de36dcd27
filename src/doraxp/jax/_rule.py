"""The layer as a function of JAX, with a rule for its derivatives.

    x (tokens, in)   W (out, in)   A (rank, in)   B (out, rank)   m (out,)   ρ (out,), None for 1
    V = ρ⊙W + s B A      n = ‖V‖ by rows      g = m / n      z = x Vᵀ      L = x Aᵀ
    y = g⊙z + bias

The rule is the change of y by changes of the arguments, which a dot marks. It is linear in them:

    ż = ẋ Vᵀ + (x Ȧᵀ) (s B)ᵀ + L (s Ḃ)ᵀ + x Ḋᵀ       Ḋ is the change of ρ⊙W
    ṅ = rowsum(s Ḃ⊙V Aᵀ + s B⊙V Ȧᵀ + Ḋ⊙V) / n        0 with a detached norm
    ẏ = g⊙ż + (ṁ − g⊙ṅ) / n ⊙ z + the change of the bias

JAX transposes it for the reverse mode. The transpose of each product here is one product of
`doraxp.backward`, and V⊙V̇ is never formed for the whole V.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from doraxp._base.types import Adapter, Config, DType
from doraxp._core import linear as core
from doraxp._core.checks import check_layer
from doraxp._core.prepared import Prepared, prepare
from doraxp.backends import JaxOperations, as_dtype, operations, transpose


class _Dots(NamedTuple):
    """The changes of the arguments, in the compute dtype; None for an argument that is constant."""

    x: Any
    base: Any
    """Ḋ, the change of ρ⊙W."""
    scaled_b: Any
    """s Ḃ."""
    lora_a: Any
    magnitude: Any
    bias: Any


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def linear(
    config: Config, x: jax.Array, weight: jax.Array, adapter: Adapter,
    bias: jax.Array | None, prepared: Prepared | None,
) -> Any:  # fmt: skip
    """Return y = g⊙(x Vᵀ) + bias for x (*stack, tokens, in) or (in,), and checked arguments."""
    return _forward(config, x, weight, adapter, bias, prepared)[0]


def _forward(
    config: Config, x: jax.Array, weight: jax.Array, adapter: Adapter,
    bias: jax.Array | None, prepared: Prepared | None,
) -> tuple[Any, core.Cache]:  # fmt: skip
    """Return y and the cache."""
    if prepared is None:
        prepared = prepare(weight, adapter, config)
    else:  # JAX has made new objects of the arrays since the caller checked them
        direction = prepared.direction.with_weight(weight)
        prepared = prepared._replace(direction=direction, adapter=adapter)
    prepared = with_configured_norm(prepared)
    return core.forward(x, weight, adapter, config, bias=bias, prepared=prepared)


def with_configured_norm(prepared: Prepared) -> Prepared:
    """Return `prepared` with an n that is a constant for JAX if the config says "detached"."""
    _, config, _, norm, *_ = prepared
    if config.norm_gradient == "exact":
        return prepared
    ops, dtype = check_layer(prepared.weight, prepared.adapter, config)
    norm = jax.lax.stop_gradient(norm)
    gain = ops.over_norm(as_dtype(prepared.adapter.magnitude, dtype, xp=ops.xp), norm)
    return prepared._replace(norm=norm, gain=gain)


@partial(linear.defjvp, symbolic_zeros=True)
def _change_of_linear(config: Config, given: tuple[Any, ...], changes: tuple[Any, ...]) -> Any:
    """Return y and ẏ. A change of `prepared` is that of the adapter and the weight: not read."""
    # An argument that JAX differentiates by may be a NumPy array here.
    y, cache = _forward(config, *jax.tree.map(jnp.asarray, given))
    ops = operations(x=cache.x)
    dots = _dots(cache, *changes[:-1], ops=ops)
    terms = []
    dz, dgain = _change_of_z(cache, dots, ops=ops), _change_of_gain(cache, dots, ops=ops)
    if dz is not None:
        terms.append(cache.prepared.gain[..., None, :] * dz)
    if dgain is not None:
        terms.append(dgain[..., None, :] * cache.z)
    if dots.bias is not None:
        terms.append(jnp.broadcast_to(dots.bias[..., None, :], cache.z.shape))
    change = _total(terms)
    if change is None:
        return y, SymbolicZero.from_primal_value(y)
    change = as_dtype(jnp.reshape(change, y.shape), y.dtype, xp=ops.xp)
    if jax.typeof(change) != jax.typeof(y):
        # y is split over a mesh, or differs between devices, by an argument that is constant. These
        # zeros are as y is. 0 * y would be NaN where y is infinite.
        change = change + 0 * as_dtype(y != y, y.dtype, xp=ops.xp)
    return y, change


def _dots(
    cache: core.Cache, x: Any, weight: Any, adapter: Adapter, bias: Any, *, ops: JaxOperations
) -> _Dots:
    """Return the changes of the arguments as the formulas take them."""
    prepared = cache.prepared
    dtype, scaling, factors = prepared.gain.dtype, prepared.config.scaling, prepared.direction.factors
    dx, dweight, da, db, dm, dbias = (_known(dot, dtype) for dot in (x, weight, *adapter, bias))
    if dx is not None:
        dx = core.as_tokens(dx, factors.weight, dtype, xp=ops.xp)
    if dweight is not None and factors.row_scale is not None:
        # D = ρ⊙W has rows of length 1: Ḋ = ρ⊙(Ẇ − D⊙rowsum(D⊙Ẇ))
        unit = factors.row_scale[..., None] * as_dtype(factors.weight, dtype, xp=ops.xp)
        along = jnp.sum(unit * dweight, axis=-1)[..., None]
        dweight = factors.row_scale[..., None] * (dweight - along * unit)
    return _Dots(dx, dweight, None if db is None else scaling * db, da, dm, dbias)


def _known(change: Any, dtype: DType) -> Any | None:
    """Return a change in `dtype`; None if JAX knows that the argument is constant, or no argument."""
    constant = change is None or isinstance(change, SymbolicZero)
    return None if constant else as_dtype(change, dtype, xp=jnp)


def _change_of_z(cache: core.Cache, dots: _Dots, *, ops: JaxOperations) -> Any | None:
    """Return ż, (*stack, tokens, out)."""
    direction = cache.prepared.direction
    terms = []
    if dots.x is not None:
        terms.append(ops.product_with_transposed(dots.x, direction.dense(ops=ops)))
    if dots.lora_a is not None:
        along = _x_times_transposed(cache, dots.lora_a, ops=ops)  # x Ȧᵀ, (tokens, rank)
        terms.append(ops.product_with_transposed(along, direction.factors.scaled_b))
    if dots.scaled_b is not None:
        terms.append(ops.product_with_transposed(cache.low_rank, dots.scaled_b))
    if dots.base is not None:
        terms.append(_x_times_transposed(cache, dots.base, ops=ops))
    return _total(terms)


def _x_times_transposed(cache: core.Cache, change: Any, *, ops: JaxOperations) -> Any:
    """Return x changeᵀ. For the reverse mode JAX keeps x in its own dtype, and casts it again."""

    def product(x: Any, change: Any) -> Any:
        tokens = core.as_tokens(x, cache.prepared.weight, change.dtype, xp=ops.xp)
        return ops.product_with_transposed(tokens, change)

    narrow = cache.x.dtype != change.dtype
    return (jax.checkpoint(product) if narrow else product)(cache.x, change)


def _change_of_gain(cache: core.Cache, dots: _Dots, *, ops: JaxOperations) -> Any | None:
    """Return ġ = (ṁ − g⊙ṅ) / n, (*stack, out)."""
    prepared = cache.prepared
    norm = prepared.norm
    terms = [] if dots.magnitude is None else [dots.magnitude]
    if prepared.config.norm_gradient == "exact":
        v, scaled_b = prepared.direction.dense(ops=ops), prepared.direction.factors.scaled_b
        along = []  # the terms of V⊙V̇ / n, by rows
        if dots.lora_a is not None:
            pulled = transpose(ops.product_with_transposed(dots.lora_a, v))  # V Ȧᵀ, (out, rank)
            along.append(scaled_b * ops.over_norm(pulled, norm))
        if dots.scaled_b is not None:
            along.append(dots.scaled_b * prepared.unit_projection)
        if dots.base is not None:
            along.append(dots.base * ops.over_norm(v, norm))
        terms += [-prepared.gain * jnp.sum(term, axis=-1) for term in along]
    change = _total(terms)
    return None if change is None else ops.over_norm(change, norm)


def _total(terms: list[Any]) -> Any | None:
    """Return the sum of the terms; None if there are none."""
    return sum(terms[1:], terms[0]) if terms else None
