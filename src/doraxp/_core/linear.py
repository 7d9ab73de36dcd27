"""A linear layer with a DoRA adapter: init, forward, backward, merge.

    x (tokens, in)   W (out, in) frozen   A (rank, in)   B (out, rank)   m (out,)
    V = ρ⊙W + s B A      n = ‖V‖ by rows      g = m / n      W' = g⊙V      y = x W'ᵀ + bias

V and W' are never formed, but for the gradient of W and for `merge`. `adapted` has the norm and
the two products with V; here they are put together.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import array_api_compat
import numpy as np

from doraxp._base.ranks import sums
from doraxp._base.scalars import check_count, check_flag, check_kind
from doraxp._base.types import Adapter, Array, Config, Form, Gradients, Reduce
from doraxp._core.checks import (
    check_bias,
    check_config,
    check_input,
    check_layer,
    check_mask,
    check_output_gradient,
)
from doraxp._core.decomposition import inverse_norms, weight_norms
from doraxp._core.prepared import (
    Prepared,
    check_prepared,
    check_previous,
    check_same_reduce,
    outputs,
    prepare,
    prepare_with_product,
    times,
)
from doraxp.backends import Factors, Operations, as_dtype, compute_dtype, operations

InitMethod: TypeAlias = Literal["kaiming", "gaussian"]


class Cache(NamedTuple):
    """What `forward` keeps for `backward`. Read it, do not build it."""

    x: Array
    """x as it came."""
    bias: Array | None
    """The bias as it came."""
    low_rank: Array
    """L = x Aᵀ, shape (*stack, tokens, rank); of the dropped x where there is a mask."""
    z: Array
    """z with y = g⊙z + bias, shape (*stack, tokens, out); x Vᵀ where there is no mask."""
    prepared: Prepared
    """What the forward was given, or made."""
    dropout_mask: Array | None = None
    """The mask as it came."""


def init(weight: Array, config: Config, *, seed: int, method: InitMethod = "kaiming") -> Adapter:
    """Return a fresh adapter: A random, B = 0, m = ‖wᵢ‖, so that W' = W.

    In the weight form that identity is exact, bit for bit.

    Parameters
    ----------
    weight : array, shape (*stack, out, in)
    config : Config
    seed : int
        The numbers are drawn on the host by NumPy, so every backend gets the same ones.
    method : {"kaiming", "gaussian"}
        A uniform in ±1/√in, which is what PEFT's kaiming_uniform_(a=√5) comes to; or normal with
        variance 1/rank.

    Returns
    -------
    Adapter
        In the compute dtype: float64 for a float64 weight, else float32.

    Raises
    ------
    TypeError
        `weight` is no array of a floating dtype.
    ValueError
        The rank is above min(out, in), or `method` is unknown.

    References
    ----------
    arXiv:2402.09353, section 4.1; PEFT 0.21.2, ``lora/layer.py``.

    Examples
    --------
    >>> weight = np.array([[3.0, 4.0], [0.0, 5.0]])
    >>> adapter = init(weight, Config(rank=1), seed=0)
    >>> adapter.magnitude
    array([5., 5.])
    """
    if method not in get_args(InitMethod):
        raise ValueError(f"method must be one of {get_args(InitMethod)}, got {method!r}")
    seed = check_count("seed", seed)
    check_kind("config", config, Config)
    ops = operations(weight=weight)
    xp = ops.xp
    check_config(weight, config)
    weight = ops.detached(weight)
    dtype = compute_dtype(weight, xp=xp)
    device = array_api_compat.device(weight)
    *stack, out, inner = weight.shape
    shape = (*stack, config.rank, inner)
    # The standard has no random numbers: draw on the host, so every backend starts equal.
    rng = np.random.default_rng(seed)
    if method == "kaiming":
        drawn = rng.uniform(-1, 1, shape) / math.sqrt(inner)
    else:
        drawn = rng.standard_normal(shape) / math.sqrt(config.rank)
    return Adapter(
        lora_a=as_dtype(xp.asarray(drawn, device=device), dtype, xp=xp),
        lora_b=xp.zeros((*stack, out, config.rank), dtype=dtype, device=device),
        magnitude=weight_norms(weight, ops.row_squares(weight, dtype), ops=ops),
    )


def forward(
    x: Array,
    weight: Array,
    adapter: Adapter,
    config: Config,
    *,
    bias: Array | None = None,
    prepared: Prepared | None = None,
    previous: Prepared | None = None,
    dropout_mask: Array | None = None,
    reduce: Reduce | None = None,
) -> tuple[Array, Cache]:
    """Return y = g⊙(x Vᵀ) + bias, and what the backward needs.

    ::

        L = x Aᵀ                   (tokens, rank)
        z = ρ⊙(x Wᵀ) + s L Bᵀ      (tokens, out)
        y = g⊙z + bias             the bias is never scaled

    With a dropout mask, x~ = mask⊙x, and by `config.dropout`::

        "input":     y = g⊙(x~ Vᵀ) + (x − x~) Wᵀ + bias
        "low_rank":  z = ρ⊙(x Wᵀ) + s (x~ Aᵀ) Bᵀ,   y = g⊙z + bias

    "input" is PEFT's: the base has the whole x, what the adapter adds to it has x~. It costs a
    second product with W, (tokens, out) in the forward and (tokens, in) in the backward, each with
    a temporary of that shape. "low_rank" costs one more product of rank columns in the backward.
    Of a fresh adapter "low_rank" gives what no mask gives, bit for bit; "input" does to rounding.

    Parameters
    ----------
    x : array, shape (*stack, ..., in)
        Computed with in the compute dtype, that of weight and adapter: a float64 x does not widen
        a float32 layer.
    weight : array, shape (*stack, out, in)
    adapter : Adapter
    config : Config
    bias : array, shape (*stack, out), optional
    prepared : Prepared, optional
        From `doraxp.prepare` with this weight, adapter and config: saves the norm.
    previous : Prepared, optional
        An earlier one of the same `weight` object, where there is no `prepared`: its ‖w‖² is used
        again, and W Aᵀ is made in one product with x Wᵀ. `cache.prepared` is the new one.
    dropout_mask : array, shape of x, optional
        0 where a number is dropped, 1/(1 − p) where it is kept: drawn and scaled by the caller.
        The norm knows nothing of it, and it has no gradient.
    reduce : callable, optional
        Array -> its sum over the ranks, where the input axis of x, W and A is split among ranks;
        see the docs page "Many processes". Remembered by `prepared`, `previous` and the cache.

    Returns
    -------
    y : array, shape (*stack, ..., out), in x's dtype
    cache : Cache
        For `doraxp.backward`. It holds x and the mask themselves: do not write to them before.

    Raises
    ------
    TypeError
        The arrays are not of one library, or a dtype is not floating.
    ValueError
        The shapes do not fit, the devices differ, `prepared` or `previous` belongs to something
        else or is of another `reduce`, or `reduce` does not return what it must.

    References
    ----------
    arXiv:2402.09353, equation 5. Dropout: PEFT 0.21.2, ``lora/variants.py`` and ``lora/dora.py``;
    mlx-lm, ``tuner/dora.py``.

    Examples
    --------
    >>> weight, config = np.array([[3.0, 4.0], [0.0, 5.0]]), Config(rank=1)
    >>> y, cache = forward(np.array([1.0, 2.0]), weight, init(weight, config, seed=0), config)
    >>> y
    array([11., 10.])
    """
    masks = {} if dropout_mask is None else {"dropout_mask": dropout_mask}
    ops = check_layer(weight, adapter, config, x=x, bias=bias, **masks)
    xp = ops.xp
    check_input(weight, x)
    check_mask(x, dropout_mask)
    check_bias(weight, bias)
    remembered = check_previous(previous, weight, reduce)
    dtype = compute_dtype(weight, *adapter, xp=xp)
    tokens, dropped, seen = _parts(x, dropout_mask, weight, config, dtype, ops=ops)
    base = None  # seen Wᵀ
    if prepared is not None:
        check_prepared(prepared, weight, adapter, config, ops=ops)
        check_same_reduce("prepared", prepared, reduce)
    elif previous is not None and ops.may_look(x):  # else V is formed, and x Wᵀ of no use
        prepared, base = prepare_with_product(
            seen, weight, adapter, config, previous, remembered, ops=ops
        )
    else:
        prepared = prepare(weight, adapter, config, previous=previous, reduce=remembered)

    low_rank = ops.product(dropped, xp.matrix_transpose(prepared.factors.lora_a))  # L
    wide_bias = None if bias is None else as_dtype(bias, dtype, xp=xp)
    low_rank, z, y = outputs(seen, base, dropped, low_rank, prepared, wide_bias, ops=ops)
    if seen is not tokens:
        (rest,) = sums(prepared.reduce, ops.times_transposed(tokens - seen, weight, dtype), xp=xp)
        y += rest
    y = xp.reshape(as_dtype(y, x.dtype, xp=xp), (*x.shape[:-1], weight.shape[-2]))
    return y, Cache(x, bias, low_rank, z, prepared, dropout_mask)


def backward(dy: Array, cache: Cache, *, train_base: bool = False) -> Gradients:
    """Return the gradients of x, A, B, m, and with `train_base` of W and the bias.

    ::

        dz = g⊙dy
        e  = Σ_tokens dy⊙z         (out,)
        dm = e / n                 q = −m e / n³ = −g⊙dm / n, or 0 with a detached norm
        dx = dz V
        dB = s dzᵀ L       + s q⊙(V Aᵀ)
        dA = s (dz B)ᵀ x   + s (q⊙B)ᵀ V
        dbias = Σ_tokens dy

        weight form:     dW = dzᵀ x + q⊙V
        direction form:  D = ρ⊙W, dD = dzᵀ x + q⊙V, dW = ρ⊙(dD − D⊙rowsum(D⊙dD))

    The q terms are the gradient through the norm; the paper's section 4.3 and PEFT drop them.
    A row with n = 0 has no gradient.

    With a dropout mask, x~ = mask⊙x stands for x in dA, L and z, and::

        "input":     dx = mask⊙(dz V) + (1 − mask)⊙(dy W)
                     dW has x~ for x too, and at last + dyᵀ (x − x~)
        "low_rank":  dx = dz V + (mask − 1)⊙(s (dz B) A)

    Parameters
    ----------
    dy : array, shape and library of y
    cache : Cache
        From `doraxp.forward`.
    train_base : bool
        Also return the gradients of the weight and of the bias. Forms V.

    Returns
    -------
    Gradients

    Raises
    ------
    TypeError
        `dy` is of another library than the cache, or its dtype is not floating.
    ValueError
        `dy` does not have y's shape, or the adapter was written to since the forward.

    References
    ----------
    arXiv:2402.09353, equations 6 to 11. The exact terms are derived on the docs page "The math".

    Examples
    --------
    >>> weight, config = np.array([[3.0, 4.0], [0.0, 5.0]]), Config(rank=1)
    >>> y, cache = forward(np.eye(2), weight, init(weight, config, seed=0), config)
    >>> backward(np.ones((2, 2)), cache).x
    array([[3., 9.],
           [3., 9.]])
    """
    check_kind("cache", cache, Cache)
    check_flag("train_base", train_base)
    x, bias, low_rank, z, prepared, dropout_mask = cache
    weight, norm, gain = prepared.weight, prepared.norm, prepared.gain
    _, a, scaled_b, row_scale = prepared.factors
    ops = operations(dy=dy, x=x)
    xp = ops.xp
    check_output_gradient(dy, (*x.shape[:-1], weight.shape[-2]))
    check_prepared(prepared, weight, prepared.adapter, prepared.config, ops=ops)
    dtype = gain.dtype

    narrow = dtype if dropout_mask is not None else ops.operand_dtype(dy, weight, dtype)
    d = as_tokens(dy, weight, narrow, xp=xp)  # (*stack, tokens, out)
    tokens, dropped, seen = _parts(x, dropout_mask, weight, prepared.config, dtype, ops=ops)
    count = d.shape[-2]
    exact = prepared.config.norm_gradient == "exact"
    room, total = prepared.config.rank if exact else 0, train_base and bias is not None
    dz, e, dbias = ops.scale_and_sum(d, z, gain, room, total=total)
    if exact:  # The norm's part of dA is a product with V too: in one with dx it costs little.
        dm, p, rows = ops.norm_rows(dz, e, gain, norm, scaled_b)
        low = ops.low_rows(dz, rows, scaled_b)  # (tokens + rank, rank)
    else:
        dm, rows = ops.over_norm(e, norm), dz
        low = ops.product(dz, scaled_b)  # (tokens, rank)
    dlow = low[..., :count, :]
    da = ops.product(xp.matrix_transpose(dlow), dropped)  # (rank, in)
    db = ops.product(xp.matrix_transpose(dz), low_rank)  # (out, rank)
    dweight = ops.product(xp.matrix_transpose(dz), seen) if train_base else None  # (out, in)
    apart = dropout_mask is not None and seen is tokens  # the mask is on s (dz B) A alone
    update = ops.product(dlow, a) if apart else None

    rounded = count if x.dtype == weight.dtype else 0
    product = times(rows, low, prepared, rounded, ops=ops)  # writes to dz and to low
    dx = product[..., :count, :]
    if exact:
        da += product[..., count:, :]
        db = ops.turning(db, p, prepared.unit_projection, prepared.config.scaling)
        if dweight is not None:
            dweight -= p[..., None] * ops.over_norm(ops.form(prepared.factors, dtype), norm)
    else:
        db *= prepared.config.scaling

    if train_base:
        if row_scale is not None:
            unit = row_scale[..., None] * as_dtype(weight, dtype, xp=xp)  # D
            (along,) = sums(prepared.reduce, xp.sum(unit * dweight, axis=-1), xp=xp)
            dweight = row_scale[..., None] * (dweight - along[..., None] * unit)
        if seen is not tokens:
            dweight += ops.product(xp.matrix_transpose(d), tokens - seen)
    if dropout_mask is not None:
        mask = as_tokens(dropout_mask, weight, dtype, xp=xp)
        if update is None:
            dx = mask * dx + (1 - mask) * ops.times(d, weight, dtype)
        else:
            dx = dx + (mask - 1) * update
    dx = xp.reshape(ops.cast(dx, x.dtype), x.shape)
    return Gradients(dx, Adapter(da, db, dm), dweight, dbias)


def merge(
    weight: Array, adapter: Adapter, config: Config, *, prepared: Prepared | None = None
) -> Array:
    """Return W' = (m / n)⊙V, the plain weight that acts as the adapted layer does.

    Parameters
    ----------
    weight : array, shape (*stack, out, in)
    adapter : Adapter
    config : Config
    prepared : Prepared, optional
        From `doraxp.prepare` with this weight, adapter and config: saves the norm.

    Returns
    -------
    array, shape (*stack, out, in), in weight's dtype

    Raises
    ------
    TypeError
        The arrays are not of one library, or a dtype is not floating.
    ValueError
        The shapes do not fit, the devices differ, or `prepared` belongs to something else.

    References
    ----------
    arXiv:2402.09353, equation 5.

    Examples
    --------
    >>> weight, config = np.array([[3.0, 4.0], [0.0, 5.0]]), Config(rank=1)
    >>> adapter = init(weight, config, seed=0)
    >>> merge(weight, adapter._replace(magnitude=2 * adapter.magnitude), config)
    array([[ 6.,  8.],
           [ 0., 10.]])
    """
    ops = check_layer(weight, adapter, config)
    dtype = compute_dtype(weight, *adapter, xp=ops.xp)
    if prepared is not None:
        check_prepared(prepared, weight, adapter, config, ops=ops)
    elif not (ops.merges_in_one_pass or ops.measures_direction(dtype, config.rank)):
        prepared = prepare(weight, adapter, config)
    if prepared is not None:
        return ops.merge(prepared.factors, prepared.gain, prepared.gain.dtype)
    a, b, m = (as_dtype(leaf, dtype, xp=ops.xp) for leaf in adapter)
    row_scale = None
    if config.form == "direction":
        row_scale = inverse_norms(weight, ops.row_squares(weight, dtype), ops=ops)
    factors = Factors(weight, a, config.scaling * b, row_scale)
    if not ops.merges_in_one_pass:
        norm = ops.norms(ops.direction_squares(factors, dtype), factors)
        return ops.merge(factors, ops.over_norm(m, norm), dtype)

    def gain_of(rows: slice, v: Array) -> Array:
        norm = weight_norms(v, ops.row_squares(v, dtype), ops=ops)
        return ops.over_norm(m[..., rows], norm)

    return ops.merge_with(factors, gain_of, dtype)


def convert_form(
    weight: Array, adapter: Adapter, config: Config, form: Form
) -> tuple[Adapter, Config]:
    """Return the adapter and config that give the same W' in another form.

    ::

        weight form:     V = W + s B A
        direction form:  V = W/‖W‖ + s B' A     with B = ‖wᵢ‖⊙B' by rows

    Exact: both V have the same direction. A row of zeros, or one so short that 1/‖wᵢ‖ overflows,
    has no length to divide by; there V = s B A in both forms, and B stays.

    Parameters
    ----------
    weight : array, shape (*stack, out, in)
    adapter : Adapter
        In the form that `config` names.
    config : Config
    form : {"weight", "direction"}

    Returns
    -------
    adapter : Adapter
        With another B; A and m are the same arrays.
    config : Config
        With `form`.

    Raises
    ------
    TypeError
        The arrays are not of one library, or a dtype is not floating.
    ValueError
        The shapes do not fit, the devices differ, or `form` is unknown.

    Examples
    --------
    >>> weight, config = np.array([[3.0, 4.0], [0.0, 5.0]]), Config(rank=1)
    >>> adapter = init(weight, config, seed=0)._replace(lora_b=np.ones((2, 1)))
    >>> adapter, config = convert_form(weight, adapter, config, "direction")
    >>> config.form, adapter.lora_b
    ('direction', array([[0.2],
           [0.2]]))
    """
    ops = check_layer(weight, adapter, config)
    target = replace(config, form=form)
    if form == config.form:
        return adapter, config
    xp = ops.xp
    dtype = compute_dtype(weight, *adapter, xp=xp)
    row_scale = inverse_norms(weight, ops.row_squares(weight, dtype), ops=ops)[..., None]
    row_scale = xp.where(row_scale > 0, row_scale, 1.0)
    b = as_dtype(adapter.lora_b, dtype, xp=xp)
    return adapter._replace(lora_b=b / row_scale if form == "weight" else b * row_scale), target


def as_tokens(x: Array, weight: Array, dtype: Any, *, xp: Any) -> Array:
    """Return x (*stack, ..., k) with one axis of tokens, in `dtype`."""
    x = as_dtype(x, dtype, xp=xp)
    if x.ndim == weight.ndim:
        return x
    stack = x.shape[: weight.ndim - 2]
    count = math.prod(x.shape[weight.ndim - 2 : -1])
    return xp.reshape(x, (*stack, count, x.shape[-1]))


def _parts(
    x: Array, mask: Array | None, weight: Array, config: Config, dtype: Any, *, ops: Operations
) -> tuple[Array, Array, Array]:
    """Return x, x~ = mask⊙x, and the one of them that ρ⊙W in V sees: (*stack, tokens, in).

    Without a mask all three are one array.
    """
    xp = ops.xp
    if mask is None:
        tokens = as_tokens(x, weight, ops.operand_dtype(x, weight, dtype), xp=xp)
        return tokens, tokens, tokens
    tokens = as_tokens(x, weight, dtype, xp=xp)
    dropped = as_tokens(mask, weight, dtype, xp=xp) * tokens
    return tokens, dropped, dropped if config.dropout == "input" else tokens
