"""Small models and adapters on disk, for the tests of checkpoints."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from doraxp import LowRank, UpdateAdapter
from doraxp.checkpoint import UpdatedLayer
from doraxp.cli import main

RANK, ALPHA = 2, 3.0
SHAPES = {"block.0.q": (7, 5), "block.0.k": (6, 5), "block.1.q": (7, 5)}
"""(out, in) of the linear layers that have an adapter."""
PREFIX = "base_model.model."
"""The beginning of all names in a file of PEFT."""


def updated(layer):
    """Return an AdaptedLayer as a merge needs it."""
    a, b, m = layer.adapter
    if layer.kind.is_transposed:
        a, b = b.T, a.T
    return UpdatedLayer(UpdateAdapter(LowRank(a, b), m), layer.config, layer.kind, layer.shape)


def draw(rng, *shape, dtype="float32"):
    return rng.standard_normal(shape).astype(dtype)


def factors(rng, shape, rank=RANK, dtype="float32"):
    """A, B and m with random values, unlike a fresh adapter's."""
    out, inner = shape
    a, b = draw(rng, rank, inner, dtype=dtype), draw(rng, out, rank, dtype=dtype)
    return a, b, (1 + rng.random(out)).astype(dtype)


def dense(weight, a, b, m, scaling=ALPHA / RANK):
    """W' in float64, by the formula."""
    weight, a, b, m = (np.asarray(leaf).astype(np.float64) for leaf in (weight, a, b, m))
    v = weight + scaling * (b @ a)
    norm = np.linalg.norm(v, axis=1, keepdims=True)
    return np.divide(m.reshape(-1, 1) * v, norm, out=np.zeros_like(v), where=norm > 0)


def write_model(folder, dtype=ml_dtypes.bfloat16):
    """Write a model of two shards, with biases, integers and a tokenizer; return its tensors."""
    rng = np.random.default_rng(5)
    folder.mkdir()
    shards = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for path, shape in SHAPES.items():
        name = "model-1.safetensors" if "0" in path else "model-2.safetensors"
        shards[name][f"{path}.weight"] = draw(rng, *shape, dtype=dtype)
        shards[name][f"{path}.bias"] = draw(rng, shape[0], dtype=dtype)
    shards["model-1.safetensors"]["steps"] = np.arange(3)
    shards["model-2.safetensors"]["empty"] = np.empty((0, 4), np.float32)
    shards["model-2.safetensors"]["scalar"] = np.array(2, np.float32)
    for name, tensors in shards.items():
        save_file(tensors, folder / name, {"format": "pt"})
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", {"torch_dtype": np.dtype(dtype).name, "hidden": 5})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (folder / "pytorch_model.bin").write_bytes(b"the old weights")
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


def write_adapter(folder, shapes=SHAPES, dtype="float32", **changes):
    """Write a PEFT adapter for some layers; `changes` go into its configuration."""
    rng = np.random.default_rng(6)
    folder.mkdir()
    adapter = {path: factors(rng, shape, dtype=dtype) for path, shape in shapes.items()}
    tensors = {
        f"base_model.model.{path}.{name}": leaf
        for path, leaves in adapter.items()
        for name, leaf in zip(
            ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"), leaves, strict=True
        )
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", peft_config(**changes))
    return adapter


def peft_config(**changes):
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": True}
    return {**config, **changes}


def write_json(path, value):
    path.write_text(json.dumps(value), "utf-8")


# Adapters that were trained a little, for bases of any names

LEAVES = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
"""The names of A, B and m in PEFT's files."""


def near(rng, weight, rank=RANK):
    """A, B and m of an adapter of a weight (out, in, ...), with m near the norms of its rows."""
    matrix = np.asarray(weight, np.float64).reshape(len(weight), -1)
    a, b = 0.2 * draw(rng, rank, matrix.shape[1]), 0.2 * draw(rng, len(matrix), rank)
    m = np.linalg.norm(matrix, axis=1) * (1 + 0.1 * rng.standard_normal(len(matrix)))
    return a, b, m.astype("float32")


def write_base(folder, tensors, **config):
    """Write a model of one file."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", config)
    return tensors


def write_peft(folder, leaves, whole=None, *, prefix=PREFIX, **changes):
    """Write a PEFT adapter of these A, B and m by module, with whole tensors beside them."""
    folder.mkdir(parents=True)
    tensors = {
        f"{prefix}{path}.{name}": np.ascontiguousarray(leaf)
        for path, own in leaves.items()
        for name, leaf in zip(LEAVES, own, strict=True)
    }
    save_file(tensors | (whole or {}), folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", peft_config(**changes))


def read_folder(folder):
    """Return the tensors of all safetensors files in a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def merge(folder, *arguments):
    """Run `doraxp merge` on the folders base, adapter and out in `folder`."""
    paths = [str(folder / name) for name in ("base", "adapter")]
    return main(["merge", *paths, "--out", str(folder / "out"), "--jobs", "1", *arguments])


def assert_merged(merged, base, changed):
    """Fail unless `merged` has the tensors of `changed`, and of `base` all others bit for bit."""
    assert merged.keys() == base.keys() | changed.keys()
    for name, tensor in merged.items():
        if name in changed:
            desired = np.asarray(changed[name]).reshape(tensor.shape)
            np.testing.assert_allclose(tensor, desired, rtol=2e-5, atol=1e-6, err_msg=name)
        else:
            assert tensor.dtype == base[name].dtype, name
            assert tensor.tobytes() == base[name].tobytes(), name


def audit(folder, *arguments):
    """Run `doraxp audit` on the folders base, adapter and out in `folder`."""
    paths = [str(folder / name) for name in ("base", "adapter", "out")]
    return main(["audit", *paths, *arguments])


def check(folder, base, changed, *arguments):
    """Merge and audit; the tensors that differ from the base's are `changed`."""
    assert merge(folder, "--verify", *arguments) == 0
    assert_merged(read_folder(folder / "out"), base, changed)
    assert audit(folder, *arguments) == 0


def refused(folder, capsys, *arguments):
    """Run a merge that must write nothing, and return its error, which must be one line."""
    before = sorted(folder.iterdir())
    assert merge(folder, *arguments) == 2
    assert sorted(folder.iterdir()) == before
    lines = capsys.readouterr().err.splitlines(keepends=True)
    (error,) = (line for line in lines if not line.startswith("doraxp merge: warning: "))
    assert error.endswith("\n")
    return error
