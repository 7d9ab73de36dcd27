"""OUT, and the folder beside it in which a merge works until it is complete.

The folder ``.OUT.partial`` has ``merge.json``, which says what merge it is of; ``model``, with the
finished shards; notes of the changes in each of them; and files that are not finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from pathlib import Path

from doraxp.checkpoint._adapters import config_path
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._json import JsonObject, read_json
from doraxp.checkpoint._merge import Merge
from doraxp.checkpoint._model import INDEX

_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def work_folder(out: Path) -> Path:
    """Return the path of the folder in which a merge works."""
    return out.parent / f".{out.name}.partial"


def check_target(merge: Merge, out: Path, *, force: bool) -> None:
    """Raise CheckpointError or OSError where the result cannot be written to `out`."""
    base, adapter = merge.model.path.resolve(), merge.adapters.reader.path.resolve()
    target = out.resolve()
    if target == base or (merge.model.is_folder and target.is_relative_to(base)):
        raise CheckpointError(f"{out}: OUT must not be in BASE, {merge.model.path}")
    if any(path.is_relative_to(target) for path in (base, adapter)):
        raise CheckpointError(f"{out}: OUT must not contain BASE or ADAPTER")
    if out.is_dir() and not merge.model.is_folder:
        raise CheckpointError(f"{out}: OUT must be a file, as BASE is, but is a folder")
    if merge.model.is_folder and out.suffix == ".safetensors":
        raise CheckpointError(f"{out}: OUT must be a folder, as BASE is, but has a file's name")
    if os.path.lexists(out) and not force:
        raise FileExistsError(f"{out}: already exists; --force replaces it")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder")
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"{out.parent}: not writable")
    work = work_folder(out)
    if os.path.lexists(work) and (work.is_symlink() or not work.is_dir()):
        raise FileExistsError(f"{work}: must be a folder of an earlier merge, or not exist")
    free = shutil.disk_usage(out.parent).free
    there = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    if free + there < merge.size:
        raise OSError(f"{out.parent}: {merge.size} bytes are needed, {free} are free")


def start_or_resume(work: Path, merge: Merge) -> None:
    """Keep the finished shards of the same merge, and clear away those of another one.

    A merge that was killed after its last rename has no ``model`` there any more: it is OUT.
    """
    note, fingerprint = work / "merge.json", _fingerprint(merge)
    if (work / "model").exists():
        with contextlib.suppress(OSError, ValueError):
            if json.loads(note.read_bytes()) == fingerprint:
                for unfinished in work.glob("*.unfinished"):
                    unfinished.unlink()
                return
    if work.exists():
        shutil.rmtree(work)
    (work / "model").mkdir(parents=True)
    note.write_text(json.dumps(fingerprint), "utf-8")


def _fingerprint(merge: Merge) -> JsonObject:
    """Return everything on which a finished shard depends, in the types of JSON."""
    files = [*(reader.path for reader in merge.model.shards.values()), merge.adapters.reader.path]
    config = config_path(merge.adapters.reader)
    return {
        "files": [
            [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
            for file in (*files, *((config,) if config.exists() else ()))
        ],
        "options": list(vars(merge.options).values()),
    }


def copy_others(merge: Merge, folder: Path) -> None:
    """Copy the configuration and the tokenizer, and write the index anew."""
    model, dtype = merge.model, merge.options.dtype
    for file in model.others:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(model.path / file, target)
    if model.index is not None:
        metadata = model.index.get("metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        index = model.index | {"metadata": metadata | {"total_size": merge.size}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    config = folder / "config.json"
    if dtype is not None and model.is_folder and config.exists():
        entries = read_json(config)
        parts = (part for part in entries.values() if isinstance(part, dict))  # text, vision
        for part in (entries, *parts):
            for key in part.keys() & {"dtype", "torch_dtype"}:
                part[key] = _DTYPE_NAMES[dtype]
        config.write_text(json.dumps(entries, indent=2) + "\n", "utf-8")


def move_to_target(merge: Merge, work: Path, out: Path) -> None:
    """Rename the complete result to `out`, and remove the work folder."""
    result = work / "model"
    if not merge.model.is_folder:
        result /= merge.model.path.name
    if merge.model.is_folder and os.path.lexists(out):
        # The name is unique: a merge that was killed at this point may have left another one.
        out.rename(work / f"{uuid.uuid4().hex}.replaced")
    result.replace(out)
    shutil.rmtree(work)
