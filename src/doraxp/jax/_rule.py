"""The layer as a function of JAX, with a rule for its derivatives.

    x (tokens, in)   W (out, in)   A (rank, in)   B (out, rank)   m (out,)   ρ (out,), None for 1
    V = ρ⊙W + s B A      n = ‖V‖ by rows      g = m / n      z = x Vᵀ      L = x Aᵀ
    y = g⊙z + bias

The rule gives the change of y for given changes of the arguments. A dot marks a change, and D is
ρ⊙W:

    ż = ẋ Vᵀ + (x Ȧᵀ) (s B)ᵀ + L (s Ḃ)ᵀ + x Ḋᵀ
    ṅ = rowsum(s Ḃ⊙V Aᵀ + s B⊙V Ȧᵀ + Ḋ⊙V) / n, or 0 with a detached norm
    ẏ = g⊙ż + (ṁ − g⊙ṅ) / n ⊙ z + the change of the bias

ẏ is linear in the changes, and JAX transposes it for the reverse mode. Each product then becomes a
product of `doraxp.backward`. Of V̇ itself only Ḋ is formed.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from doraxp._base.types import Adapter, Config, DType
from doraxp._core import linear as core
from doraxp._core.checks import check_layer
from doraxp._core.matrix import Cache, as_tokens
from doraxp._core.prepared import Prepared, prepare
from doraxp.backends import as_dtype, operations, transpose

Operations: TypeAlias = Any
"""JAX's operations. They have `product_with_transposed`, which no other library has."""


class _Changes(NamedTuple):
    """The changes of the arguments, in the compute dtype; None for an argument that is constant."""

    x: Any
    """ẋ, (*stack, tokens, in)."""
    base: Any
    """Ḋ, the change of ρ⊙W."""
    lora_a: Any
    """Ȧ."""
    scaled_b: Any
    """s Ḃ."""
    magnitude: Any
    """ṁ."""
    bias: Any
    """The change of the bias."""


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def linear(
    config: Config, x: jax.Array, weight: jax.Array, adapter: Adapter,
    bias: jax.Array | None, prepared: Prepared | None,
) -> Any:  # fmt: skip
    """Return y = g⊙(x Vᵀ) + bias for x (*stack, tokens, in) or (in,); all arguments are checked."""
    return _forward(config, x, weight, adapter, bias, prepared)[0]


def _forward(
    config: Config, x: jax.Array, weight: jax.Array, adapter: Adapter,
    bias: jax.Array | None, prepared: Prepared | None,
) -> tuple[Any, Cache]:  # fmt: skip
    """Return y and the cache of `doraxp.forward`."""
    if prepared is None:
        prepared = prepare(weight, adapter, config)
    else:  # JAX has made new objects of the arrays since the caller checked them
        direction = prepared.direction.with_weight(weight)
        prepared = prepared._replace(direction=direction, adapter=adapter)
    prepared = with_configured_norm(prepared)
    return core.forward(x, weight, adapter, config, bias=bias, prepared=prepared)


def with_configured_norm(prepared: Prepared) -> Prepared:
    """Return `prepared`, where n is a constant for JAX if the config says "detached"."""
    config = prepared.config
    if config.norm_gradient == "exact":
        return prepared
    ops, dtype = check_layer(prepared.weight, prepared.adapter, config)
    norm = jax.lax.stop_gradient(prepared.norm)
    gain = ops.over_norm(as_dtype(prepared.adapter.magnitude, dtype, xp=ops.xp), norm)
    return prepared._replace(norm=norm, gain=gain)


@partial(linear.defjvp, symbolic_zeros=True)
def _change_of_linear(config: Config, given: tuple[Any, ...], changes: tuple[Any, ...]) -> Any:
    """Return y and ẏ.

    The change of `prepared` is not read: it follows from those of the weight and the adapter.
    """
    # An argument that JAX differentiates by may be a NumPy array here.
    y, cache = _forward(config, *jax.tree.map(jnp.asarray, given))
    ops: Operations = operations(x=cache.x)
    dots = _changes(cache, *changes[:-1], ops=ops)
    of_z, of_gain = _change_of_z(cache, dots, ops=ops), _change_of_gain(cache, dots, ops=ops)
    terms = []
    if of_z is not None:
        terms.append(cache.prepared.gain[..., None, :] * of_z)
    if of_gain is not None:
        terms.append(of_gain[..., None, :] * cache.z)
    if dots.bias is not None:
        terms.append(jnp.broadcast_to(dots.bias[..., None, :], cache.z.shape))
    change = _total(terms)
    if change is None:
        return y, SymbolicZero.from_primal_value(y)
    change = jnp.asarray(jnp.reshape(change, y.shape), y.dtype)
    if jax.typeof(change) != jax.typeof(y):
        # A constant argument splits y over a mesh, or makes it vary between devices. These zeros
        # are split and vary as y does. 0 * y would be NaN where y is infinite.
        change = change + 0 * jnp.asarray(y != y, y.dtype)
    return y, change


def _changes(
    cache: Cache, x: Any, weight: Any, adapter: Adapter, bias: Any, *, ops: Operations
) -> _Changes:
    """Return the changes of the arguments in the form that the formulas need."""
    prepared = cache.prepared
    row_scale, dtype = prepared.direction.factors.row_scale, prepared.gain.dtype
    dx, dweight, da, db, dm, dbias = (_known(dot, dtype) for dot in (x, weight, *adapter, bias))
    if dx is not None:
        dx = as_tokens(dx, prepared.weight, dtype, xp=ops.xp)
    if dweight is not None and row_scale is not None:
        # The rows of D have length 1: Ḋ = ρ⊙(Ẇ − D⊙rowsum(D⊙Ẇ))
        unit: Any = row_scale[..., None] * as_dtype(prepared.weight, dtype, xp=ops.xp)  # D
        along = jnp.sum(unit * dweight, axis=-1)
        dweight = row_scale[..., None] * (dweight - along[..., None] * unit)
    db = None if db is None else prepared.config.scaling * db
    return _Changes(dx, dweight, da, db, dm, dbias)


def _known(change: Any, dtype: DType) -> Any | None:
    """Return a change in `dtype`; None if there is no argument or JAX knows that it is constant."""
    if change is None or isinstance(change, SymbolicZero):
        return None
    return jnp.asarray(change, dtype)


def _change_of_z(cache: Cache, dots: _Changes, *, ops: Operations) -> Any | None:
    """Return ż, (*stack, tokens, out)."""
    direction = cache.prepared.direction
    terms = []
    if dots.x is not None:
        terms.append(ops.product_with_transposed(dots.x, direction.dense(ops=ops)))
    if dots.lora_a is not None:
        low = _x_times_transposed(cache, dots.lora_a, ops=ops)  # x Ȧᵀ, (tokens, rank)
        terms.append(ops.product_with_transposed(low, direction.factors.scaled_b))
    if dots.scaled_b is not None:
        terms.append(ops.product_with_transposed(cache.low_rank, dots.scaled_b))
    if dots.base is not None:
        terms.append(_x_times_transposed(cache, dots.base, ops=ops))
    return _total(terms)


def _x_times_transposed(cache: Cache, change: Any, *, ops: Operations) -> Any:
    """Return x changeᵀ. For the reverse mode JAX keeps x in its own dtype, and casts it again."""

    def product(x: Any, change: Any) -> Any:
        tokens = as_tokens(x, cache.prepared.weight, change.dtype, xp=ops.xp)
        return ops.product_with_transposed(tokens, change)

    narrow = cache.x.dtype != change.dtype
    return (jax.checkpoint(product) if narrow else product)(cache.x, change)


def _change_of_gain(cache: Cache, dots: _Changes, *, ops: Operations) -> Any | None:
    """Return ġ = (ṁ − g⊙ṅ) / n, (*stack, out)."""
    prepared = cache.prepared
    norm, direction = prepared.norm, prepared.direction
    along: list[Any] = []  # arrays whose row sums add up to ṅ
    if prepared.config.norm_gradient == "exact":
        v = direction.dense(ops=ops)
        if dots.lora_a is not None:
            pulled = transpose(ops.product_with_transposed(dots.lora_a, v))  # V Ȧᵀ, (out, rank)
            along.append(direction.factors.scaled_b * ops.over_norm(pulled, norm))
        if dots.scaled_b is not None:
            along.append(dots.scaled_b * prepared.unit_projection)
        if dots.base is not None:
            along.append(dots.base * ops.over_norm(v, norm))
    terms = [-prepared.gain * jnp.sum(term, axis=-1) for term in along]
    if dots.magnitude is not None:
        terms.append(dots.magnitude)
    change = _total(terms)
    return None if change is None else ops.over_norm(change, norm)


def _total(terms: list[Any]) -> Any | None:
    """Return the sum of the terms; None if there is no term."""
    return sum(terms[1:], terms[0]) if terms else None
