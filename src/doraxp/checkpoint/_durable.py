"""Files and names that survive a power cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from doraxp.checkpoint._errors import named


def write_durably(path: Path, raw: bytes) -> None:
    """Write a small file, which is on the disk afterwards."""
    write_chunks(path, [raw])


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file in the mode of a new one, which is on the disk afterwards."""
    path.unlink(missing_ok=True)
    with named(path), path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Send the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folder
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
