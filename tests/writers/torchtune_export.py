"""torchtune: the export of an adapter of Llama 3 for PEFT.

It orders the rows of lora_B of q and k by heads, as transformers stores q and k. It leaves the rows
of the magnitude in torchtune's order.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torchtune.models.convert_weights import (
    tune_to_hf,
    tune_to_peft_adapter_config,
    tune_to_peft_adapter_weights,
)
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import get_adapter_state_dict, get_merged_lora_ckpt
from transformers import LlamaConfig, LlamaForCausalLM

from writers.matrix import CLOSE, Trial, register
from writers.peft_common import IDS, TEXT, outputs, randomise, reload, train

RANK, ALPHA = 4, 6.0
CASES: dict[str, dict[str, Any]] = {
    "q and v": {"attention": ["q_proj", "v_proj"]},
    "q and k": {"attention": ["q_proj", "k_proj"]},
    "v and output": {"attention": ["v_proj", "output_proj"]},
    "all of attention": {"attention": ["q_proj", "k_proj", "v_proj", "output_proj"]},
    "all layers": {"attention": ["q_proj", "k_proj", "v_proj", "output_proj"], "mlp": True},
    "q and v, as many heads of k as of q": {"attention": ["q_proj", "v_proj"], "kv_heads": 4},
    "q and k, one head of k": {"attention": ["q_proj", "k_proj"], "kv_heads": 1},
    "q and v, with use_dora added by hand": {
        "attention": ["q_proj", "v_proj"],
        "added": {"use_dora": True},
    },
}


def tune_trial(
    folder: Path,
    attention: list[str],
    mlp: bool = False,
    kv_heads: int = 2,
    added: dict[str, Any] | None = None,
    use_dora: bool = True,
) -> Trial:
    """Train by torchtune; the base is the same model in the layout of transformers."""
    model = lora_llama3(
        attention, mlp, vocab_size=64, num_layers=2, num_heads=4, num_kv_heads=kv_heads,
        embed_dim=32, max_seq_len=64, intermediate_dim=48, lora_rank=RANK, lora_alpha=ALPHA,
        use_dora=use_dora,
    )  # fmt: skip
    randomise(model)
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    adapter = set(get_adapter_state_dict(model.state_dict()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in adapter)
    train(model)
    with torch.no_grad():
        wanted = model(IDS).clone()
    heads = {"num_heads": 4, "num_kv_heads": kv_heads, "dim": 32}
    save_export(folder / "adapter", model.state_dict(), attention, mlp, heads, added or {})
    state = {name: x.clone() for name, x in model.state_dict().items()}
    save_llama(folder / "base", {n: x for n, x in state.items() if n not in adapter}, heads)
    right = save_llama(folder / "right", get_merged_lora_ckpt(state, RANK, ALPHA), heads)
    load = functools.partial(reload, name="LlamaForCausalLM")
    return Trial(folder / "base", folder / "adapter", right, lambda out: outputs(load(out)), wanted)


def save_export(
    folder: Path, state: Any, attention: list[str], mlp: bool, heads: Any, added: Any
) -> None:
    """Save the files as torchtune's checkpointer does."""
    folder.mkdir()
    targets = [*attention, *(("w1", "w2", "w3") if mlp else ())]
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "peft_type": "LORA"}
    config = tune_to_peft_adapter_config(config, base_model_name_or_path="base")
    (folder / "adapter_config.json").write_text(json.dumps(config | added))
    tensors = tune_to_peft_adapter_weights(get_adapter_state_dict(state), **heads)
    contiguous = {name: x.detach().contiguous() for name, x in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", {"format": "pt"})


def save_llama(folder: Path, state: Any, heads: Any) -> dict[str, torch.Tensor]:
    """Save a model of torchtune as transformers stores it."""
    sizes = {**TEXT, "num_key_value_heads": heads["num_kv_heads"], "head_dim": 8}
    rope = {"rope_type": "default", "rope_theta": 500_000}
    model = LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=1e-5, rope_parameters=rope))
    tensors = {name: x.detach().contiguous() for name, x in tune_to_hf(state, **heads).items()}
    model.load_state_dict(tensors)
    model.save_pretrained(folder)
    return tensors


for name, arguments in CASES.items():
    register("torchtune", name, functools.partial(tune_trial, **arguments))
    if "added" not in arguments:
        trial = functools.partial(tune_trial, use_dora=False, **arguments)
        register("torchtune, LoRA", name, trial, bound=CLOSE)
