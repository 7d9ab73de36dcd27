"""A base model on disk: one safetensors file, or a folder of shards with its index."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from doraxp.checkpoint._adapters import CONFIG
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._formats import FILES
from doraxp.checkpoint._json import JsonObject, read_json
from doraxp.checkpoint._safetensors import Reader

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Such files nearly always hold other copies of the weights, from before the merge, or are the
# indexes and graphs of such copies. A .model is not one: it is the tokenizer of sentencepiece.
_WEIGHTS = re.compile(
    r""" .+ \. (
        safetensors | bin | pt | pth | pkl | pickle | joblib | distcp           # PyTorch
      | (safetensors | bin | h5 | msgpack) \.index\.json
      | onnx ([._]data (_\d+)?)?
      | npz | npy | msgpack | ot | nemo | pdparams | params
      | h5 | hdf5 | keras | pb | tflite | ckpt (-\d+)? (\.(index | meta))?      # TensorFlow
      | data-\d+-of-\d+
      | (gguf | ggml) (\.part.* | -split-.*)? | llamafile                       # llama.cpp
      | mlmodel | pte | engine | plan | litertlm | task
    ) | openvino_.+ \.xml""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_LIMIT = 100_000
"""Files and folders of a model; the largest ones have some thousand. Links may multiply them."""
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_EMBEDDINGS = tuple(
    f".{name}.weight" for name in ("embed_tokens", "wte", "word_embeddings", "shared")
)


@dataclass(frozen=True)
class Model:
    """The safetensors files of a model, opened."""

    path: Path
    shards: dict[str, Reader]
    """By file name."""
    others: tuple[Path, ...]
    """The other files to copy, relative to `path`: configuration, tokenizer."""
    left_out: tuple[Path, ...]
    """Files that are neither merged nor copied: weights, which nearly always are other copies of
    the model's, and the configuration of an adapter."""
    index: JsonObject | None
    """The content of ``model.safetensors.index.json``; None without that file."""
    config: JsonObject
    """The content of ``config.json``; empty without that file."""

    @property
    def is_folder(self) -> bool:
        """True for a folder, False for one file."""
        return self.path.is_dir()

    def reader_of(self) -> dict[str, Reader]:
        """Return the file of each tensor, by name."""
        return {name: reader for reader in self.shards.values() for name in reader.tensors}

    def output_heads(self) -> set[str]:
        """Return the names of the embeddings that are also the output head.

        The set is empty if the head has its own tensor. A model type whose default is true may
        leave ``tie_word_embeddings`` out; then any language model without a head counts as tied.
        """
        tensors = self.reader_of()
        if any(f".{name}".endswith(".lm_head.weight") for name in tensors):
            return set()
        text = self.config.get("text_config")
        nested = text.get("tie_word_embeddings") if isinstance(text, dict) else None
        tied = self.config.get("tie_word_embeddings", nested)
        if tied is None:
            architectures = self.config.get("architectures")
            names = architectures if isinstance(architectures, list) else []
            tied = any(str(name).endswith(_WITH_HEAD) for name in names)
        return {name for name in tensors if tied and f".{name}".endswith(_EMBEDDINGS)}


def open_model(path: Path) -> Model:
    """Open a model, and compare its index with its shards.

    Raises
    ------
    CheckpointError
        A file is malformed, the index is wrong or points out of the folder, or the weights are
        quantised.
    OSError
        Something cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_dir():
        return Model(path, {path.name: Reader(path)}, (), (), None, {})
    file = path / "config.json"
    config = read_json(file) if file.is_file() else {}
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{file}: the model has a quantization_config: quantised weights cannot be merged "
            "into; merge into the model from which they were quantised"
        )
    index = read_json(_inside(path, INDEX)) if (path / INDEX).is_file() else None
    if index is None:
        shards = {(name := _only_file(path)): Reader(_inside(path, name))}
    else:
        shards = _indexed(path, index)
    _check_loaded(path, shards, config, is_indexed=index is not None)
    rest = [file for file in _files(path) if str(file) not in (*shards, INDEX)]
    left_out = tuple(file for file in rest if _is_left_out(file.name))
    others = tuple(file for file in rest if not _is_left_out(file.name))
    for file in others:
        if not _inside(path, str(file)).exists():
            raise CheckpointError(f"{path / file}: this link leads to no file; remove it")
    return Model(path, shards, others, left_out, index, config)


def _only_file(path: Path) -> str:
    """Return the name of the one file of weights in a folder without an index."""
    names = sorted(file.name for file in path.glob("*.safetensors"))
    names = [name for name in names if name not in FILES] or names
    # For a model of pickles, the reader refuses the first one with the reason.
    names = names or sorted(file.name for file in path.glob("pytorch_model*.bin"))[:1]
    if len(names) != 1:
        raise CheckpointError(
            f"{path}: must have {INDEX} or one safetensors file, got {len(names)} of them"
        )
    return names[0]


def _check_loaded(
    path: Path, shards: Mapping[str, Reader], config: JsonObject, *, is_indexed: bool
) -> None:
    """Raise CheckpointError where transformers would load other files of the folder.

    It takes the file that ``transformers_weights`` in ``config.json`` names, else
    ``model.safetensors``, else the files of the index.
    """
    if is_indexed and SINGLE not in shards and (path / SINGLE).is_file():
        raise CheckpointError(
            f"{path / SINGLE}: is not in {INDEX}, and transformers loads it instead of the files "
            f"that {INDEX} lists; move the one that is out of date out of the folder"
        )
    used, named = INDEX if is_indexed else next(iter(shards)), config.get("transformers_weights")
    if named is not None and named != used:
        raise CheckpointError(
            f"{path / 'config.json'}: transformers_weights must be {used!r}, the weights of this "
            f"folder, got {named!r}: remove that entry, or the weights that it does not name"
        )


def _is_left_out(name: str) -> bool:
    """Return whether a file must not be beside the merged weights.

    Transformers loads the adapter of an ``adapter_config.json`` on top of the model.
    """
    return name == CONFIG or _WEIGHTS.fullmatch(name) is not None


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


def _indexed(path: Path, index: JsonObject) -> dict[str, Reader]:
    """Open the shards that an index lists."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX}: must have a weight_map of names to files")
    if not isinstance(index.get("metadata") or {}, dict):
        raise CheckpointError(
            f"{path / INDEX}: metadata must be a JSON object, got {index['metadata']!r}"
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
                f"{path / INDEX}: the file of a tensor must be in the folder itself, got {name!r}"
            )
        names.setdefault(name, set()).add(tensor)
    shards = {name: Reader(_inside(path, name)) for name in sorted(names)}
    for name, tensors in names.items():
        differ = sorted(tensors ^ shards[name].tensors.keys())
        if differ:
            raise CheckpointError(
                f"{path / INDEX} and {name} must have the same tensors, but {differ[0]!r} is in "
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
