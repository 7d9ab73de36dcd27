"""A base model on disk: one safetensors file, or a folder of shards with its index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._json import JsonObject, read_json
from doraxp.checkpoint._safetensors import Reader

INDEX = "model.safetensors.index.json"
# Such files nearly always hold other copies of the weights, from before the merge.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
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
    """Files of weights that are neither merged nor copied: nearly always other copies of them."""
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
        names = sorted(file.name for file in path.glob("*.safetensors"))
        # For a model of pickles, the reader refuses the first one with the reason.
        names = names or sorted(file.name for file in path.glob("pytorch_model*.bin"))[:1]
        if len(names) != 1:
            raise CheckpointError(
                f"{path}: must have {INDEX} or one safetensors file, got {len(names)} of them"
            )
        shards = {names[0]: Reader(_inside(path, names[0]))}
    else:
        shards = _indexed(path, index)
    files = sorted(
        file.relative_to(path)
        for file in path.rglob("*")
        if file.is_file() or (file.is_symlink() and not file.exists())
    )
    # Hidden folders belong to tools and hold the old weights: .git of git, .cache of the hub's
    # client.
    own = [file for file in files if not any(part.startswith(".") for part in file.parts[:-1])]
    rest = [file for file in own if str(file) not in (*shards, INDEX)]
    weights = tuple(file for file in rest if file.suffix in _WEIGHTS)
    others = tuple(file for file in rest if file not in weights)
    for file in others:
        if not _inside(path, str(file)).exists():
            raise CheckpointError(f"{path / file}: this link leads to no file; remove it")
    return Model(path, shards, others, weights, index, config)


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
    target, root = file.resolve(), folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not target.is_relative_to(root) and not target.is_relative_to(blobs):
        raise CheckpointError(f"{file}: this link leads out of the folder, to {target}")
    return file
