"""Tables and lines of text, by rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def new_console(*, stderr: bool = False) -> Console:
    """Return a console, which breaks lines at the width of the terminal."""
    from rich.console import Console

    return Console(stderr=stderr)


def plain_console() -> Console:
    """Return a console that prints brackets and colons unchanged: names in files may have them."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


def print_names(line: str, console: Console) -> None:
    """Print a line, however long, with the names in it unchanged."""
    console.print(line, soft_wrap=True, markup=False, emoji=False, highlight=False)


def new_table(labels: Iterable[str], headings: Iterable[str], **options: Any) -> Table:
    """Return an empty table: `labels` head its left columns, `headings` its columns of numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), **options)
    for label in labels:
        table.add_column(label, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], console: Console) -> None:
    """Print a table of one column of names and others of numbers, as wide as the names need it."""
    first, *others = headings
    table = new_table([first], others)
    for row in rows:
        table.add_row(*row)
    # A name of a tensor is long, and useless if it is cut.
    width = table.__rich_measure__(console, console.options.update(width=10_000)).maximum
    console.width = max(console.width, width)
    console.print(table)
