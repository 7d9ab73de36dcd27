"""Tables of more than one command, by rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def plain_console() -> Console:
    """Return what prints names from files as they are: brackets and colons are no commands."""
    return Console(markup=False, emoji=False)


def print_names(line: str, console: Console) -> None:
    """Print a line, uncut, with the names in it as they are on any console."""
    console.print(line, soft_wrap=True, markup=False, emoji=False, highlight=False)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], console: Console) -> None:
    """Print a table, its first column to the left, the others to the right."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Names of tensors are long, and no use when they are cut.
    width = table.__rich_measure__(console, console.options.update(width=10_000)).maximum
    console.width = max(console.width, width)
    console.print(table)
