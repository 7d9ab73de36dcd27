"""Trees of parameters, and the numbers that go with their leaves.

    tree   a NamedTuple of arrays, or a dict of trees
    leaf   one array of a tree
    path   of a leaf: "['q_proj'].lora_a"

Leaves are matched by path, not by position, because JAX sorts the keys of a dict.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Collection, Iterator, Sequence
from numbers import Real
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import array_api_compat

from doraxp._base.scalars import check_number
from doraxp._base.types import Array
from doraxp.backends import (
    Operations,
    array_namespace,
    compute_dtype,
    operations,
    operations_of_plain,
)

Params = TypeVar("Params")
PerLeaf: TypeAlias = Any
"""A number or 0-d array; a NamedTuple of these; or a dict of numbers and NamedTuples."""
Structure: TypeAlias = tuple[Any, ...]
"""A tree without its leaves: the fields of a NamedTuple; or the keys of a dict, their types, and
the structures below them. It is hashable."""

_SHAPE = operator.attrgetter("shape")
_FIELDS: dict[type, tuple[str, ...]] = {}
"""The fields of each class of NamedTuple that was in a tree."""


class Names(NamedTuple):
    """The names of the leaves of a structure, in order."""

    paths: tuple[str, ...]
    fields: tuple[str, ...]
    """The last part of each path: the field of a NamedTuple."""
    nodes: tuple[tuple[str, ...], ...]
    """The fields of each NamedTuple."""


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
        _check_paths(name, paths, self._first, wanted)
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
    leaves: list[Array] = []
    try:
        return _structure(tree, leaves), leaves
    except TypeError:
        raise TypeError(_refusal(name, tree)) from None


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
                leaves += entry
        return keys, tuple(map(type, keys)), *below  # 1 and True are equal, but not their paths
    kind = tree.__class__
    if not _is_node(kind):
        raise TypeError("neither a dict nor a NamedTuple")  # `_refusal` names the place
    leaves += tree
    _FIELDS[kind] = kind._fields
    return _FIELDS[kind]


def _is_node(kind: type) -> bool:
    """Return whether a class is that of a NamedTuple."""
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


def _refusal(name: str, tree: Any) -> str:
    """Return the error of the first part of a tree that is neither a dict nor a NamedTuple."""
    if isinstance(tree, dict):
        parts = (_refusal(f"{name}[{key!r}]", entry) for key, entry in tree.items())
        return next(filter(None, parts), "")
    if _is_node(type(tree)):
        return ""
    return f"{name} must be a NamedTuple of arrays or a dict of them, got {type(tree).__name__}"


@functools.lru_cache(maxsize=64)
def _names(structure: Structure) -> Names:
    """Return the names of the leaves. A training loop asks for the same ones in each step."""
    nodes = list(_nodes(structure, ""))
    fields = tuple(field for _, node in nodes for field in node)
    paths = tuple(f"{path}.{field}" for path, node in nodes for field in node)
    return Names(paths, fields, tuple(node for _, node in nodes))


def _nodes(structure: Structure, path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the path and the fields of each NamedTuple."""
    if structure and isinstance(structure[0], tuple):
        keys, _, *below = structure
        for key, each in zip(keys, below, strict=True):
            yield from _nodes(each, f"{path}[{key!r}]")
    else:
        yield path, structure


def _filled(tree: Any, leaves: Iterator[Array]) -> Any:
    """Return the structure of `tree` with the next leaves of an iterator."""
    if isinstance(tree, dict):
        return {key: _filled(entry, leaves) for key, entry in tree.items()}
    return tree._make(itertools.islice(leaves, len(tree)))


def _check_paths(name: str, paths: Collection[str], other: str, wanted: Collection[str]) -> None:
    """Raise ValueError unless two trees have the same paths."""
    absent = [name + path for path in wanted if path not in paths]
    absent += [other + path for path in paths if path not in wanted]
    if absent:
        raise ValueError(
            f"{name} and {other} must have the same entries; missing: {', '.join(absent)}"
        )


def per_leaf(name: str, value: Any, aligned: Aligned, *, spared: str = "") -> list[float | Array]:
    """Return a number for each leaf of the first of the aligned trees, in order.

    Where `value` is one number for all leaves, those named `spared` get 0 instead.
    """
    ops, (paths, fields, nodes) = aligned.ops, aligned.names
    given: tuple[str, ...] | None = getattr(value, "_fields", None)
    if given is None and not isinstance(value, dict):
        number = _number(name, value, ops=ops)
        if not spared:
            return [number] * len(fields)
        return [0.0 if field == spared else number for field in fields]
    if given is not None and all(node == given for node in nodes):
        first = zip(paths[: len(given)], value, strict=True)
        numbers = [_number(name + path, each, ops=ops) for path, each in first]
        return numbers * len(nodes)
    by_path = _by_path(name, value, aligned.first, spared=spared, ops=ops)
    return [by_path[path] for path in paths]


def _by_path(
    name: str, value: Any, tree: Any, path: str = "", *, spared: str, ops: Operations
) -> dict[str, float | Array]:
    """Return the result of `per_leaf` by path, for any mixture of dicts and NamedTuples."""
    if isinstance(tree, dict):
        each = value if isinstance(value, dict) else dict.fromkeys(tree, value)
        given, wanted = ([f"{path}[{key!r}]" for key in keys] for keys in (each, tree))
        _check_paths(name, given, "params", wanted)
        entries = (
            _by_path(name, each[key], tree[key], f"{path}[{key!r}]", spared=spared, ops=ops)
            for key in tree
        )
        return {path: number for numbers in entries for path, number in numbers.items()}
    if hasattr(value, "_asdict"):
        given, wanted = ([f"{path}.{field}" for field in one._fields] for one in (value, tree))
        _check_paths(name, given, "params", wanted)
        numbers = zip(given, value, strict=True)
        return {path: _number(name + path, number, ops=ops) for path, number in numbers}
    number = _number(name + path, value, ops=ops)
    return {f"{path}.{field}": 0.0 if field == spared else number for field in tree._fields}


def _number(name: str, value: Any, *, ops: Operations) -> float | Array:
    """Return a float; or `value` itself, where it is a 0-d array that must not be read."""
    if value.__class__ is float or isinstance(value, Real):
        return check_number(name, value)
    xp = ops.xp
    known = array_api_compat.is_array_api_obj(value)
    if not known or array_namespace(value) is not xp or value.ndim != 0:
        raise TypeError(
            f"{name} must be a number or a 0-d array of the library of params, got {value!r}"
        )
    if not xp.isdtype(value.dtype, ("real floating", "integral")):
        raise TypeError(f"{name} must be of a real dtype, got {value.dtype}")
    return check_number(name, float(value)) if ops.can_read_values(value) else value


def zeros_like(params: Params) -> Params:
    """Return zeros for each leaf, in its compute dtype."""
    aligned = align(params=params)
    xp = aligned.ops.xp
    zeros = [xp.zeros_like(leaf, dtype=compute_dtype(leaf, xp=xp)) for leaf in aligned.columns[0]]
    return cast(Params, aligned.build("params", zeros))
