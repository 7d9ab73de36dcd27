"""`stages`: the ways to compare the names of an adapter with those of a base.

From the narrowest to the widest::

    exact        the names as they are
    dropped      without `model` and `language_model` in both
    unwrapped    also without what DDP, FSDP and torch.compile add
    leading      one leading component more, or less: a model with a head, and the model itself
    family       renamed by the table of the base's own family
    families     renamed by the table of any one family
    towers       each module renamed by the table of some family: composed models
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from doraxp.checkpoint._names._places import Shapes, Wanted
from doraxp.checkpoint._names._tables import DROPPED, WRAPPERS, Rename, Table, tables, without

_LEADS = 2
"""The leading components that are tried: those of the most tensors, and those of the most tensors
that have the first module's name."""


class Way(NamedTuple):
    """One way to compare names."""

    key: Rename
    """Of a base's name."""
    renames: tuple[Rename, ...]
    """Of an adapter's path, each of which may give the base's key."""
    permuted: re.Pattern[str] | None = None
    """The modules whose rows the base stores in another order."""


def stages(
    wanted: Sequence[Wanted], shapes: Shapes, model_type: str | None
) -> Iterator[Iterable[Way]]:
    """Yield the ways of each stage."""
    yield [Way(same, (same,))]
    yield [Way(_drop, (_drop,))]
    yield [Way(unwrap, (unwrap,))]
    leads = list(leading(wanted, shapes))
    yield [Way(key, (rename,)) for key, rename in leads]
    # Blocks have names that differ by a number, which no table renames.
    paths = {re.sub(r"(?<![^.])\d+(?![^.])", "0", unwrap(one.path)) for one in wanted}
    every = [table for table in tables() if any(table.rename(path) != path for path in paths)]
    yield [renamed(unwrap, unwrap, table) for table in every if model_type in table.families]
    yield (renamed(unwrap, unwrap, table) for table in every)
    ways = [(_chain(unwrap, key), _chain(unwrap, rename)) for key, rename in leads]
    yield (renamed(*way, table) for way in ways for table in every)
    if every:
        yield [Way(unwrap, (unwrap, *(_then(unwrap, table) for table in every)))]


def renamed(key: Rename, rename: Rename, table: Table) -> Way:
    """Return the way in which a table may rename each module, or leave its name."""
    return Way(key, (rename, _then(rename, table)), table.permuted)


def same(name: str) -> str:
    """Return the name."""
    return name


_drop = partial(without, DROPPED)
unwrap = partial(without, DROPPED | WRAPPERS)
"""A name without the components that are dropped, and without those of wrappers."""
_unwrap_only = partial(without, WRAPPERS)


def _chain(first: Rename, second: Rename) -> Rename:
    return lambda name: first(second(name))


def _then(first: Rename, table: Table) -> Rename:
    return lambda name: without(DROPPED, table.rename(first(name)))


def leading(wanted: Sequence[Wanted], shapes: Shapes) -> Iterator[tuple[Rename, Rename]]:
    """Yield pairs of functions, of the base's names and of the adapter's.

    One of the two drops a leading component.
    """
    split = [name.partition(".") for name in shapes]
    first = next((_drop(one.name) for one in wanted if one.shape is not None), None)
    fitting = Counter(lead for lead, _, rest in split if _drop(rest) == first)
    every = Counter(lead for lead, _, _ in split)
    leads = [
        lead
        for counts in (Counter({lead: every[lead] for lead in fitting}), every)
        for lead, _ in counts.most_common(_LEADS)
    ]
    for lead in dict.fromkeys(leads):
        yield partial(_without_lead, f"{lead}."), same
        yield _chain(_drop, partial(_without_lead, f"{lead}.")), _drop
    own = Counter(
        _unwrap_only(one.path).partition(".")[0] for one in wanted if one.shape is not None
    )
    for lead, _ in own.most_common(1):
        yield same, _chain(partial(_without_lead, f"{lead}."), _unwrap_only)
        yield _drop, _chain(_drop, _chain(partial(_without_lead, f"{lead}."), _unwrap_only))


def _without_lead(lead: str, name: str) -> str:
    return name.removeprefix(lead)
