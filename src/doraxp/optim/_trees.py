"""Trees of parameters, and the numbers that go with their leaves.

    tree   a NamedTuple of arrays, or a dict of trees
    leaf   one array of a tree
    path   of a leaf: "['q_proj'].lora_a"

Leaves are matched by path, not by position, because JAX sorts the keys of a dict.
"""

from __future__ import annotations

from collections.abc import Collection
from numbers import Real
from typing import Any, TypeAlias, TypeVar, cast

import array_api_compat

from doraxp._base.scalars import check_number
from doraxp._base.types import Array
from doraxp.backends import Operations, compute_dtype, operations

Params = TypeVar("Params")
PerLeaf: TypeAlias = Any
"""A number or 0-d array; a NamedTuple of these; or a dict of numbers and NamedTuples."""


def _leaves(name: str, tree: Any, path: str = "") -> dict[str, Array]:
    """Return the leaves of a tree by path. An error calls a leaf `name` + path."""
    if isinstance(tree, dict):
        entries = (_leaves(name, entry, f"{path}[{key!r}]") for key, entry in tree.items())
        return {path: leaf for leaves in entries for path, leaf in leaves.items()}
    if not hasattr(tree, "_asdict"):
        raise TypeError(
            f"{name}{path} must be a NamedTuple of arrays or a dict of them, "
            f"got {type(tree).__name__}"
        )
    return {f"{path}.{field}": leaf for field, leaf in tree._asdict().items()}


def build(tree: Params, leaves: dict[str, Array], path: str = "") -> Params:
    """Return the leaves, given by path, in the structure of `tree`."""
    like: Any = tree
    if isinstance(like, dict):
        built = {key: build(like[key], leaves, f"{path}[{key!r}]") for key in like}
    else:
        built = like._make(leaves[f"{path}.{field}"] for field in like._fields)
    return cast(Params, built)


def align(**trees: Any) -> tuple[Operations, dict[str, tuple[Array, ...]]]:
    """Return the operations, and by path the leaves of all trees at that path.

    Raise where a tree differs from the first in structure or shapes.
    """
    flat = {name: _leaves(name, tree) for name, tree in trees.items()}
    (first, leaves), *others = flat.items()
    if not leaves:
        raise ValueError(f"{first} must hold at least one array, got {trees[first]!r}")
    for name, other in others:
        _check_paths(name, other, first, leaves)
    arrays = {name + path: leaf for name, tree in flat.items() for path, leaf in tree.items()}
    ops = operations(**arrays)
    for name, other in others:
        for path, leaf in leaves.items():
            if tuple(other[path].shape) != tuple(leaf.shape):
                raise ValueError(
                    f"{name}{path} must have the shape of {first}{path}, {tuple(leaf.shape)}, "
                    f"got {tuple(other[path].shape)}"
                )
    return ops, {path: tuple(tree[path] for tree in flat.values()) for path in leaves}


def _check_paths(name: str, paths: Collection[str], other: str, wanted: Collection[str]) -> None:
    """Raise ValueError unless two trees have the same paths."""
    absent = [name + path for path in wanted if path not in paths]
    absent += [other + path for path in paths if path not in wanted]
    if absent:
        raise ValueError(
            f"{name} and {other} must have the same entries; missing: {', '.join(absent)}"
        )


def per_leaf(
    name: str, value: Any, tree: Any, path: str = "", *, spared: str = "", ops: Operations
) -> dict[str, float | Array]:
    """Return a number for each leaf of `tree` by path.

    Where `value` is one number for all leaves, those named `spared` get 0 instead.
    """
    if isinstance(tree, dict):
        each = value if isinstance(value, dict) else dict.fromkeys(tree, value)
        given, wanted = ([f"{path}[{key!r}]" for key in keys] for keys in (each, tree))
        _check_paths(name, given, "params", wanted)
        entries = (
            per_leaf(name, each[key], tree[key], f"{path}[{key!r}]", spared=spared, ops=ops)
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
    if isinstance(value, Real):
        return check_number(name, value)
    xp = ops.xp
    known = array_api_compat.is_array_api_obj(value)
    if not known or array_api_compat.array_namespace(value) is not xp or value.ndim != 0:
        raise TypeError(
            f"{name} must be a number or a 0-d array of the library of params, got {value!r}"
        )
    if not xp.isdtype(value.dtype, ("real floating", "integral")):
        raise TypeError(f"{name} must be of a real dtype, got {value.dtype}")
    return check_number(name, float(value)) if ops.can_read_values(value) else value


def zeros_like(params: Params) -> Params:
    """Return zeros for each leaf, in its compute dtype."""
    ops, leaves = align(params=params)
    xp = ops.xp
    zeros = {
        path: xp.zeros_like(leaf, dtype=compute_dtype(leaf, xp=xp))
        for path, (leaf,) in leaves.items()
    }
    return build(params, zeros)
