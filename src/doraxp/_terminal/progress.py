"""Progress bars on the standard error, which vanish when the work is done. By rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

from doraxp._terminal.tables import new_console

if TYPE_CHECKING:
    from rich.progress import Progress


def progress_by_parts() -> Progress:
    """Return a bar that counts parts of the work and names the current one.

    It shows nothing unless a terminal reads it.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = new_console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def progress_by_bytes() -> Progress:
    """Return a bar that counts bytes; it shows nothing unless a terminal reads it."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = new_console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
