"""Named arrays as one vector and back, and new arrays in place of them.

    arrays   {"lora_a": A, "lora_b": B, "magnitude": m}
    vector   [A][B][m], each row-major

The order of the vector is that of the dict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from doraxp._base.scalars import check_kind
from doraxp._base.types import Array, DType, Namespace
from doraxp.backends import as_dtype, operations


def count(arrays: Mapping[str, Array]) -> int:
    """Return how many numbers the arrays have together."""
    return sum(math.prod(array.shape) for array in arrays.values())


def as_vector(arrays: Mapping[str, Array], dtype: DType, *, xp: Namespace) -> Array:
    """Return the arrays as one vector of `dtype`."""
    wide = [as_dtype(array, dtype, xp=xp) for array in arrays.values()]
    return xp.concat([xp.reshape(array, (-1,)) for array in wide])


def from_vector(vector: Array, like: Mapping[str, Array], *, xp: Namespace) -> dict[str, Array]:
    """Return the arrays of a vector, with the names and shapes of `like`."""
    operations(vector=vector, layer=next(iter(like.values())))
    shape = (count(like),)
    if tuple(vector.shape) != shape:
        raise ValueError(
            f"vector must have shape (parameter_count,) = {shape}, got {tuple(vector.shape)}"
        )
    arrays, start = {}, 0
    for name, old in like.items():
        stop = start + math.prod(old.shape)
        arrays[name] = xp.reshape(vector[start:stop], old.shape)
        start = stop
    return arrays


def updated(
    old: Mapping[str, Array], state: Mapping[str, Array], *, strict: bool, xp: Namespace
) -> dict[str, Array]:
    """Return `old` with copies of the arrays of `state` in its place, cast to the old dtypes.

    Raise ValueError with all problems: other shapes and, with `strict`, missing and unexpected
    names. Without `strict`, missing arrays stay the old ones.
    """
    check_kind("state", state, Mapping)
    given = {name: state[name] for name in old if state.get(name) is not None}
    operations(**given, layer=next(iter(old.values())))
    problems = [
        f"{name} must have shape {tuple(old[name].shape)}, got {tuple(array.shape)}"
        for name, array in given.items()
        if tuple(array.shape) != tuple(old[name].shape)
    ]
    if strict:
        problems += [f"missing {name}" for name in old if name not in given]
        problems += [f"unexpected {name}" for name in state if name not in old]
    if problems:
        raise ValueError("state must fit the layer: " + "; ".join(problems))
    new = {name: xp.astype(array, old[name].dtype) for name, array in given.items()}
    return {**old, **new}
