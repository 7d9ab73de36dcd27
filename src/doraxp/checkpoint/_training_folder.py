"""The folder of a training run: two files, of which one is replaced in one step.

::

    training.json           settings, numbers, and the name of the other file
    arrays-0.safetensors    the arrays; the next save writes arrays-1.safetensors, then 0 again

A save writes the new arrays beside the old ones, and then renames a new training.json over the old
one. Each of the two is complete at that moment, so that a kill leaves the old state or the new one.
"""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from doraxp._base.safetensors import Tensor, write_header
from doraxp._base.types import HostArray
from doraxp.checkpoint._durable import sync, write_chunks, write_durably
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._json import JsonObject, read_json
from doraxp.checkpoint._safetensors import RAW, Reader

TABLE = "training.json"
_NEW = "training.json.new"
_ARRAYS = ("arrays-0.safetensors", "arrays-1.safetensors")
_VERSION = 1
_NAMES = {dtype: name for name, dtype in reversed(RAW.items()) if not name.startswith("F8")}
_ENTRIES = ("version", "id", "arrays", "layers", "optimizer", "step", "generator", "extra")


def write_folder(
    folder: Path, table: Mapping[str, Any], arrays: Mapping[str, HostArray], *, overwrite: bool
) -> None:
    """Write a table and its arrays; the rename is the moment at which they become current."""
    current = _prepared(folder, overwrite=overwrite)
    own = _ARRAYS[current == _ARRAYS[0]]
    whole = {"version": _VERSION, "id": secrets.token_hex(8), "arrays": own, **table}
    write_chunks(folder / own, _safetensors(arrays, str(whole["id"])))
    write_durably(folder / _NEW, json.dumps(whole, indent=1).encode())
    sync(folder)
    (folder / _NEW).replace(folder / TABLE)
    sync(folder)
    if current is not None:
        (folder / current).unlink(missing_ok=True)


def read_folder(folder: Path) -> tuple[JsonObject, dict[str, HostArray]]:
    """Return the table and the arrays, and raise CheckpointError unless they are of one save."""
    table = read_json(folder / TABLE)
    absent = [name for name in _ENTRIES if name not in table]
    if absent or table["version"] != _VERSION or table["arrays"] not in _ARRAYS:
        raise CheckpointError(
            f"{folder / TABLE}: must be version {_VERSION} of a table of save_training, got "
            f"version {table.get('version')!r} and the file {table.get('arrays')!r}, without "
            f"{absent}"
        )
    reader = Reader(folder / str(table["arrays"]))
    if reader.metadata.get("id") != table["id"]:
        raise CheckpointError(
            f"{reader.path}: belongs to another save than {TABLE}: copy the folder again, while "
            "no save is running"
        )
    return table, {name: reader.read(name) for name in reader.tensors}


def _prepared(folder: Path, *, overwrite: bool) -> str | None:
    """Make the folder, and return the name of the file of arrays that its table needs, if any."""
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{folder.parent}: no such folder")
    if not os.path.lexists(folder):
        folder.mkdir()
        sync(folder.parent)
        return None
    if not folder.is_dir():
        raise FileExistsError(f"{folder}: must be a folder, or not exist")
    known = {TABLE, _NEW, *_ARRAYS}
    foreign = sorted(each.name for each in folder.iterdir() if each.name not in known)
    if foreign:
        raise FileExistsError(
            f"{folder}: must have the files of a state and no others, got {foreign[0]}: choose "
            "another folder"
        )
    if not (folder / TABLE).exists():
        return None
    if not overwrite:
        raise FileExistsError(f"{folder}: already has a state; overwrite=True replaces it")
    table: JsonObject = read_json(folder / TABLE)
    return str(table.get("arrays"))


def _safetensors(arrays: Mapping[str, HostArray], id: str) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file of arrays."""
    header = io.BytesIO()
    write_header(
        header,
        {name: Tensor(_NAMES[a.dtype], a.shape, a.nbytes) for name, a in arrays.items()},
        {"id": id},
    )
    yield header.getvalue()
    for array in arrays.values():
        yield array.reshape(-1).view(np.uint8).data
