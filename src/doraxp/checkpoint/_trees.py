"""Trees of arrays and numbers as JSON and named arrays, and back.

::

    value                       JSON
    None, bool, number, str     itself
    list, dict                  a list or an object of trees; keys do not begin with $
    array                       {"$array": name}
    NamedTuple of doraxp        {"$AdamWState": [tree, ...]}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import array_api_compat

from doraxp._base.types import Adapter, HostArray
from doraxp.checkpoint._host import on_host
from doraxp.optim import AdamWState, SGDState

_ARRAY = "$array"
_TUPLES: dict[str, Callable[..., Any]] = {
    f"${kind.__name__}": kind for kind in (AdamWState, Adapter, SGDState)
}


def encoded(name: str, tree: Any, arrays: dict[str, HostArray]) -> Any:
    """Return a tree as JSON, and put its arrays into `arrays`, under names that begin with `name`.

    Raises
    ------
    TypeError
        A part of the tree is of another type, or a key of a dict is not a str, or begins with $.
    """
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if array_api_compat.is_array_api_obj(tree):
        arrays[name] = on_host(tree)
        return {_ARRAY: name}
    if isinstance(tree, Mapping):
        if not all(isinstance(key, str) and not key.startswith("$") for key in tree):
            raise TypeError(
                f"{name} must have keys of type str that do not begin with $ to be saved, got "
                f"{list(tree)}"
            )
        return {key: encoded(f"{name}/{key}", each, arrays) for key, each in tree.items()}
    if type(tree) is list:
        return [encoded(f"{name}/{place}", each, arrays) for place, each in enumerate(tree)]
    kind = f"${type(tree).__name__}"
    if _TUPLES.get(kind) is type(tree):
        pairs = zip(tree._fields, tree, strict=True)
        return {kind: [encoded(f"{name}/{field}", each, arrays) for field, each in pairs]}
    raise TypeError(
        f"{name} must be an array, a number, a list, a dict or a state of doraxp's optimizers to "
        f"be saved, got {type(tree).__name__}"
    )


def decoded(tree: Any, place: Callable[[str], Any]) -> Any:
    """Return the tree that was encoded; `place` returns the array of a name.

    KeyError or TypeError where the JSON is not that of a tree.
    """
    if isinstance(tree, list):
        return [decoded(each, place) for each in tree]
    if not isinstance(tree, dict):
        return tree
    for kind, parts in tree.items():
        if kind == _ARRAY:
            return place(parts)
        if kind.startswith("$"):
            return _TUPLES[kind](*(decoded(each, place) for each in parts))
    return {key: decoded(each, place) for key, each in tree.items()}
