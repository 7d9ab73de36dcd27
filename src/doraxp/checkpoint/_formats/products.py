"""LoHa and LoKr: the tensors of one module, as LyCORIS and PEFT name them.

::

    LoHa    hada_w1_a (out, r)   hada_w1_b (r, in·kernel)   hada_w2_a   hada_w2_b
    cores   hada_t1 (r, r, *kernel), and then hada_w1_a (r, out), hada_w1_b (r, in); hada_t2
    LoKr    lokr_w1 (p, q)               or lokr_w1_a (p, r), lokr_w1_b (r, q)
            lokr_w2 (out/p, in/q, …)     or lokr_w2_a (out/p, r), lokr_w2_b (r, in/q·kernel)
    core    lokr_t2 (r, r, *kernel), and then lokr_w2_a (r, out/p), lokr_w2_b (r, in/q)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._safetensors import Reader
from doraxp.checkpoint._update_names import HadamardNames, KroneckerNames

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = (
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
    *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)


class Product(NamedTuple):
    """The update of one module, as its tensors' shapes tell it."""

    names: HadamardNames | KroneckerNames
    shape: tuple[int, ...]
    """Of the weight; flat after the first axis where the tensors do not tell the kernel."""
    rank: int | None
    """None where both sides of LoKr are whole."""


def product(reader: Reader, path: str, parts: Mapping[str, str], magnitude: str | None) -> Product:
    """Return the update of a module whose tensors have the names of LoHa or LoKr.

    Parameters
    ----------
    reader : Reader
    path : str
        The module, for errors.
    parts : mapping of str to str
        The names in the file by those above.
    magnitude : str, optional
        The name of m in the file.

    Raises
    ------
    CheckpointError
        A tensor is missing, or the shapes do not fit each other.
    """
    shapes = _Shapes(reader, path, parts)
    if not parts.keys().isdisjoint(LOHA):
        return _hadamard(shapes, magnitude)
    return _kronecker(shapes, magnitude)


def _hadamard(shapes: _Shapes, magnitude: str | None) -> Product:
    shapes.check_there("LoHa", *LOHA[:4])
    cores = [name for name in LOHA[4:] if name in shapes.parts]
    if len(cores) == 1:
        raise shapes.error(f"LoHa has {cores[0]} alone, and must have both cores or none")
    first, second = (
        shapes.low_rank(f"hada_w{place}_a", f"hada_w{place}_b", f"hada_t{place}")
        for place in (1, 2)
    )
    if first.shape != second.shape:
        raise shapes.error(
            f"both products of LoHa must have one shape, got {first.shape} and {second.shape}"
        )
    w1_a, w1_b, w2_a, w2_b = (shapes.parts[name] for name in LOHA[:4])
    both = (shapes.parts[LOHA[4]], shapes.parts[LOHA[5]]) if cores else None
    names = HadamardNames(w1_a, w1_b, w2_a, w2_b, both, magnitude)
    return Product(names, first.shape, first.rank)


def _kronecker(shapes: _Shapes, magnitude: str | None) -> Product:
    left, p_q, left_rank = shapes.side("lokr_w1")
    right, own, right_rank = shapes.side("lokr_w2", "lokr_t2")
    if len(p_q) != 2:
        raise shapes.error(f"lokr_w1 must have two axes, got {p_q}")
    shape = (p_q[0] * own[0], p_q[1] * own[1], *own[2:])
    names = KroneckerNames(left, right, shapes.parts.get("lokr_t2"), magnitude)
    return Product(names, shape, left_rank if left_rank is not None else right_rank)


class _LowRank(NamedTuple):
    shape: tuple[int, ...]
    rank: int


class _Side(NamedTuple):
    names: tuple[str, ...]
    shape: tuple[int, ...]
    rank: int | None
    """None for a side that is one tensor."""


class _Shapes:
    """The shapes of one module's tensors."""

    def __init__(self, reader: Reader, path: str, parts: Mapping[str, str]) -> None:
        self._reader, self._path, self.parts = reader, path, parts

    def error(self, problem: str) -> CheckpointError:
        """Return an error that names the module."""
        return CheckpointError(f"{self._reader.path}: {self._path}: {problem}")

    def check_there(self, algorithm: str, *names: str) -> None:
        """Raise CheckpointError where a tensor is missing."""
        missing = [name for name in names if name not in self.parts]
        if missing:
            raise self.error(f"{algorithm} needs {', '.join(missing)}, which the file lacks")

    def side(self, name: str, core: str = "") -> _Side:
        """Return one side of LoKr."""
        if name in self.parts:
            both = [one for one in (f"{name}_a", f"{name}_b", core) if one in self.parts]
            if both:
                raise self.error(f"{name} and {both[0]} are the same side of LoKr")
            return _Side((self.parts[name],), self._shape(name), None)
        self.check_there("LoKr", f"{name}_a", f"{name}_b")
        found = self.low_rank(f"{name}_a", f"{name}_b", core)
        names = (self.parts[f"{name}_a"], self.parts[f"{name}_b"])
        return _Side(names, found.shape, found.rank)

    def low_rank(self, left: str, right: str, core: str) -> _LowRank:
        """Return the shape that two factors and a core make, and their rank."""
        a, b = self._shape(right), self._shape(left)
        if core not in self.parts:
            if len(b) != 2 or b[1] != a[0]:
                raise self.error(
                    f"{left} must have shape (out, rank) and {right} (rank, in), got {b} and {a}"
                )
            return _LowRank((b[0], *a[1:]), a[0])
        t = self._shape(core)
        if len(t) < 3 or (len(a), len(b)) != (2, 2) or t[:2] != (b[0], a[0]) or a[0] != b[0]:
            raise self.error(
                f"{core} must have shape (rank, rank, *kernel), {left} (rank, out) and {right} "
                f"(rank, in), got {t}, {b} and {a}"
            )
        return _LowRank((b[1], a[1], *t[2:]), t[0])

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self._reader.tensors[self.parts[name]].shape
        if len(shape) < 2 or math.prod(shape) == 0:
            raise self.error(f"{name} must have at least two axes, none of length 0, got {shape}")
        return shape
