"""Paramss of parameters, and the numbers that go with their leaves.

A tree is a NamedTuple, or a dict of trees. A leaf is known by its path, "['q_proj'].lora_a", and
not by its place: JAX sorts the keys of a dict.
"""

from __future__ import annotations

from collections.abc import Collection
from numbers import Real
from typing import Any, TypeAlias, TypeVar, cast

import array_api_compat

from doraxp._base.scalars import check_number
from doraxp._base.types import Array
from doraxp.backends import Operations, as_dtype, compute_dtype, operations

Params = TypeVar("Params")
PerLeaf: TypeAlias = Any
"""A number or 0-d array; a NamedTuple of them; or a dict of either."""


def _leaves(name: str, tree: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves by path; an error calls them `name` + path."""
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
    """Return `leaves` in the structure of `tree`."""
    like: Any = tree
    if isinstance(like, dict):
        built = {key: build(like[key], leaves, f"{path}[{key!r}]") for key in like}
    else:
        built = like._make(leaves[f"{path}.{field}"] for field in like._fields)
    return cast(Params, built)


def align(**trees: Any) -> tuple[Operations, dict[str, tuple[Array, ...]]]:
    """Return the leaves of all trees by path, held to the structure and shapes of the first."""
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
    """Hold two trees to the same entries."""
    absent = [name + path for path in wanted if path not in paths]
    absent += [other + path for path in paths if path not in wanted]
    if absent:
        raise ValueError(
            f"{name} and {other} must have the same entries, but there is no "
            f"{' and no '.join(absent)}"
        )


def per_leaf(
    name: str, value: Any, tree: Any, path: str = "", *, spared: str = "", ops: Operations
) -> dict[str, Any]:
    """Return a number for each leaf of `tree` by path; where one is for all, `spared` has 0."""
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


def _number(name: str, value: Any, *, ops: Operations) -> Any:
    """Return a float; or `value`, where it is a 0-d array whose value may not be looked at."""
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


def widened(*values: Any, xp: Any) -> tuple[Any, ...]:
    """Return arrays in the compute dtype of the first, and floats as they are."""
    dtype = compute_dtype(values[0], xp=xp)
    return tuple(
        value if isinstance(value, float) else as_dtype(value, dtype, xp=xp) for value in values
    )


def zeros_like(params: Params) -> Params:
    """Return zeros for each leaf, in its compute dtype."""
    ops, leaves = align(params=params)
    xp = ops.xp
    zeros = {
        path: xp.zeros_like(leaf, dtype=compute_dtype(leaf, xp=xp))
        for path, (leaf,) in leaves.items()
    }
    return build(params, zeros)
