"""Merges into models that mlx-lm quantised, to bfloat16 and back into the same format.

The right weights are the formula's in float64, from those that MLX dequantises, rounded to bfloat16
or quantised again by MLX.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.tuner.lora import LoRAEmbedding
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import dequantize_model, load_model, quantize_model, save_config, save_model

from writers.matrix import BOUND16, CLOSE, Trial, read_tensors, register
from writers.mlx_models import EXPERTS, MODELS, SIZES, new_model, outputs, save_adapter, train
from writers.quantised import FOLDERS
from writers.quantised_formats import config_of

WIDE = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 32, "vocab_size": 96}
KEYS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
Weights = dict[str, np.ndarray]


def some_in_8_bits(path: str, module: Any) -> bool | dict[str, Any]:
    """Quantise some layers to 8 bits, and leave others dense, as mixed recipes of mlx-lm do."""
    if path.endswith("down_proj"):
        return {"group_size": 32, "bits": 8, "mode": "affine"}
    return not path.endswith("v_proj")


@functools.cache
def base_of(
    title: str,
    bits: int,
    group: int,
    mode: str,
    predicate: Callable[[str, Any], bool | dict[str, Any]] | None,
    *,
    tied: bool,
) -> tuple[Path, dict[str, Any]]:
    """Quantise a model in bfloat16; return its folder, and its configuration before that."""
    sizes = {**SIZES, **{**MODELS, **EXPERTS}[title], **WIDE, "tie_word_embeddings": tied}
    if title in EXPERTS:
        sizes["moe_intermediate_size"] = 32
    model = new_model(sizes)
    model.set_dtype(mx.bfloat16)
    model, config = quantize_model(model, dict(sizes), group, bits, mode, quant_predicate=predicate)
    folder = Path(tempfile.mkdtemp(dir=FOLDERS.name)) / "base"
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder, sizes


def settings_of(folder: Path, module: str) -> dict[str, Any]:
    """Return how a module is quantised."""
    settings = config_of(folder)["quantization"]
    own = settings.get(module)
    return (
        own if isinstance(own, dict) else {k: settings[k] for k in ("bits", "group_size", "mode")}
    )


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a folder, where every quantised weight is dense."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(mx.load(str(file)))
    new = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if f"{module}.scales" not in tensors:
            new[name] = tensor
        elif last == "weight":
            parts = (tensors[f"{module}.scales"], tensors.get(f"{module}.biases"))
            new[name] = mx.dequantize(tensor, *parts, **settings_of(folder, module))
    return {name: to_torch(tensor) for name, tensor in new.items()}


def to_torch(tensor: Any) -> torch.Tensor:
    """Return a tensor, which is bfloat16 in these files, in bfloat16."""
    return torch.from_numpy(np.array(tensor.astype(mx.float32))).bfloat16()


def to_mlx(tensor: torch.Tensor) -> Any:
    return mx.array(tensor.float().numpy()).astype(mx.bfloat16)


def dense_model(folder: Path, sizes: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """Save tensors, and load them as a model in float32."""
    folder.mkdir()
    arrays = {name: to_mlx(tensor) for name, tensor in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    save_config(dict(sizes), folder / "config.json")
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return model


def merged(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return the weight of an adapted layer: its rows have the norms m, where there are any."""
    a, b = (torch.from_numpy(np.array(x)).double() for x in (layer.lora_a, layer.lora_b))
    if weight.ndim == 3:
        update = b @ a
    else:
        update = a @ b if isinstance(layer, LoRAEmbedding) else (a @ b).mT
    v = weight.double() + layer.scale * update
    if "m" not in layer:
        return v
    m = torch.from_numpy(np.array(layer.m)).double()
    return m[:, None] * v / v.norm(dim=1, keepdim=True)


def stored(name: str, weight: torch.Tensor, folder: Path, to: str) -> torch.Tensor:
    """Return a merged weight as OUT should have it, dense."""
    module = name.removesuffix(".weight")
    if to == "bf16" or f"{module}.scales" not in read_tensors(folder):
        return weight.bfloat16()
    how = settings_of(folder, module)
    # From float32: mlx would round the merge to bfloat16 first, and its fuse does.
    codes, *beside = mx.quantize(mx.array(weight.float().numpy()), **how)
    beside = [one if one.dtype == mx.uint8 else one.astype(mx.bfloat16) for one in beside]
    return to_torch(mx.dequantize(codes, *beside, **how))


def trial_of(
    folder: Path,
    to: str,
    title: str,
    bits: int,
    group: int = 32,
    mode: str = "affine",
    predicate: Callable[[str, Any], bool | dict[str, Any]] | None = None,
    tied: bool = False,
    kind: str = "dora",
    keys: list[str] | None = None,
    options: tuple[str, ...] = ("--compute", "float64"),
) -> Trial:
    """Train an adapter on the dense weights, and merge it into the quantised ones."""
    base, sizes = base_of(title, bits, group, mode, predicate, tied=tied)
    before = dense(base)
    model = dense_model(folder / "dense", sizes, before)
    model.freeze()
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": keys or KEYS}
    mx.random.seed(0)
    linear_to_lora_layers(model, -1, parameters, use_dora=kind == "dora")
    train(model)
    save_adapter(folder / "adapter", model, kind, -1, parameters, bare=False)
    right = before | {
        name: stored(name, merged(module, before[name]), base, to)
        for path, module in model.named_modules()
        if "lora_a" in module and (name := f"{path}.weight")
    }
    wanted = outputs(dense_model(folder / "right", sizes, right))
    options = ("--targets", to, *options)
    return Trial(base, folder / "adapter", right, reload, wanted, options=options, read=dense)


def reload(out: Path) -> torch.Tensor:
    """Load OUT, which must have a module's scales if its configuration has a way to read them."""
    model, _ = load_model(out)
    modules = {name for name, module in model.named_modules() if "scales" in module}
    names = {name.removesuffix(".scales") for name in read_tensors(out) if name.endswith("scales")}
    if modules != names:
        raise ValueError(f"config.json is wrong about {sorted(modules ^ names)}")
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    return outputs(model)


def add(name: str, *, bound: float = CLOSE, refused: str | None = None, **what: Any) -> None:
    for to in ("bf16", "same"):
        trial = functools.partial(trial_of, to=to, **what)
        title = f"{name}, --targets {to}"
        register("Quantised, mlx-lm", title, trial, bound=bound, refused=refused)


for bits in 2, 3, 4, 5, 6, 8:
    add(f"{bits} bits", title="Llama", bits=bits)
for bits in 4, 8:
    add(f"{bits} bits, groups of 64", title="Llama", bits=bits, group=64)
    add(f"{bits} bits, LoRA", title="Qwen3", bits=bits, kind="lora")
    add(f"{bits} bits, tied", title="Llama", bits=bits, tied=True)
    add(f"{bits} bits, Qwen3-MoE, LoRA", title="Qwen3-MoE", bits=bits, kind="lora",
        keys=["self_attn.q_proj", "mlp.switch_mlp.up_proj"])  # fmt: skip
    add(f"{bits} bits, default precision", bound=BOUND16, title="Qwen3", bits=bits, options=())
add("4 bits, of some layers 8 or 16", title="Llama", bits=4, predicate=some_in_8_bits)
add("4 bits, of some layers 8 or 16, all layers", title="Llama", bits=4, predicate=some_in_8_bits,
    keys=["self_attn.v_proj", "self_attn.q_proj", "mlp.down_proj", "mlp.up_proj"])  # fmt: skip
add("4 bits, lm_head", title="Llama", bits=4, keys=["lm_head", "self_attn.q_proj"])
for name, tied in ("embed_tokens", False), ("embed_tokens, tied", True):
    add(f"4 bits, LoRA, {name}", title="Llama", bits=4, keys=["model.embed_tokens"], kind="lora",
        tied=tied)  # fmt: skip
for mode, bits in ("mxfp4", 4), ("mxfp8", 8):
    add(mode, title="Llama", bits=bits, mode=mode)
add("nvfp4", title="Llama", bits=4, group=16, mode="nvfp4", refused="nvfp4")
