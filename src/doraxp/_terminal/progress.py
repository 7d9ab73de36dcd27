"""Progress bars on the standard error, which vanish when the work is done. By rich.

All have one style: the bar, the amount, the time so far, the time left, and the current work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from doraxp._terminal.tables import new_console

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


def progress_by_parts() -> Progress:
    """Return a bar that counts parts of the work and names the current one.

    It shows nothing unless a terminal reads it.
    """
    from rich.progress import MofNCompleteColumn

    return _progress(MofNCompleteColumn())


def progress_by_bytes() -> Progress:
    """Return a bar that counts bytes; it shows nothing unless a terminal reads it."""
    from rich.progress import DownloadColumn

    return _progress(DownloadColumn())


def _progress(amount: ProgressColumn) -> Progress:
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(bar_width=20),
        amount,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    console = new_console(stderr=True)
    # A terminal that cannot move its cursor, or a file with FORCE_COLOR, would get a blank line.
    return Progress(*columns, console=console, transient=True, disable=not console.is_interactive)
