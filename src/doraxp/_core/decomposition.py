"""Magnitude and direction of a plain weight: its row norms, and how far the weight moved.

    W  (out, in)        m = ‖wᵢ‖, (out,)        W/m (out, in), rows of length 1

The paper's "column-wise" norm is for weights stored as (in, out). Here weights are stored as
(out, in), and it is one norm per row.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from doraxp._base.types import Array, DType, Reduce, RowWeight
from doraxp._core.checks import check_weight
from doraxp._core.kinds import LayerKind
from doraxp.backends import Operations, as_dtype, compute_dtype, operations


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


def decompose(weight: Array | RowWeight, *, kind: LayerKind | None = None) -> tuple[Array, Array]:
    """Return (m, W/m): the row norms m = ‖wᵢ‖ and the rows of length 1.

    Parameters
    ----------
    weight : array, shape (*stack, out, in), or RowWeight, shape (out, in)
        Or as a layer of `kind` stores it. A RowWeight is of the kind "linear".
    kind : LayerKind, optional
        The rows are those of `kind.matrix(weight)`. None takes the weight for the matrix.

    Returns
    -------
    magnitude : array, shape (*stack, out), in the compute dtype
    direction : array, in weight's shape, in the compute dtype
        A zero row has no direction: it stays zero.

    Raises
    ------
    TypeError
        `weight` is not an array of a floating dtype.
    ValueError
        `weight` has fewer than two axes, or an axis of length 0, or another shape than `kind` has.

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
    >>> decompose(np.array([[3.0, 5.0], [4.0, 0.0]]), kind=LayerKind("columns"))[0]
    array([5., 5.])
    """
    stored = cast(Array, weight)
    ops = operations(weight=stored)
    check_weight(stored)
    dtype = compute_dtype(stored, xp=ops.xp)
    if kind is None:
        return _decompose(stored, dtype, ops=ops)
    magnitude, unit = _decompose(kind.matrix(stored), dtype, ops=ops)
    return magnitude, kind.restore(unit, tuple(stored.shape))


def magnitude_direction_change(
    weight_before: Array | RowWeight, weight_after: Array | RowWeight
) -> MagnitudeDirectionChange:
    """Return ΔM = mean abs(‖w'ᵢ‖ − ‖wᵢ‖) and ΔD = mean (1 − cos(w'ᵢ, wᵢ)), over the rows.

    1 − cos is computed as ½‖ŵ' − ŵ‖², which keeps its digits where the change is small. A row
    that is zero in only one of the weights counts as orthogonal, ΔD = 1. A row that is zero in
    both counts as unchanged, ΔD = 0.

    Parameters
    ----------
    weight_before, weight_after : array, shape (*stack, out, in), or RowWeight, shape (out, in)
        The weights of one layer, or of a stack of layers. Each layer has its own means.

    Returns
    -------
    MagnitudeDirectionChange
        ΔM in units of the weight, ΔD in 0..2; for each layer and for each row.

    Raises
    ------
    TypeError
        The weights are not arrays of one library, or a dtype is not floating.
    ValueError
        The shapes differ or are not those of a weight, or the devices differ.

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
    before, after = cast(Array, weight_before), cast(Array, weight_after)
    ops = operations(weight_before=before, weight_after=after)
    xp = ops.xp
    check_weight(before, "weight_before")
    if tuple(before.shape) != tuple(after.shape):
        raise ValueError(
            f"weight_before and weight_after must have one shape, got "
            f"{tuple(before.shape)} and {tuple(after.shape)}"
        )
    dtype = compute_dtype(before, after, xp=xp)
    m_before, unit_before = _decompose(before, dtype, ops=ops)
    m_after, unit_after = _decompose(after, dtype, ops=ops)
    turn = unit_after - unit_before  # (*stack, out, in)
    direction = 0.5 * xp.sum(turn * turn, axis=-1)
    one_is_zero = (m_before == 0) != (m_after == 0)
    direction = xp.where(one_is_zero, 1.0, direction)
    magnitude = xp.abs(m_after - m_before)
    return MagnitudeDirectionChange(
        xp.mean(magnitude, axis=-1), xp.mean(direction, axis=-1), magnitude, direction
    )


def _decompose(weight: Array, dtype: DType, *, ops: Operations) -> tuple[Array, Array]:
    """Return ‖wᵢ‖ and W/‖wᵢ‖ in `dtype`, for a weight that was checked."""
    weight = ops.whole(weight)
    magnitude = ops.row_norms(weight, ops.row_squares(weight, dtype))
    return magnitude, ops.over_norm(as_dtype(weight, dtype, xp=ops.xp), magnitude)


def inverse_norms(
    weight: Array, squares: Array, *, ops: Operations, reduce: Reduce | None = None
) -> Array:
    """Return ρ = 1/‖wᵢ‖, and 0 for a row of zeros or one so short that 1/‖wᵢ‖ overflows."""
    xp = ops.xp
    norm = ops.row_norms(weight, squares, reduce)
    invertible = ~(norm <= 1 / float(xp.finfo(norm.dtype).max))  # a NaN stays NaN
    return xp.where(invertible, 1 / xp.where(invertible, norm, 1.0), 0.0)
