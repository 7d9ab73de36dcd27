"""A base model on disk: one safetensors file, or a folder of shards with its index."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from doraxp._base.types import HostArray
from doraxp.checkpoint._errors import CheckpointError, gguf
from doraxp.checkpoint._formats import FILES
from doraxp.checkpoint._json import JsonObject, read_json
from doraxp.checkpoint._left_out import files_to_leave_out, is_variant
from doraxp.checkpoint._quantised import find
from doraxp.checkpoint._quantised.protocol import Quantisation, Refused
from doraxp.checkpoint._quantised.reader import QuantisedReader
from doraxp.checkpoint._quantised.settings import settings_of
from doraxp.checkpoint._safetensors import Reader, Source

SINGLE = "model.safetensors"
INDEXES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
"""The index of transformers, and that of diffusers."""
_PIPELINE = "model_index.json"
_LIMIT = 100_000
"""Files and folders of a model; the largest ones have some thousand. Links may multiply them."""


@dataclass(frozen=True)
class Model:
    """The safetensors files of a model, opened."""

    path: Path
    shards: dict[str, Reader]
    """By path in the folder. They are in the folder itself, but in a pipeline of diffusers in the
    folder of each component."""
    others: tuple[Path, ...]
    """The other files to copy, relative to `path`: configuration, tokenizer."""
    left_out: tuple[Path, ...]
    """Files that are neither merged nor copied: other copies of the model's weights, and the
    configuration of an adapter."""
    indexes: dict[str, JsonObject]
    """The content of each index of shards, by its path in the folder."""
    config: JsonObject
    """The content of ``config.json``; empty without that file."""
    quantised: Mapping[str, Quantisation | Refused]
    """How each quantised weight is stored, by the name that it would have in 16 bits."""

    @property
    def is_folder(self) -> bool:
        """True for a folder, False for one file."""
        return self.path.is_dir()

    @property
    def is_pipeline(self) -> bool:
        """True for a pipeline of diffusers, whose components are models of their own."""
        return any("/" in name for name in self.shards)

    def prefix(self, shard: str) -> str:
        """Return the part before the names of a shard's tensors: "" or "unet." in a pipeline."""
        return _component(shard)

    @functools.cached_property
    def stored(self) -> dict[str, Source]:
        """Return all tensors on disk by name; in a pipeline the component's name stands before."""
        return _stored(self.shards)

    def sources(self) -> dict[str, Source]:
        """Return all tensors by name, as `stored` does, with each quantised weight as one of them.

        It has the place of its codes. The other tensors of the weight are left out.
        """
        sources = {}
        for name, source in self.stored.items():
            weight = self.weight_of.get(name)
            if weight is None:
                sources[name] = source
            elif name == weight.quantisation.tensors[0]:
                sources[weight.name] = Source(weight, weight.name)
        return sources

    @functools.cached_property
    def readable(self) -> dict[str, QuantisedReader]:
        """The quantised weights that can be read, by name."""
        return {
            name: QuantisedReader(name, found, {one: self.stored[one] for one in found.tensors})
            for name, found in self.quantised.items()
            if not isinstance(found, Refused)
        }

    @functools.cached_property
    def weight_of(self) -> dict[str, QuantisedReader]:
        """The weight that a tensor on disk is a part of, by the tensor's name."""
        return {part: weight for weight in self.readable.values() for part in weight.sources}

    def home(self, name: str) -> str:
        """Return the shard to which a tensor is added that the model does not have."""
        *_, last = (shard for shard in self.shards if name.startswith(self.prefix(shard)))
        return last


def open_model(path: Path) -> Model:
    """Open a model, and compare its index with its shards.

    Raises
    ------
    CheckpointError
        A file is malformed, or an index is wrong or points out of its folder.
    OSError
        Something cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_dir():
        return _model(path, {path.name: Reader(path)})
    file = path / "config.json"
    config = read_json(file) if file.is_file() else {}
    shards: dict[str, Reader] = {}
    indexes: dict[str, JsonObject] = {}
    for folder in _components(path):
        found, index = _open_folder(path / folder)
        shards |= {f"{folder / name}": reader for name, reader in found.items()}
        indexes |= {f"{folder / name}": content for name, content in index.items()}
    _check_loaded(path, shards, config, index=next(iter(indexes), None))
    rest = [file for file in _files(path) if str(file) not in (*shards, *indexes)]
    left_out = files_to_leave_out(path, rest, shards)
    others = tuple(file for file in rest if file not in left_out)
    for file in others:
        if not _inside(path, str(file)).exists():
            raise CheckpointError(f"{path / file}: this link leads to no file; remove it")
    left = tuple(file for file in rest if file in left_out)
    return _model(path, shards, others, left, indexes, config)


def _model(
    path: Path,
    shards: dict[str, Reader],
    others: tuple[Path, ...] = (),
    left_out: tuple[Path, ...] = (),
    indexes: dict[str, JsonObject] | None = None,
    config: JsonObject | None = None,
) -> Model:
    """Return a model, with its quantised weights."""
    config = {} if config is None else config
    stored = _stored(shards)
    entries = {name: source.tensor for name, source in stored.items()}

    def fetch(name: str, rows: slice | None = None) -> HostArray:
        return stored[name].read(rows)

    quantised: dict[str, Quantisation | Refused] = {}
    try:
        for component in dict.fromkeys(map(_component, shards)):
            own = {name: one for name, one in entries.items() if name.startswith(component)}
            file = path / component.removesuffix(".") / "config.json"
            words = read_json(file) if component and file.is_file() else config
            quantised |= find(own, settings_of(words), fetch)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return Model(path, shards, others, left_out, indexes or {}, config, quantised)


def _stored(shards: Mapping[str, Reader]) -> dict[str, Source]:
    return {
        f"{_component(shard)}{name}": Source(reader, name)
        for shard, reader in shards.items()
        for name in reader.tensors
    }


def _component(shard: str) -> str:
    """Return the part before the names of a shard's tensors: "" or "unet." in a pipeline."""
    return f"{shard.rpartition('/')[0]}.".removeprefix(".")


def _components(path: Path) -> list[Path]:
    """Return the folders of a model's shards, relative to it: several in a pipeline."""
    if not (path / _PIPELINE).is_file() or any((path / name).is_file() for name in INDEXES):
        return [Path()]
    folders = sorted(file.parent.name for file in path.glob("*/*.safetensors"))
    if any(path.glob("*.safetensors")) and not folders:
        return [Path()]
    found = [Path(name) for name in dict.fromkeys(folders) if not name.startswith(".")]
    if not found:
        raise CheckpointError(f"{path}: no folder of this pipeline has a safetensors file")
    return found


def _open_folder(path: Path) -> tuple[dict[str, Reader], dict[str, JsonObject]]:
    """Return the shards in a folder by name, and its index by name, if it has one."""
    for name in INDEXES:
        if (path / name).is_file():
            index = read_json(_inside(path, name))
            return _indexed(path, name, index), {name: index}
    name = _only_file(path)
    return {name: Reader(_inside(path, name))}, {}


def _only_file(path: Path) -> str:
    """Return the name of the one file of weights in a folder without an index."""
    names = sorted(file.name for file in path.glob("*.safetensors"))
    names = [name for name in names if name not in FILES] or names
    unmarked = [name for name in names if not is_variant(name, names)]
    names = unmarked or names
    # For a model of pickles, the reader refuses the first one with the reason.
    names = names or sorted(file.name for file in path.glob("pytorch_model*.bin"))[:1]
    of_llama = sorted(path.glob("*.gguf"))
    if of_llama and not names:
        raise gguf(of_llama[0])
    if len(names) != 1:
        models = [
            file
            for file in path.glob("*/*.safetensors")
            if file.name not in FILES and not file.parent.name.startswith(".")
        ]
        largest = max(models, key=_size, default=None)
        advice = f": give {largest.parent}, the folder of the model" if largest else ""
        if names:
            advice = ": give the one that is the model"
        raise CheckpointError(
            f"{path}: must have {INDEXES[0]} or one safetensors file, got {len(names)} of them"
            f"{advice}"
        )
    return names[0]


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _check_loaded(
    path: Path, shards: Mapping[str, Reader], config: JsonObject, *, index: str | None
) -> None:
    """Raise CheckpointError where transformers would load other files of the folder.

    It takes the file that ``transformers_weights`` in ``config.json`` names, else
    ``model.safetensors``, else the files of the index.
    """
    if index == INDEXES[0] and SINGLE not in shards and (path / SINGLE).is_file():
        raise CheckpointError(
            f"{path / SINGLE}: is not in {index}, and transformers loads it instead of the files "
            f"that {index} lists; move the one that is out of date out of the folder"
        )
    used, named = index or next(iter(shards)), config.get("transformers_weights")
    if named is not None and named != used:
        raise CheckpointError(
            f"{path / 'config.json'}: transformers_weights must be {used!r}, the weights of this "
            f"folder, got {named!r}: remove that entry, or the weights that it does not name"
        )


def _files(path: Path) -> Iterator[Path]:
    """Yield the files of a model, relative to its folder. Links to folders of it are followed.

    Hidden folders belong to tools and hold the old weights: .git of git, .cache of the hub's
    client. A worktree of git has a file .git instead.

    Raises
    ------
    CheckpointError
        A link leads out of the model or to a folder that contains it, something is neither a file
        nor a folder, or the files are too many.
    OSError
        A folder cannot be read.
    """
    left: list[tuple[Path, tuple[Path, ...]]] = [(Path(), (path.resolve(),))]
    found = 0
    while left:
        folder, above = left.pop()
        with os.scandir(path / folder) as entries:
            names = sorted(entry.name for entry in entries)
        found += len(names)
        if found > _LIMIT:
            raise CheckpointError(f"{path}: must have at most {_LIMIT} files and folders")
        for name in names:
            file = folder / name
            if (path / file).is_dir():
                if not name.startswith("."):
                    left.append((file, (*above, _followed(path, file, above))))
            elif (path / file).is_file() or not (path / file).exists():
                if name != ".git":
                    yield file
            else:
                raise CheckpointError(f"{path / file}: is neither a file nor a folder; remove it")


def _followed(path: Path, folder: Path, above: tuple[Path, ...]) -> Path:
    """Return the real path of a folder; raise CheckpointError unless it leads away from `above`.

    Each endless way through links comes to one that leads to a folder which is on the way, or
    which contains one.
    """
    real = _inside(path, str(folder)).resolve()
    if any(other.is_relative_to(real) for other in above):
        raise CheckpointError(
            f"{path / folder}: this link leads to a folder that contains it; remove it"
        )
    return real


def _indexed(path: Path, file: str, index: JsonObject) -> dict[str, Reader]:
    """Open the shards that an index lists."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / file}: must have a weight_map of names to files")
    if not isinstance(index.get("metadata") or {}, dict):
        raise CheckpointError(
            f"{path / file}: metadata must be a JSON object, got {index['metadata']!r}"
        )
    names: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if (
            not isinstance(name, str)
            or not name.isprintable()
            or not name
            or PurePosixPath(name).name != name
        ):
            raise CheckpointError(
                f"{path / file}: the file of a tensor must be in the folder itself, got {name!r}"
            )
        names.setdefault(name, set()).add(tensor)
    shards = {name: Reader(_inside(path, name)) for name in sorted(names)}
    for name, tensors in names.items():
        differ = sorted(tensors ^ shards[name].tensors.keys())
        if differ:
            raise CheckpointError(
                f"{path / file} and {name} must have the same tensors, but {differ[0]!r} is in "
                "one of them only"
            )
    return shards


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a file in the folder, and refuse a link out of the folder.

    The hub's cache is the exception: every file in it is a link to ``../../blobs``.
    """
    file = folder / name
    target, root = Path(os.path.realpath(file)), folder.resolve()  # resolve() raises at a loop
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not target.is_relative_to(root) and not target.is_relative_to(blobs):
        raise CheckpointError(
            f"{file}: this link leads out of the folder, to {target}; put a copy there instead"
        )
    return file
