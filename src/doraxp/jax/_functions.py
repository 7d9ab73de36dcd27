"""`dora_linear` and `merge`: the checks of their arguments, and the calls of the core.

W (out, in)   A (rank, in)   B (out, rank)   ρ (out,)   V = ρ⊙W + s B A   n = ‖V‖ by rows
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from doraxp._base.scalars import check_flag, check_kind
from doraxp._base.types import Adapter, Config
from doraxp._core import adapter as adapters
from doraxp._core.checks import check_call
from doraxp._core.prepared import Prepared, check_prepared, prepare
from doraxp.jax._rule import linear, with_configured_norm


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
    """Return y = g⊙(x Vᵀ) + bias. Differentiable by x, adapter and bias, in both modes.

    ::

        V = ρ⊙W + s B A      n = ‖V‖ by rows      g = m / n

    The change of y, where a dot marks the change of an array::

        z = x Vᵀ             L = x Aᵀ
        ż = ẋ Vᵀ + s ((x Ȧᵀ) Bᵀ + L Ḃᵀ)
        ṅ = s rowsum(Ḃ⊙V Aᵀ + B⊙V Ȧᵀ) / n, or 0 with a detached norm
        ẏ = g⊙ż + z⊙(ṁ − g⊙ṅ) / n + the change of the bias

    JAX transposes this map: the result is `doraxp.backward`, with the same products. In a row with
    n = 0, y does not change.

    Parameters
    ----------
    x : jax.Array, shape (*stack, ..., in)
    weight : jax.Array, shape (*stack, out, in)
    adapter : Adapter
        Its arrays are JAX arrays.
    config : Config
        ``norm_gradient`` says whether derivatives go through n.
    bias : jax.Array, shape (*stack, out), optional
    prepared : Prepared, optional
        From `doraxp.prepare` with this weight, adapter and config: saves the computation of the
        norm and does not change the derivatives. Where y is differentiated, call `doraxp.prepare`
        inside the differentiated function.
    train_base : bool
        Differentiate by the weight too; without it the weight counts as a constant.

    Returns
    -------
    jax.Array, shape (*stack, ..., out), in x's dtype

    Raises
    ------
    TypeError
        An array is not of JAX or NumPy, or a dtype is not floating.
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
    weight, adapter, others = _on_jax(weight, adapter, config, train_base, x=x, bias=bias)
    x, bias = others["x"], others["bias"]
    ops, _ = check_call(x, weight, adapter, config, bias)
    if prepared is not None:
        _check_prepared_on_jax(prepared)
        check_prepared(prepared, weight, adapter, config, ops=ops)
    if not train_base:
        weight = jax.lax.stop_gradient(weight)
    call, depth = partial(linear, config), weight.ndim - 2
    # Not by a reshape to one axis of tokens: each axis may be split over a mesh in its own way.
    for _ in range(x.ndim - weight.ndim):
        call = jax.vmap(call, in_axes=(depth, None, None, None, None), out_axes=depth)
    y: jax.Array = call(x, weight, adapter, bias, prepared)
    return y


def merge(
    weight: jax.Array, adapter: Adapter, config: Config, *, train_base: bool = False
) -> jax.Array:
    """Return W' = (m / n)⊙V. Differentiable by the adapter, in both modes.

    In a row with n = 0, W' does not change.

    Parameters
    ----------
    weight : jax.Array, shape (*stack, out, in)
    adapter : Adapter
        Its arrays are JAX arrays.
    config : Config
        ``norm_gradient`` says whether derivatives go through n.
    train_base : bool
        Differentiate by the weight too; without it the weight counts as a constant.

    Returns
    -------
    jax.Array, shape (*stack, out, in), in weight's dtype

    Raises
    ------
    TypeError
        An array is not of JAX or NumPy, or a dtype is not floating.
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
    weight, adapter, _ = _on_jax(weight, adapter, config, train_base)
    if not train_base:
        weight = jax.lax.stop_gradient(weight)
    # The gradients of V Aᵀ and of V itself cost the same here, so JAX's own derivative will do.
    prepared = with_configured_norm(prepare(weight, adapter, config))
    return jnp.asarray(adapters.merge(weight, adapter, config, prepared=prepared))


def _on_jax(
    weight: Any, adapter: Adapter, config: Config, train_base: bool, **others: Any
) -> tuple[Any, Adapter, dict[str, Any]]:
    """Return the weight, the adapter and the other arrays as JAX arrays; the bias may be None."""
    check_kind("adapter", adapter, Adapter)
    check_kind("config", config, Config)
    check_flag("train_base", train_base)
    weight = _as_jax("weight", weight)
    leaves = (_as_jax(name, leaf) for name, leaf in adapter._asdict().items())
    return weight, Adapter(*leaves), {name: _as_jax(name, array) for name, array in others.items()}


def _as_jax(name: str, array: Any) -> Any:
    if isinstance(array, jax.Array) or (array is None and name == "bias"):
        return array
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be an array of JAX or NumPy, got {type(array).__name__}")
    return jnp.asarray(array)


def _check_prepared_on_jax(prepared: Prepared) -> None:
    check_kind("prepared", prepared, Prepared)
    if not isinstance(prepared.gain, jax.Array):
        raise TypeError(
            "prepared must be of JAX arrays, and is of another library's: call doraxp.prepare with "
            "the weight and the adapter as JAX arrays"
        )
