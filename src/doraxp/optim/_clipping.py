"""Clipping of gradients by their global norm.

g  all gradients, as one vector        norm = ‖g‖
"""

from __future__ import annotations

from doraxp._base.scalars import check_number
from doraxp._base.types import Array, DType, Namespace
from doraxp.backends import as_dtype, compute_dtype
from doraxp.optim._trees import Params, align


def clip_by_global_norm(grads: Params, max_norm: float) -> tuple[Params, Array]:
    """Return the gradients times min(1, max_norm / norm), and the norm before clipping.

    ::

        norm = √(Σ g²)      over all leaves together

    Gradients whose norm is at most `max_norm` are returned unchanged. torch's `clip_grad_norm_`
    adds an ε to the norm; this function does not. Where a gradient is not finite, all gradients
    are returned unchanged and the norm is NaN. Where all are finite and the norm is above the
    largest number of its dtype, they are clipped and the norm is infinite.

    Parameters
    ----------
    grads : tree of arrays
    max_norm : float
        Above 0.

    Returns
    -------
    grads : the structure and dtypes of `grads`
    norm : array, shape (), in the compute dtype
        It is not read on the host.

    Raises
    ------
    TypeError
        The arrays are of two libraries, a dtype is not floating, or `max_norm` is not a number.
    ValueError
        The devices differ, or `max_norm` is not above 0.

    References
    ----------
    arXiv:1211.5063, algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> from doraxp import Adapter
    >>> grads = Adapter(np.array([[0.0, 2.0]]), np.array([[4.0]]), np.array([4.0]))
    >>> clipped, norm = clip_by_global_norm(grads, max_norm=3.0)
    >>> float(norm), clipped.lora_a
    (6.0, array([[0., 1.]]))
    """
    max_norm = check_number("max_norm", max_norm, positive=True)
    aligned = align(grads=grads)
    xp, (leaves,) = aligned.ops.xp, aligned.columns
    dtype = compute_dtype(*leaves, xp=xp)
    wide = [as_dtype(leaf, dtype, xp=xp) for leaf in leaves]
    flat = xp.concat([xp.reshape(leaf, (-1,)) for leaf in wide])
    norm, shrink, shrunk_norm = _norm(flat, dtype, xp=xp)
    over = norm > max_norm
    factor = xp.where(over, max_norm / xp.where(over, shrunk_norm, 1.0), 1.0)
    shrink = xp.where(over, shrink, 1.0)
    pairs = zip(leaves, wide, strict=True)
    clipped = [as_dtype(factor * (shrink * each), leaf.dtype, xp=xp) for leaf, each in pairs]
    return aligned.build("grads", clipped), norm


def _norm(g: Array, dtype: DType, *, xp: Namespace) -> tuple[Array, Array, Array]:
    """Return ‖g‖, a power of two c ≤ 1, and ‖c g‖, which does not overflow where g is finite.

    c is 1 unless g has very large numbers. ‖g‖ is infinite if it overflows, and NaN if g is not
    finite.
    """
    largest = float(xp.finfo(dtype).max)
    peak = xp.max(xp.abs(g))
    # Under loss scaling the squares of gradients overflow long before the norm does. The scale is
    # finite, because infinity over infinity warns; and an eighth of the largest number at most,
    # because XLA multiplies by 1 / scale, which must not underflow.
    scale = xp.where(peak < largest / 8, peak, largest / 8)
    scale = xp.where(scale > 0, scale, 1.0)
    unit = g / scale
    shrink = xp.where(scale > 2.0**64, 2.0**-64, xp.ones_like(scale))
    shrunk = (shrink * scale) * xp.sqrt(xp.sum(unit * unit))
    fits = shrunk <= shrink * largest
    norm = xp.where(fits, xp.where(fits, shrunk, 0.0) / shrink, float("inf"))
    return xp.where(peak < float("inf"), norm, float("nan")), shrink, shrunk  # NaN < ∞ is false
