"""`Stamp`: the size, the times and the number of a file, by which a file that changed is known.

A merge is planned from headers and reads the tensors later, perhaps hours later. Each time that it
opens a file, it compares the stamp with that of the file which it planned for.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from doraxp.checkpoint._errors import changed, named

CHUNK = 1 << 20
"""Bytes that are copied at a time, and which a core's cache can hold."""
_TICK, _COARSE_TICK = 20_000_000, 2_000_000_000
"""Nanoseconds between two times that a file system can tell apart: usual ones, and old ones."""


class Stamp(NamedTuple):
    """The size, the times and the number that the system keeps of a file."""

    size: int
    mtime_ns: int
    ctime_ns: int
    """Of the last change, of the file or of its mode and names. Programs cannot set it back."""
    inode: int


def stamp_of(file: FileIO) -> Stamp:
    """Return the stamp of an open file."""
    return _stamp(os.fstat(file.fileno()))


def settled_stamp_of(file: FileIO) -> Stamp:
    """Return the stamp of an open file, when a later change to the file would change the stamp.

    A file that is written twice within a tick of the file system's clock may have one time. So
    this function waits until the file is older than a tick.
    """
    stamp = stamp_of(file)
    # A file system without fractions of a second has an even rougher clock.
    tick = _TICK if stamp.mtime_ns % 1_000_000_000 else _COARSE_TICK
    age = time.time_ns() - stamp.mtime_ns
    if 0 <= age < tick:
        time.sleep((tick - age) / 1e9)
    return stamp_of(file)


def stamps_at(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """Return the stamps of those of the paths that are files."""
    stamps = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if path.is_file():
                with path.open("rb", buffering=0) as file:
                    stamps[path] = settled_stamp_of(file)
    return stamps


def check_stamps(stamps: Mapping[Path, Stamp]) -> None:
    """Raise ChangedError unless each file still has its stamp."""
    for path, stamp in stamps.items():
        try:
            now = _stamp(path.stat())
        except FileNotFoundError:
            raise changed(path) from None
        if now != stamp:
            raise changed(path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[FileIO]:
    """Open a file to read; an error that names no file then names it."""
    with named(path), path.open("rb", buffering=0) as file:
        yield file


def read_up_to(file: FileIO, size: int) -> bytes:
    """Return the next bytes of a file, fewer than `size` only where the file ends."""
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def chunks(file: FileIO, size: int, path: Path) -> Iterator[memoryview]:
    """Yield the next `size` bytes of a file. Each chunk overwrites the one before."""
    buffer = memoryview(bytearray(min(size, CHUNK)))
    while size:
        chunk = buffer[: min(size, CHUNK)]
        fill(file, chunk, path)
        size -= len(chunk)
        yield chunk


def fill(file: FileIO, buffer: memoryview, path: Path) -> None:
    """Read bytes until `buffer` is full."""
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise changed(path)  # it is shorter now
        buffer = buffer[count:]


def unchanged_chunks(path: Path, stamp: Stamp) -> Iterator[memoryview]:
    """Yield the bytes of a file, and raise ChangedError unless it has this stamp all the time."""
    with opened(path) as file:
        if stamp_of(file) != stamp:
            raise changed(path)
        yield from chunks(file, stamp.size, path)
        if stamp_of(file) != stamp:
            raise changed(path)


def _stamp(stat: os.stat_result) -> Stamp:
    return Stamp(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
