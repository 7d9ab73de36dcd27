"""Write a small pipeline of diffusers with random weights, and DoRA adapters of its parts.

    python benchmarks/image_model.py FOLDER

The script writes `pipeline`, a U-Net and a text encoder; `kohya.safetensors`, one file with an
adapter of both parts under kohya's names; and the same adapters as PEFT saves them, in `peft/unet`
and `peft/text_encoder`. The parts have a few layers only, so diffusers cannot load them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from doraxp import AdaptedLayer, Adapter, Config, LayerKind
from doraxp.checkpoint import save_adapters

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TEXT = "text_model.encoder.layers.0.self_attn"
PARTS = {
    "unet": {
        f"{BLOCK}.attn1.to_q": (32, 32),
        f"{BLOCK}.attn1.to_v": (32, 32),
        f"{BLOCK}.ff.net.2": (32, 128),
        "conv_out": (4, 32, 3, 3),
    },
    "text_encoder": {f"{TEXT}.q_proj": (24, 24), f"{TEXT}.v_proj": (24, 24)},
}
"""The shapes of the layers of each part."""
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
FILES = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
CONFIG = Config(rank=4, alpha=6)


def adapted(rng: np.random.Generator, weight: np.ndarray) -> AdaptedLayer:
    """Return a trained adapter: m is near the norms of the rows."""
    rows = weight.reshape(len(weight), -1)
    noise = 1 + 0.05 * rng.standard_normal(len(rows), np.float32)
    adapter = Adapter(
        rng.standard_normal((CONFIG.rank, rows.shape[1]), np.float32) / rows.shape[1] ** 0.5,
        0.2 * rng.standard_normal((len(rows), CONFIG.rank), np.float32),
        np.linalg.norm(rows, axis=1) * noise,
    )
    kind = LayerKind("conv") if weight.ndim > 2 else LayerKind()
    return AdaptedLayer(adapter, CONFIG, kind, weight.shape)


def as_kohya(module: str, layer: AdaptedLayer) -> dict[str, np.ndarray]:
    """Return the tensors of an adapter as kohya's scripts name and shape them."""
    a, b, m = layer.adapter
    out, *inner = layer.shape
    ones = [1] * len(inner)
    return {
        f"{module}.lora_down.weight": a.reshape(-1, *inner),
        f"{module}.lora_up.weight": b.reshape(out, -1, *ones[1:]),
        f"{module}.dora_scale": m.reshape(out, *ones),
        f"{module}.alpha": np.array(CONFIG.alpha, np.float32),
    }


def write(folder: Path) -> None:
    """Write the pipeline and its adapters."""
    rng = np.random.default_rng(0)
    (folder / "peft").mkdir(parents=True)
    kohya = {}
    for part, shapes in PARTS.items():
        place = folder / "pipeline" / part
        place.mkdir(parents=True)
        weights = {
            name: rng.standard_normal(shape, np.float32) / np.prod(shape[1:]) ** 0.5
            for name, shape in shapes.items()
        }
        tensors = {f"{name}.weight": weight for name, weight in weights.items()}
        save_file(tensors, place / FILES[part], {"format": "pt"})
        (place / "config.json").write_text("{}", "utf-8")
        layers = {name: adapted(rng, weight) for name, weight in weights.items()}
        save_adapters(folder / "peft" / part, layers)
        for name, layer in layers.items():
            kohya |= as_kohya(f"{PREFIXES[part]}_{name.replace('.', '_')}", layer)
    save_file(kohya, folder / "kohya.safetensors")
    index = {"_class_name": "StableDiffusionPipeline"}
    (folder / "pipeline" / "model_index.json").write_text(json.dumps(index), "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
