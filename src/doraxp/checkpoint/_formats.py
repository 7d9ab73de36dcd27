"""`load_adapters` and `save_adapters`: which format a file is in, and which can hold what."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
from safetensors.numpy import save_file

from doraxp.checkpoint._adapters import AdapterSet
from doraxp.checkpoint._others import read_lycoris, read_mlx
from doraxp.checkpoint._peft import read_peft
from doraxp.checkpoint._safetensors import CheckpointError, Reader, read_json
from doraxp.checkpoint._writers import to_mlx, to_peft
from doraxp.layers import AdaptedLayer

TargetFormat: TypeAlias = Literal["peft", "mlx"]
_FILES = ("adapter_model.safetensors", "adapters.safetensors")
_WRITERS = {"peft": (_FILES[0], to_peft), "mlx": (_FILES[1], to_mlx)}


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
        A mapping of paths to AdaptedLayer. Only the header has been read; each adapter is read
        when it is asked for.

    Raises
    ------
    CheckpointError
        The file is malformed, of no known format, holds no DoRA adapter, or does not agree with
        its configuration.
    OSError
        It cannot be read.
    """
    file = _adapter_file(Path(path))
    reader = Reader(file)
    config = file.parent / "adapter_config.json"
    parts = {part for name in reader.tensors for part in name.split(".")[-3:]}
    if parts & {"lora_A", "lora_embedding_A", "lora_magnitude_vector", "weight_m_wdecomp"}:
        return read_peft(reader, read_json(config))
    if "lora_a" in parts:
        return read_mlx(reader, read_json(config))
    if parts & {"lora_down", "dora_scale"}:
        return read_lycoris(reader)
    raise CheckpointError(f"{file}: of no known format: none of its tensors is a DoRA adapter's")


def _adapter_file(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        pickles = [path / name for name in ("adapter_model.bin",) if (path / name).is_file()]
        if not found and not pickles:
            raise FileNotFoundError(f"{path}: no adapter in it, neither {' nor '.join(_FILES)}")
        path = (found or pickles)[0]
    return path


def save_adapters(
    path: str | os.PathLike[str],
    adapters: Mapping[str, AdaptedLayer],
    format: TargetFormat = "peft",
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
        There is something at `path`.
    FileNotFoundError
        There is no folder to put it in.
    ValueError
        The format cannot hold such adapters, and why; nothing is written.
    """
    if format not in get_args(TargetFormat):
        raise ValueError(f"format must be one of {get_args(TargetFormat)}, got {format!r}")
    if isinstance(adapters, AdapterSet) and adapters.replacements:
        raise ValueError(
            f"adapters must hold adapters only, but {adapters.reader.path} also replaces "
            f"{', '.join(adapters.replacements)}"
        )
    if not adapters:
        raise ValueError("adapters must hold at least one layer")
    target = Path(path)
    if target.exists():
        raise FileExistsError(f"{target}: already there")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder")
    file, write = _WRITERS[format]
    tensors, config = write(adapters)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        beside = Path(folder) / "complete"
        beside.mkdir()
        # The library writes the bytes of an array as they lie: C-contiguous or wrong.
        contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(contiguous, beside / file, {"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (beside / "adapter_config.json").write_text(text, "utf-8")
        beside.rename(target)
