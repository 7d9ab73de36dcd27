"""The forward and the backward of a matrix with a DoRA adapter, for arguments that were checked.

    x (tokens, in)   W (out, in) frozen   A (rank, in)   B (out, rank)   m (out,)   ρ (out,)
    V = ρ⊙W + s B A      n = ‖V‖ by rows      g = m / n      y = g⊙(x Vᵀ) + bias

`Prepared.direction` stands for V. It multiplies by W, A and s B; only the gradient of W stores V.
`doraxp._core.prepared` makes it, with n, g and V Aᵀ / n.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from doraxp._base.ranks import sums
from doraxp._base.types import (
    Adapter,
    Array,
    Config,
    DType,
    Gradients,
    Namespace,
    Reduce,
)
from doraxp._core.operated import Through
from doraxp._core.prepared import (
    Prepared,
    prepare_checked,
    prepare_with_product,
    through_norm,
)
from doraxp._core.tokens import with_tokens
from doraxp.backends import (
    Norm,
    Operations,
    ProductDirection,
    as_dtype,
    transpose,
)


class Cache(NamedTuple):
    """The values of a `forward` that its `backward` needs. Read it, do not build it."""

    x: Array
    """x, the array that the forward was given."""
    bias: Array | None
    """The bias that the forward was given."""
    low_rank: Array
    """L = x Aᵀ, shape (*stack, tokens, rank); x~ Aᵀ with a dropout mask."""
    z: Array
    """z with y = g⊙z + bias, shape (*stack, tokens, out); x Vᵀ without a dropout mask."""
    prepared: Prepared
    """The norm and V, given to the forward or made by it."""
    dropout_mask: Array | None = None
    """The mask that the forward was given."""
    through: Through | None = None
    """The operator of the layer, where that is not a product of matrices."""


class _Inputs(NamedTuple):
    """x as the products take it, (*stack, tokens, in). Without a mask all three are one array."""

    whole: Array
    """x."""
    dropped: Array
    """x~ = mask⊙x, the input of the update s B A."""
    seen: Array
    """The input of ρ⊙W as a part of V: x~ for dropout "input", else x."""

    @property
    def rest(self) -> Array | None:
        """The part x − x~, which only W itself gets, for dropout "input"; else None."""
        return None if self.seen is self.whole else self.whole - self.seen

    @property
    def update_only(self) -> Array | None:
        """The x~ that only the update s B A gets, for dropout "low_rank"; else None."""
        return None if self.dropped is self.seen else self.dropped


def forward_checked(
    x: Array, weight: Array, adapter: Adapter, config: Config, bias: Array | None,
    prepared: Prepared | None, previous: Prepared | None, mask: Array | None,
    reduce: Reduce | None, dtype: DType, *, ops: Operations,
) -> tuple[Array, Cache]:  # fmt: skip
    """Return the results of `forward` for arguments that have been checked."""
    of_z = None if reduce is None else dtype  # a sum over ranks is not rounded
    inputs = _inputs(x, mask, weight, config, dtype, of_z, ops=ops)
    base = None  # x Wᵀ, where it is known
    if prepared is None and previous is not None and ops.can_read_values(x):
        prepared, base = prepare_with_product(
            inputs.seen, weight, adapter, config, previous, reduce, dtype, ops=ops
        )
    elif prepared is None:  # also where the library stores V, and so needs no x Wᵀ
        prepared = prepare_checked(weight, adapter, config, previous, reduce, dtype, ops=ops)

    wide_bias = None if bias is None else as_dtype(bias, dtype, xp=ops.xp)
    low, z, y = _outputs(inputs, base, prepared, wide_bias, ops=ops)
    rest = inputs.rest
    if rest is not None:
        (of_rest,) = sums(prepared.reduce, ops.product_with_transposed(rest, weight), xp=ops.xp)
        y = of_rest + y  # y may have fewer digits
    y = _in_shape(as_dtype(y, x.dtype, xp=ops.xp), (*x.shape[:-1], weight.shape[-2]), ops=ops)
    return y, Cache(x, bias, low, z, prepared, mask)


def backward_checked(dy: Array, cache: Cache, *, train_base: bool, ops: Operations) -> Gradients:
    """Return the results of `backward` for arguments that have been checked."""
    x, bias, low_rank, z, prepared, mask, _ = cache
    config, weight, dtype = prepared.config, prepared.matrix, prepared.gain.dtype
    kind = ops.operand_dtype(dy, weight, dtype, masked=mask is not None, z=z.dtype)
    d = as_tokens(dy, weight, kind, xp=ops.xp)
    inputs = _inputs(x, mask, weight, config, dtype, z.dtype, ops=ops)
    known = Norm(prepared.norm, prepared.gain, prepared.unit_projection, prepared.direction)
    dx, da, db, dm, p, dbias = ops.gradients(
        d, inputs.dropped, low_rank, z, known, config.scaling, x.dtype,
        exact=config.norm_gradient == "exact", with_bias=train_base and bias is not None,
        round_later=mask is not None,
    )  # fmt: skip
    dweight = _weight_gradient(d, inputs, p, prepared, ops=ops) if train_base else None
    if mask is not None:
        update = None  # s (dz B) A, for dropout "low_rank"
        if inputs.update_only is not None:
            _, a, scaled_b, _ = prepared.direction.factors
            low = ops.product(d, prepared.gain[..., None] * scaled_b)  # s dz B, (tokens, rank)
            update = ops.product(low, a)
        dx = _through_dropout(dx, d, update, mask, weight, x.dtype, ops=ops)
    return Gradients(_in_shape(dx, x.shape, ops=ops), Adapter(da, db, dm), dweight, dbias)


def _inputs(
    x: Array, mask: Array | None, weight: Array, config: Config, dtype: DType,
    z: DType | None = None, *, ops: Operations,
) -> _Inputs:  # fmt: skip
    """Return x, x~, and the one of the two that is the input of ρ⊙W.

    `z` is the dtype of z where it is known already.
    """
    kind = ops.operand_dtype(x, weight, dtype, masked=mask is not None, z=z)
    whole = as_tokens(x, weight, kind, xp=ops.xp)
    if mask is None:
        return _Inputs(whole, whole, whole)
    dropped = as_tokens(mask, weight, whole.dtype, xp=ops.xp) * whole
    return _Inputs(whole, dropped, dropped if config.dropout == "input" else whole)


def _outputs(
    inputs: _Inputs, base: Array | None, prepared: Prepared, bias: Array | None, *, ops: Operations
) -> tuple[Array, Array, Array]:
    """Return L = x~ Aᵀ, z and y = g⊙z + bias; `base` is x Wᵀ where it is known.

    (*stack, tokens, in) -> (*stack, tokens, rank) and twice (*stack, tokens, out).
    """
    direction, gain = prepared.direction, prepared.gain
    low = ops.product(inputs.dropped, transpose(direction.factors.lora_a))
    if prepared.reduce is None:
        z, y = direction.outputs(inputs.seen, low, gain, bias, base, inputs.update_only, ops=ops)
        return low, z, y
    # Each rank has its part of L and of z. One sum over the ranks adds both up.
    whole = cast(ProductDirection, direction)
    z = whole.transposed_product(inputs.seen, low, base, inputs.update_only, ops=ops)
    z, low = sums(prepared.reduce, z, low, xp=ops.xp)
    return low, *ops.forward_epilogue(z, None, None, gain, bias)


def _weight_gradient(
    d: Array, inputs: _Inputs, p: Array | None, prepared: Prepared, *, ops: Operations
) -> Array:
    """Return dW, (out, in). This stores V."""
    dv = ops.product(transpose(d), inputs.seen)
    dv *= prepared.gain[..., None]
    dv = through_norm(dv, p, prepared, ops=ops)
    rest = inputs.rest
    if rest is not None:
        dv += ops.product(transpose(d), rest)
    return dv


def _through_dropout(
    dx: Array, d: Array, update: Array | None, mask: Array, weight: Array, dtype: DType,
    *, ops: Operations,
) -> Array:  # fmt: skip
    """Return dx in `dtype`, given dz V, (tokens, in), and dy.

    ::

        "input":     mask⊙(dz V) + (1 − mask)⊙(dy W)
        "low_rank":  dz V + (mask − 1)⊙(s (dz B) A)        update = s (dz B) A
    """
    mask = as_tokens(mask, weight, dx.dtype, xp=ops.xp)
    if update is None:
        dx = mask * dx + (1 - mask) * ops.product(d, weight)
    else:
        dx = dx + (mask - 1) * update
    return as_dtype(dx, dtype, xp=ops.xp)


def _in_shape(array: Array, shape: tuple[int, ...], *, ops: Operations) -> Array:
    """Return `array` in `shape`: the same object if it has that shape."""
    return array if array.shape == shape else ops.xp.reshape(array, shape)


def as_tokens(x: Array, weight: Array, dtype: DType, *, xp: Namespace) -> Array:
    """Return x (*stack, ..., k) in `dtype`, with one axis of tokens: (*stack, tokens, k)."""
    x = as_dtype(x, dtype, xp=xp)
    return with_tokens(x, len(weight.shape) - 2, xp=xp)
