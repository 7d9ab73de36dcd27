"""Numbers that go with the leaves of a tree of parameters: rates and decays.

by field   one number for each name that leaves have, such as `lora_a`, for all layers
by entry   a tree of numbers with the entries of the parameters; a number stands for all below
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import array_api_compat

from doraxp._base.scalars import check_number
from doraxp._base.types import Array
from doraxp.backends import Operations, array_namespace
from doraxp.optim._trees import Aligned, Names, check_paths, names_of

PerLeaf: TypeAlias = Any
"""A number or 0-d array; or a NamedTuple or dict of these, by field or by entry."""


class _Source(NamedTuple):
    """The argument that numbers come from."""

    name: str
    spared: str
    """The name of the leaves that get 0 where one number is given for several leaves."""
    ops: Operations


def per_leaf(name: str, value: Any, aligned: Aligned, *, spared: str = "") -> list[float | Array]:
    """Return a number for each leaf of the first of the aligned trees, in order.

    Where `value` is one number for several leaves, those named `spared` get 0 instead.
    """
    source = _Source(name, spared, aligned.ops)
    if _entries(value) is None:
        return _of_all(source, value, aligned.names)
    return list(_by_entry(source, value, aligned.first, "", aligned.names))


def learning_rates(value: Any, lora_plus: float, aligned: Aligned) -> list[float | Array]:
    """Return η of each leaf of the first of the aligned trees: `lora_plus` times as much for B."""
    lora_plus = check_number("lora_plus", lora_plus, positive=True)
    rates = per_leaf("learning_rate", value, aligned)
    if lora_plus == 1:
        return rates
    pairs = zip(aligned.names.fields, rates, strict=True)
    return [rate * lora_plus if field == "lora_b" else rate for field, rate in pairs]


def _of_all(source: _Source, value: Any, names: Names, path: str = "") -> list[float | Array]:
    """Return one number for all leaves, and 0 for those that are spared."""
    number = _number(source.name + path, value, ops=source.ops)
    if not source.spared:
        return [number] * len(names.fields)
    return [0.0 if field == source.spared else number for field in names.fields]


def _by_entry(
    source: _Source, value: Any, tree: Any, path: str, names: Names | None = None
) -> Iterator[float | Array]:
    """Yield the numbers of the leaves below `tree`, in order."""
    given, wanted = _entries(value), _entries(tree)
    if wanted is None:
        yield _number(source.name + path, value, ops=source.ops)
    elif given is not None and given.keys() == wanted.keys():
        for key, part in _parts(tree, path).items():
            yield from _by_entry(source, given[key], wanted[key], part)
    else:
        names = names or names_of(tree)
        if given is None:
            yield from _of_all(source, value, names, path)
        else:
            yield from _by_field(source, value, tree, path, names)


def _by_field(
    source: _Source, value: Any, tree: Any, path: str, names: Names
) -> Iterator[float | Array]:
    """Yield the numbers of the leaves below `tree`, given one for each field."""
    given = _entries(value) or {}
    if given.keys() != names.firsts.keys():
        check_paths(
            source.name, _parts(value, path).values(), "params", _parts(tree, path).values()
        )
    numbers = {
        field: _number(source.name + path + first, given[field], ops=source.ops)
        for field, first in names.firsts.items()
    }
    yield from (numbers[field] for field in names.fields)


def _entries(tree: Any) -> dict[Any, Any] | None:
    """Return the entries of a dict or a NamedTuple, and None for anything else."""
    if isinstance(tree, dict):
        return tree
    return tree._asdict() if hasattr(tree, "_asdict") else None


def _parts(tree: Any, path: str) -> dict[Any, str]:
    """Return the path of each entry of a dict or a NamedTuple."""
    if isinstance(tree, dict):
        return {key: f"{path}[{key!r}]" for key in tree}
    return {field: f"{path}.{field}" for field in tree._fields}


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
