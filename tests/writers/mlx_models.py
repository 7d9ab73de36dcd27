"""mlx-lm: adapters as its trainer saves them, and models as `mlx_lm.fuse` does."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, save_config, save_model

from writers.matrix import BOUND16, CLOSE, Trial, read_tensors, register
from writers.peft_common import IDS, TEXT

mx.set_default_device(mx.cpu)
ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]
MODELS = {
    "Llama": {"model_type": "llama"},
    "Qwen2": {"model_type": "qwen2"},
    "Qwen3": {"model_type": "qwen3", "head_dim": 8},
    "Gemma": {"model_type": "gemma", "head_dim": 8, "tie_word_embeddings": True},
    "Phi-3": {"model_type": "phi3"},
}
SIZES = {**TEXT, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False}
EXPERTS = {
    "Mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3-MoE": {
        "model_type": "qwen3_moe", "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "scale below 1": {"scale": 0.5},
    "rank=1": {"rank": 1},
    "dropout": {"dropout": 0.1},
    "the last block alone": {"num_layers": 1},
    "one kind of layer": {"keys": ["mlp.down_proj"]},
    "lm_head": {"keys": [*ATTENTION, "lm_head"]},
    "embed_tokens": {"keys": [*ATTENTION, "model.embed_tokens"]},
    "embed_tokens of as many tokens as dimensions": {
        "keys": ["model.embed_tokens"],
        "sizes": {"vocab_size": 32},
    },
    "embed_tokens, tied": {
        "keys": [*ATTENTION, "model.embed_tokens"],
        "sizes": {"tie_word_embeddings": True},
    },
    "square layers": {"sizes": {"intermediate_size": 32, "num_key_value_heads": 4}},
}


def new_model(sizes: dict[str, Any]) -> Any:
    """Return a model of mlx-lm whose weights are random."""
    module = importlib.import_module(f"mlx_lm.models.{sizes['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(sizes))
    rng = np.random.default_rng(1)
    drawn = [
        (name, mx.array(draw(rng, np.array(x)))) for name, x in tree_flatten(model.parameters())
    ]
    model.load_weights(drawn)
    return model


def draw(rng: Any, old: np.ndarray) -> np.ndarray:
    """Return matrices whose rows have unlike norms, or a vector near the old one."""
    noise = rng.standard_normal(old.shape).astype(np.float32)
    if old.ndim == 1:
        return old + 0.1 * noise
    rows = 0.5 + rng.random((*old.shape[:-1], 1), dtype=np.float32)
    return noise * rows * np.float32(0.8 / old.shape[-1] ** 0.5)


def train(model: Any) -> None:
    """Change the factors, and the magnitudes by a tenth."""
    rng = np.random.default_rng(2)
    trained = []
    for name, x in tree_flatten(model.trainable_parameters()):
        noise = mx.array(rng.standard_normal(x.shape).astype(np.float32)).astype(x.dtype)
        new = x * (1 + 0.1 * noise) if name.endswith(".m") else x + 0.05 * noise
        trained.append((name, new.astype(x.dtype)))
    model.load_weights(trained, strict=False)
    model.eval()


def outputs(model: Any) -> torch.Tensor:
    logits = model(mx.array(IDS.numpy())).astype(mx.float32)
    return torch.from_numpy(np.array(logits))


def mlx_trial(
    folder: Path,
    model: dict[str, Any],
    sizes: dict[str, Any] | None = None,
    num_layers: int = -1,
    dtype: Any = mx.float32,
    bare: bool = False,
    kind: str = "dora",
    **changes: Any,
) -> Trial:
    """Train an adapter on a model, and save both as mlx-lm does."""
    config = {**SIZES, **model, **(sizes or {})}
    base = new_model(config)
    base.set_dtype(dtype)
    save_model(folder / "base", base)
    save_config(dict(config), folder / "base" / "config.json")
    base.set_dtype(mx.float32)
    base.freeze()
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, **changes}
    mx.random.seed(0)
    linear_to_lora_layers(base, num_layers, parameters, use_dora=kind == "dora")
    train(base)
    wanted = outputs(base)
    save_adapter(folder / "adapter", base, kind, num_layers, parameters, bare)
    fused = [(name, m.fuse()) for name, m in base.named_modules() if hasattr(m, "fuse")]
    base.update_modules(tree_unflatten(fused))
    save_model(folder / "right", base)
    save_config(dict(config), folder / "right" / "config.json")
    right = read_tensors(folder / "right")
    return Trial(folder / "base", folder / "adapter", right, reload, wanted)


def reload(out: Path) -> torch.Tensor:
    model, _ = load_model(out)
    model.set_dtype(mx.float32)
    return outputs(model)


def save_adapter(
    folder: Path, model: Any, kind: str, num_layers: int, parameters: Any, bare: bool
) -> None:
    """Save the trained parameters, and the checkpoint of an earlier step beside them."""
    folder.mkdir()
    trained = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained)
    earlier = {name: 2 * x for name, x in trained.items()}
    mx.save_safetensors(str(folder / "0000100_adapters.safetensors"), earlier)
    config = {
        "fine_tune_type": kind,
        "num_layers": num_layers,
        "lora_parameters": {k: sorted(v) if k == "keys" else v for k, v in parameters.items()},
    }
    others = {} if bare else {"model": "base", "batch_size": 4, "iters": 100, "seed": 0}
    (folder / "adapter_config.json").write_text(json.dumps(config | others))


for title, model in MODELS.items():
    register("mlx-lm", f"{title}, all layers", functools.partial(mlx_trial, model=model))
for name, changes in OPTIONS.items():
    trial = functools.partial(mlx_trial, model=MODELS["Llama"], **changes)
    register("mlx-lm", f"Llama, {name}", trial)
register(
    "mlx-lm",
    "Llama, base in bfloat16",
    functools.partial(mlx_trial, model=MODELS["Llama"], dtype=mx.bfloat16),
    bound=BOUND16,
)

for title, model in {**MODELS, **EXPERTS}.items():
    trial = functools.partial(mlx_trial, model=model, kind="lora", rank=3)
    register("mlx-lm, LoRA", f"{title}, all layers", trial, bound=CLOSE)
for name, changes in OPTIONS.items():
    trial = functools.partial(mlx_trial, model=MODELS["Llama"], kind="lora", **changes)
    register("mlx-lm, LoRA", f"Llama, {name}", trial, bound=CLOSE)
