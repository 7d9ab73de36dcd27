"""The forward and the backward of a layer whose weight acts through an operator.

    x, y as the operator has them       W, A, V as the layer stores its weight
    z (*stack, tokens, out)    L (*stack, tokens, rank)    B, n, g as in `doraxp._core.matrix`
    L = apply(x, A)            z = apply(x, V)             y = g⊙z + bias

The formulas are those of `doraxp._core.matrix` with x Vᵀ = apply(x, V), dz V = transpose(dz, V)
and dzᵀ x = weight_gradient(dz, x). V is formed for each call: beside the work of a convolution that
costs little, and it takes as much memory as W. A table of ids is too large for that. Its rows are
looked up in W and in A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from doraxp._base.scalars import check_kind
from doraxp._base.types import Adapter, Array, DType, Gradients, Namespace
from doraxp._core.kinds import LayerKind
from doraxp._core.operators import Convolution, Embedding, MatMul, Operator
from doraxp._core.prepared import Prepared, through_norm
from doraxp._core.tokens import by_channel, by_token, with_tokens
from doraxp.backends import Factored, Operations, as_dtype, is_integer, transpose


@dataclass(frozen=True)
class Through:
    """The operator of a forward, for its backward."""

    operator: Operator
    kind: LayerKind
    y_shape: tuple[int, ...] = ()
    """The shape of y, once it is known."""


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
        y, axis = self.operator.apply(x, weight), self.operator.channel_axis
        shape, outputs = tuple(y.shape), self.kind.groups * self.kind.matrix_shape(weight.shape)[-2]
        if not -len(shape) <= axis < len(shape) or shape[axis] != outputs:
            raise ValueError(
                f"operator.apply must return the {outputs} outputs of the weight on axis {axis}, "
                f"its channel_axis, got an array of shape {shape}"
            )
        return self.tokens(y), shape

    def base(self) -> Array:
        """Return W as it is stored, in the compute dtype."""
        return as_dtype(self.prepared.weight, self.dtype, xp=self.ops.xp)

    def formed(self, x: Array) -> Array | None:
        """Return V; None where x has ids and products with the factors keep all digits."""
        direction = self.prepared.direction
        if is_integer(x) and isinstance(direction, Factored):
            return None
        return direction.dense(ops=self.ops)


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
    if isinstance(operator, type):
        raise TypeError(
            f"operator must be an object, got the class {operator.__name__}: call it, as in "
            "doraxp.MatMul()"
        )
    if type(operator) not in _KINDS and not isinstance(operator, Operator):
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
    return kind, None if type(operator) is MatMul else operator


def outputs(layer: Layer, x: Array, mask: Array | None, bias: Array | None) -> Operated:
    """Return y, L and z."""
    prepared, ops = layer.prepared, layer.ops
    _, a, scaled_b, row_scale = prepared.direction.factors
    if isinstance(layer.operator, Convolution):  # it takes the groups from x, below from V and A
        layer.operator.check_groups(tuple(x.shape), layer.shape, layer.kind.groups)
    inputs = _inputs(layer, x, mask)
    v = layer.formed(x)
    if v is None:
        low, _ = layer.applied(x, layer.stored(a))
        z, shape = _looked_up(layer, x)
        z, y = ops.forward_epilogue(z, row_scale, (low, scaled_b), prepared.gain, bias)
        return Operated(layer.outputs(y, shape), low, z)
    # One call makes x Vᵀ and x Aᵀ: it reads the windows of x once.
    both, shape = layer.applied(inputs.seen, layer.stored(_below(v, a, xp=ops.xp)))
    z, low = both[..., : v.shape[-2]], both[..., v.shape[-2] :]
    update = None
    if inputs.dropped is not inputs.seen:  # V has seen x, and its part s B A must see x~
        of_seen = low
        low, _ = layer.applied(inputs.dropped, layer.stored(a))
        update = low - of_seen, scaled_b
    z, y = ops.forward_epilogue(z, None, update, prepared.gain, bias)
    if inputs.rest is not None:
        y = layer.applied(inputs.rest, layer.base())[0] + y
    return Operated(layer.outputs(y, shape), low, z)


def _looked_up(layer: Layer, ids: Array) -> tuple[Array, tuple[int, ...]]:
    """Return apply(ids, W) by tokens, and its shape. A weight of 16 bits is scaled in 32."""
    weight, operator = layer.prepared.weight, layer.operator
    if type(operator) is not Embedding or operator.scale == 1:
        return layer.applied(ids, weight)
    rows, shape = layer._replace(operator=Embedding()).applied(ids, weight)
    return operator.scale * rows, shape


def _below(v: Array, a: Array, *, xp: Namespace) -> Array:
    """Return V (*stack, out, in) with A below it."""
    return xp.concat([v, a], axis=a.ndim - 2)


class _Inputs(NamedTuple):
    """x as the operator takes it. Without a mask the first two are one array."""

    dropped: Array
    """x~ = mask⊙x, the input of the update s B A."""
    seen: Array
    """The input of ρ⊙W as a part of V: x~ for dropout "input", else x."""
    rest: Array | None
    """x − x~, the input of W itself for dropout "input"; else None."""


def _inputs(layer: Layer, x: Array, mask: Array | None) -> _Inputs:
    """Return x and x~ in the compute dtype; ids as they are."""
    xp = layer.ops.xp
    whole = x if is_integer(x) else as_dtype(x, layer.dtype, xp=xp)
    if mask is None:
        return _Inputs(whole, whole, None)
    dropped = as_dtype(mask, layer.dtype, xp=xp) * whole
    if layer.prepared.config.dropout == "input":
        return _Inputs(dropped, dropped, whole - dropped)
    return _Inputs(dropped, whole, None)


def gradients(
    layer: Layer, dy: Array, x: Array, low_rank: Array, z: Array, mask: Array | None,
    *, train_base: bool, with_bias: bool,
) -> Gradients:  # fmt: skip
    """Return the gradients, as `doraxp.backward` does."""
    operator, kind, prepared, ops = layer
    config, scaled_b = prepared.config, prepared.direction.factors.scaled_b
    d, like, tokens = layer.tokens(dy), tuple(dy.shape), z.shape[-2]
    rows, rows_b, dm, p, dbias = ops.output_gradients(
        d, z, prepared.gain, prepared.norm, scaled_b, exact=config.norm_gradient == "exact",
        with_bias=with_bias,
    )  # fmt: skip
    dz, dz_b = rows[..., :tokens, :], rows_b[..., :tokens, :]
    db = ops.product(transpose(dz), low_rank)
    if p is not None:
        db -= p[..., None] * prepared.unit_projection
    db *= config.scaling

    inputs, v = _inputs(layer, x, mask), layer.formed(x)
    dz_b = layer.outputs(dz_b, like)
    shape = kind.shape_with(layer.shape, config.rank)
    da = kind.matrix(operator.weight_gradient(dz_b, inputs.dropped, shape))
    if p is not None:
        below = rows[..., tokens:, :], rows_b[..., tokens:, :]
        da = da + _times_v(*below, v, layer)  # (q⊙(s B))ᵀ V
    dx = cast(Array, None)  # the type of `Gradients` is that of most layers: x has numbers
    if v is not None and not is_integer(x):
        dx = operator.transpose(layer.outputs(dz, like), layer.stored(v), tuple(x.shape))
        if mask is not None:
            dx = _through_dropout(layer, dx, layer.outputs(d, like), dz_b, mask)
        dx = as_dtype(dx, x.dtype, xp=ops.xp)
    dweight = None
    if train_base:
        dweight = _weight_gradient(layer, layer.outputs(d, like), inputs, p)
    return Gradients(dx, Adapter(da, db, dm), dweight, dbias)


def _times_v(rows: Array, rows_b: Array, v: Array | None, layer: Layer) -> Array:
    """Return rows V, (*stack, k, out) -> (*stack, k, in), given rows (s B)."""
    ops = layer.ops
    if v is not None:
        return ops.product(rows, v)
    weight, a, _, row_scale = layer.prepared.direction.factors
    scaled = rows if row_scale is None else row_scale[..., None, :] * rows
    return ops.accumulate(ops.product(scaled, weight), rows_b, a)


def _through_dropout(layer: Layer, dx: Array, d: Array, dz_b: Array, mask: Array) -> Array:
    """Return dx, given dz V; d and dz (s B) are as the operator has outputs.

    ::

        "input":     mask⊙(dz V) + (1 − mask)⊙(dy W)
        "low_rank":  dz V + (mask − 1)⊙(s (dz B) A)
    """
    shape = tuple(dx.shape)
    mask = as_dtype(mask, layer.dtype, xp=layer.ops.xp)
    if layer.prepared.config.dropout == "input":
        return mask * dx + (1 - mask) * layer.operator.transpose(d, layer.base(), shape)
    lora_a = layer.stored(layer.prepared.direction.factors.lora_a)
    return dx + (mask - 1) * layer.operator.transpose(dz_b, lora_a, shape)


def _weight_gradient(layer: Layer, d: Array, inputs: _Inputs, p: Array | None) -> Array:
    """Return dW, as the weight is stored; d is dy as the operator has outputs."""
    operator, kind, prepared, ops = layer
    product = kind.matrix(operator.weight_gradient(d, inputs.seen, layer.shape))
    dw = through_norm(prepared.gain[..., None] * product, p, prepared, ops=ops)
    if inputs.rest is not None:
        dw = dw + kind.matrix(operator.weight_gradient(d, inputs.rest, layer.shape))
    return kind.restore(dw, layer.shape)
