"""The norm n of an adapted weight, and all else that depends on W and the adapter but not on x.

W  (out, in)   frozen        A (rank, in)    B (out, rank)     ρ (out,), 1 in the weight form
V = ρ⊙W + s B A              n = ‖V‖ by rows, (out,)           g = m / n, 0 where n = 0
"""

from __future__ import annotations

from typing import NamedTuple, cast

from doraxp._base.pytrees import register_static
from doraxp._base.ranks import check_reduce, sums
from doraxp._base.scalars import check_kind
from doraxp._base.types import (
    Adapter,
    Array,
    Config,
    Consumed,
    DType,
    Reduce,
    RowWeight,
    Snapshot,
)
from doraxp._core.checks import check_layer
from doraxp._core.decomposition import inverse_norms
from doraxp._core.kinds import LayerKind
from doraxp.backends import Direction, Factors, Operations, as_dtype, is_by_rows, transpose


class Prepared(NamedTuple):
    """The results of `prepare`, for one state of the adapter. Read it, do not build it."""

    adapter: Adapter
    """A, B and m, the arrays that `prepare` was given."""
    config: Config
    """The config that `prepare` was given."""
    direction: Direction
    """V = ρ⊙W + s B A, for products with it. It holds W, A, s B and ρ."""
    norm: Array
    """n = ‖V‖ by rows, shape (*stack, out), in the compute dtype."""
    gain: Array
    """g = m / n, and 0 where n = 0, shape (*stack, out)."""
    unit_projection: Array
    """V Aᵀ / n, and 0 where n = 0, shape (*stack, out, rank)."""
    weight_squares: Array
    """‖w‖² by rows, shape (*stack, out). With `reduce` it is the sum over the ranks."""
    snapshot: Snapshot | None
    """A copy of the adapter's values, to notice a later write to its arrays.

    None where the host cannot read values.
    """
    reduce: Reduce | None = None
    """The sum over ranks that `prepare` was given."""
    kind: LayerKind | None = None
    """How the weight is stored, where that is not as its matrix."""
    stored: Array | None = None
    """The weight that `prepare` was given, where it is stored in another way than its matrix."""

    @property
    def weight(self) -> Array:
        """W, the object that `prepare` was given."""
        return self.matrix if self.stored is None else self.stored

    @property
    def matrix(self) -> Array:
        """W as the matrix that DoRA adapts, (*stack, out, in)."""
        return self.direction.factors.weight


def prepare(
    weight: Array | RowWeight,
    adapter: Adapter,
    config: Config,
    *,
    previous: Prepared | None = None,
    reduce: Reduce | None = None,
    kind: LayerKind | None = None,
) -> Prepared:
    """Return V, n, g and V Aᵀ / n: a forward and a backward need them until the adapter changes.

    ::

        U    = ρ⊙(W Aᵀ)                (out, rank)
        G    = A Aᵀ                    (rank, rank)
        n²   = ρ²⊙‖w‖² + 2s·rowsum(B⊙U) + s²·rowsum((B G)⊙B)
        V Aᵀ = U + s B G               (out, rank)

    In rows where this sum cancels, overflows or underflows, n is measured on V itself.

    Parameters
    ----------
    weight : array, shape (*stack, out, in), or RowWeight, shape (out, in)
        Or as a layer of `kind` stores it.
    adapter : Adapter
    config : Config
    previous : Prepared, optional
        An earlier result for the same `weight` object: its ‖w‖² is used again.
    reduce : callable, optional
        Returns the sum of an array over the ranks, if the input axis is split among ranks; see
        `docs/howto/distributed.md`. The result remembers it.
    kind : LayerKind, optional
        The rows of n are those of `kind.matrix(weight)`. None takes the weight for the matrix.

    Returns
    -------
    Prepared
        For `doraxp.forward` and `doraxp.merge`, which refuse it with any other adapter. It is right
        only for the values that the weight has now: do not write to the weight.

    Raises
    ------
    TypeError
        The arrays are not of one library, or a dtype is not floating.
    ValueError
        The shapes do not fit, the devices differ, `previous` is of another weight, kind or
        `reduce`, or `reduce` is given for a RowWeight or a kind that is not a matrix.

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
    stored = cast(Array, weight)
    kind, matrix = matrix_of(stored, kind)
    ops, dtype = check_layer(matrix, adapter, config)
    reduce = check_previous(previous, stored, reduce, kind)
    prepared = prepare_checked(matrix, adapter, config, previous, reduce, dtype, ops=ops)
    return stored_as(prepared, stored, kind)


def matrix_of(
    weight: Array, kind: LayerKind | None, known: Prepared | None = None
) -> tuple[LayerKind | None, Array]:
    """Return the matrix of a stored weight, and its kind; None where it is stored as its matrix.

    A `known` result of the same weight and kind has the matrix already.
    """
    if kind is None:
        return None, weight
    if isinstance(known, Prepared) and known.stored is weight and known.kind == kind:
        return kind, known.matrix
    check_kind("kind", kind, LayerKind)
    matrix = kind.matrix(weight)
    return (None if kind.name in ("linear", "experts") else kind), matrix


def stored_as(prepared: Prepared, weight: Array, kind: LayerKind | None) -> Prepared:
    """Return the `Prepared` of a matrix for the weight that it is stored in."""
    if kind is None:
        return prepared
    register_static(LayerKind)
    return prepared._replace(kind=kind, stored=weight)


def prepare_checked(
    weight: Array, adapter: Adapter, config: Config, previous: Prepared | None,
    reduce: Reduce | None, dtype: DType, *, ops: Operations,
) -> Prepared:  # fmt: skip
    """Return the result of `prepare` for arguments that have been checked."""
    u = None
    if reduce is not None:
        u = ops.product(weight, transpose(as_dtype(adapter.lora_a, dtype, xp=ops.xp)))  # W Aᵀ
    return _measure(weight, adapter, config, previous, reduce, u, dtype, ops=ops)


def prepare_with_product(
    x: Array, weight: Array, adapter: Adapter, config: Config, previous: Prepared,
    reduce: Reduce | None, dtype: DType, *, ops: Operations,
) -> tuple[Prepared, Array]:  # fmt: skip
    """Return the result of `prepare`, and x Wᵀ for x (*stack, tokens, in) in the compute dtype.

    One product makes both x Wᵀ and A Wᵀ. Beside many tokens, `rank` more rows cost little.
    """
    xp, tokens = ops.xp, x.shape[-2]
    rows = xp.concat([x, as_dtype(adapter.lora_a, dtype, xp=xp)], axis=-2)  # (tokens + rank, in)
    product = ops.product_with_transposed(rows, weight)
    u = transpose(product[..., tokens:, :])  # W Aᵀ, (out, rank)
    prepared = _measure(weight, adapter, config, previous, reduce, u, dtype, ops=ops)
    return prepared, product[..., :tokens, :]


def _measure(
    weight: Array, adapter: Adapter, config: Config, previous: Prepared | None,
    reduce: Reduce | None, u: Array | None, dtype: DType, *, ops: Operations,
) -> Prepared:  # fmt: skip
    """Return the result of `prepare`, given W Aᵀ if the caller has it."""
    squares = None if previous is None else previous.weight_squares
    if squares is not None and squares.dtype != dtype:
        squares = None
    products = None
    if u is not None:
        a = as_dtype(adapter.lora_a, dtype, xp=ops.xp)
        gram = ops.product(a, transpose(a))
        if squares is None:
            squares = ops.row_squares(weight, dtype)
            u, gram, squares = sums(reduce, u, gram, squares, xp=ops.xp)
        else:
            u, gram = sums(reduce, u, gram, xp=ops.xp)
        products = u, gram
    elif squares is None:
        squares = ops.row_squares(weight, dtype)
    row_scale = None
    if config.form == "direction":
        row_scale = _known_row_scale(previous, dtype)
        if row_scale is None:
            row_scale = inverse_norms(weight, squares, ops=ops, reduce=reduce)
    norm, gain, unit, direction = ops.norm_and_direction(
        weight, adapter, config.scaling, row_scale, squares, products, reduce
    )
    snapshot = ops.snapshot(adapter)
    return Prepared(adapter, config, direction, norm, gain, unit, squares, snapshot, reduce)


def _known_row_scale(previous: Prepared | None, dtype: DType) -> Array | None:
    """Return ρ of an earlier result, if that has one in `dtype`."""
    if previous is None:
        return None
    row_scale = previous.direction.factors.row_scale
    return None if row_scale is None or row_scale.dtype != dtype else row_scale


def factor(weight: Array, leaves: Adapter, config: Config, *, ops: Operations) -> Factors:
    """Return W, A, s B and ρ, for the adapter's leaves in the compute dtype."""
    a, b, _ = leaves
    row_scale = None
    if config.form == "direction":
        row_scale = inverse_norms(weight, ops.row_squares(weight, a.dtype), ops=ops)
    return Factors(weight, a, config.scaling * b, row_scale)


def through_norm(dv: Consumed, p: Array | None, prepared: Prepared, *, ops: Operations) -> Array:
    """Return the gradient by W as a part of V, (*stack, out, in), given g⊙(dyᵀ x). It stores V.

    ::

        weight form:     dW = dV                              dV = g⊙(dyᵀ x) − p⊙V / n
        direction form:  dW = ρ⊙(dV − D⊙rowsum(D⊙dV))         D = ρ⊙W
    """
    direction = prepared.direction
    if p is not None:
        dv -= p[..., None] * ops.over_norm(direction.dense(ops=ops), prepared.norm)
    weight, _, _, row_scale = direction.factors
    if row_scale is not None:
        unit = row_scale[..., None] * as_dtype(weight, dv.dtype, xp=ops.xp)  # D
        (along,) = sums(prepared.reduce, ops.xp.sum(unit * dv, axis=-1), xp=ops.xp)
        dv = row_scale[..., None] * (dv - along[..., None] * unit)
    return dv


def check_previous(
    previous: Prepared | None,
    weight: Array,
    reduce: Reduce | None,
    kind: LayerKind | None = None,
) -> Reduce | None:
    """Refuse a `previous` of another weight; return the `reduce` that applies."""
    if reduce is not None and kind is not None:
        raise ValueError(
            f"reduce must be None for a weight of kind {kind.name!r}: its inputs are not one axis"
        )
    if reduce is not None and is_by_rows(weight):
        raise ValueError(
            "reduce must be None for a weight that is given by rows: it holds whole rows"
        )
    if previous is None:
        check_reduce(reduce)
        return reduce
    check_kind("previous", previous, Prepared)
    if previous.weight is not weight:
        raise ValueError("previous must be of the same weight object, but is of another one")
    if previous.kind != kind:
        raise ValueError(f"previous must be of the kind {kind}, but is of {previous.kind}")
    check_same_reduce("previous", previous, reduce)
    return previous.reduce


def check_same_reduce(name: str, known: Prepared, reduce: Reduce | None) -> None:
    """Refuse a `reduce` other than the one that `known` was given. None means the same one."""
    check_reduce(reduce)
    # Not by identity: a bound method is another object each time that it is looked up.
    if reduce is not None and reduce != known.reduce:
        raise ValueError(
            f"{name} must be of the same reduce, but is of {known.reduce}, not of {reduce}"
        )


def check_prepared(
    prepared: Prepared, weight: Array, adapter: Adapter, config: Config,
    kind: LayerKind | None = None, *, ops: Operations,
) -> None:  # fmt: skip
    """Refuse a prepared norm that does not belong to these arguments any more."""
    check_kind("prepared", prepared, Prepared)
    if prepared.weight is not weight:
        changed = "the weight is another object"
    elif prepared.kind != kind:
        changed = f"the kind was {prepared.kind}, is {kind}"
    elif prepared.config is not config and prepared.config != config:
        changed = f"the config was {prepared.config}, is {config}"
    elif not ops.unchanged(prepared.snapshot, prepared.adapter, adapter):
        changed = "the adapter has changed"
    else:
        return
    raise ValueError(
        f"prepared must belong to this weight, adapter and config, but {changed}: "
        "call prepare again"
    )


def check_unwritten(prepared: Prepared, *, ops: Operations) -> None:
    """Refuse a cache whose adapter was written to since the forward."""
    if not ops.unchanged(prepared.snapshot, prepared.adapter, prepared.adapter):
        raise ValueError(
            "cache must belong to the adapter of its forward, but the adapter has changed: "
            "call forward again"
        )
