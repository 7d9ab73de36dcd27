"""Write a synthetic sharded model and a DoRA adapter for all its linear layers.

    python benchmarks/checkpoint_model.py FOLDER [--gigabytes 4] [--rank 16] [--width 4096]
        [--dtype bfloat16]

The script writes `base` and `adapter` to FOLDER. `base` is a Llama that transformers loads, with
the layer shapes of the model of 7 billion parameters and as many layers as fit into the size. Its
tokenizer knows single letters and bytes. `adapter` is in PEFT's format.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
from pathlib import Path

import ml_dtypes  # noqa: F401  makes NumPy know bfloat16
import numpy as np
from safetensors.numpy import save_file

from doraxp import AdaptedLayer, Adapter, Config, LayerKind
from doraxp.checkpoint import save_adapters


def linear_shapes(width: int) -> dict[str, tuple[int, int]]:
    """Return (out, in) of the linear layers of one block."""
    hidden = width * 43 // 16
    attention = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    return {
        **attention,
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }


def write_tokenizer(folder: Path, size: int) -> None:
    """Write a tokenizer of `size` tokens, in the form that the converter of llama.cpp reads.

    It cuts a text into letters, and any other character into its bytes. Further tokens have a
    number and are in no text.
    """
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters]
    tokens += [f"<extra_{number}>" for number in range(size - len(tokens))]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 0}}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": place, "content": token, "special": True, **flags}
            for place, token in enumerate(special)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, other],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: place for place, token in enumerate(tokens)},
            "merges": [],
        },
    }
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "add_eos_token": False,
    }
    for name, content in {"tokenizer": tokenizer, "tokenizer_config": settings}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")


def main() -> int:
    """Read the arguments and write both folders. Return 2 where one of them exists."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    for path in (arguments.folder / "base", arguments.folder / "adapter"):
        if path.exists():
            print(
                f"{parser.prog}: error: {path} already exists: remove the folder "
                f"{arguments.folder}, or give another FOLDER",
                file=sys.stderr,
            )
            return 2
    write(**vars(arguments))
    return 0


def write(
    folder: Path,
    gigabytes: float = 4,
    rank: int = 16,
    width: int = 4096,
    dtype: str = "bfloat16",
) -> None:
    """Write both folders."""
    linear, stored = linear_shapes(width), np.dtype(dtype)
    base = folder / "base"
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    weights = sum(out * inner for out, inner in linear.values())
    vocabulary = 8 * width
    ends = 2 * vocabulary * width  # the embedding and the output layer
    layers = max(1, round((gigabytes * 1e9 / stored.itemsize - ends) / weights))
    weight_map, adapters = {}, {}
    for layer in range(layers):
        name = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        tensors = {}
        for module, shape in linear.items():
            path = f"model.layers.{layer}.{module}"
            weight = 0.02 * rng.standard_normal(shape, np.float32)
            tensors[f"{path}.weight"] = weight.astype(stored)
            norm = np.linalg.norm(weight, axis=1)
            adapter = Adapter(
                rng.standard_normal((rank, shape[1]), np.float32) / shape[1] ** 0.5,
                0.05 * rng.standard_normal((shape[0], rank), np.float32),
                norm * (1 + 0.05 * rng.standard_normal(shape[0], np.float32)),
            )
            adapters[path] = AdaptedLayer(adapter, Config(rank), LayerKind(), shape)
        for norm_name in ("input", "post_attention"):
            name_of_norm = f"model.layers.{layer}.{norm_name}_layernorm.weight"
            tensors[name_of_norm] = np.ones(width, stored)
        if layer == 0:
            tensors["model.norm.weight"] = np.ones(width, stored)
            for path in ("model.embed_tokens", "lm_head"):
                table = 0.02 * rng.standard_normal((vocabulary, width), np.float32)
                tensors[f"{path}.weight"] = table.astype(stored)
        weight_map |= dict.fromkeys(tensors, name)
        save_file(tensors, base / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": dtype,
        "hidden_size": width,
        "intermediate_size": linear["mlp.up_proj"][0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 128),
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    (base / "config.json").write_text(json.dumps(config), "utf-8")
    write_tokenizer(base, vocabulary)
    save_adapters(folder / "adapter", adapters)


if __name__ == "__main__":
    sys.exit(main())
