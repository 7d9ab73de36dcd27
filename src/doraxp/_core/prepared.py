"""The adapted direction V: its norm, and products with it, without forming it.

W  (out, in)   frozen        A (rank, in)    B (out, rank)     ρ (out,), 1 in the weight form
V = ρ⊙W + s B A              n = ‖V‖ by rows, (out,)           g = m / n, 0 where n = 0
"""

from __future__ import annotations

from typing import Any, NamedTuple

from doraxp._base.ranks import check_reduce, sums
from doraxp._base.scalars import check_kind
from doraxp._base.types import Adapter, Array, Config, Reduce
from doraxp._core.checks import check_layer
from doraxp._core.decomposition import inverse_norms
from doraxp.backends import Factors, Operations, as_dtype, compute_dtype

# The expanded n² is trusted down to this part of the terms that it is the sum of. Below, their
# rounding errors show: at a half they are 3 ulp of n, at a hundredth 500. Rows get there only
# when B A points against W and is of its size.
CANCELLATION = 0.5


class Prepared(NamedTuple):
    """What `prepare` makes once per change of the adapter. Read it, do not build it."""

    weight: Array
    """W, the array that `prepare` was given."""
    adapter: Adapter
    """A, B and m, the arrays that `prepare` was given."""
    config: Config
    """The one that `prepare` was given."""
    norm: Array
    """n = ‖V‖ by rows, shape (*stack, out), in the compute dtype."""
    gain: Array
    """g = m / n, and 0 where n = 0, shape (*stack, out)."""
    unit_projection: Array
    """V Aᵀ / n, and 0 where n = 0, shape (*stack, out, rank)."""
    weight_squares: Array
    """‖w‖² by rows, shape (*stack, out)."""
    factors: Factors
    """W, A, s B and ρ, for products with V."""
    formed: Any
    """Rows of V that the factored formulas cannot serve; None where there are none."""
    snapshot: Adapter | None
    """The adapter's values, to notice a later write to its arrays."""
    reduce: Reduce | None = None
    """The one that `prepare` was given."""


def prepare(
    weight: Array,
    adapter: Adapter,
    config: Config,
    *,
    previous: Prepared | None = None,
    reduce: Reduce | None = None,
) -> Prepared:
    """Return n, g and V Aᵀ, which every forward and backward needs until the adapter changes.

    ::

        U  = ρ⊙(W Aᵀ)              (out, rank)
        G  = A Aᵀ                  (rank, rank)
        n² = ρ²⊙‖w‖² + 2s·rowsum(B⊙U) + s²·rowsum((B G)⊙B)

    Rows where this cancels, overflows or underflows are measured on V itself.

    Parameters
    ----------
    weight : array, shape (*stack, out, in)
    adapter : Adapter
    config : Config
    previous : Prepared, optional
        An earlier one of the same `weight` object: its ‖w‖² is used again.
    reduce : callable, optional
        Array -> its sum over the ranks, where the input axis is split among ranks; see the docs
        page "Many processes". Remembered.

    Returns
    -------
    Prepared
        For `doraxp.forward` and `doraxp.merge`, which refuse it with any other adapter. It is of
        the weight's values as they were: do not write to the weight.

    Raises
    ------
    TypeError
        The arrays are not of one library, or a dtype is not floating.
    ValueError
        The shapes do not fit, the devices differ, or `previous` is of another weight or another
        `reduce`.

    References
    ----------
    arXiv:2402.09353, equation 5; the expansion is this project's.

    Examples
    --------
    >>> import numpy as np
    >>> import doraxp
    >>> weight, config = np.eye(3), doraxp.Config(rank=1)
    >>> adapter = doraxp.init(weight, config, seed=0)
    >>> doraxp.prepare(weight, adapter, config).norm
    array([1., 1., 1.])
    """
    ops = check_layer(weight, adapter, config)
    reduce = check_previous(previous, weight, reduce)
    dtype = compute_dtype(weight, *adapter, xp=ops.xp)
    a = as_dtype(adapter.lora_a, dtype, xp=ops.xp)
    u = ops.project(weight, a, dtype)
    return _prepare(weight, adapter, config, previous, reduce, u, ops=ops)


def prepare_with_product(
    x: Array,
    weight: Array,
    adapter: Adapter,
    config: Config,
    previous: Prepared,
    reduce: Reduce | None,
    *,
    ops: Operations,
) -> tuple[Prepared, Array]:
    """Return what `prepare` does and x Wᵀ, with x (*stack, tokens, in) in the compute dtype.

    W Aᵀ comes out of the same product: beside many tokens, rank more cost little.
    """
    xp = ops.xp
    count = x.shape[-2]
    rows = xp.concat([x, as_dtype(adapter.lora_a, x.dtype, xp=xp)], axis=-2)
    product = ops.times_transposed(rows, weight, x.dtype)  # (tokens + rank, out)
    u = xp.matrix_transpose(product[..., count:, :])
    prepared = _prepare(weight, adapter, config, previous, reduce, u, ops=ops)
    return prepared, product[..., :count, :]


def _prepare(
    weight: Array, adapter: Adapter, config: Config, previous: Prepared | None,
    reduce: Reduce | None, u: Array, *, ops: Operations,
) -> Prepared:  # fmt: skip
    """Return what `prepare` does, given W Aᵀ (out, rank) in the compute dtype."""
    xp, dtype = ops.xp, u.dtype
    a, b, m = (as_dtype(leaf, dtype, xp=xp) for leaf in adapter)
    b = config.scaling * b  # s B: the update is never wanted without s

    gram = ops.product(a, xp.matrix_transpose(a))  # G, (rank, rank)
    squares = previous.weight_squares if previous is not None else None
    if squares is None or squares.dtype != dtype:
        squares = ops.row_squares(weight, dtype)
        u, gram, squares = sums(reduce, u, gram, squares, xp=xp)
    else:
        u, gram = sums(reduce, u, gram, xp=xp)
    row_scale = None
    if config.form == "direction":
        row_scale = inverse_norms(weight, squares, ops=ops, reduce=reduce)
    factors = Factors(weight, a, b, row_scale)
    norm, gain, unit_projection, formed = ops.adapted_norm(
        u, gram, squares, factors, m, CANCELLATION, reduce
    )
    return Prepared(
        weight,
        adapter,
        config,
        norm=norm,
        gain=gain,
        unit_projection=unit_projection,
        weight_squares=squares,
        factors=factors,
        formed=formed,
        snapshot=ops.snapshot(adapter),
        reduce=reduce,
    )


def outputs(
    x: Array, base: Array | None, dropped: Array, low_rank: Array, prepared: Prepared,
    bias: Array | None, *, ops: Operations,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Return L = x~ Aᵀ, z = ρ⊙(x Wᵀ) + L (s B)ᵀ and y = g⊙z + bias.

    (*stack, tokens, in) -> (*stack, tokens, rank) and twice (*stack, tokens, out). x~ = `dropped`
    is the same object as x where z = x Vᵀ; `base` is x Wᵀ where that is known. `low_rank` is L,
    or this rank's part of it: the sums of L and z over ranks are made in one.
    """
    weight, a, scaled_b, row_scale = prepared.factors
    gain, formed, reduce = prepared.gain, prepared.formed, prepared.reduce
    if reduce is None and (formed is None or dropped is x):
        factors = prepared.factors
        return low_rank, *ops.outputs(x, base, factors, low_rank, formed, gain, bias)
    transposed = ops.xp.matrix_transpose(a)
    update = (low_rank if dropped is x or formed is None else ops.product(x, transposed)), scaled_b

    def factored(_: Array) -> Array:
        product = ops.times_transposed(x, weight, x.dtype) if base is None else base
        return ops.scale_and_shift(product, row_scale, update, gain, None)[0]

    z = factored(x) if formed is None else ops.guarded_times_transposed(formed, x, factored)
    if formed is not None and dropped is not x:  # z = x Vᵀ + ((x~ − x) Aᵀ) (s B)ᵀ
        z = ops.accumulate(
            z, ops.product(dropped - x, transposed), ops.xp.matrix_transpose(scaled_b)
        )
    z, low_rank = sums(reduce, z, low_rank, xp=ops.xp)
    return low_rank, *ops.scale_and_shift(z, None, None, gain, bias)


def times(d: Array, low: Array, prepared: Prepared, rounded: int, *, ops: Operations) -> Array:
    """Return d V = (ρ⊙d) W + (d s B) A: (tokens, out) -> (tokens, in).

    `low` (tokens, rank) is d s B; both may be written to. The first `rounded` rows of the result
    will be rounded to the dtype of W.
    """
    weight, a, scaled_b, row_scale = prepared.factors

    def factored(d: Array, low: Array) -> Array:
        scaled = d if row_scale is None else row_scale[..., None, :] * d
        return ops.accumulate(ops.times(scaled, weight, d.dtype), low, a)

    if prepared.formed is None:
        return factored(d, low)
    # What the guard keeps out of d is not in d s B either.
    return ops.guarded_times(
        prepared.formed, d, low, lambda rest: factored(rest, ops.product(rest, scaled_b)), rounded
    )


def check_previous(
    previous: Prepared | None, weight: Array, reduce: Reduce | None
) -> Reduce | None:
    """Refuse to take ‖w‖² from another weight; return the `reduce` that holds."""
    if previous is not None:
        check_kind("previous", previous, Prepared)
        if previous.weight is not weight:
            raise ValueError("previous must be of the same weight object, but is of another")
        check_same_reduce("previous", previous, reduce)
        return previous.reduce
    check_reduce(reduce)
    return reduce


def check_same_reduce(name: str, known: Prepared, reduce: Reduce | None) -> None:
    """Refuse sums over other ranks; None is what `known` was given."""
    check_reduce(reduce)
    # Not by identity: each look at a bound method makes another object.
    if reduce is not None and reduce != known.reduce:
        raise ValueError(
            f"{name} must be of the same reduce, but was given {known.reduce}, not {reduce}"
        )


def check_prepared(
    prepared: Prepared, weight: Array, adapter: Adapter, config: Config, *, ops: Operations
) -> None:
    """Refuse a prepared norm that does not belong to these arguments any more."""
    check_kind("prepared", prepared, Prepared)
    if prepared.weight is not weight:
        changed = "the weight is another object"
    elif prepared.config != config:
        changed = f"the config was {prepared.config}, is {config}"
    elif not ops.unchanged(prepared.snapshot, prepared.adapter, adapter):
        changed = "the adapter has changed"
    else:
        return
    raise ValueError(
        f"prepared must belong to this weight, adapter and config, but {changed}: "
        "call prepare again"
    )
