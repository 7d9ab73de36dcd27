"""The forward and the backward of a layer whose weight acts through an operator.

    x, y as the operator has them       W, A, V as the layer stores its weight
    z (*stack, tokens, out)    L (*stack, tokens, rank)    B, n, g as in `doraxp._core.linear`
    L = apply(x, A)            z = ρ⊙apply(x, W) + s L Bᵀ  y = g⊙z + bias

The formulas are those of `doraxp._core.linear` with x Wᵀ = apply(x, W), dz W = transpose(dz, W)
and dzᵀ x = weight_gradient(dz, x). Where the direction stores rows of V, V is formed, and acts in
place of ρ⊙W + s B A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from doraxp._base.scalars import check_kind
from doraxp._base.types import Adapter, Array, DType, Gradients
from doraxp._core.kinds import LayerKind
from doraxp._core.operators import Convolution, Embedding, MatMul, Operator
from doraxp._core.prepared import Prepared, through_norm
from doraxp._core.tokens import by_channel, by_token, with_tokens
from doraxp.backends import Factored, Operations, as_dtype, is_integer, transpose


@dataclass(frozen=True)
class Through:
    """The operator of a forward, for its backward."""

    operator: Operator
    y_shape: tuple[int, ...]
    """The shape of y."""


class Operated(NamedTuple):
    """The results of `outputs`, for the cache."""

    y: Array
    """y, as the operator returns it, in the compute dtype."""
    low_rank: Array
    """L, (*stack, tokens, rank)."""
    z: Array
    """z, (*stack, tokens, out)."""


class Layer(NamedTuple):
    """A layer and the arrays that its operator takes."""

    operator: Operator
    kind: LayerKind
    prepared: Prepared
    ops: Operations

    @property
    def dtype(self) -> DType:
        """The compute dtype."""
        return self.prepared.gain.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the weight is stored in."""
        return tuple(self.prepared.weight.shape)

    @property
    def stack(self) -> tuple[int, ...]:
        """The stack of the matrix: the groups of a convolution, or the experts."""
        return tuple(self.prepared.gain.shape[:-1])

    def stored(self, matrix: Array) -> Array:
        """Return a matrix (*stack, k, in) as a weight of k outputs, or of k for each group."""
        return self.kind.restore(matrix, self.kind.shape_with(self.shape, matrix.shape[-2]))

    def tokens(self, y: Array) -> Array:
        """Return outputs of the operator as (*stack, tokens, k), in the compute dtype."""
        y, xp = as_dtype(y, self.dtype, xp=self.ops.xp), self.ops.xp
        if self.kind.is_stack:
            return with_tokens(y, len(self.stack), xp=xp)
        tokens = by_token(y, self.operator.channel_axis, self.kind.groups, xp=xp)
        return tokens if self.stack else tokens[0, ...]

    def outputs(self, tokens: Array, like: tuple[int, ...]) -> Array:
        """Return (*stack, tokens, k) as the operator has outputs: `like` with k for each group."""
        xp, axis, width = self.ops.xp, self.operator.channel_axis % len(like), tokens.shape[-1]
        shape = *like[:axis], self.kind.groups * width, *like[axis + 1 :]
        if self.kind.is_stack:
            return xp.reshape(tokens, shape)
        return by_channel(tokens if self.stack else tokens[None, ...], shape, axis, xp=xp)

    def applied(self, x: Array, weight: Array) -> tuple[Array, tuple[int, ...]]:
        """Return apply(x, weight) by tokens, and the shape that the operator gave it."""
        y = self.operator.apply(x, weight)
        return self.tokens(y), tuple(y.shape)

    def base(self, x: Array) -> Array:
        """Return W as the operator takes it: as it is stored for ids, else in the compute dtype."""
        weight = self.prepared.weight
        return weight if is_integer(x) else as_dtype(weight, self.dtype, xp=self.ops.xp)


_KINDS: dict[type, tuple[str, ...]] = {
    MatMul: ("linear", "experts", "transposed", "transposed_experts"),
    Convolution: ("conv",),
    Embedding: ("embedding",),
}
"""The kinds of weight that each operator of the library takes."""
_NEEDED = {
    "conv": "doraxp.Convolution(stride=..., padding=..., dilation=...)",
    "embedding": "doraxp.Embedding()",
}


def resolved(kind: LayerKind | None, operator: Any) -> tuple[LayerKind, Operator | None]:
    """Return the kind of the weight, and the operator; None for a product of matrices."""
    if operator is None:
        check_kind("kind", kind, LayerKind)
        kind = cast(LayerKind, kind)
        if kind.name in _NEEDED:
            raise ValueError(
                f"operator must be given for a weight of kind {kind.name!r}: pass "
                f"operator={_NEEDED[kind.name]}"
            )
        operator = MatMul()
    if not isinstance(operator, Operator):
        raise TypeError(
            "operator must have kind, channel_axis, apply, transpose and weight_gradient, as "
            f"doraxp.MatMul() has, got {type(operator).__name__}"
        )
    kind = operator.kind if kind is None else kind
    check_kind("kind", kind, LayerKind)
    names = _KINDS.get(type(operator))
    if kind.name == "columns" or (names is not None and kind.name not in names):
        fitting = "another kind than 'columns'" if names is None else " or ".join(map(repr, names))
        raise ValueError(
            f"kind must be {fitting} for operator {type(operator).__name__}, got {kind.name!r}"
        )
    return kind, None if isinstance(operator, MatMul) else operator


def outputs(layer: Layer, x: Array, mask: Array | None, bias: Array | None) -> Operated:
    """Return y, L and z."""
    prepared, ops = layer.prepared, layer.ops
    direction, xp = prepared.direction, ops.xp
    _, a, scaled_b, row_scale = direction.factors
    whole = x if is_integer(x) else as_dtype(x, layer.dtype, xp=xp)
    dropped = whole if mask is None else as_dtype(mask, layer.dtype, xp=xp) * whole
    seen = dropped if prepared.config.dropout == "input" else whole  # by ρ⊙W as a part of V
    base, lora_a = layer.base(x), layer.stored(a)
    update: tuple[Array, Array] | None
    if isinstance(direction, Factored):
        low, z, shape = _both(layer, dropped, seen, base)
        update = low, scaled_b
    else:
        low, shape = layer.applied(dropped, lora_a)
        z, shape = layer.applied(seen, layer.stored(direction.dense(ops=ops)))
        row_scale = update = None
        if seen is not dropped:  # V has seen the whole x: take the rest out of the update
            update = low - layer.applied(seen, lora_a)[0], scaled_b
    z, y = ops.forward_epilogue(z, row_scale, update, prepared.gain, bias)
    if seen is not whole:
        y = layer.applied(whole - seen, base)[0] + y
    return Operated(layer.outputs(y, shape), low, z)


def _both(
    layer: Layer, dropped: Array, seen: Array, base: Array
) -> tuple[Array, Array, tuple[int, ...]]:
    """Return apply(x~, A) and apply(x, W) by tokens, and the shape of the second's outputs.

    One call makes both where W and A have one input: it reads x once. A table of ids is too large
    to be copied beside A.
    """
    factors = layer.prepared.direction.factors
    if seen is not dropped or is_integer(seen):
        low, _ = layer.applied(dropped, layer.stored(factors.lora_a))
        return low, *layer.applied(seen, base)
    rank, out = factors.lora_a.shape[-2], factors.weight.shape[-2]
    both, shape = layer.applied(seen, _beside(layer, factors.weight))
    axis = layer.operator.channel_axis % len(shape)
    groups = layer.kind.groups
    shape = *shape[:axis], shape[axis] - groups * rank, *shape[axis + 1 :]
    return both[..., out:], both[..., :out], shape


def _beside(layer: Layer, weight: Array) -> Array:
    """Return a matrix (*stack, out, in) with A below it, as a weight of out + rank outputs."""
    xp, a = layer.ops.xp, layer.prepared.direction.factors.lora_a
    both = xp.concat([as_dtype(weight, layer.dtype, xp=xp), a], axis=a.ndim - 2)
    return layer.stored(both)


def gradients(
    layer: Layer, dy: Array, x: Array, low_rank: Array, z: Array, mask: Array | None,
    *, train_base: bool, with_bias: bool,
) -> Gradients:  # fmt: skip
    """Return the gradients, as `doraxp.backward` does."""
    operator, kind, prepared, ops = layer
    config, direction, xp = prepared.config, prepared.direction, ops.xp
    scaled_b = direction.factors.scaled_b
    d, ids = layer.tokens(dy), is_integer(x)
    tokens, like = d.shape[-2], tuple(dy.shape)
    rows, rows_b, dm, p, dbias = ops.output_gradients(
        d, z, prepared.gain, prepared.norm, scaled_b, exact=config.norm_gradient == "exact",
        with_bias=with_bias,
    )  # fmt: skip
    dz, dz_b = rows[..., :tokens, :], rows_b[..., :tokens, :]
    db = ops.product(transpose(dz), low_rank)
    if p is not None:
        db -= p[..., None] * prepared.unit_projection
    db *= config.scaling

    whole = x if ids else as_dtype(x, layer.dtype, xp=xp)
    dropped = whole if mask is None else as_dtype(mask, layer.dtype, xp=xp) * whole
    seen = dropped if config.dropout == "input" else whole
    shape = kind.shape_with(layer.shape, config.rank)
    da = kind.matrix(operator.weight_gradient(layer.outputs(dz_b, like), dropped, shape))
    v = None if isinstance(direction, Factored) else direction.dense(ops=ops)
    if p is not None:
        below, below_b = rows[..., tokens:, :], rows_b[..., tokens:, :]
        da = da + _times_v(below, below_b, v, layer)  # (q⊙(s B))ᵀ V
    dx = cast(Array, None)  # the type of `Gradients` is that of most layers: x has numbers
    if not ids:
        dx = _input_gradient(layer, d, dz, dz_b, v, mask, like, tuple(x.shape))
        dx = as_dtype(dx, x.dtype, xp=xp)
    dweight = None
    if train_base:
        rest = None if seen is whole else whole - seen
        dweight = _weight_gradient(layer, layer.outputs(d, like), seen, rest, p)
    return Gradients(dx, Adapter(da, db, dm), dweight, dbias)


def _times_v(rows: Array, rows_b: Array, v: Array | None, layer: Layer) -> Array:
    """Return rows V, (*stack, k, out) -> (*stack, k, in), given rows (s B)."""
    ops = layer.ops
    if v is not None:
        return ops.product(rows, v)
    weight, a, _, row_scale = layer.prepared.direction.factors
    scaled = rows if row_scale is None else row_scale[..., None, :] * rows
    return ops.accumulate(ops.product(scaled, weight), rows_b, a)


def _input_gradient(
    layer: Layer, d: Array, dz: Array, dz_b: Array, v: Array | None, mask: Array | None,
    like: tuple[int, ...], shape: tuple[int, ...],
) -> Array:  # fmt: skip
    """Return dx in the compute dtype.

    ::

        no mask:     dz V
        "input":     mask⊙(dz V) + (1 − mask)⊙(dy W)
        "low_rank":  dz V + (mask − 1)⊙(s (dz B) A)
    """
    operator, prepared, xp = layer.operator, layer.prepared, layer.ops.xp
    weight, a, _, row_scale = prepared.direction.factors

    def back(tokens: Array, matrix: Array) -> Array:
        return operator.transpose(layer.outputs(tokens, like), layer.stored(matrix), shape)

    if v is not None:
        dx = back(dz, v)
    else:
        scaled = dz if row_scale is None else row_scale[..., None, :] * dz
        both = xp.concat([scaled, dz_b], axis=dz.ndim - 1)
        dx = operator.transpose(layer.outputs(both, like), _beside(layer, weight), shape)
    if mask is None:
        return dx
    mask = as_dtype(mask, layer.dtype, xp=xp)
    if prepared.config.dropout == "input":
        return mask * dx + (1 - mask) * back(d, as_dtype(weight, layer.dtype, xp=xp))
    return dx + (mask - 1) * back(dz_b, a)


def _weight_gradient(
    layer: Layer, d: Array, seen: Array, rest: Array | None, p: Array | None
) -> Array:
    """Return dW, as the weight is stored; d is dy as the operator has outputs."""
    operator, kind, prepared, ops = layer
    product = kind.matrix(operator.weight_gradient(d, seen, layer.shape))
    dw = through_norm(prepared.gain[..., None] * product, p, prepared, ops=ops)
    if rest is not None:
        dw = dw + kind.matrix(operator.weight_gradient(d, rest, layer.shape))
    return kind.restore(dw, layer.shape)
