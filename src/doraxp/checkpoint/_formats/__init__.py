"""The formats of adapter files: one module each, with the functions that `Format` asks for.

To add a format, add its module here and its name to `FORMATS`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from doraxp.checkpoint._adapters import CONFIG, AdapterSet
from doraxp.checkpoint._durable import sync, write_durably
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._formats import lycoris, mlx, peft
from doraxp.checkpoint._formats.protocol import Format, WritableFormat
from doraxp.checkpoint._safetensors import Reader
from doraxp.layers import AdaptedLayer

FORMATS: tuple[Format, ...] = (peft, mlx, lycoris)
"""In the order in which they are tried."""
_WRITABLE = {format.NAME: format for format in FORMATS if isinstance(format, WritableFormat)}
FILES = tuple(format.FILE for format in _WRITABLE.values())
"""The names of the files of tensors in an adapter's folder."""
_PICKLE = "adapter_model.bin"
"""PEFT's file of before safetensors."""


def load_adapters(
    path: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    adapter_name: str | None = None,
) -> AdapterSet:
    """Return the adapters of a checkpoint by module path, whatever its format.

    Parameters
    ----------
    path : path
        A folder as PEFT or mlx-lm save it, or a safetensors file, with its ``adapter_config.json``
        beside it where the format has one.
    subfolder : str, optional
        The adapter's folder in `path`.
    adapter_name : str, optional
        The adapter to take from a file that has several, as a state dict of PEFT may.

    Returns
    -------
    AdapterSet
        A mapping of paths to AdaptedLayer. Only the header has been read, and whole tensors that
        the file has twice; each access to an adapter reads it.

    Raises
    ------
    CheckpointError
        The file is malformed, its format is unknown, it has no DoRA adapter, or it contradicts
        its configuration.
    OSError
        The file cannot be read.
    """
    reader = Reader(_adapter_file(Path(path, subfolder or "")))
    parts = {part for name in reader.tensors for part in name.split(".")[-3:]}
    for format in FORMATS:
        if format.recognises(parts):
            if adapter_name is None:
                return format.read(reader)
            if format is not peft:
                raise CheckpointError(
                    f"{reader.path}: has one adapter without a name, got the name {adapter_name!r}"
                )
            return peft.read(reader, adapter_name)
    raise CheckpointError(f"{reader.path}: no tensor in it has a name of a known adapter format")


def _adapter_file(path: Path) -> Path:
    if not os.path.lexists(path) and _hidden(path).is_dir():
        raise FileNotFoundError(
            f"{path}: no such file or folder; a save was stopped when it replaced this adapter: "
            f"save it again, or rename {_hidden(path)}, which has the adapter of before"
        )
    if not path.is_dir():
        return path
    # The reader refuses the pickle, and says how to convert it.
    found = [path / name for name in (*FILES, _PICKLE) if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{path}: the folder must contain {' or '.join(FILES)}")
    return found[0]


def save_adapters(
    path: str | os.PathLike[str],
    adapters: Mapping[str, AdaptedLayer],
    format: str = "peft",
    *,
    overwrite: bool = False,
) -> None:
    """Write adapters as a folder that PEFT or mlx-lm loads; exactly, or not at all.

    The folder appears when it is complete and on the disk.

    Parameters
    ----------
    path : path
        A folder that does not exist yet, unless `overwrite` is True.
    adapters : mapping of str to AdaptedLayer
        From `load_adapters` or `doraxp.adapt`; arrays of NumPy.
    format : {"peft", "mlx"}
        mlx-lm has one rank and one s for all modules, and linear layers only.
    overwrite : bool
        Replace a folder that has an adapter's files and no others. The old one stays until the new
        one is complete. It then has the name ``.NAME.replaced`` for a moment; if the process is
        killed in that moment, the next call puts it back first.

    Raises
    ------
    FileExistsError
        `path` exists and `overwrite` is False, or something there is not an adapter's.
    FileNotFoundError
        The folder above `path` does not exist.
    ValueError
        The format cannot hold these adapters; the message gives the reason. Nothing is written.
    """
    if format not in _WRITABLE:
        raise ValueError(f"format must be one of {tuple(_WRITABLE)}, got {format!r}")
    if isinstance(adapters, AdapterSet) and adapters.replacements:
        raise ValueError(
            f"adapters must hold adapters only, but {adapters.reader.path} also replaces "
            f"{', '.join(adapters.replacements)}"
        )
    if not adapters:
        raise ValueError("adapters must hold at least one layer")
    target = Path(path)
    replaced = _hidden(target)
    if os.path.lexists(replaced):
        _check_replaceable(replaced, overwrite=True)
        _put_back(target)
    if os.path.lexists(target):
        _check_replaceable(target, overwrite=overwrite)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder")
    written = _WRITABLE[format].write(adapters)
    # The safetensors library writes an array's memory as it is, which must be C-contiguous.
    contiguous = {name: np.ascontiguousarray(leaf) for name, leaf in written.tensors.items()}
    text = json.dumps(written.config, indent=2, sort_keys=True) + "\n"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        complete = Path(folder) / "complete"
        complete.mkdir()
        # The library would write a file that only its owner can read.
        write_durably(complete / _WRITABLE[format].FILE, save(contiguous, {"format": "pt"}))
        write_durably(complete / CONFIG, text.encode())
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


def _hidden(target: Path) -> Path:
    """Return the name that an adapter has while another one takes its place."""
    return target.with_name(f".{target.name}.replaced")


def _put_back(target: Path) -> None:
    """Give an adapter its name again, if no other one has taken it."""
    if not os.path.lexists(target) and _hidden(target).exists():
        _hidden(target).rename(target)


def _check_replaceable(target: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError unless `target` may be replaced: a folder with an adapter alone."""
    if not overwrite:
        raise FileExistsError(
            f"{target}: already exists; overwrite=True, or --force, replaces an adapter"
        )
    if target.is_symlink() or not target.is_dir():
        raise FileExistsError(f"{target}: must be a folder to be replaced")
    known = {CONFIG, *FILES}
    foreign = sorted(
        path.name for path in target.iterdir() if path.name not in known or path.is_dir()
    )
    if foreign:
        raise FileExistsError(
            f"{target}: only an adapter's own files are replaced, but it has {foreign[0]}: move it"
        )
