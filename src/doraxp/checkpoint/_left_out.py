"""The files of a model's folder that must not be beside its merged weights.

They are other copies of the weights, from before the merge, and indexes and graphs of such copies.
The weights of another module in a folder of its own, such as ``2_Dense`` of sentence-transformers,
are not copies, so they stay.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from doraxp.checkpoint._adapters import CONFIG
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._formats import FILES
from doraxp.checkpoint._safetensors import Reader

# A .model is not one: it is the tokenizer of sentencepiece.
_WEIGHTS = re.compile(
    r""" .+ \. (
        safetensors | bin | pt | pth | pkl | pickle | joblib | distcp           # PyTorch
      | (safetensors | bin | h5 | msgpack) \.index (\.\w+)? \.json
      | onnx ([._]data (_\d+)?)?
      | npz | npy | msgpack | ot | nemo | pdparams | params
      | h5 | hdf5 | keras | pb | tflite | ckpt (-\d+)? (\.(index | meta))?      # TensorFlow
      | data-\d+-of-\d+
      | (gguf | ggml) (\.part.* | -split-.*)? | llamafile                       # llama.cpp
      | mlmodel | pte | engine | plan | litertlm | task
    ) | openvino_.+ \.xml""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_PICKLE = re.compile(r".+\.(bin|pt|pth)")
_VARIANT = re.compile(
    r"(?P<stem>.+)\.(?:fp16|fp32|bf16|non_ema|ema)(?P<shard>-\d+-of-\d+)?\.safetensors"
)


def is_variant(name: str, names: Collection[str]) -> bool:
    """Return whether a file has the weights of another one in another dtype, as its mark says."""
    match = _VARIANT.fullmatch(name)
    return match is not None and f"{match['stem']}{match['shard'] or ''}.safetensors" in names


def files_to_leave_out(
    path: Path, files: Collection[Path], shards: Mapping[str, Reader]
) -> set[Path]:
    """Return the files that a merge does not copy.

    Parameters
    ----------
    path : Path
        The model's folder.
    files : collection of Path
        Its files that are not merged, relative to it.
    shards : mapping of str to Reader
        The files that are merged, by path.
    """
    left_out = {file for file in files if _WEIGHTS.fullmatch(file.name) or file.name == CONFIG}
    listed = _listed_modules(path / "modules.json")
    kept = {
        file.parent
        for file in left_out
        if str(file.parent) not in {str(Path(name).parent) for name in shards}
        and (str(file.parent) in listed or _is_a_module(path / file.parent, shards))
    }
    return {file for file in left_out if not _stays(path / file, kept={path / one for one in kept})}


def _listed_modules(file: Path) -> set[str]:
    """Return the folders that modules.json of sentence-transformers lists."""
    try:
        modules = json.loads(file.read_bytes())
        return {str(Path(module["path"])) for module in modules}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return set()


def _stays(file: Path, kept: Collection[Path]) -> bool:
    """Return whether a file of weights is the only copy of a module's."""
    if file.parent not in kept or file.name in (CONFIG, *FILES):
        return False
    names = [one.name for one in file.parent.glob("*.safetensors")]
    if file.name in names:
        return not is_variant(file.name, names)
    is_index = file.name.endswith(".safetensors.index.json")
    return is_index or (not names and _PICKLE.fullmatch(file.name) is not None)


def _is_a_module(folder: Path, shards: Mapping[str, Reader]) -> bool:
    """Return whether a folder has the weights of a module of its own, not those of the model.

    They are the model's if half of them have the names of the model's, or if they are half as many
    numbers.
    """
    own = {path: Reader(path) for path in sorted(folder.glob("*.safetensors")) if _is_safe(path)}
    if not own:
        return (folder / "config.json").is_file()
    known = {name for reader in shards.values() for name in reader.tensors}
    names = [name for reader in own.values() for name in reader.tensors]
    if 2 * len(known.intersection(names)) >= len(names):
        return False
    return 2 * _numbers(own.values()) < _numbers(shards.values())


def _is_safe(path: Path) -> bool:
    """Return whether a file is one of safetensors."""
    try:
        Reader(path)
    except (CheckpointError, FileNotFoundError):
        return False
    return True


def _numbers(readers: Collection[Reader]) -> int:
    return sum(math.prod(tensor.shape) for reader in readers for tensor in reader.tensors.values())
