"""Adapters to a folder: `save_adapters`, and `renamed` for names that no trainer knows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from doraxp.checkpoint._adapters import CONFIG, AdapterSet, StoredLayer
from doraxp.checkpoint._formats import FILES, WRITABLE, choices
from doraxp.checkpoint._replace import prepare_place, put
from doraxp.layers import AdaptedLayer


def save_adapters(
    path: str | os.PathLike[str],
    adapters: Mapping[str, AdaptedLayer],
    format: str = "peft",
    *,
    overwrite: bool = False,
) -> None:
    """Write adapters as a folder that PEFT or mlx-lm loads; exactly, or not at all.

    The folder appears when it is complete and on the disk. From a PEFT file to "peft", whole
    tensors and all entries of the configuration stay as they are. `norm_gradient` and `dropout`
    of each `Config` are in the header of the file, where other programs skip them.

    Parameters
    ----------
    path : path
        A folder that does not exist yet, unless `overwrite` is True.
    adapters : mapping of str to AdaptedLayer
        From `load_adapters` or `doraxp.adapt`; arrays of NumPy.
    format : {"peft", "mlx"}
        mlx-lm has one rank and one s for all modules, linear layers, and embeddings of kind linear
        on (tokens, dims).
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
    if format not in WRITABLE:
        raise ValueError(f"format must be one of {tuple(WRITABLE)}, got {format!r}")
    if isinstance(adapters, AdapterSet) and adapters.dots_lost:
        raise ValueError(
            f"{adapters.reader.path}: {next(iter(adapters))} has an underscore for each dot of the "
            "module's name, so no trainer would find the module: doraxp convert takes the names "
            "from the model with --base BASE"
        )
    if not adapters:
        raise ValueError("adapters must hold at least one layer")
    target = Path(path)
    prepare_place(target, {CONFIG, *FILES}, overwrite=overwrite)
    written = WRITABLE[format].write(adapters)
    # The safetensors library writes an array's memory as it is, which must be C-contiguous.
    # `ascontiguousarray` would give a number an axis.
    contiguous = {name: np.asarray(leaf, order="C") for name, leaf in written.tensors.items()}
    header = {"format": "pt", **choices.without_choices(written.metadata)}
    # The order of the patterns in an entry has a meaning: only the entries are sorted.
    text = json.dumps(dict(sorted(written.config.items())), indent=2) + "\n"
    # The library would write a file that only its owner can read.
    raw = save(contiguous, header | choices.metadata(adapters))
    put(target, {WRITABLE[format].FILE: raw, CONFIG: text.encode()})


def renamed(adapters: AdapterSet, names: Mapping[str, str]) -> AdapterSet:
    """Return the adapters of a file whose names lost their dots, by the names of the model.

    `save_adapters` and a merge then find the modules.

    Parameters
    ----------
    adapters : AdapterSet
        Of a LyCORIS or kohya file.
    names : mapping of str to str
        The module's path in the model, for each path of `adapters`.

    Raises
    ------
    ValueError
        The file's names have dots, a path is missing from `names` or unknown, or two modules would
        have one name.

    Examples
    --------
    >>> renamed(load_adapters("a.safetensors"),
    ...         {"lora_unet_mid_block": "mid.block"})  # doctest: +SKIP
    """
    if not adapters.dots_lost:
        raise ValueError(f"{adapters.reader.path}: only names that lost their dots are replaced")
    foreign = next((path for path in names if path not in adapters.layers), None)
    if foreign is not None:
        raise ValueError(f"{adapters.reader.path}: the file has no adapter {foreign}")
    layers: dict[str, StoredLayer] = {}
    before: dict[str, str] = {}
    for path, layer in adapters.layers.items():
        if path not in names:
            raise ValueError(f"names must have an entry for {path}")
        new = names[path]
        if new in before:
            raise ValueError(
                f"{adapters.reader.path}: {before[new]} and {path} would both be named {new}"
            )
        before[new], layers[new] = path, layer
    return replace(adapters, layers=layers, dots_lost=False)
