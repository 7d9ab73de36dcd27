"""Small files and names that survive a power cut."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_durably(path: Path, raw: bytes) -> None:
    """Write a new file, in the mode that the umask gives, which is on the disk afterwards."""
    with path.open("xb") as file:
        file.write(raw)
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
