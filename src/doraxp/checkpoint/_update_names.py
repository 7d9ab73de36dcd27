"""The tensors of an update in an adapter's file, and the update that they make.

Each class has the names of one kind of update. `update` reads them as ΔW of the module, (out, in),
a convolution flat after its first axis, without s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from doraxp._base.types import Array, HostArray
from doraxp._core.updates import (
    Difference,
    Hadamard,
    Kronecker,
    LowRank,
    Mapped,
    Update,
    with_core,
)
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._expert_names import ExpertNames, Stack
from doraxp.checkpoint._safetensors import Reader, Source

Read: TypeAlias = Callable[[str], HostArray]
"""Returns a tensor of finite numbers by its name in the file."""


class TensorNames(NamedTuple):
    """The names of A, B and m; of a convolution with a Tucker core also that of the core."""

    lora_a: str
    lora_b: str
    magnitude: str | None = None
    core: str | None = None

    def update(self, reader: Reader, read: Read, rank: int, *, transposed: bool) -> Update:
        """Return B A; `transposed` says that the file has Aᵀ and Bᵀ."""
        a, b = read(self.lora_a), read(self.lora_b)
        if transposed:
            a, b = a.T, b.T
        a, b = a.reshape(rank, -1), b.reshape(-1, rank)
        if self.core is not None:
            a = np.asarray(with_core(wide(read(self.core)), wide(a)))
        return LowRank(a, b)


class HadamardNames(NamedTuple):
    """The names of LoHa's four factors, of two cores where it has them, and of m."""

    w1_a: str
    w1_b: str
    w2_a: str
    w2_b: str
    cores: tuple[str, str] | None = None
    magnitude: str | None = None

    def update(self, reader: Reader, read: Read, rank: int, *, transposed: bool) -> Update:
        """Return (w1_a w1_b) ⊙ (w2_a w2_b)."""
        first, second = self.cores or (None, None)
        return Hadamard(
            _product(read, self.w1_a, self.w1_b, first),
            _product(read, self.w2_a, self.w2_b, second),
        )


class KroneckerNames(NamedTuple):
    """The names of LoKr's two sides, each a tensor or two factors, of a core, and of m."""

    left: tuple[str, ...]
    right: tuple[str, ...]
    core: str | None = None
    magnitude: str | None = None
    is_of_peft: bool = False
    """True where a U of three axes is multiplied as PEFT does it: see `update`."""

    def update(self, reader: Reader, read: Read, rank: int, *, transposed: bool) -> Update:
        """Return C ⊗ U.

        PEFT multiplies C, (p, q), and a U of a convolution in one dimension, (k, l, kernel), as
        arrays with the last axes side by side, to (k, p·l, q·kernel), in its forward too.
        """
        parts = [read(name) for name in self.left]
        left = parts[0] if len(parts) == 1 else wide(parts[0]) @ wide(parts[1])
        if len(self.right) == 2:
            return Kronecker(left, _product(read, *self.right, self.core))
        right = read(self.right[0])
        if self.is_of_peft and right.ndim == 3:
            whole = np.kron(wide(left)[None], wide(right))
            return Difference(whole.reshape(len(left) * len(right), -1))
        return Kronecker(left, Difference(right.reshape(len(right), -1)))


class DifferenceNames(NamedTuple):
    """The names of a difference of a whole weight, and of m."""

    difference: str
    magnitude: str | None = None

    def update(self, reader: Reader, read: Read, rank: int, *, transposed: bool) -> Update:
        """Return the difference, which is read block by block."""
        return StoredDifference(Source(reader, self.difference))


ALGORITHMS = {
    TensorNames: "LoRA",
    HadamardNames: "LoHa",
    KroneckerNames: "LoKr",
    DifferenceNames: "full",
    ExpertNames: "LoRA",
}
"""The names of the kinds of update, as trainers have them."""
UpdateNames: TypeAlias = (
    TensorNames | HadamardNames | KroneckerNames | DifferenceNames | ExpertNames
)


def tensors_of(names: UpdateNames) -> list[str]:
    """Return the names of all tensors."""
    found: list[str] = []
    for name in names:
        if isinstance(name, str):
            found.append(name)
        elif isinstance(name, tuple):
            found += name
    return found


def _product(read: Read, left: str, right: str, core: str | None) -> LowRank:
    """Return a factor (out, rank) times one (rank, in), or (rank, out) and (rank, in) by a core."""
    a, b = read(right), read(left)
    if core is None:
        return LowRank(a.reshape(len(a), -1), b)
    return LowRank(np.asarray(with_core(wide(read(core)), wide(a))), b.T)


def wide(array: Array) -> HostArray:
    """Return an array in float32 at least, in which products lose nothing that counts."""
    own = np.asarray(array)
    return own.astype(np.promote_types(own.dtype, np.float32), copy=False)


class StoredDifference(NamedTuple):
    """ΔW as a tensor of a file, of which blocks of rows are read."""

    source: Source
    function: Mapped | None = None
    """Of each block."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        out, *others = self.source.tensor.shape
        return out, math.prod(others)

    def rows(self, rows: slice) -> Array:
        """Return some rows of ΔW, (k, in)."""
        block = self.source.read(rows).reshape(rows.stop - rows.start, -1)
        if not np.isfinite(block).all():
            raise CheckpointError(
                f"{self.source.reader.path}: {self.source.name} contains NaN or infinity"
            )
        return block if self.function is None else self.function(block)

    def scaled(self, factor: float) -> StoredDifference:
        """Return factor · ΔW."""
        return self.mapped(lambda block: factor * block)

    def mapped(self, function: Mapped) -> StoredDifference:
        """Return the update whose blocks are `function` of those of this one."""
        inner = self.function
        return self._replace(
            function=function if inner is None else lambda block: function(inner(block))
        )


class Rows(NamedTuple):
    """Some rows of an update: those of a module that are one of the base's tensors."""

    update: Update
    places: tuple[slice, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of these rows."""
        return sum(one.stop - one.start for one in self.places), self.update.shape[1]

    def rows(self, rows: slice) -> Array:
        """Return some of the rows, (k, in)."""
        parts, start = [], 0
        for place in self.places:
            size = place.stop - place.start
            first, last = max(rows.start - start, 0), min(rows.stop - start, size)
            if first < last:
                parts.append(self.update.rows(slice(place.start + first, place.start + last)))
            start += size
        return parts[0] if len(parts) == 1 else np.concatenate([np.asarray(one) for one in parts])

    def scaled(self, factor: float) -> Rows:
        """Return these rows of factor · ΔW."""
        return self._replace(update=self.update.scaled(factor))

    def mapped(self, function: Mapped) -> Rows:
        """Return these rows of the update of `function`."""
        return self._replace(update=self.update.mapped(function))


def some_rows(update: Update, places: tuple[slice, ...]) -> Update:
    """Return some rows of an update."""
    if isinstance(update, LowRank):
        b = np.asarray(update.lora_b)
        return update._replace(lora_b=np.concatenate([b[one] for one in places]))
    return Rows(update, places)


def transposed(update: Update) -> Update:
    """Return ΔWᵀ of a matrix."""
    if isinstance(update, LowRank | Stack):
        a, b = (np.asarray(leaf) for leaf in update)
        return type(update)(b.mT, a.mT)
    if isinstance(update, Hadamard):
        one, other = (LowRank(*map(_flipped, part[::-1])) for part in update)
        return Hadamard(one, other)
    if isinstance(update, Kronecker):
        return Kronecker(_flipped(update.left), transposed(update.right))
    return Difference(_flipped(update.rows(slice(0, update.shape[0]))))


def _flipped(array: Array) -> HostArray:
    return np.asarray(array).T
