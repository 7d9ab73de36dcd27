"""Tables and lines of text, by rich."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from doraxp._base.printable import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def new_console(*, stderr: bool = False) -> Console:
    """Return a console, which breaks lines at the width of the terminal.

    It gives numbers no colour: a total looks the same under every table.
    """
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def plain_console() -> Console:
    """Return a console that prints brackets and colons unchanged: names in files may have them."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


def print_names(line: str, console: Console) -> None:
    """Print a line, however long. Brackets in names are not read as markup."""
    console.print(printable(line), soft_wrap=True, markup=False, emoji=False)


def print_caption(text: str, console: Console) -> None:
    """Print an explanation, in lines that fit the terminal."""
    console.print(text, markup=False, emoji=False)


def new_table(
    labels: Iterable[str], headings: Iterable[str], *, gap: int = 1, **options: Any
) -> Table:
    """Return an empty table: `labels` head its left columns, `headings` its columns of numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, gap, 0, 0), **options)
    for label in labels:
        table.add_column(label, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], console: Console) -> None:
    """Print a table of one column of names and others of numbers.

    If it is too wide for the terminal, its columns move together, and then the start that all names
    share is left out. A table that is still too wide is printed in full: a name of a tensor is
    useless if it is cut.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    start = _common_start([first for first, *_ in cells])
    for gap, left_out in ((1, ""), (0, ""), (0, start)):
        table = new_table(headings[:1], headings[1:], gap=gap)
        for first, *rest in cells:
            table.add_row(f"…{first.removeprefix(left_out)}" if left_out else first, *rest)
        width = table.__rich_measure__(console, console.options.update(width=10_000)).maximum
        if width <= console.width:
            break
    usual, console.width = console.width, max(console.width, width)
    console.print(table)
    console.width = usual
    if left_out:
        print_names(f"… is {left_out}", console)


def _common_start(names: Sequence[str]) -> str:
    """Return the dotted parts that all names begin with, and never a whole name."""
    places = zip(*(name.split(".")[:-1] for name in names), strict=False)
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, places)
    return "".join(f"{parts[0]}." for parts in same)
