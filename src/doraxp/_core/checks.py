"""The check of one layer's arguments: classes, libraries, dtypes and shapes.

A public function checks its arguments once, before it computes anything: `check_layer` and
`check_call` are for those of a whole layer. Each error names the argument, the rule and the value.
"""

from __future__ import annotations

import math

from doraxp._base.scalars import check_kind
from doraxp._base.types import Adapter, Array, Config, DType
from doraxp._base.words import counted
from doraxp._core.kinds import LayerKind
from doraxp.backends import Operations, compute_dtype, is_by_rows, is_integer, operations


def check_layer(weight: Array, adapter: Adapter, config: Config) -> tuple[Operations, DType]:
    """Return the operations for the arrays of one layer, and the dtype to compute in."""
    return _check(weight, adapter, config, None, {})


def check_call(
    x: Array, weight: Array, adapter: Adapter, config: Config, bias: Array | None,
    dropout_mask: Array | None = None,
) -> tuple[Operations, DType]:  # fmt: skip
    """Return the operations for a layer and its input, and the dtype to compute in."""
    others = {"x": x} if dropout_mask is None else {"x": x, "dropout_mask": dropout_mask}
    checked = _check(weight, adapter, config, bias, others)
    check_input(weight, x, dropout_mask)
    check_bias(weight, bias)
    return checked


def check_operated(
    x: Array, weight: Array, adapter: Adapter, config: Config, bias: Array | None,
    dropout_mask: Array | None, kind: LayerKind | None,
) -> tuple[Operations, DType]:  # fmt: skip
    """Return the operations for a layer with an operator, and the dtype to compute in.

    `weight` is the matrix. The operator itself checks the shape of x.
    """
    others = {"x": x} if dropout_mask is None else {"x": x, "dropout_mask": dropout_mask}
    if hasattr(x, "dtype") and is_integer(x):  # a list gets the error of all arguments
        if dropout_mask is not None:
            raise ValueError("dropout_mask must be None where x has ids: they cannot be dropped")
        others = {}
    if is_by_rows(weight):
        raise ValueError("operator must be None for a weight that is given by rows")
    checked = _check(weight, adapter, config, bias, others)
    if dropout_mask is not None:
        check_mask(x, dropout_mask)
    if kind is None or not kind.groups > 1:
        check_bias(weight, bias)
    elif bias is not None and tuple(bias.shape) != (math.prod(weight.shape[:-1]),):
        raise ValueError(
            f"bias must have shape (out,) = {(math.prod(weight.shape[:-1]),)} for a convolution "
            f"of {counted(kind.groups, 'group')}, got {tuple(bias.shape)}"
        )
    return checked


def _check(
    weight: Array, adapter: Adapter, config: Config, bias: Array | None, others: dict[str, Array]
) -> tuple[Operations, DType]:
    check_kind("adapter", adapter, Adapter)
    check_kind("config", config, Config)
    a, b, m = adapter
    ops = operations(weight=weight, lora_a=a, lora_b=b, magnitude=m, bias=bias, **others)
    check_adapter(weight, adapter, config)
    return ops, compute_dtype(weight, a, b, m, xp=ops.xp)


def check_weight(weight: Array, name: str = "weight", axes: str = "out, in") -> tuple[int, ...]:
    """Return a weight's shape. Refuse one that is not (*stack, out, in), or has an empty axis."""
    shape = weight.shape
    if len(shape) < 2 or 0 in shape:
        raise ValueError(
            f"{name} must have shape (*stack, {axes}) with no axis of length 0, got {tuple(shape)}"
        )
    return shape


def _sizes(weight: Array) -> str:
    """Return the sizes of a matrix, for errors.

    The matrix has another shape than the weight that the caller stores (in, out).
    """
    *stack, out, inner = weight.shape
    matrix = f"a stack {tuple(stack)} of matrices" if stack else "a matrix"
    return f"{matrix} with out = {out} and in = {inner}"


def check_rank(weight: Array, config: Config) -> tuple[int, ...]:
    """Return the weight's shape. Refuse a rank above min(out, in)."""
    shape = check_weight(weight)
    limit = min(shape[-2:])
    if config.rank > limit:
        raise ValueError(
            f"rank must be in 1..{limit} = 1..min(out, in) for {_sizes(weight)}, got {config.rank}"
        )
    return shape


def check_adapter(weight: Array, adapter: Adapter, config: Config) -> None:
    """Refuse an adapter whose arrays do not fit the weight and the rank."""
    *stack, out, inner = check_rank(weight, config)
    rank = config.rank
    shapes = (*stack, rank, inner), (*stack, out, rank), (*stack, out)
    a, b, m = adapter
    if (a.shape, b.shape, m.shape) == shapes:
        return
    for name, leaf, shape in zip(Adapter._fields, adapter, shapes, strict=True):
        if tuple(leaf.shape) != shape:
            rule = {"lora_a": "rank, in", "lora_b": "out, rank", "magnitude": "out"}[name]
            raise ValueError(
                f"{name} must have shape (*stack, {rule}) = {shape} for rank {rank} and "
                f"{_sizes(weight)}, got {tuple(leaf.shape)}"
            )


def check_bias(weight: Array, bias: Array | None) -> None:
    """Refuse a bias that does not have one number for each row of the weight."""
    if bias is not None and tuple(bias.shape) != tuple(weight.shape[:-1]):
        raise ValueError(
            f"bias must have shape (*stack, out) = {tuple(weight.shape[:-1])} for "
            f"{_sizes(weight)}, got {tuple(bias.shape)}"
        )


def check_input(weight: Array, x: Array, dropout_mask: Array | None = None) -> None:
    """Refuse an x that does not fit the weight's stack and columns, or a mask of another shape."""
    (*stack, _, inner), shape = weight.shape, x.shape
    depth = len(stack)
    if len(shape) <= depth or shape[-1] != inner or [*shape[:depth]] != stack:
        rule = "(*stack, ..., in)" if stack else "(..., in)"
        raise ValueError(f"x must have shape {rule} for {_sizes(weight)}, got {tuple(shape)}")
    if dropout_mask is not None:
        check_mask(x, dropout_mask)


def check_mask(x: Array, dropout_mask: Array) -> None:
    """Refuse a mask that does not have the shape of x."""
    if tuple(dropout_mask.shape) != tuple(x.shape):
        raise ValueError(
            f"dropout_mask must have the shape of x, {tuple(x.shape)}, "
            f"got {tuple(dropout_mask.shape)}"
        )


def check_output_gradient(dy: Array, shape: tuple[int, ...]) -> None:
    """Refuse a dy that does not have the shape of its y."""
    if tuple(dy.shape) != shape:
        raise ValueError(f"dy must have the shape of y, {shape}, got {tuple(dy.shape)}")
