"""Gradients of A and B in the metric of their product, for scaled SGD and scaled AdamW.

A (rank, in)   B (out, rank)   dA, dB  their gradients   δ  damping
"""

from __future__ import annotations

from doraxp._base.scalars import check_number
from doraxp._base.types import Array
from doraxp.backends import Operations, as_dtype, compute_dtype, transpose
from doraxp.optim._trees import Params, align


def scaled_gradients(params: Params, grads: Params, *, damping: float = 1e-6) -> Params:
    """Return (BᵀB + δI)⁻¹ dA and dB (AAᵀ + δI)⁻¹ for each pair of A and B.

    A pair is a leaf named `lora_a` and a leaf named `lora_b` in the same NamedTuple or dict. All
    other gradients are returned unchanged. With δ = 0, a step of plain SGD along these gradients
    changes B A by the same amount for all pairs (R⁻¹ A, B R) of one product. Give them to
    `adamw_step` for the scaled AdamW of the paper.

    δ is a number that is added, as in the paper's code, and not a part of BᵀB. A δ below the
    rounding error of BᵀB has no effect; δ is raised to that error there, which is about ε times
    the trace, where ε belongs to the compute dtype. Otherwise the matrix might be singular.

    Parameters
    ----------
    params, grads : tree of arrays
    damping : float
        δ, at least 0.

    Returns
    -------
    grads : the structure and dtypes of `grads`

    Raises
    ------
    TypeError
        The arrays are of two libraries, a dtype is not floating, or `damping` is not a number.
    ValueError
        Structures, shapes or devices differ, A and B do not fit each other, or `damping` is
        negative.

    References
    ----------
    arXiv:2402.02347, equation 1 and algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> params = {"lora_a": np.array([[3.0, 4.0]]), "lora_b": np.array([[2.0], [0.0]])}
    >>> scaled_gradients(params, params, damping=0)
    {'lora_a': array([[0.75, 1.  ]]), 'lora_b': array([[0.08],
           [0.  ]])}
    """
    damping = check_number("damping", damping)
    aligned = align(params=params, grads=grads)
    leaves, column = aligned.columns
    scaled = list(column)
    for pair in aligned.names.pairs:
        a, b = (leaves[place] for place in pair)
        _check_fit(*(f"params{aligned.names.paths[place]}" for place in pair), a=a, b=b)
        of_a, of_b = (column[place] for place in pair)
        dtype = compute_dtype(a, b, of_a, of_b, xp=aligned.ops.xp)
        a, b, da, db = (as_dtype(each, dtype, xp=aligned.ops.xp) for each in (a, b, of_a, of_b))
        da = _over_gram(transpose(b), da, damping, ops=aligned.ops)
        db = transpose(_over_gram(a, transpose(db), damping, ops=aligned.ops))
        for place, given, new in zip(pair, (of_a, of_b), (da, db), strict=True):
            scaled[place] = as_dtype(new, given.dtype, xp=aligned.ops.xp)
    return aligned.build("grads", scaled)  # type: ignore[no-any-return]


def _check_fit(name_a: str, name_b: str, *, a: Array, b: Array) -> None:
    """Raise ValueError unless B A is a product."""
    of_a, of_b = tuple(a.shape), tuple(b.shape)
    if min(len(of_a), len(of_b)) < 2 or (*of_b[:-2], of_b[-1]) != of_a[:-1]:
        raise ValueError(
            f"{name_b} must have shape (*stack, out, rank) and {name_a} (*stack, rank, in), got "
            f"{of_b} and {of_a}"
        )


def _over_gram(rows: Array, right: Array, damping: float, *, ops: Operations) -> Array:
    """Return (R Rᵀ + δI)⁻¹ right, for rows R (*stack, rank, k) and right (*stack, rank, j)."""
    xp, info = ops.xp, ops.xp.finfo(rows.dtype)
    gram = ops.product(rows, transpose(rows))  # (*stack, rank, rank)
    trace = xp.sum(rows * rows, axis=(-2, -1), keepdims=True)
    least = float(info.eps) * trace + float(info.smallest_normal)
    shift = xp.where(least > damping, least, damping)
    one = xp.eye(gram.shape[-1], dtype=gram.dtype, device=ops.device(gram))
    return ops.solve(gram + shift * one, right)
