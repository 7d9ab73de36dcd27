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
from safetensors.numpy import save_file

from doraxp.checkpoint._adapters import CONFIG, AdapterSet
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._formats import lycoris, mlx, peft
from doraxp.checkpoint._formats.protocol import Format, WritableFormat
from doraxp.checkpoint._safetensors import Reader
from doraxp.layers import AdaptedLayer

FORMATS: tuple[Format, ...] = (peft, mlx, lycoris)
"""In the order in which they are tried."""
_WRITABLE = {format.NAME: format for format in FORMATS if isinstance(format, WritableFormat)}
_PICKLE = "adapter_model.bin"
"""PEFT's file of before safetensors."""


def load_adapters(path: str | os.PathLike[str]) -> AdapterSet:
    """Return the adapters of a checkpoint by module path, whatever its format.

    Parameters
    ----------
    path : path
        A folder as PEFT or mlx-lm save it, or a safetensors file, with its ``adapter_config.json``
        beside it where the format has one.

    Returns
    -------
    AdapterSet
        A mapping of paths to AdaptedLayer. Only the header has been read; each access to an
        adapter reads it.

    Raises
    ------
    CheckpointError
        The file is malformed, its format is unknown, it has no DoRA adapter, or it contradicts
        its configuration.
    OSError
        The file cannot be read.
    """
    reader = Reader(_adapter_file(Path(path)))
    parts = {part for name in reader.tensors for part in name.split(".")[-3:]}
    for format in FORMATS:
        if format.recognises(parts):
            return format.read(reader)
    raise CheckpointError(f"{reader.path}: no tensor in it has a name of a known adapter format")


def _adapter_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = [format.FILE for format in _WRITABLE.values()]
    # The reader refuses the pickle, and says how to convert it.
    found = [path / name for name in (*names, _PICKLE) if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{path}: the folder must contain {' or '.join(names)}")
    return found[0]


def save_adapters(
    path: str | os.PathLike[str],
    adapters: Mapping[str, AdaptedLayer],
    format: str = "peft",
) -> None:
    """Write adapters as a folder that PEFT or mlx-lm loads; exactly, or not at all.

    Parameters
    ----------
    path : path
        A folder that does not exist yet.
    adapters : mapping of str to AdaptedLayer
        From `load_adapters` or `doraxp.adapt`; arrays of NumPy.
    format : {"peft", "mlx"}
        mlx-lm has one rank and one s for all modules, and linear layers only.

    Raises
    ------
    FileExistsError
        `path` exists.
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
    if target.exists():
        raise FileExistsError(f"{target}: already exists")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder")
    written = _WRITABLE[format].write(adapters)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        complete = Path(folder) / "complete"
        complete.mkdir()
        # The safetensors library writes an array's memory as it is, which must be C-contiguous.
        contiguous = {name: np.ascontiguousarray(leaf) for name, leaf in written.tensors.items()}
        save_file(contiguous, complete / _WRITABLE[format].FILE, {"format": "pt"})
        text = json.dumps(written.config, indent=2, sort_keys=True) + "\n"
        (complete / CONFIG).write_text(text, "utf-8")
        complete.rename(target)
