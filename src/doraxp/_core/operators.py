"""Operators: how the weight of a layer acts on x.

::

    operator       x                      weight, as stored              y, without the bias
    MatMul         (*stack, ..., in)      (*stack, out, in)              (*stack, ..., out)
    Convolution    (batch, in, *size)     (out, in/groups, *kernel)      (batch, out, *positions)
    Embedding      ids (...)              (tokens, dim)                  (..., dim)

A layer is linear in its weight. A is a weight of the same operator with `rank` outputs, and B acts
on the outputs alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from doraxp._base.scalars import check_count, check_real
from doraxp._base.types import Array
from doraxp._base.words import counted
from doraxp._core.checks import check_input, check_output_gradient, check_weight
from doraxp._core.kinds import LayerKind
from doraxp._core.tokens import by_channel, by_token, with_tokens
from doraxp.backends import (
    Operations,
    Windows,
    array_namespace,
    device,
    is_integer,
    operations,
    transpose,
)


@runtime_checkable
class Operator(Protocol):
    """How a weight acts on x. A framework passes its own fast one as such an object.

    `doraxp.forward` calls it with floating x, dy and weights in the compute dtype of the layer. An
    integer x is a matter of ids: it has no gradient, and the weight has the dtype that it is stored
    in. The three methods write to none of their arguments. docs/howto/convolutions.md has an
    example and a test for it.
    """

    # Read-only for type checkers: an operator may have both on its class.
    @property
    def kind(self) -> LayerKind:
        """How the weights are stored, unless the caller gives another kind."""

    @property
    def channel_axis(self) -> int:
        """The axis of y that has the outputs of the weight."""

    def apply(self, x: Array, weight: Array, /) -> Array:
        """Return y, without the bias."""

    def transpose(self, dy: Array, weight: Array, x_shape: tuple[int, ...], /) -> Array:
        """Return the gradient by x. It is not called for an integer x."""

    def weight_gradient(self, dy: Array, x: Array, weight_shape: tuple[int, ...], /) -> Array:
        """Return the gradient by the weight, in `weight_shape`."""


@dataclass(frozen=True)
class MatMul:
    """y = x Wᵀ: the operator of linear layers, and of stacks of them.

    Examples
    --------
    >>> import numpy as np
    >>> MatMul().apply(np.array([1.0, 2.0]), np.array([[3.0, 4.0], [0.0, 5.0]]))
    array([11., 10.])
    """

    kind: ClassVar[LayerKind] = LayerKind("linear")
    channel_axis: ClassVar[int] = -1

    def apply(self, x: Array, weight: Array) -> Array:
        """Return x Wᵀ: (*stack, ..., in) and (*stack, out, in) -> (*stack, ..., out)."""
        ops = operations(x=x, weight=weight)
        check_weight(weight)
        check_input(weight, x)
        y = ops.product(with_tokens(x, len(weight.shape) - 2, xp=ops.xp), transpose(weight))
        return ops.xp.reshape(y, (*x.shape[:-1], weight.shape[-2]))

    def transpose(self, dy: Array, weight: Array, x_shape: tuple[int, ...]) -> Array:
        """Return dy W, in `x_shape`."""
        ops = operations(dy=dy, weight=weight)
        check_output_gradient(dy, (*x_shape[:-1], weight.shape[-2]))
        d = with_tokens(dy, len(weight.shape) - 2, xp=ops.xp)
        return ops.xp.reshape(ops.product(d, weight), x_shape)

    def weight_gradient(self, dy: Array, x: Array, weight_shape: tuple[int, ...]) -> Array:
        """Return dyᵀ x, in `weight_shape`."""
        ops = operations(dy=dy, x=x)
        depth = len(weight_shape) - 2
        d, tokens = (with_tokens(array, depth, xp=ops.xp) for array in (dy, x))
        return ops.product(transpose(d), tokens)


@dataclass(frozen=True)
class Convolution:
    """A convolution over one to three dimensions, as torch.nn.Conv1d to Conv3d have it.

    ::

        y[b, o, p] = Σ W[o, i, k] x[b, i, p·stride − padding + k·dilation]

    The sum is over the inputs i of o's group and the offsets k of the kernel; x is 0 outside of
    its size. The groups are in/(in of the weight).

    Parameters
    ----------
    stride, padding, dilation : int or sequence of int
        One number for each dimension, or one for all. `padding` adds zeros on both sides.

    Raises
    ------
    TypeError
        A number is not an integer.
    ValueError
        A number is out of range, or there are not one to three.

    Examples
    --------
    >>> import numpy as np
    >>> x, weight = np.arange(5.0).reshape(1, 1, 5), np.array([[[1.0, 0.0, -1.0]]])
    >>> Convolution(padding=1).apply(x, weight)
    array([[[-1., -2., -2., -2.,  3.]]])
    """

    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] = 0
    dilation: int | Sequence[int] = 1

    kind: ClassVar[LayerKind] = LayerKind("conv")
    channel_axis: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name in ("stride", "padding", "dilation"):
            value, least = getattr(self, name), 0 if name == "padding" else 1
            if isinstance(value, Sequence) and not isinstance(value, str):
                if not 1 <= len(value) <= 3:
                    raise ValueError(f"{name} must have 1 to 3 numbers, got {tuple(value)}")
                value = tuple(check_count(name, each, least=least) for each in value)
            else:
                value = check_count(name, value, least=least)
            object.__setattr__(self, name, value)

    def apply(self, x: Array, weight: Array) -> Array:
        """Return y in x's dtype, with an output for each position of the windows."""
        ops = operations(x=x, weight=weight)
        windows, groups = self._windows(tuple(x.shape), tuple(weight.shape))
        tokens = ops.convolve(x, _by_group(weight, groups, ops=ops), windows)
        shape = x.shape[0], weight.shape[0], *windows.positions
        return by_channel(tokens, shape, self.channel_axis, xp=ops.xp)

    def transpose(self, dy: Array, weight: Array, x_shape: tuple[int, ...]) -> Array:
        """Return the gradient by x, in `x_shape`."""
        ops = operations(dy=dy, weight=weight)
        windows, groups = self._windows(tuple(x_shape), tuple(weight.shape))
        check_output_gradient(dy, (x_shape[0], weight.shape[0], *windows.positions))
        tokens = by_token(dy, self.channel_axis, groups, xp=ops.xp)
        return ops.convolve_transposed(tokens, _by_group(weight, groups, ops=ops), windows)

    def weight_gradient(self, dy: Array, x: Array, weight_shape: tuple[int, ...]) -> Array:
        """Return the gradient by the weight, in `weight_shape`."""
        ops = operations(dy=dy, x=x)
        windows, groups = self._windows(tuple(x.shape), tuple(weight_shape))
        check_output_gradient(dy, (x.shape[0], weight_shape[0], *windows.positions))
        tokens = by_token(dy, self.channel_axis, groups, xp=ops.xp)
        gradient = ops.convolve_gradient(tokens, x, windows)
        return ops.xp.reshape(gradient, tuple(weight_shape))

    def check_groups(self, x: tuple[int, ...], weight: tuple[int, ...], groups: int) -> None:
        """Refuse shapes that do not fit, or that fit with other groups than the kind has."""
        _, found = self._windows(x, weight)
        if found != groups:
            of_groups = f"{counted(groups, 'group')} · {weight[1]} = {groups * weight[1]}"
            raise ValueError(
                f"x must have in = {of_groups}, for a weight of shape {weight}, got {x[1]}: "
                f"for other groups pass kind=LayerKind('conv', groups={found}) everywhere"
            )

    def _windows(self, x: tuple[int, ...], weight: tuple[int, ...]) -> tuple[Windows, int]:
        """Return the shape of the convolution and the groups. Refuse shapes that do not fit."""
        dims = len(weight) - 2
        if not 1 <= dims <= 3 or 0 in weight:
            raise ValueError(
                "the weight of a convolution must have shape (out, in/groups, *kernel) with a "
                f"kernel of 1 to 3 dimensions and no axis of length 0, got {weight}"
            )
        if len(x) != dims + 2 or 0 in x[1:] or x[1] % weight[1] or weight[0] % (x[1] // weight[1]):
            raise ValueError(
                f"x must have shape (batch, in, *size) with {counted(dims, 'size')}, and in a "
                f"multiple of {weight[1]} by which out = {weight[0]} can be split, for a "
                f"weight of shape {weight}, got {x}"
            )
        each = {}
        for name in ("stride", "padding", "dilation"):
            value = getattr(self, name)
            each[name] = value if isinstance(value, tuple) else (value,) * dims
            if len(each[name]) != dims:
                raise ValueError(
                    f"{name} must be one number or {dims}, one for each dimension of a kernel of "
                    f"shape {weight[2:]}, got {value}"
                )
        windows = Windows(x[2:], weight[2:], **each)
        if min(windows.positions) < 1:
            raise ValueError(
                f"the kernel must fit into x: it spans {windows.extents} with its dilation, and "
                f"x with its padding has {windows.padded}"
            )
        return windows, x[1] // weight[1]


@dataclass(frozen=True)
class Embedding:
    """The rows of a table: y = scale · W[ids].

    Parameters
    ----------
    scale : float
        Multiplies the rows, as Gemma's embeddings do with √dim; PEFT calls it `embed_scale`.

    Raises
    ------
    TypeError
        `scale` is not a number.
    ValueError
        `scale` is 0 or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> Embedding(scale=2.0).apply(np.array([1, 0]), np.array([[1.0, 2.0], [3.0, 4.0]]))
    array([[6., 8.],
           [2., 4.]])
    """

    scale: float = 1.0

    kind: ClassVar[LayerKind] = LayerKind("embedding")
    channel_axis: ClassVar[int] = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", check_real("scale", self.scale, rule="a number"))
        if self.scale == 0 or not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite and not 0, got {self.scale}")

    def apply(self, ids: Array, weight: Array) -> Array:
        """Return scale · W[ids]: integers (...) and (tokens, dim) -> (..., dim)."""
        ops = operations(weight=weight)
        _check_table(tuple(weight.shape))
        check_ids(ids, weight.shape[0], weight, ops=ops)
        rows = ops.rows_at(ops.xp.reshape(ids, (-1,)), weight)
        rows = rows if self.scale == 1 else self.scale * rows
        return ops.xp.reshape(rows, (*ids.shape, weight.shape[1]))

    def transpose(self, dy: Array, weight: Array, x_shape: tuple[int, ...]) -> Array:
        """Raise TypeError: ids have no gradient."""
        raise TypeError("an Embedding has no gradient by its ids: they are integers")

    def weight_gradient(self, dy: Array, ids: Array, weight_shape: tuple[int, ...]) -> Array:
        """Return the table whose rows are the sums of scale · dy over the places with their id."""
        ops = operations(dy=dy)
        _check_table(tuple(weight_shape))
        check_ids(ids, weight_shape[0], dy, ops=ops)
        check_output_gradient(dy, (*ids.shape, weight_shape[1]))
        rows = ops.xp.reshape(dy, (-1, weight_shape[1]))
        rows = rows if self.scale == 1 else self.scale * rows
        return ops.sums_at(ops.xp.reshape(ids, (-1,)), rows, weight_shape[0])


def check_ids(ids: Array, count: int, other: Array, *, ops: Operations) -> None:
    """Refuse ids that are not integers in 0 ≤ id < count, beside an array of the same layer.

    Values are read only where the host can read them.
    """
    xp = ops.xp
    try:
        known = array_namespace(ids) is xp
    except TypeError:
        known = False
    if not known:
        raise TypeError(
            f"ids must be an array of the library of the weight, got {type(ids).__name__}"
        )
    if not is_integer(ids):
        raise TypeError(f"ids must be of an integer dtype, got {ids.dtype}")
    places = device(ids), device(other)
    if None not in places and places[0] != places[1]:  # JAX's traced arrays have no device
        raise ValueError(f"ids must be on {places[1]}, where the weight is")
    if 0 in ids.shape or not ops.can_read_values(ids):
        return
    low, high = (int(float(extreme)) for extreme in (xp.min(ids), xp.max(ids)))
    if low < 0 or high >= count:
        raise ValueError(
            f"ids must be in 0 ≤ id < {count}, the rows of the table, got "
            f"{low if low < 0 else high}"
        )


def _check_table(shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            "the weight of an embedding must have shape (tokens, dim) with no axis of length 0, "
            f"got {shape}"
        )


def _by_group(weight: Array, groups: int, *, ops: Operations) -> Array:
    """Return the weight of a convolution as matrices: (out, in/groups·kernel) by groups."""
    out, *inner = weight.shape
    return ops.xp.reshape(weight, (groups, out // groups, math.prod(inner)))
