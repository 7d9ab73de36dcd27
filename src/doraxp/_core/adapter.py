"""Functions of an adapter that need no input x: `init`, `merge` and `convert_form`.

W (out, in) frozen   A (rank, in)   B (out, rank)   m (out,)   ρ = 1 or 1/‖wᵢ‖ by rows
V = ρ⊙W + s B A      n = ‖V‖ by rows                W' = (m / n)⊙V
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, TypeAlias, cast, get_args

import numpy as np

from doraxp._base.scalars import check_count, check_kind
from doraxp._base.types import Adapter, Array, Config, Form, RowWeight
from doraxp._core.checks import check_layer, check_rank
from doraxp._core.decomposition import inverse_norms
from doraxp._core.kinds import LayerKind
from doraxp._core.prepared import Prepared, check_prepared, factor, matrix_of
from doraxp._core.updates import LowRank as LowRank  # for the doctest of `merge`
from doraxp._core.updates import UpdateAdapter, merge_update
from doraxp.backends import as_dtype, compute_dtype, operations

InitMethod: TypeAlias = Literal["kaiming", "gaussian"]


def init(
    weight: Array | RowWeight,
    config: Config,
    *,
    seed: int,
    method: InitMethod = "kaiming",
    kind: LayerKind | None = None,
) -> Adapter:
    """Return a fresh adapter: A random, B = 0, m = ‖wᵢ‖, so that W' = W.

    In the weight form, W' = W holds bit for bit.

    Parameters
    ----------
    weight : array, shape (*stack, out, in), or RowWeight, shape (out, in)
        Or as a layer of `kind` stores it.
    config : Config
    seed : int
        NumPy draws the numbers on the host, so every backend gets the same numbers.
    method : {"kaiming", "gaussian"}
        How A is drawn: uniform in ±1/√in, as PEFT's kaiming_uniform_(a=√5) does, or normal with
        variance 1/rank.
    kind : LayerKind, optional
        A, B and m are for `kind.matrix(weight)`. None takes the weight for the matrix.

    Returns
    -------
    Adapter
        In the compute dtype: float64 for a float64 weight, else float32.

    Raises
    ------
    TypeError
        `weight` is not an array of a floating dtype.
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
    given = cast(Array, weight)
    ops = operations(weight=given)
    _, given = matrix_of(given, kind)
    xp = ops.xp
    check_rank(given, config)
    stored = ops.detached(given)
    dtype = compute_dtype(stored, xp=xp)
    where = ops.device(stored)
    *stack, out, inner = stored.shape
    shape = (*stack, config.rank, inner)
    # The standard has no random numbers: draw on the host, so every backend starts equal.
    rng = np.random.default_rng(seed)
    if method == "kaiming":
        drawn = rng.uniform(-1, 1, shape) / math.sqrt(inner)
    else:
        drawn = rng.standard_normal(shape) / math.sqrt(config.rank)
    return Adapter(
        lora_a=as_dtype(xp.asarray(drawn, device=where), dtype, xp=xp),
        lora_b=xp.zeros((*stack, out, config.rank), dtype=dtype, device=where),
        magnitude=ops.row_norms(stored, ops.row_squares(stored, dtype)),
    )


def merge(
    weight: Array | RowWeight,
    adapter: Adapter | UpdateAdapter,
    config: Config,
    *,
    kind: LayerKind | None = None,
    prepared: Prepared | None = None,
) -> Array:
    """Return W' = (m / n)⊙V, the plain weight that acts as the adapted layer does.

    ::

        V = ρ⊙W + s ΔW        ΔW = B A of an Adapter, or any update of an UpdateAdapter
        W' = V                without a magnitude: plain LoRA, LoHa or LoKr

    Parameters
    ----------
    weight : array, shape (*stack, out, in), or RowWeight, shape (out, in)
        Or as a layer of `kind` stores it. A RowWeight is of the kind "linear"; it does not change,
        and W' is an array.
    adapter : Adapter or UpdateAdapter
    config : Config
        Of an UpdateAdapter only `scaling` and `form` count.
    kind : LayerKind, optional
        The rows of n and m are those of `kind.matrix(weight)`: over the outputs, or with "columns"
        over the inputs. None takes the weight for the matrix.
    prepared : Prepared, optional
        From `doraxp.prepare` with this weight, adapter and config. It saves computing the norm.

    Returns
    -------
    array, in weight's shape and dtype

    Raises
    ------
    TypeError
        The arrays are not of one library, or a dtype is not floating.
    ValueError
        The shapes do not fit, the devices differ, or `prepared` belongs to other arguments; or an
        adapter of the direction form has no magnitude.

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
    >>> merge(weight, UpdateAdapter(LowRank(np.ones((1, 2)), np.ones((2, 1)))), config)
    array([[4., 5.],
           [1., 6.]])
    """
    weight = cast(Array, weight)
    if isinstance(adapter, UpdateAdapter):
        return merge_update(weight, adapter, config, kind or LayerKind())
    other, matrix = matrix_of(weight, kind)
    ops, dtype = check_layer(matrix, adapter, config)
    if prepared is not None:
        check_prepared(prepared, weight, adapter, config, other, ops=ops)
        merged = ops.merge(prepared.direction, prepared.gain)
    else:
        leaves = Adapter(*(as_dtype(leaf, dtype, xp=ops.xp) for leaf in adapter))
        merged = ops.merge_and_measure(factor(matrix, leaves, config, ops=ops), leaves.magnitude)
    return merged if other is None else other.restore(merged, tuple(weight.shape))


def convert_form(
    weight: Array,
    adapter: Adapter,
    config: Config,
    form: Form,
    *,
    kind: LayerKind | None = None,
) -> tuple[Adapter, Config]:
    """Return the adapter and config that give the same W' in another form.

    ::

        weight form:     V = W + s B A
        direction form:  V = W/‖W‖ + s B' A     with B = ‖wᵢ‖⊙B' by rows

    The conversion is exact: the rows of both V have the same directions. A row of zeros, or one so
    short that 1/‖wᵢ‖ overflows, cannot be divided by its length. There V = s B A in both forms, and
    B does not change.

    Parameters
    ----------
    weight : array, shape (*stack, out, in)
    adapter : Adapter
        In the form that `config` names.
    config : Config
    form : {"weight", "direction"}
    kind : LayerKind, optional
        The rows are those of `kind.matrix(weight)`. None takes the weight for the matrix.

    Returns
    -------
    adapter : Adapter
        With another B; A and m are the same arrays.
    config : Config
        The same numbers and choices, with the new `form`.

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
    _, weight = matrix_of(weight, kind)
    ops, dtype = check_layer(weight, adapter, config)
    target = replace(config, form=form)
    if form == config.form:
        return adapter, config
    xp = ops.xp
    row_scale = inverse_norms(weight, ops.row_squares(weight, dtype), ops=ops)[..., None]
    row_scale = xp.where(row_scale > 0, row_scale, 1.0)
    b = as_dtype(adapter.lora_b, dtype, xp=xp)
    return adapter._replace(lora_b=b / row_scale if form == "weight" else b * row_scale), target
