"""Kinds of layer: how each stores its weight, and the matrix that DoRA adapts.

::

    kind          stored                       matrix
    linear        (out, in)                    W
    experts       (*stack, out, in)            W, an adapter for each element of the stack
    transposed    (in, out)                    Wᵀ, (out, in); GPT-2's Conv1D
    transposed_experts
                  (*stack, in, out)            Wᵀ of each element, (*stack, out, in)
    embedding     (tokens, dim)                Wᵀ, (dim, tokens): one norm per dimension
    columns       (out, in, *kernel)           Wᵀ, (in, out·kernel): one norm per input; LyCORIS
                                               with wd_on_output=False
    conv          (out, in/groups, *kernel)    (out, in·kernel); with groups a stack of them,
                                               (groups, out/groups, in/groups·kernel)

A grouped convolution is a stack: the update of a group stays in its group. Stride, padding and
dilation do not change the weight, and so they do not matter here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from doraxp._base.types import Array
from doraxp.backends import array_namespace, check_shaped, is_by_rows

KindName: TypeAlias = Literal[
    "linear", "experts", "transposed", "transposed_experts", "embedding", "columns", "conv"
]
_STORED = {
    "linear": "(out, in)",
    "experts": "(*stack, out, in)",
    "transposed": "(in, out)",
    "transposed_experts": "(*stack, in, out)",
    "embedding": "(tokens, dim)",
    "columns": "(out, in, *kernel)",
    "conv": "(out, in/groups, *kernel)",
}
_TRANSPOSED = ("transposed", "transposed_experts", "embedding", "columns")
_EXPERTS = ("experts", "transposed_experts")


@dataclass(frozen=True)
class LayerKind:
    """How a layer stores its weight.

    Parameters
    ----------
    name : {"linear", "experts", "transposed", "transposed_experts", "embedding", "columns", "conv"}
    groups : int
        The groups of a convolution; 1 for every other kind.

    Raises
    ------
    ValueError
        The name is unknown, or `groups` is below 1, or above 1 for another kind than "conv".

    Examples
    --------
    >>> import numpy as np
    >>> kind = LayerKind("conv", groups=2)
    >>> matrix = kind.matrix(np.ones((6, 4, 3, 3)))
    >>> matrix.shape, kind.restore(matrix, (6, 4, 3, 3)).shape
    ((2, 3, 36), (6, 4, 3, 3))
    """

    name: KindName = "linear"
    groups: int = 1

    def __post_init__(self) -> None:
        if self.name not in get_args(KindName):
            raise ValueError(f"kind must be one of {get_args(KindName)}, got {self.name!r}")
        if self.groups < 1 or (self.groups > 1 and self.name != "conv"):
            raise ValueError(
                f"groups must be 1, or at least 1 for a conv, got {self.groups} for {self.name!r}"
            )

    @property
    def is_transposed(self) -> bool:
        """Whether the matrix is the transpose of the stored weight."""
        return self.name in _TRANSPOSED

    @property
    def is_stack(self) -> bool:
        """Whether the weight is a stack of matrices, such as one for each expert."""
        return self.name in _EXPERTS

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the matrix of a weight stored in `shape`.

        Raises
        ------
        ValueError
            No layer of this kind has a weight of that shape.
        """
        ranks = {"conv": (3, 5), "columns": (2, 5)} | dict.fromkeys(_EXPERTS, (3, math.inf))
        least, most = ranks.get(self.name, (2, 2))
        if not least <= len(shape) <= most or 0 in shape or shape[0] % self.groups:
            groups = f" and out a multiple of groups = {self.groups}" if self.groups > 1 else ""
            raise ValueError(
                f"a weight of kind {self.name!r} must have shape {_STORED[self.name]} with no axis "
                f"of length 0{groups}, got {shape}"
            )
        if self.name == "transposed_experts":
            return *shape[:-2], shape[-1], shape[-2]
        if self.is_transposed:
            return shape[1], shape[0] * math.prod(shape[2:])
        if self.name != "conv":
            return shape
        stack = (self.groups,) if self.groups > 1 else ()
        return (*stack, shape[0] // self.groups, math.prod(shape[1:]))

    def shape_with(self, shape: tuple[int, ...], outputs: int) -> tuple[int, ...]:
        """Return the shape of a weight with other outputs: `outputs` for each group of a conv."""
        if self.name == "conv":
            return self.groups * outputs, *shape[1:]
        if self.name == "transposed_experts" or (self.is_transposed and len(shape) == 2):
            return *shape[:-1], outputs
        if self.is_transposed:
            return shape[0], outputs, *shape[2:]
        return *shape[:-2], outputs, shape[-1]

    def matrix(self, weight: Array) -> Array:
        """Return the matrix (*stack, out, in) of a stored weight."""
        check_shaped("weight", weight)
        shape = self.matrix_shape(tuple(weight.shape))
        if is_by_rows(weight):
            if self.name != "linear":
                raise ValueError(
                    f"a weight that is given by rows must be of kind 'linear', got {self.name!r}"
                )
            return weight
        xp = array_namespace(weight)
        if self.name == "transposed_experts" or (self.is_transposed and len(weight.shape) == 2):
            return xp.matrix_transpose(weight)
        if self.is_transposed:
            weight = _swapped(weight)  # (in, out, *kernel)
        return xp.reshape(weight, shape)

    def restore(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        """Return a matrix in the shape that the weight is stored in."""
        xp = array_namespace(matrix)
        if self.name == "transposed_experts" or (self.is_transposed and len(shape) == 2):
            return xp.matrix_transpose(matrix)
        if self.is_transposed:
            out, inner, *kernel = shape
            return _swapped(xp.reshape(matrix, (inner, out, *kernel)))
        return xp.reshape(matrix, shape)


def _swapped(weight: Array) -> Array:
    """Return an array with its first two axes in the other order."""
    xp = array_namespace(weight)
    first, second, *kernel = weight.shape
    flat = xp.matrix_transpose(xp.reshape(weight, (first, second * math.prod(kernel))))
    by_second = xp.reshape(flat, (second, math.prod(kernel), first))
    return xp.reshape(xp.matrix_transpose(by_second), (second, first, *kernel))
