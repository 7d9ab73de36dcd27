"""The formats of adapter files: one module each, with the functions that `Format` asks for.

To add a format, add its module here and its name to `FORMATS`.
"""

from __future__ import annotations

import os
from pathlib import Path

from doraxp._base.types import Dropout, Form, NormGradient
from doraxp.checkpoint._adapters import AdapterSet, config_path
from doraxp.checkpoint._errors import CheckpointError, gguf
from doraxp.checkpoint._formats import diffusers, lycoris, mlx, peft
from doraxp.checkpoint._formats.choices import with_choices
from doraxp.checkpoint._formats.protocol import Format, WritableFormat
from doraxp.checkpoint._json import read_json
from doraxp.checkpoint._replace import hidden
from doraxp.checkpoint._safetensors import Reader

FORMATS: tuple[Format, ...] = (mlx, diffusers, lycoris, peft)
"""In the order in which they are tried."""
WRITABLE = {format.NAME: format for format in FORMATS if isinstance(format, WritableFormat)}
"""The formats that `doraxp.checkpoint.save_adapters` writes, by name."""
FILES = tuple(format.FILE for format in WRITABLE.values())
"""The names of the files of tensors in an adapter's folder."""
_PICKLE = "adapter_model.bin"
"""PEFT's file of before safetensors."""


def load_adapters(
    path: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    adapter_name: str | None = None,
    norm_gradient: NormGradient | None = None,
    dropout: Dropout | None = None,
    form: Form | None = None,
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
    norm_gradient, dropout : str, optional
        As in `Config`, for all modules. None takes the value that `save_adapters` wrote to the
        file; without one it is the default of `Config`. They matter for further training, and not
        for a merge.
    form : {"weight", "direction"}, optional
        The form of the numbers in the file, as in `Config`. None takes the weight form, which all
        trainers write. No number changes: `doraxp.convert_form` converts, with the base's weight.

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
    ValueError
        `norm_gradient`, `dropout` or `form` is unknown.
    OSError
        The file cannot be read.
    """
    reader = Reader(_adapter_file(Path(path, subfolder or "")))
    parts = {part for name in reader.tensors for part in name.split(".")[-3:]}
    for format in FORMATS:
        if format.recognises(reader, parts):
            if adapter_name is None:
                adapters = format.read(reader)
            elif format is peft:
                adapters = peft.read(reader, adapter_name)
            else:
                raise CheckpointError(
                    f"{reader.path}: has one adapter without a name, got the name {adapter_name!r}"
                )
            given = {"norm_gradient": norm_gradient, "dropout": dropout, "form": form}
            return with_choices(adapters, given)
    where = config_path(reader)
    peft_type = read_json(where).get("peft_type") if where.is_file() else None
    if isinstance(peft_type, str):
        raise CheckpointError(
            f"{where}: peft_type is {peft_type!r}, which doraxp cannot merge: PEFT itself can"
        )
    raise CheckpointError(f"{reader.path}: no tensor in it has a name of a known adapter format")


def _adapter_file(path: Path) -> Path:
    if not os.path.lexists(path) and hidden(path).is_dir():
        raise FileNotFoundError(
            f"{path}: no such file or folder; a save was stopped when it replaced this adapter: "
            f"save it again, or rename {hidden(path)}, which has the adapter of before"
        )
    if not path.is_dir():
        return path
    # The reader refuses the pickle, and says how to convert it.
    found = [path / name for name in (*FILES, _PICKLE) if (path / name).is_file()]
    if found:
        return found[0]
    names = {file.parent.name for name in FILES for file in path.glob(f"*/{name}")}
    if names:
        raise FileNotFoundError(
            f"{path}: has the adapters {', '.join(sorted(names))}: choose one with --subfolder NAME"
        )
    of_llama = sorted(path.glob("*.gguf"))
    if of_llama:
        raise gguf(of_llama[0])
    raise FileNotFoundError(f"{path}: the folder must contain {' or '.join(FILES)}")
