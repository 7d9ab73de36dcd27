"""OUT: the check that the result can be written there, and its last steps."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from doraxp.checkpoint._config_edits import ConfigEdits
from doraxp.checkpoint._durable import sync, write_chunks, write_durably
from doraxp.checkpoint._errors import CheckpointError, gguf
from doraxp.checkpoint._json import JsonObject, read_json
from doraxp.checkpoint._merge import Merge
from doraxp.checkpoint._model import open_model
from doraxp.checkpoint._safetensors import Reader
from doraxp.checkpoint._stamp import unchanged_chunks
from doraxp.checkpoint._work import REPLACED, stranger_in, work_folder

_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OF_MODELS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*processor_config.json",
    "README.md",
    "LICENSE*",
    ".gitattributes",
)
"""Names of the files that a merge replaces although BASE may not have them."""


def check_target(merge: Merge, out: str | os.PathLike[str], *, force: bool = False) -> None:
    """Raise an error where `run_merge` would not begin to write the result to `out`.

    Parameters
    ----------
    merge : Merge
    out : path
    force : bool
        Accept an `out` that exists, if it is a model.

    Raises
    ------
    CheckpointError
        `out` is in the base or contains it.
    FileExistsError
        `out` exists, and `force` is False or something in it is not of a model.
    OSError
        `out` cannot be written, or the disk has too little space.
    """
    out = Path(out).absolute()
    base = merge.model.path.resolve()
    adapters = [one.reader.path.resolve() for one in merge.adapters]
    target = out.resolve()
    if target == base or (merge.model.is_folder and target.is_relative_to(base)):
        raise CheckpointError(f"{out}: OUT must not be in BASE, {merge.model.path}")
    work = work_folder(out)
    for folder in (target, work.resolve()):
        if any(path.is_relative_to(folder) for path in (base, *adapters)):
            raise CheckpointError(
                f"{folder}: OUT and its work folder must not contain BASE or ADAPTER"
            )
    if out.suffix.lower() == ".gguf":
        raise gguf(out)
    if out.is_dir() and not merge.model.is_folder:
        raise CheckpointError(f"{out}: OUT must be a file, as BASE is, but is a folder")
    if merge.model.is_folder and out.suffix == ".safetensors":
        raise CheckpointError(f"{out}: OUT must be a folder, as BASE is, but has a file's name")
    if not merge.model.is_folder and out.suffix not in ("", ".safetensors", base.suffix):
        raise CheckpointError(
            f"{out}: OUT is written in the format of safetensors, so its name must end in "
            f".safetensors, not in {out.suffix}"
        )
    _check_replaceable(merge, out, force=force)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder")
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"{out.parent}: not writable")
    if os.path.lexists(work) and (work.is_symlink() or not work.is_dir()):
        raise FileExistsError(f"{work}: must be a folder of an earlier merge, or not exist")
    stranger = stranger_in(work)
    if stranger is not None:
        problem = f"is not of a merge, but in the folder in which one to {out.name} works: move it"
        raise FileExistsError(f"{stranger}: {problem}")
    free = shutil.disk_usage(out.parent).free
    if free + _size(work) < merge.size:
        raise OSError(f"{out.parent}: {merge.size} bytes are needed, {free} are free")


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder, in which another merge may be at work."""
    total = 0
    for path, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(path, file)).st_size
    return total


def _check_replaceable(merge: Merge, out: Path, *, force: bool) -> None:
    """Raise FileExistsError if something is at `out` that must be kept."""
    if not os.path.lexists(out):
        return
    if not force:
        raise FileExistsError(f"{out}: already exists; --force replaces it")
    if out.is_symlink():
        return  # only the link goes
    kept = _kept_in(merge, out) if merge.model.is_folder else _kept_file(out)
    # A merge without a lock may have just moved `out` away.
    if kept is not None and os.path.lexists(out):
        raise FileExistsError(f"{kept}; --force replaces only a model; choose another OUT")


def _kept_in(merge: Merge, out: Path) -> str | None:
    """Return the reason why a folder must not be replaced."""
    if not out.is_dir():
        return f"{out}: OUT must be a folder, as BASE is, but is a file"
    files = list(_files(out))
    if not files:
        return None
    for file in files:
        if not _is_of_a_model(file, merge):
            return f"{out / file}: is not a file of a model"
    if not any(file.suffix == ".safetensors" for file in files):
        return f"{out}: has no safetensors file"
    try:
        open_model(out)
    except (CheckpointError, FileNotFoundError) as error:
        return str(error)
    return None


def _kept_file(out: Path) -> str | None:
    """Return the reason why a file must not be replaced."""
    if out.is_file() and out.stat().st_size == 0:
        return None
    try:
        Reader(out)
    except (CheckpointError, FileNotFoundError):
        return f"{out}: is not a safetensors file"
    return None


def _files(folder: Path) -> Iterator[Path]:
    """Yield all in a folder that is not a folder, in order, relative to it."""
    for path, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(path) / name).is_symlink()]
        folders.sort()
        for name in sorted([*files, *links]):
            yield (Path(path) / name).relative_to(folder)


def _is_of_a_model(file: Path, merge: Merge) -> bool:
    """Return True for a file that the merge writes too, or that has the name of a model's file."""
    model = merge.model
    if str(file) in (*model.shards, *model.indexes) or file in model.others:
        return True
    return len(file.parts) == 1 and any(fnmatch.fnmatch(file.name, own) for own in _OF_MODELS)


def copy_others(merge: Merge, folder: Path) -> None:
    """Copy the configuration and the tokenizer, and write each index anew.

    The files get the mode of new ones: those of BASE may be read-only.
    """
    model = merge.model
    own = {file.name: file for file in merge.tokenizer()}
    for file in dict.fromkeys([*model.others, *map(Path, own)]):
        source = own.get(str(file), model.path / file)
        target = folder / file
        for parent in [*reversed(file.parents)][1:]:
            (folder / parent).mkdir(exist_ok=True)  # not `folder`, if another merge took it
        write_chunks(target, unchanged_chunks(source, merge.stamps[source]))
        sync(target.parent)
    for name, index in model.indexes.items():
        write_durably(folder / name, _json(_index(merge, name, index)))
    for config in (file for file in model.others if file.name == "config.json"):
        _write_config(merge, folder, config)
    sync(folder)


def _index(merge: Merge, name: str, index: JsonObject) -> JsonObject:
    """Return the index of the result's shards."""
    beside = name.rpartition("/")[0]
    shards = [shard for shard in merge.model.shards if shard.rpartition("/")[0] == beside]
    metadata = index.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    size = sum(map(merge.shard_size, shards))
    weight_map = {
        tensor: shard.rpartition("/")[2] for shard in shards for tensor in merge.tasks_of(shard)
    }
    return index | {"metadata": metadata | {"total_size": size}, "weight_map": weight_map}


def _write_config(merge: Merge, folder: Path, config: Path) -> None:
    """Write a configuration again, where the merge changes it."""
    dtype, file = merge.options.dtype, folder / config
    edits = merge.edits
    if config != Path("config.json"):  # of a component of a pipeline, or of another module
        lead = f"{config.parent}."
        own = [name.removeprefix(lead) for name in edits.dense if name.startswith(lead)]
        edits = ConfigEdits(dense=tuple(own))
    if not file.exists() or not merge.model.is_folder or (dtype is None and not edits):
        return
    entries = edits.apply(read_json(file))
    parts = (part for part in entries.values() if isinstance(part, dict))  # text, vision
    for part in (entries, *parts):
        for key in part.keys() & {"dtype", "torch_dtype"}:
            part[key] = part[key] if dtype is None else _DTYPE_NAMES[dtype]
    write_durably(file, _json(entries))


def _json(entries: JsonObject) -> bytes:
    return f"{json.dumps(entries, indent=2)}\n".encode()


def move_to_target(merge: Merge, run: Path, out: Path, *, force: bool) -> None:
    """Rename the complete result to `out`.

    An `out` of before goes to the run folder: if the second rename fails, it comes back.
    """
    _check_replaceable(merge, out, force=force)  # someone may have put a file there since
    result = run / "model"
    if not merge.model.is_folder:
        result /= merge.model.path.name
    if force and result.is_file():
        result.replace(out)
    elif force and os.path.lexists(out):
        # The name is unique: a merge that was killed at this point may have left another one.
        replaced = run / f"{uuid.uuid4().hex}{REPLACED}"
        out.rename(replaced)
        try:
            _rename_to_new(result, out)
        except OSError:
            if not os.path.lexists(out):
                with contextlib.suppress(FileNotFoundError):  # a merge without a lock took it
                    replaced.rename(out)
            raise
    else:
        _rename_to_new(result, out)
    sync(out.parent)


def _rename_to_new(result: Path, out: Path) -> None:
    """Rename a folder or file, or raise FileExistsError if something has come to `out`."""
    is_folder = result.is_dir()
    try:
        if is_folder:
            result.rename(out)  # fails where a folder that is not empty is
        else:
            os.link(result, out)  # fails where anything is
    except OSError as error:
        if os.path.lexists(out):
            problem = "appeared when the merge was complete; remove it, or choose another OUT"
            raise FileExistsError(f"{out}: {problem}") from error
        if is_folder:
            raise
        result.replace(out)  # the file system has no links
