"""`match`: the rows of the base that each tensor of an adapter is for.

The stages of `_ways` are tried in order. A stage matches the whole adapter, or it does not count.
In a stage each module has one tensor, each tensor one module, and the shapes fit. Several modules
may share a fused tensor whose rows are known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from doraxp.checkpoint._names._advice import rename_option
from doraxp.checkpoint._names._experts import experts_apart
from doraxp.checkpoint._names._fused import rows_of_modules
from doraxp.checkpoint._names._places import (
    WEIGHT,
    Place,
    Places,
    Shapes,
    Wanted,
    cut,
)
from doraxp.checkpoint._names._tables import Rename, tables
from doraxp.checkpoint._names._ways import Way, leading, renamed, same, stages, unwrap

_PARTS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
}
"""The modules of which a fused module has the rows, one below the other."""
_OLD_LEAVES = {"weight": "gamma", "bias": "beta"}
"""The names of a norm's tensors in old files of transformers, such as BERT's."""


class Match(NamedTuple):
    """The result of a search."""

    places: dict[str, Places]
    """Of each tensor that was found, by the adapter's name of it."""
    missing: list[Wanted]
    """The tensors that the base does not have."""
    problem: str | None = None
    """The reason why nothing was found, in words."""
    options: tuple[tuple[str, str], ...] = ()
    """The tensors or parts that may be meant, and the argument of --rename that takes each."""


def match(wanted: Sequence[Wanted], shapes: Shapes, model_type: str | None = None) -> Match:
    """Return the places of an adapter's tensors in a base.

    Parameters
    ----------
    wanted : sequence of Wanted
        Those with a shape must all be found.
    shapes : mapping of str to tuple of int
        Of the base's tensors, by name.
    model_type : str, optional
        The base's family, from its config.json.
    """
    index = _Index(shapes)
    for stage in stages(wanted, shapes, model_type):
        found: list[tuple[Way, dict[str, Places]]] = []
        for way in stage:
            places = _places(way, wanted, index)
            if places is not None:
                _add(found, way, places)
        permuted = next((name for way, _ in found for name in _permuted(way, wanted)), None)
        if permuted is not None:
            problem = (
                f"the base stores the rows of {permuted} in another order than the module's: merge "
                "it with PEFT's merge_and_unload instead"
            )
            return Match({}, [], problem)
        if len(found) > 1:
            return _ambiguity(wanted, found[0][1], found[1][1])
        if found:
            places = found[0][1] | _of_family(wanted, found[0][1], index, model_type)
            return Match(places, [one for one in wanted if one.name not in places])
    return Match({}, list(wanted))


def _of_family(
    wanted: Sequence[Wanted], places: Mapping[str, Places], index: _Index, model_type: str | None
) -> dict[str, Places]:
    """Return the places of more tensors without a shape: by dropped names or by a table."""
    ways = [Way(unwrap, (unwrap,))]
    ways += [renamed(unwrap, unwrap, table) for table in tables() if model_type in table.families]
    taken = {place.tensor for found in places.values() for place in found}
    index.use(unwrap)
    others: dict[str, Places] = {}
    for one in (one for one in wanted if one.name not in places):
        tensors = {_found(one, way, index) for way in ways}
        tensors -= {None, *taken}
        if len(tensors) == 1:
            others[one.name] = (Place(str(tensors.pop())),)
    return others


def guess(wanted: Sequence[Wanted], shapes: Shapes) -> dict[str, Places]:
    """Return the places that the names alone give to most tensors, whatever the shapes.

    An error about an adapter that does not fit compares it with these.
    """
    index = _Index(shapes)
    ways = [Way(same, (same,)), Way(unwrap, (unwrap,))]
    ways += [Way(key, (rename,)) for key, rename in leading(wanted, shapes)]
    best: dict[str, Places] = {}
    for way in ways:
        index.use(way.key)
        found: dict[str, Places] = {}
        for one in wanted:
            tensor = _found(one._replace(shape=None), way, index)
            if tensor is not None:
                found[one.name] = (Place(tensor),)
        best = max(best, found, key=len)
    return best


def _add(found: list[tuple[Way, dict[str, Places]]], way: Way, places: dict[str, Places]) -> None:
    """Add the places of a way, or extend those of one that it does not contradict."""
    for _, known in found:
        if all(known.get(name, own) == own for name, own in places.items()):
            known |= places
            return
    found.append((way, places))


def _ambiguity(
    wanted: Sequence[Wanted], one: Mapping[str, Places], other: Mapping[str, Places]
) -> Match:
    """Return the result where two ways contradict each other."""
    shared = [each for each in wanted if each.name in one and each.name in other]
    first = next(each for each in shared if one[each.name] != other[each.name])
    tensors = [places[first.name][0].tensor for places in (one, other)]
    options = tuple(
        (tensor, rename_option(first.path, tensor.removesuffix(f".{first.leaf}")))
        for tensor in tensors
    )
    return Match({}, [], f"{first.name} may be {' or '.join(tensors)} in the base", options)


def _permuted(way: Way, wanted: Sequence[Wanted]) -> Iterator[str]:
    """Yield the modules whose rows the base stores in another order."""
    if way.permuted is not None:
        yield from (one.path for one in wanted if way.permuted.search(one.path))


class _Index:
    """The base's names by the keys of a way; the next way shares them if its keys are the same."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self._key: Rename | None = None
        self._first: dict[str, str] = {}
        self._others: dict[str, list[str]] = {}

    def use(self, key: Rename) -> None:
        """Compute the keys of all names."""
        if key is self._key:
            return
        self._key, self._first, self._others = key, {}, {}
        for name in self.shapes:
            if self._first.setdefault(own := key(name), name) != name:
                self._others.setdefault(own, []).append(name)

    def names(self, key: str) -> Iterator[str]:
        """Yield the names that have a key."""
        if key in self._first:
            yield self._first[key]
            yield from self._others.get(key, ())


def _places(way: Way, wanted: Sequence[Wanted], index: _Index) -> dict[str, Places] | None:
    """Return the places of all tensors that a way finds; None if it does not find all modules."""
    index.use(way.key)
    found: dict[str, str] = {}
    split: dict[str, Places] = {}
    for one in wanted:
        tensor = _found(one, way, index)
        if tensor is not None:
            found[one.name] = tensor
        elif one.shape is not None:
            split[one.name] = _split(one, way, index)
            if not split[one.name]:
                return None
    return _rows(found, split, {one.name: one for one in wanted}, index.shapes)


def _split(one: Wanted, way: Way, index: _Index) -> Places:
    """Return the places of a fused module whose parts are tensors of their own in the base."""
    if one.is_stack:
        return experts_apart(one, index.shapes, lambda wanted: _found(wanted, way, index))
    lead, _, last = one.path.rpartition(".")
    parts = [
        _found(Wanted(f"{lead}.{part}", one.leaf, None), way, index)
        for part in _PARTS.get(last, ())
    ]
    tensors = [part for part in parts if part is not None]
    sizes = [index.shapes[tensor][0] for tensor in tensors]
    columns = {index.shapes[tensor][1:] for tensor in tensors}
    shape = one.shape or ()
    if not tensors or len(tensors) < len(parts) or (sum(sizes),) != shape[:1]:
        return ()
    if columns != {shape[1:]}:
        return ()
    own = cut([sum(sizes[:place]) for place in range(len(sizes))], sum(sizes))
    return tuple(Place(tensor, None, rows) for tensor, rows in zip(tensors, own, strict=True))


def _found(one: Wanted, way: Way, index: _Index) -> str | None:
    """Return the one tensor of the base that `one` may be."""
    keys = {rename(one.path) for rename in way.renames}
    names = {f"{key}.{one.leaf}" if key else one.leaf for key in keys}
    if one.leaf == WEIGHT:
        names |= keys  # such as attn.in_proj_weight
    if one.leaf in _OLD_LEAVES:
        names |= {f"{key}.{_OLD_LEAVES[one.leaf]}" for key in keys}
    tensors = {tensor for name in names for tensor in index.names(name)}
    if one.shape is not None:
        tensors = {
            tensor
            for tensor in tensors
            if one.fits(index.shapes[tensor]) or one.fits_rows(index.shapes[tensor])
        }
    return tensors.pop() if len(tensors) == 1 else None


def _rows(
    found: Mapping[str, str],
    split: Mapping[str, Places],
    wanted: Mapping[str, Wanted],
    shapes: Shapes,
) -> dict[str, Places] | None:
    """Return the places of the tensors that were found; None where rows are not known."""
    places: dict[str, Places] = dict(split)
    users: dict[str, list[str]] = defaultdict(list)
    for name, tensor in found.items():
        if wanted[name].fits(shapes[tensor]):
            places[name] = (Place(tensor),)
        else:
            users[tensor].append(name)
    for tensor, names in users.items():
        sizes = {wanted[name].path: (wanted[name].shape or (0,))[0] for name in names}
        rows = rows_of_modules(tensor.removesuffix(f".{WEIGHT}"), shapes[tensor][0], sizes)
        if rows is None:
            return None
        places |= {name: (Place(tensor, rows[wanted[name].path]),) for name in names}
    whole = [
        place.tensor
        for name, own in places.items()
        for place in own
        if wanted[name].shape is not None and place.rows is None
    ]
    if len(set(whole)) < len(whole) or set(whole) & users.keys():
        return None
    return {name: places[name] for name in wanted if name in places}
