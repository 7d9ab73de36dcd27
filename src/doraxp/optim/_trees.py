"""Trees of parameters, taken apart and built again.

    tree   a NamedTuple of arrays, or a dict of arrays and trees
    leaf   one array of a tree
    path   of a leaf: "['q_proj'].lora_a" in a NamedTuple, "['q_proj']['lora_a']" in a dict

Leaves are matched by path, not by position, because JAX sorts the keys of a dict.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

from doraxp._base.types import Array
from doraxp.backends import Operations, compute_dtype, operations, operations_of_plain

Params = TypeVar("Params")
Structure: TypeAlias = tuple[Any, ...]
"""A tree without its leaves: the fields of a NamedTuple; or the keys of a dict, their types, and
the structures below them, () for a leaf. It is hashable."""

_SHAPE = operator.attrgetter("shape")
_FIELDS: dict[type, tuple[str, ...]] = {}
"""The fields of each class of NamedTuple that was in a tree, and () for each class of arrays."""


class Names(NamedTuple):
    """The names of the leaves of a structure, in order."""

    paths: tuple[str, ...]
    fields: tuple[Any, ...]
    """The last part of each path: the field of a NamedTuple, or the key of a dict."""
    firsts: dict[Any, str]
    """The first path of each field."""
    pairs: tuple[tuple[int, int], ...]
    """The places of the `lora_a` and the `lora_b` of each NamedTuple or dict that has both."""


class Aligned:
    """Trees of one structure, taken apart: a column holds the leaves of one tree.

    All columns have the order of the first tree.
    """

    def __init__(self, trees: dict[str, Any]) -> None:
        """Take the trees apart. An error calls a leaf by the name of its tree and its path."""
        self._trees = trees
        self.first = next(iter(trees.values()))
        taken = {name: _take_apart(name, tree) for name, tree in trees.items()}
        self._structures = {name: structure for name, (structure, _) in taken.items()}
        (self._first, (structure, leaves)), *others = taken.items()
        if not leaves:
            raise ValueError(
                f"{self._first} must hold at least one array, got {trees[self._first]!r}"
            )
        self.names = _names(structure)
        self.columns: list[list[Array]] = [leaves]
        for name, (other, column) in others:
            self.columns.append(column if other == structure else self._ordered(name, column))
        self.leaves = [*itertools.chain(*self.columns)]
        self.ops: Operations = operations_of_plain(self.leaves) or operations(**self.named())
        self._check_shapes()

    def named(self) -> dict[str, Array]:
        """Return all leaves by the names of their trees and their paths."""
        columns = zip(self._trees, self.columns, strict=True)
        return {
            name + path: leaf
            for name, column in columns
            for path, leaf in zip(self.names.paths, column, strict=True)
        }

    def build(self, name: str, column: Sequence[Array]) -> Any:
        """Return a column of leaves in the structure of the tree `name`.

        Return the tree itself if these are its leaves.
        """
        if column is self.columns[[*self._trees].index(name)]:
            return self._trees[name]
        structure = self._structures[name]
        if structure != self._structures[self._first]:
            by_path = dict(zip(self.names.paths, column, strict=True))
            column = [by_path[path] for path in _names(structure).paths]
        return _filled(self._trees[name], iter(column))

    def _ordered(self, name: str, column: Sequence[Array]) -> list[Array]:
        """Return the leaves of the tree `name` in the order of the first tree."""
        paths, wanted = _names(self._structures[name]).paths, self.names.paths
        check_paths(name, paths, self._first, wanted)
        by_path = dict(zip(paths, column, strict=True))
        return [by_path[path] for path in wanted]

    def _check_shapes(self) -> None:
        """Refuse a tree with a leaf of another shape than in the first tree."""
        shapes = list(map(_SHAPE, self.columns[0]))
        others = zip([*self._trees][1:], self.columns[1:], strict=True)
        for name, column in others:
            if list(map(_SHAPE, column)) == shapes:
                continue
            for path, leaf, shape in zip(self.names.paths, column, shapes, strict=True):
                if tuple(leaf.shape) != tuple(shape):
                    raise ValueError(
                        f"{name}{path} must have the shape of {self._first}{path}, {tuple(shape)}, "
                        f"got {tuple(leaf.shape)}"
                    )


def align(**trees: Any) -> Aligned:
    """Take trees apart, and refuse one that differs from the first in structure or shapes."""
    return Aligned(trees)


def _take_apart(name: str, tree: Any) -> tuple[Structure, list[Array]]:
    """Return the structure of a tree, and its leaves in order."""
    if not isinstance(tree, dict) and not _is_node(type(tree)):
        raise TypeError(
            f"{name} must be a NamedTuple of arrays or a dict of arrays and such trees, got "
            f"{type(tree).__name__}"
        )
    leaves: list[Array] = []
    return _structure(tree, leaves), leaves


def _structure(tree: Any, leaves: list[Array]) -> Structure:
    """Return the structure of a tree, and append its leaves to `leaves`."""
    if isinstance(tree, dict):
        keys, below = tuple(tree), []
        for entry in tree.values():
            fields = _FIELDS.get(entry.__class__)
            if fields is None:
                below.append(_structure(entry, leaves))
            else:
                below.append(fields)
                if fields:
                    leaves += entry
                else:
                    leaves.append(entry)
        return keys, tuple(map(type, keys)), *below  # 1 and True are equal, but not their paths
    kind = tree.__class__
    fields = kind._fields if _is_node(kind) else ()
    leaves += tree if fields else [tree]
    _FIELDS[kind] = fields
    return fields


def _is_node(kind: type) -> bool:
    """Return whether a class is that of a NamedTuple with at least one field."""
    return issubclass(kind, tuple) and bool(getattr(kind, "_fields", ()))


@functools.lru_cache(maxsize=64)
def _names(structure: Structure) -> Names:
    """Return the names of the leaves. A training loop asks for the same ones in each step."""
    leaves = list(_leaves(structure, ""))
    fields = tuple(field for _, _, field in leaves)
    paths = tuple(parent + end for parent, end, _ in leaves)
    firsts = dict(reversed([*zip(fields, paths, strict=True)]))
    places = {(parent, field): place for place, (parent, _, field) in enumerate(leaves)}
    pairs = [
        (place, places[parent, "lora_b"])
        for (parent, field), place in places.items()
        if field == "lora_a" and (parent, "lora_b") in places
    ]
    return Names(paths, fields, firsts, tuple(pairs))


def _leaves(structure: Structure, path: str) -> Iterator[tuple[str, str, Any]]:
    """Yield the path of the parent, the last part of the path and the field of each leaf."""
    if not isinstance(structure[0], tuple):
        yield from ((path, f".{field}", field) for field in structure)
        return
    keys, _, *below = structure
    for key, each in zip(keys, below, strict=True):
        if each:
            yield from _leaves(each, f"{path}[{key!r}]")
        else:
            yield path, f"[{key!r}]", key


def names_of(tree: Any) -> Names:
    """Return the names of the leaves of a tree."""
    return _names(_structure(tree, []))


def _filled(tree: Any, leaves: Iterator[Array]) -> Any:
    """Return the structure of `tree` with the next leaves of an iterator."""
    if isinstance(tree, dict):
        return {key: _filled(entry, leaves) for key, entry in tree.items()}
    if _FIELDS[tree.__class__]:
        return tree._make(itertools.islice(leaves, len(tree)))
    return next(leaves)


def check_paths(name: str, paths: Collection[str], other: str, wanted: Collection[str]) -> None:
    """Raise ValueError unless two trees have the same paths."""
    absent = [name + path for path in wanted if path not in paths]
    absent += [other + path for path in paths if path not in wanted]
    if absent:
        raise ValueError(
            f"{name} and {other} must have the same entries; missing: {', '.join(absent)}"
        )


def zeros_like(params: Params) -> Params:
    """Return zeros for each leaf, in its compute dtype."""
    aligned = align(params=params)
    xp = aligned.ops.xp
    zeros = [xp.zeros_like(leaf, dtype=compute_dtype(leaf, xp=xp)) for leaf in aligned.columns[0]]
    return cast(Params, aligned.build("params", zeros))
