"""The lock of a work folder: one merge at a time works for one OUT."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK = "lock"
_UNSUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}
"""Errors of file systems that have no locks. There the names of run folders must suffice."""

_fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
"""The module of file locks, which Windows does not have."""


def _lock(file: int) -> None:
    """Lock an open file, or raise BlockingIOError. The lock of a dead process is gone."""
    if _fcntl is None:
        return
    try:
        _fcntl.flock(file, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


@contextlib.contextmanager
def alone(work: Path, out: Path) -> Iterator[None]:
    """Hold the lock of a work folder. Make a folder that is missing; remove one that ends empty.

    Raises
    ------
    BlockingIOError
        Another merge to `out` holds it.
    """
    file = _locked(work, out)
    try:
        yield
    finally:
        try:
            # As long as the file is locked, another merge cannot take the folder for its own.
            with contextlib.suppress(OSError):
                if set(os.listdir(work)) <= {LOCK}:
                    (work / LOCK).unlink(missing_ok=True)
                    work.rmdir()
        finally:
            os.close(file)


def _locked(work: Path, out: Path) -> int:
    """Return the lock's file, open and locked."""
    while True:
        with contextlib.suppress(FileExistsError):
            work.mkdir()
        try:
            file = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # a merge has just ended, and has removed the folder
        try:
            _lock(file)
            if _is_at(file, work / LOCK):
                holder = json.dumps({"process": os.getpid(), "host": platform.node()})
                os.ftruncate(file, 0)
                os.write(file, holder.encode())
                return file
        except BlockingIOError:
            holder = _holder(file)
            os.close(file)
            raise BlockingIOError(f"{out}: another merge to it is at work{holder}") from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """Return False for a file that a merge removed when it ended."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _holder(file: int) -> str:
    """Return the process that wrote into the lock's file, for an error."""
    try:
        holder = json.loads(os.read(file, 1000))
        return f" (process {int(holder['process'])} on host {ascii(holder['host'])[1:-1]})"
    except (ValueError, TypeError, KeyError):
        return ""
