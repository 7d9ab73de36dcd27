"""Adapters to a folder: `save_adapters`, and `named_for` for the names of a model's modules."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from doraxp.checkpoint._adapters import CONFIG, AdapterSet, StoredLayer, with_kernel
from doraxp.checkpoint._errors import CheckpointError, gguf
from doraxp.checkpoint._fit import AS_FILED, Fit, Fitted, fit
from doraxp.checkpoint._formats import FILES, WRITABLE, choices, diffusers
from doraxp.checkpoint._given import GivenLayer, as_layers
from doraxp.checkpoint._model import Model
from doraxp.checkpoint._names import WRAPPERS, Places, without
from doraxp.checkpoint._replace import prepare_place, put
from doraxp.checkpoint._torchtune import in_order
from doraxp.checkpoint._updated_layer import AnyLayer

_OF_PEFT = ("peft", "nvlabs")
"""The formats whose names are those of PEFT's modules."""


def save_adapters(
    path: str | os.PathLike[str],
    adapters: Mapping[str, GivenLayer],
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
    adapters : AdaptedModel, or mapping of str to layer
        By path: a `DoRALayer`, which is saved in the weight form; an `AdaptedLayer` of
        `doraxp.adapt` or `load_adapters`; an `UpdatedLayer`; or a pair of `Adapter` and `Config`,
        for a linear layer or a stack of them. Arrays may be of any library.
    format : {"peft", "mlx", "diffusers"}
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
    TypeError
        A layer is of another type.
    ValueError
        The format cannot hold these adapters; the message gives the reason. Nothing is written.
    """
    if format not in WRITABLE:
        raise ValueError(f"format must be one of {tuple(WRITABLE)}, got {format!r}")
    if isinstance(adapters, AdapterSet):
        _check_names(adapters, format)
    if not adapters:
        raise ValueError("adapters must hold at least one layer")
    target = Path(path)
    check_place(target, overwrite=overwrite)
    layers = as_layers(adapters)
    if format != diffusers.NAME:
        layers = _without_part(layers)
    written = WRITABLE[format].write(layers)
    # The safetensors library writes an array's memory as it is, which must be C-contiguous.
    # `ascontiguousarray` would give a number an axis.
    contiguous = {name: np.asarray(leaf, order="C") for name, leaf in written.tensors.items()}
    header = {"format": "pt", **choices.without_choices(written.metadata)}
    # The library would write a file that only its owner can read.
    raw = save(contiguous, header | choices.metadata(layers))
    files = {WRITABLE[format].FILE: raw}
    if written.config is not None:
        # The order of the patterns in an entry has a meaning: only the entries are sorted.
        text = json.dumps(dict(sorted(written.config.items())), indent=2) + "\n"
        files[CONFIG] = text.encode()
    put(target, files)


def check_place(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise unless `save_adapters` may write to a path: before work that an error would lose.

    Parameters
    ----------
    path : path
    overwrite : bool
        As in `save_adapters`.

    Raises
    ------
    FileExistsError
        `path` exists and `overwrite` is False, or something there is not an adapter's.
    FileNotFoundError
        The folder above `path` does not exist.
    """
    if Path(path).suffix.lower() == ".gguf":
        raise gguf(Path(path))
    prepare_place(Path(path), {CONFIG, *FILES}, overwrite=overwrite)


def _check_names(adapters: AdapterSet, format: str) -> None:
    """Raise ValueError where a conversion needs the base, for names or for the order of rows."""
    first, problem = next(iter(adapters.layers)), None
    if adapters.differences:
        raise ValueError(
            f"{adapters.reader.path}: has {next(iter(adapters.differences))}, which is added to "
            "that of the base, and a conversion does not write such tensors: merge it into its "
            "base instead, with doraxp merge"
        )
    if adapters.is_of_images and not adapters.format == format == "diffusers":
        problem = f"{first} is not the name of a module in the model, so no trainer would find it"
    elif adapters.is_interleaved:
        problem = "the magnitudes of q and k have torchtune's order of rows, not transformers'"
    if problem is not None:
        raise ValueError(f"{adapters.reader.path}: {problem}: give the model, with --base BASE")


def _without_part(adapters: Mapping[str, AnyLayer]) -> Mapping[str, AnyLayer]:
    """Return the adapters of one part of a pipeline under the names in that part."""
    if not isinstance(adapters, AdapterSet) or not adapters.is_of_pipeline:
        return adapters
    used = {path.partition(".")[0] for path in adapters}
    if len(used) > 1:
        raise ValueError(
            f"{adapters.reader.path}: has adapters for {', '.join(sorted(used))}, and only "
            "diffusers has a format for several parts"
        )
    layers = {path.partition(".")[2]: layer for path, layer in adapters.layers.items()}
    return replace(adapters, layers=layers)


def named_for(
    model: Model, adapters: AdapterSet, choices: Fit = AS_FILED, *, format: str | None = None
) -> AdapterSet:
    """Return the adapters under the names of a model's modules, as `save_adapters` needs them.

    A module that the model has in several, as the queries, keys and values of original names are in
    diffusers, becomes several: each has all of A and its rows of B and m, which is exact. Where
    source and `format` are PEFT's, the names stay: they are those of the modules in memory.

    Parameters
    ----------
    model : Model
        The base, from `open_model`.
    adapters : AdapterSet
        From `load_adapters`.
    choices : Fit
        How the adapter fits the base, where the files do not say it.
    format : {"peft", "mlx", "diffusers"}, optional
        The format in which they will be saved. None if the names of the file are needed.

    Raises
    ------
    CheckpointError
        A module is not in the model, or is only a part of one of its modules; or PEFT's names of
        the modules are not known.
    """
    fitted = fit(model, adapters, choices)
    problem = next(fitted.missing(adapters), None)
    if problem is not None:
        raise CheckpointError(f"{adapters.reader.path}: {problem}")
    if format == "peft" and adapters.format in _OF_PEFT:
        kept = {_own_path(path, fitted, choices): adapters.layers[path] for path in fitted.modules}
        return _under(adapters, kept)
    if format == "peft" and "text_config" in model.config:
        raise CheckpointError(
            f"{adapters.reader.path}: PEFT has the names of modules in memory, and with "
            "text_config in BASE's config.json they may not be those of its file: merge it into "
            "its base instead, with doraxp merge"
        )
    layers: dict[str, StoredLayer] = {}
    tied = fitted.tied.head if fitted.tied and format == "mlx" else None
    for path in fitted.modules:
        if tied and tied in {one.tensor for one in fitted.places[path]}:
            raise CheckpointError(
                f"{adapters.reader.path}: {path} is tied to the embeddings in BASE, and mlx-lm has "
                "no module for it: merge it into its base instead, with doraxp merge"
            )
        layer = in_order(path, adapters.layers[path], adapters, model.config)
        for tensor, rows in _rows_by_tensor(path, fitted.places[path], adapters).items():
            size = sum(one.stop - one.start for one in rows)
            own = layer._replace(rows=rows, shape=(size, *layer.shape[1:])) if rows else layer
            own = with_kernel(own, (own.shape[0], *fitted.shapes[tensor][1:]))
            name = tensor.removesuffix(".weight")
            if name in layers:
                raise CheckpointError(f"{adapters.reader.path}: two modules are for {tensor}")
            layers[name] = own
    return replace(_under(adapters, layers), is_of_pipeline=model.is_pipeline)


def _own_path(path: str, fitted: Fitted, choices: Fit) -> str:
    """Return the path of a module of PEFT, after renames, and without what wrappers add."""
    new = choices.renamed(path)
    return new if f"{new}.weight" in fitted.sources else without(WRAPPERS, new)


def _under(adapters: AdapterSet, layers: Mapping[str, StoredLayer]) -> AdapterSet:
    """Return the adapters with layers of new paths."""
    format = adapters.format
    if layers.keys() != adapters.layers.keys() and format in _OF_PEFT:
        format = f"{format}, renamed"  # patterns and targets of the file have the old names
    return replace(adapters, format=format, layers=layers, is_of_images=False, is_interleaved=False)


def _rows_by_tensor(
    path: str, places: Places, adapters: AdapterSet
) -> dict[str, tuple[slice, ...]]:
    """Return the rows of a module that each tensor has, in the tensor's order; () for all."""
    found: dict[str, tuple[slice, ...]] = {}
    for place in sorted(places, key=lambda place: 0 if place.rows is None else place.rows.start):
        if place.expert is not None:
            raise CheckpointError(
                f"{adapters.reader.path}: {path} is of all experts, and BASE has a tensor for "
                "each: merge it instead, with doraxp merge"
            )
        if place.rows is not None and place.own is None:
            raise CheckpointError(
                f"{adapters.reader.path}: {path} is only some rows of {place.tensor}, and an "
                "adapter cannot say that: merge it instead, with doraxp merge"
            )
        own = () if place.own is None else (place.own,)
        found[place.tensor] = (*found.get(place.tensor, ()), *own)
    return found
