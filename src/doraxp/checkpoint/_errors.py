"""The errors that a file's content can cause, and the names of files in those of the system."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from doraxp._base.printable import printable

_LIMIT = 1000


class CheckpointError(ValueError):
    """A file cannot be used. The message is one short line, whatever the file contains."""

    def __init__(self, message: str) -> None:
        line = printable(message)
        if len(line) > _LIMIT:
            line = f"{line[: _LIMIT - 40]}… of {len(line)} letters"
        super().__init__(line)


class ChangedError(CheckpointError):
    """A file has changed since it was opened first."""


def changed(path: str | os.PathLike[str]) -> ChangedError:
    """Return the error for a file that changed."""
    return ChangedError(f"{path}: changed since it was first read; run the same command again")


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give `path` to an OSError without a file: the system does not say which file is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def gguf(path: Path) -> CheckpointError:
    """Return the error of a file of llama.cpp, or of a folder that has one."""
    return CheckpointError(
        f"{path}: GGUF files are neither read nor written here: merge into the model's safetensors "
        "files, then make a GGUF file from OUT with the converter of the engine, such as "
        "convert_hf_to_gguf.py of llama.cpp"
    )
