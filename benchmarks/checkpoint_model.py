"""Write a synthetic sharded bfloat16 model and a DoRA adapter for all its linear layers.

    python benchmarks/checkpoint_model.py FOLDER [--gigabytes 4] [--rank 16] [--width 4096]

FOLDER gets `base`, with the shapes of a 7-billion-parameter Llama and as many layers as fit, and
`adapter`, in PEFT's format.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ml_dtypes
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


def main() -> None:
    """Write both folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--width", type=int, default=4096)
    arguments = parser.parse_args()
    linear = linear_shapes(arguments.width)
    base = arguments.folder / "base"
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    weights = sum(out * inner for out, inner in linear.values())
    layers = max(1, round(arguments.gigabytes * 1e9 / 2 / weights))
    weight_map, adapters = {}, {}
    for layer in range(layers):
        name = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        tensors = {}
        for module, shape in linear.items():
            path = f"model.layers.{layer}.{module}"
            weight = 0.02 * rng.standard_normal(shape, np.float32)
            tensors[f"{path}.weight"] = weight.astype(ml_dtypes.bfloat16)
            norm = np.linalg.norm(weight, axis=1)
            adapter = Adapter(
                rng.standard_normal((arguments.rank, shape[1]), np.float32) / shape[1] ** 0.5,
                0.05 * rng.standard_normal((shape[0], arguments.rank), np.float32),
                norm * (1 + 0.05 * rng.standard_normal(shape[0], np.float32)),
            )
            adapters[path] = AdaptedLayer(adapter, Config(arguments.rank), LayerKind(), shape)
        norm_name = f"model.layers.{layer}.input_layernorm.weight"
        tensors[norm_name] = np.ones(arguments.width, ml_dtypes.bfloat16)
        weight_map |= dict.fromkeys(tensors, name)
        save_file(tensors, base / name, {"format": "pt"})
    index = {"metadata": {"total_size": 2 * weights * layers}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    (base / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}), "utf-8")
    save_adapters(arguments.folder / "adapter", adapters)


if __name__ == "__main__":
    main()
