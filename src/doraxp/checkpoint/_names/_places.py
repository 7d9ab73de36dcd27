"""`Wanted` and `Place`: a tensor that an adapter is for, and the rows of the base that it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

WEIGHT = "weight"


class Wanted(NamedTuple):
    """A tensor of the base that an adapter is for, under the adapter's name."""

    path: str
    """The module."""
    leaf: str
    """The tensor in the module: "weight" or "bias"."""
    shape: tuple[int, ...] | None
    """None where the base may have another shape: the adapter has the tensor in full."""
    is_stack: bool = False
    """Whether it is a stack of experts, (experts, out, in), or each of them transposed."""

    @property
    def name(self) -> str:
        """The tensor's name."""
        return f"{self.path}.{self.leaf}" if self.path else self.leaf

    def fits(self, there: tuple[int, ...]) -> bool:
        """Return whether it may be stored in the shape `there`."""
        if self.is_stack and self.shape is not None:
            stack, *sides = self.shape
            return there in (self.shape, (stack, *sides[::-1]))
        return fits(self.shape, there)

    def fits_rows(self, there: tuple[int, ...]) -> bool:
        """Return whether it may be some rows of a tensor of the shape `there`."""
        return not self.is_stack and fits_rows(self.shape, there)


class Place(NamedTuple):
    """Rows of a tensor of the base, and the rows of the module that are for them."""

    tensor: str
    rows: slice | None = None
    """Of the tensor; None for all."""
    own: slice | None = None
    """Of the module, or of one expert of it; None for all."""
    expert: int | None = None
    """The expert that the tensor is of; None where it is not of one of several."""


Places: TypeAlias = tuple[Place, ...]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


def fits(shape: tuple[int, ...] | None, there: tuple[int, ...]) -> bool:
    """Return whether a weight may be stored in the shape `there`: as it is, or transposed.

    A convolution's adapter may have its last axes as one: (out, in·kernel) or (out, in, kernel).
    """
    if shape is None or shape == there or (len(shape) == 2 and shape[::-1] == there):
        return True
    known = 1 if len(shape) == 2 else 2
    is_flat = 2 <= len(shape) < len(there) and shape[:known] == there[:known]
    return is_flat and math.prod(shape) == math.prod(there)


def fits_rows(shape: tuple[int, ...] | None, there: tuple[int, ...]) -> bool:
    """Return whether a weight may be some rows of a tensor of the shape `there`."""
    return shape is not None and shape[1:] == there[1:] and 0 < shape[0] < there[0]


def cut(starts: Sequence[int], stop: int) -> list[slice]:
    """Return the slices that begin at `starts`; the last one ends at `stop`."""
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], stop], strict=True)]
