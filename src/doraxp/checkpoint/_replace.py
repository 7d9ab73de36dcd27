"""A folder that takes the place of another one: both are complete at each moment, or hidden.

The old folder gets the name ``.NAME.replaced`` for the moment between two renames.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from doraxp.checkpoint._durable import sync, write_durably


def hidden(target: Path) -> Path:
    """Return the name that an adapter has while another one takes its place."""
    return target.with_name(f".{target.name}.replaced")


def prepare_place(target: Path, known: Collection[str], *, overwrite: bool) -> None:
    """Put a folder back that a killed save left hidden, and raise unless `target` may be written.

    A folder is replaced if all its files have names in `known`.
    """
    replaced = hidden(target)
    if os.path.lexists(replaced):
        _check_replaceable(replaced, known, overwrite=True)
        _put_back(target)
    if os.path.lexists(target):
        _check_replaceable(target, known, overwrite=overwrite)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder")


def put(target: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files, which appears when it is complete and on the disk."""
    replaced = hidden(target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        complete = Path(folder) / "complete"
        complete.mkdir()
        for name, content in files.items():
            write_durably(complete / name, content)
        sync(complete)
        if replaced.exists():  # a save was killed when it had only to remove this
            replaced.rename(Path(folder) / "older")
        try:
            if target.exists():
                target.rename(replaced)
            complete.rename(target)
        except BaseException:
            _put_back(target)
            raise
        sync(target.parent)
        if replaced.exists():
            replaced.rename(Path(folder) / "old")


def _put_back(target: Path) -> None:
    """Give an adapter its name again, if no other one has taken it."""
    if not os.path.lexists(target) and hidden(target).exists():
        hidden(target).rename(target)


def _check_replaceable(target: Path, known: Collection[str], *, overwrite: bool) -> None:
    """Raise FileExistsError unless `target` may be replaced: a folder with an adapter alone."""
    if not overwrite:
        raise FileExistsError(
            f"{target}: already exists; overwrite=True, or --force, replaces an adapter"
        )
    if target.is_symlink() or not target.is_dir():
        raise FileExistsError(f"{target}: must be a folder to be replaced")
    foreign = sorted(
        path.name for path in target.iterdir() if path.name not in known or path.is_dir()
    )
    if foreign:
        raise FileExistsError(
            f"{target}: only an adapter's own files are replaced, but it has {foreign[0]}: move it"
        )
