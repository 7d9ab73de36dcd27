"""DoRA inside of JAX: two functions for jit, vmap and grad, sharded or not.

    dora_linear          y = x W'ᵀ + bias
    merge                W'

Needs the extra ``jax``. The math is `doraxp.forward` and `doraxp.backward`. `jax.grad` of
`doraxp.forward` itself is NaN where a row of V is zero; the functions here have gradient rules
that avoid this. The import registers `doraxp.Config` as static with JAX: a `doraxp.Prepared` may
then be an argument and a result of a jitted function.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from doraxp._base.scalars import check_flag, check_kind
from doraxp._base.types import Adapter, Array, Config
from doraxp._core import adapter as adapters
from doraxp._core import linear
from doraxp._core.checks import check_layer
from doraxp._core.prepared import Prepared, check_prepared

__all__ = ["dora_linear", "merge"]

with contextlib.suppress(ValueError):  # the user has registered it already
    jax.tree_util.register_static(Config)


def dora_linear(
    x: jax.Array,
    weight: jax.Array,
    adapter: Adapter,
    config: Config,
    bias: jax.Array | None = None,
    *,
    prepared: Prepared | None = None,
    train_base: bool = False,
) -> jax.Array:
    """Return y = g⊙(x Vᵀ) + bias. Differentiable once, in reverse mode, by x, adapter and bias.

    ::

        V = ρ⊙W + s B A      n = ‖V‖ by rows      g = m / n

    Parameters
    ----------
    x : jax.Array, shape (*stack, ..., in)
    weight : jax.Array, shape (*stack, out, in)
    adapter : Adapter
        Its arrays are JAX arrays.
    config : Config
        ``norm_gradient`` says whether gradients go through n.
    bias : jax.Array, shape (*stack, out), optional
    prepared : Prepared, optional
        From `doraxp.prepare` with this weight, adapter and config: saves the computation of the
        norm and does not change the gradients. Under `jax.grad`, call `doraxp.prepare` inside the
        differentiated function.
    train_base : bool
        Compute the gradient of the weight too; without it that gradient is zero.

    Returns
    -------
    jax.Array, shape (*stack, ..., out), in x's dtype

    Raises
    ------
    TypeError
        An array is not a JAX array, or a dtype is not floating.
    ValueError
        The shapes do not fit, or `prepared` is of another weight, adapter or config.

    References
    ----------
    arXiv:2402.09353, equations 5 to 11.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import doraxp
    >>> weight, config = jnp.array([[3.0, 4.0], [0.0, 5.0]]), doraxp.Config(rank=1)
    >>> adapter = doraxp.init(weight, config, seed=0)
    >>> gradient = jax.grad(lambda x: dora_linear(x, weight, adapter, config).sum())
    >>> gradient(jnp.array([1.0, 2.0]))
    Array([3., 9.], dtype=float32)
    """
    _check(weight, adapter, config, train_base, x=x, bias=bias)
    if prepared is not None:
        ops, _ = check_layer(weight, adapter, config)
        check_prepared(prepared, weight, adapter, config, ops=ops)
        # The gradients below include those through the norm. Those of `prepare` would be NaN for
        # a zero row.
        prepared = jax.lax.stop_gradient(prepared)
    y: jax.Array = _linear(config, train_base, x, weight, adapter, bias, prepared)
    return y


def merge(
    weight: jax.Array, adapter: Adapter, config: Config, *, train_base: bool = False
) -> jax.Array:
    """Return W' = (m / n)⊙V. Differentiable once, in reverse mode, by the adapter.

    The gradients are those of `dora_linear` where x is the unit matrix: they cost as much as a
    batch of `in` tokens.

    Parameters
    ----------
    weight : jax.Array, shape (*stack, out, in)
    adapter : Adapter
        Its arrays are JAX arrays.
    config : Config
    train_base : bool
        Compute the gradient of the weight too; without it that gradient is zero.

    Returns
    -------
    jax.Array, shape (*stack, out, in), in weight's dtype

    Raises
    ------
    TypeError
        An array is not a JAX array, or a dtype is not floating.
    ValueError
        The shapes do not fit.

    References
    ----------
    arXiv:2402.09353, equation 5.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import doraxp
    >>> weight, config = jnp.array([[3.0, 4.0], [0.0, 5.0]]), doraxp.Config(rank=1)
    >>> adapter = doraxp.init(weight, config, seed=0)
    >>> jax.grad(lambda adapter: merge(weight, adapter, config).sum())(adapter).magnitude
    Array([1.4, 1. ], dtype=float32)
    """
    _check(weight, adapter, config, train_base)
    merged: jax.Array = _merge(config, train_base, weight, adapter)
    return merged


def _check(
    weight: jax.Array,
    adapter: Adapter,
    config: Config,
    train_base: bool,
    **others: jax.Array | None,
) -> None:
    """Raise TypeError where an argument is of the wrong class; a bias of None is allowed."""
    check_kind("adapter", adapter, Adapter)
    check_kind("config", config, Config)
    check_flag("train_base", train_base)
    for name, array in {"weight": weight, **adapter._asdict(), **others}.items():
        if name != "bias" or array is not None:
            check_kind(name, array, jax.Array)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(config: Config, train_base: bool, *arrays: Any) -> Any:
    return _linear_forward(config, train_base, *arrays)[0]


def _linear_forward(
    config: Config, train_base: bool, x: jax.Array, weight: jax.Array, adapter: Adapter,
    bias: jax.Array | None, prepared: Prepared | None,
) -> tuple[Array, linear.Cache]:  # fmt: skip
    if prepared is not None:  # checked by the caller; JAX has made new objects of the arrays since
        direction = prepared.direction.with_weight(weight)
        prepared = prepared._replace(direction=direction, adapter=adapter)
    return linear.forward(x, weight, adapter, config, bias=bias, prepared=prepared)


def _linear_backward(config: Config, train_base: bool, cache: linear.Cache, dy: jax.Array) -> Any:
    bias, prepared = cache.bias, cache.prepared
    gradients = linear.backward(dy, cache, train_base=train_base)
    dbias = None
    if bias is not None:
        wide = dy.astype(prepared.gain.dtype)
        dbias = jnp.sum(wide, axis=tuple(range(bias.ndim - 1, dy.ndim - 1))).astype(bias.dtype)
    dweight, dadapter = _as_given(gradients.weight, gradients.adapter, prepared)
    return gradients.x, dweight, dadapter, dbias, None


_linear.defvjp(_linear_forward, _linear_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _merge(config: Config, train_base: bool, weight: jax.Array, adapter: Adapter) -> Any:
    return adapters.merge(weight, adapter, config)


def _merge_forward(
    config: Config, train_base: bool, weight: jax.Array, adapter: Adapter
) -> tuple[Array, tuple[jax.Array, Adapter]]:
    return adapters.merge(weight, adapter, config), (weight, adapter)


def _merge_backward(
    config: Config, train_base: bool, given: tuple[jax.Array, Adapter], dmerged: jax.Array
) -> Any:
    weight, adapter = given
    *stack, _, inner = weight.shape
    unit = jnp.broadcast_to(jnp.eye(inner, dtype=weight.dtype), (*stack, inner, inner))
    _, cache = linear.forward(unit, weight, adapter, config)  # y = W'ᵀ
    gradients = linear.backward(dmerged.mT, cache, train_base=train_base)
    return _as_given(gradients.weight, gradients.adapter, cache.prepared)


_merge.defvjp(_merge_forward, _merge_backward)


def _as_given(
    dweight: Array | None, dadapter: Adapter, prepared: Prepared
) -> tuple[Array | None, Adapter]:
    """Return the gradients in the dtypes of the weight and of the adapter's arrays."""
    if dweight is not None:
        dweight = jnp.asarray(dweight, prepared.weight.dtype)
    leaves = (jnp.asarray(d, of.dtype) for d, of in zip(dadapter, prepared.adapter, strict=True))
    return dweight, Adapter(*leaves)
