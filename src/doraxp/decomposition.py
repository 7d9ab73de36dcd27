"""Magnitude and direction: the row norms of an adapted weight, without forming it.

    W  (out, in)   frozen        A (rank, in)    B (out, rank)     ρ (out,), 1 in the weight form
    V = ρ⊙W + s B A              n = ‖V‖ by rows, (out,)           g = m / n, 0 where n = 0

The paper's "column-wise" norm is for weights stored (in, out). Stored (out, in), as here, it is
one norm per output row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from doraxp._checks import check_layer, check_weight
from doraxp._scalars import check_kind
from doraxp._types import Adapter, Array, Config
from doraxp.backends import Factors, Operations, as_dtype, compute_dtype, operations

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


class MagnitudeDirectionChange(NamedTuple):
    """How far a weight moved in magnitude and in direction."""

    magnitude: Array
    """ΔM = mean over rows of abs(‖w'ᵢ‖ − ‖wᵢ‖), shape (*stack,)."""
    direction: Array
    """ΔD = mean over rows of 1 − cos(w'ᵢ, wᵢ), shape (*stack,)."""
    magnitude_rows: Array
    """abs(‖w'ᵢ‖ − ‖wᵢ‖), shape (*stack, out)."""
    direction_rows: Array
    """1 − cos(w'ᵢ, wᵢ), shape (*stack, out)."""


def decompose(weight: Array) -> tuple[Array, Array]:
    """Return (m, W/m): the row norms m = ‖wᵢ‖ and the rows of length 1.

    Parameters
    ----------
    weight : array, shape (*stack, out, in)

    Returns
    -------
    magnitude : array, shape (*stack, out), in the compute dtype
    direction : array, shape (*stack, out, in), in the compute dtype
        A zero row has no direction: it stays zero.

    Raises
    ------
    TypeError
        `weight` is no array of a floating dtype.
    ValueError
        `weight` has fewer than two axes, or an empty one.

    References
    ----------
    arXiv:2402.09353, equation 2.

    Examples
    --------
    >>> import numpy as np
    >>> magnitude, direction = decompose(np.array([[3.0, 4.0], [0.0, 5.0]]))
    >>> magnitude
    array([5., 5.])
    >>> direction
    array([[0.6, 0.8],
           [0. , 1. ]])
    """
    ops = operations(weight=weight)
    check_weight(weight)
    dtype = compute_dtype(weight, xp=ops.xp)
    magnitude = weight_norms(weight, ops.row_squares(weight, dtype), ops=ops)
    return magnitude, ops.over_norm(as_dtype(weight, dtype, xp=ops.xp), magnitude)


def magnitude_direction_change(
    weight_before: Array, weight_after: Array
) -> MagnitudeDirectionChange:
    """Return ΔM = mean abs(‖w'ᵢ‖ − ‖wᵢ‖) and ΔD = mean (1 − cos(w'ᵢ, wᵢ)), over the rows.

    1 − cos is computed as ½‖ŵ' − ŵ‖², which keeps its digits where the change is small. A row
    that is zero on one side only counts as orthogonal, ΔD = 1; on both, as unchanged.

    Parameters
    ----------
    weight_before, weight_after : array, shape (*stack, out, in)
        Of one layer, or of a stack of layers; the means are taken for each layer.

    Returns
    -------
    MagnitudeDirectionChange
        ΔM in units of the weight, ΔD in 0..2; for each layer and for each row.

    Raises
    ------
    TypeError
        They are no arrays of one library, or a dtype is not floating.
    ValueError
        The shapes differ or are no weight's, or the devices differ.

    References
    ----------
    arXiv:2402.09353, section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> before = np.array([[3.0, 4.0], [0.0, 5.0]])
    >>> after = np.array([[6.0, 8.0], [2.0, 0.0]])  # a row doubled, a row turned
    >>> change = magnitude_direction_change(before, after)
    >>> change.magnitude_rows, change.direction_rows
    (array([5., 3.]), array([0., 1.]))
    """
    ops = operations(weight_before=weight_before, weight_after=weight_after)
    xp = ops.xp
    check_weight(weight_before, "weight_before")
    if tuple(weight_before.shape) != tuple(weight_after.shape):
        raise ValueError(
            f"weight_before and weight_after must have one shape, got "
            f"{tuple(weight_before.shape)} and {tuple(weight_after.shape)}"
        )
    dtype = compute_dtype(weight_before, weight_after, xp=xp)
    before, after = (as_dtype(w, dtype, xp=xp) for w in (weight_before, weight_after))
    m_before, unit_before = decompose(before)
    m_after, unit_after = decompose(after)
    turn = unit_after - unit_before  # (*stack, out, in)
    direction = 0.5 * xp.sum(turn * turn, axis=-1)
    one_is_zero = (m_before == 0) != (m_after == 0)
    direction = xp.where(one_is_zero, 1.0, direction)
    magnitude = xp.abs(m_after - m_before)
    return MagnitudeDirectionChange(
        xp.mean(magnitude, axis=-1), xp.mean(direction, axis=-1), magnitude, direction
    )


def prepare(
    weight: Array, adapter: Adapter, config: Config, *, previous: Prepared | None = None
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
        The shapes do not fit, the devices differ, or `previous` is of another weight.

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
    check_previous(previous, weight)
    dtype = compute_dtype(weight, *adapter, xp=ops.xp)
    a = as_dtype(adapter.lora_a, dtype, xp=ops.xp)
    return _prepare(weight, adapter, config, previous, ops.project(weight, a, dtype), ops=ops)


def prepare_with_product(
    x: Array,
    weight: Array,
    adapter: Adapter,
    config: Config,
    previous: Prepared,
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
    return _prepare(weight, adapter, config, previous, u, ops=ops), product[..., :count, :]


def check_previous(previous: Prepared | None, weight: Array) -> None:
    """Refuse to take ‖w‖² from another weight."""
    if previous is not None:
        check_kind("previous", previous, Prepared)
        if previous.weight is not weight:
            raise ValueError("previous must be of the same weight object, but is of another")


def _prepare(
    weight: Array, adapter: Adapter, config: Config, previous: Prepared | None, u: Array, *,
    ops: Operations,
) -> Prepared:  # fmt: skip
    """Return what `prepare` does, given W Aᵀ (out, rank) in the compute dtype."""
    xp, dtype = ops.xp, u.dtype
    a, b, m = (as_dtype(leaf, dtype, xp=xp) for leaf in adapter)
    b = config.scaling * b  # s B: the update is never wanted without s

    squares = previous.weight_squares if previous is not None else None
    if squares is None or squares.dtype != dtype:
        squares = ops.row_squares(weight, dtype)
    row_scale, base = None, squares
    if config.form == "direction":
        row_scale = inverse_norms(weight, squares, ops=ops)
        base = xp.astype(row_scale > 0, dtype)  # ρ²⊙‖w‖² is 1, and 0 for a row of zeros
        u = row_scale[..., None] * u
    gram = a @ xp.matrix_transpose(a)  # G, (rank, rank)
    bg = b @ gram  # (out, rank)
    update = xp.sum(bg * b, axis=-1)  # ‖s(BA)ᵢ‖²
    n2 = base + 2 * xp.sum(b * u, axis=-1) + update

    factors = Factors(weight, a, b, row_scale)
    norm = xp.sqrt(xp.maximum(n2, xp.zeros_like(n2)))
    norm, formed = ops.guard(_suspect(n2, base, update, a, b, ops=ops), norm, factors, dtype)

    projection = u + bg  # V Aᵀ, (out, rank)
    if formed is not None:
        factored = xp.matrix_transpose(projection)
        projection = xp.matrix_transpose(
            ops.guarded_times_transposed(formed, a, lambda _: factored)
        )
    return Prepared(
        weight,
        adapter,
        config,
        norm=norm,
        gain=ops.over_norm(m, norm),
        unit_projection=ops.over_norm(projection, norm),
        weight_squares=squares,
        factors=factors,
        formed=formed,
        snapshot=ops.snapshot(adapter),
    )


def _suspect(
    n2: Array, base: Array, update: Array, a: Array, b: Array, *, ops: Operations
) -> Array:
    """Say which n² = base + 2 (…) + update may have lost digits, with b = s B."""
    xp = ops.xp
    *_, rank, terms = a.shape
    # `update` cancels too, where A's rows are nearly dependent: compare with what it would be if
    # they were orthogonal and alike.
    mean_square = (xp.sum(a * a, axis=(-2, -1)) / rank)[..., None]
    b_squares = xp.sum(b * b, axis=-1)  # (out,)
    update = xp.maximum(update, b_squares * mean_square)
    trusted = (n2 > CANCELLATION * (base + update)) & _in_range(n2, terms, ops=ops)
    return ~(trusted & (_in_range(mean_square, terms, ops=ops) | (b_squares == 0)))


def outputs(
    x: Array, base: Array | None, low_rank: Array, prepared: Prepared, bias: Array | None, *,
    ops: Operations,
) -> tuple[Array, Array]:  # fmt: skip
    """Return z = x Vᵀ = ρ⊙(x Wᵀ) + L (s B)ᵀ with L = x Aᵀ, and y = g⊙z + bias.

    (*stack, tokens, in) -> twice (*stack, tokens, out). `base` is x Wᵀ where that is known.
    """
    weight, _, scaled_b, row_scale = prepared.factors
    gain, formed, update = prepared.gain, prepared.formed, (low_rank, scaled_b)

    def product() -> Array:
        return ops.times_transposed(x, weight, x.dtype) if base is None else base

    def factored(_: Array) -> Array:
        return ops.scale_and_shift(product(), row_scale, update, gain, None)[0]

    if formed is None:
        return ops.scale_and_shift(product(), row_scale, update, gain, bias)
    z = ops.guarded_times_transposed(formed, x, factored)
    return ops.scale_and_shift(z, None, None, gain, bias)


def times(d: Array, prepared: Prepared, *, ops: Operations) -> Array:
    """Return d V = (ρ⊙d) W + (d s B) A: (tokens, out) -> (tokens, in)."""
    weight, a, scaled_b, row_scale = prepared.factors

    def factored(d: Array) -> Array:
        scaled = d if row_scale is None else row_scale[..., None, :] * d
        return ops.accumulate(ops.times(scaled, weight, d.dtype), d @ scaled_b, a)

    if prepared.formed is None:
        return factored(d)
    return ops.guarded_times(prepared.formed, d, factored)


def weight_norms(weight: Array, squares: Array, *, ops: Operations) -> Array:
    """Return ‖wᵢ‖, given their squares in the compute dtype.

    The expressions are those of `prepare` with B = 0, so that m / n is exactly 1 there.
    """
    suspect = ~_in_range(squares, weight.shape[-1], ops=ops)
    plain = Factors(weight, None, None, None)
    norm, _ = ops.guard(suspect, ops.xp.sqrt(squares), plain, squares.dtype)
    return norm


def inverse_norms(weight: Array, squares: Array, *, ops: Operations) -> Array:
    """Return ρ = 1/‖wᵢ‖, and 0 for a row of zeros or so near to it that 1/‖wᵢ‖ overflows."""
    xp = ops.xp
    norm = weight_norms(weight, squares, ops=ops)
    invertible = ~(norm <= 1 / float(xp.finfo(norm.dtype).max))  # NaN too
    return xp.where(invertible, 1 / xp.where(invertible, norm, 1.0), 0.0)


def _in_range(squares: Array, terms: int, *, ops: Operations) -> Array:
    """Say which sums of `terms` squares lost nothing to overflow or underflow (NaN: no)."""
    info = ops.xp.finfo(squares.dtype)
    floor = terms * float(info.smallest_normal) / float(info.eps)
    return (squares > floor) & (squares < float("inf"))
