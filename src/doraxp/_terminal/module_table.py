"""The figures of modules or tensors as a table: a row for each kind of module, or for each name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from doraxp._terminal.tables import print_table

if TYPE_CHECKING:
    from rich.console import Console

Figures: TypeAlias = Mapping[str, Mapping[str, Any]]
"""By name of a module or tensor, and then by name of the figure."""


class Column(NamedTuple):
    """One figure in a table."""

    figure: str
    heading: str
    of_many: Callable[[Sequence[Any]], Any] | None = None
    """Makes one value of those of a kind; None shows the least and the largest."""


def kind_of(name: str) -> str:
    """Return the kind of a module: the last part of its path, with the part before a number.

    Where the path has underscores instead of dots, all its numbers are left open.
    """
    parts = name.removesuffix(".weight").split(".")
    if len(parts) == 1:
        return re.sub(r"\d+", "*", parts[0])
    first = next((at for at in reversed(range(len(parts))) if not parts[at].isdecimal()), 0)
    return ".".join(parts[first:])


def print_modules(
    label: str, figures: Figures, columns: Sequence[Column], console: Console, *, every: bool
) -> None:
    """Print a row for each kind of module; if `every`, one for each name.

    Columns without any figure are left out. None counts as missing.
    """
    columns = [
        column
        for column in columns
        if any(row.get(column.figure) is not None for row in figures.values())
    ]
    headings = [column.heading for column in columns]
    if every:
        groups = {name: [row] for name, row in figures.items()}
        first = [label]
    else:
        groups = {}
        for name, row in figures.items():
            groups.setdefault(kind_of(name), []).append(row)
        first = [f"kind of\n{label}", "count"]
    rows = [
        [
            name,
            *([] if every else [f"{len(group):,}"]),
            *(_cell(column, group) for column in columns),
        ]
        for name, group in groups.items()
    ]
    print_table([*first, *headings], rows, console)


def _cell(column: Column, group: Sequence[Mapping[str, Any]]) -> str:
    values = [row[column.figure] for row in group if row.get(column.figure) is not None]
    if not values:
        return ""
    if column.of_many is not None:
        return _text(column.of_many(values))
    different = sorted(set(values))
    if isinstance(different[0], str):
        return ", ".join(different)
    return "–".join(dict.fromkeys(_text(value) for value in (different[0], different[-1])))


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
