"""PEFT's options on a small Llama, GPT-2 and a network of convolutions."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file

from writers.matrix import BOUND16, Trial, register
from writers.peft_common import adapt, finish, peft_trial, randomise, reload, text_model, train

WRITER = "PEFT, options"
LAYER = ["q_proj", "v_proj"]
llama = functools.partial(text_model, "LlamaForCausalLM", head_dim=8)
qwen = functools.partial(text_model, "Qwen2ForCausalLM")
gpt2 = functools.partial(text_model, "GPT2LMHeadModel")
untied_gpt2 = functools.partial(gpt2, tie_word_embeddings=False)

OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "use_rslora": (llama, {"use_rslora": True}),
    "r=1": (llama, {"r": 1}),
    "r larger than the layer": (llama, {"r": 40}),
    "lora_alpha is a fraction": (llama, {"lora_alpha": 2.5}),
    "rank_pattern": (llama, {"rank_pattern": {"v_proj": 7}}),
    "alpha_pattern": (llama, {"alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3}}),
    "rank_pattern and alpha_pattern with use_rslora": (
        llama, {"rank_pattern": {"v_proj": 7}, "alpha_pattern": {"q_proj": 9}, "use_rslora": True},
    ),
    "two patterns for one module": (
        llama, {"rank_pattern": {"1.self_attn.v_proj": 2, "v_proj": 7}},
    ),
    "lora_dropout": (llama, {"lora_dropout": 0.3}),
    "layers_to_transform": (llama, {"layers_to_transform": [1]}),
    "target_modules is an expression": (llama, {"target_modules": r".*layers\.0\..*down_proj"}),
    "exclude_modules": (llama, {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "bias=all": (qwen, {"bias": "all"}),
    "bias=lora_only": (qwen, {"bias": "lora_only"}),
    "bias=all, GPT-2": (gpt2, {"bias": "all", "target_modules": ["c_attn", "c_proj"]}),
    "embed_tokens": (llama, {"target_modules": [*LAYER, "embed_tokens"]}),
    "embed_tokens and lm_head": (llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "modules_to_save=[lm_head]": (llama, {"modules_to_save": ["lm_head"]}),
    "modules_to_save=[embed_tokens, lm_head]": (
        llama, {"modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "modules_to_save=[norm]": (llama, {"modules_to_save": ["norm", "input_layernorm"]}),
    "init_lora_weights=gaussian": (llama, {"init_lora_weights": "gaussian"}),
    "init_lora_weights=orthogonal": (llama, {"init_lora_weights": "orthogonal"}),
    "GPT-2's square c_proj beside c_attn": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "GPT-2's square c_proj beside lm_head": (
        untied_gpt2, {"target_modules": ["attn.c_proj", "lm_head"]},
    ),
    "GPT-2, all modules and an untied lm_head": (
        untied_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc", "lm_head"]},
    ),
    "GPT-2's wte": (untied_gpt2, {"target_modules": ["c_attn", "wte"]}),
    "trainable_token_indices": (llama, {"trainable_token_indices": [3, 5, 60]}),
    "trainable_token_indices by module": (
        llama, {"trainable_token_indices": {"embed_tokens": [4, 7]}},
    ),
}  # fmt: skip


def option_trial(folder: Path, make: Any, changes: dict[str, Any]) -> Trial:
    return peft_trial(folder, make, **{"target_modules": LAYER, **changes})


for name, (make, changes) in OPTIONS.items():
    register(WRITER, name, functools.partial(option_trial, make=make, changes=changes))


def stored(folder: Path, dtype: torch.dtype, size: str = "1GB") -> Trial:
    """Save the base in the dtype and in shards. The right values are those of a float32 copy."""
    llama().to(dtype).save_pretrained(folder / "base", max_shard_size=size)
    return finish(folder, adapt(reload(folder / "base"), target_modules="all-linear"))


register(WRITER, "base in shards", functools.partial(stored, dtype=torch.float32, size="9KB"))
for dtype in torch.bfloat16, torch.float16:
    make = functools.partial(stored, dtype=dtype)
    register(WRITER, f"base in {str(dtype).removeprefix('torch.')}", make, bound=BOUND16)


def unmergeable(folder: Path, fields: Any = None, **changes: Any) -> Trial:
    """Make an adapter that must be refused; `fields` are changed in its adapter_config.json."""
    base = llama()
    base.save_pretrained(folder / "base")
    adapt(base, **{"target_modules": LAYER, **changes}).save_pretrained(folder / "adapter")
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (fields or {})))
    return Trial(folder / "base", folder / "adapter", {})


for name, message, make in (
    ("layer_replication", "layer_replication", {"layer_replication": [(0, 2), (1, 2)]}),
    # PEFT writes the patterns in another order, by which it cannot load its own file.
    (
        "two patterns for one module, sorted otherwise",
        "says rank 2, but lora_A",
        {"rank_pattern": {"v_proj": 7, "layers.1.self_attn.v_proj": 2}},
    ),
    ("lora_bias", "lora_bias", {"fields": {"lora_bias": True}}),  # PEFT refuses it beside use_dora
    ("use_dora=False beside magnitudes", "use_dora", {"fields": {"use_dora": False}}),
    ("a base of PiSSA that was not saved", "pissa", {"init_lora_weights": "pissa"}),
    ("a base of OLoRA that was not saved", "olora", {"init_lora_weights": "olora"}),
):
    register(WRITER, name, functools.partial(unmergeable, **make), refused=message)


def residual(folder: Path, way: str, options: tuple[str, ...] = (), declared: Any = None) -> Trial:
    """Save as the base the residual that PEFT's initialisation of A and B leaves of it."""
    tuned = adapt(llama(), target_modules=LAYER, init_lora_weights=way)
    copy.deepcopy(tuned).unload().save_pretrained(folder / "base")
    tuned.peft_config["default"].init_lora_weights = declared or way
    return finish(folder, tuned)._replace(options=options)


for way in "pissa", "pissa_niter_4", "olora":
    make = functools.partial(residual, way=way, options=("--base-is-residual",))
    register(WRITER, f"residual base of {way}", make)
register(
    WRITER,
    "residual base of pissa, declared as PEFT advises",
    functools.partial(residual, way="pissa", declared=True),
)


def with_subfolder(folder: Path) -> Trial:
    """Put a module of sentence-transformers beside the model, in a folder of its own."""
    trial = peft_trial(folder, llama, target_modules=LAYER)
    dense = {"linear.weight": torch.randn(8, 32)}
    (folder / "base" / "2_Dense").mkdir()
    save_file(dense, folder / "base" / "2_Dense" / "model.safetensors")
    return trial._replace(
        right={**trial.right, **{f"2_Dense/{name}": x for name, x in dense.items()}}
    )


register(WRITER, "base with weights in a sub-folder", with_subfolder)


class Network(torch.nn.Module):
    """Layers of other kinds than Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(20, 6)
        self.line = torch.nn.Conv1d(6, 8, 3)
        self.plane = torch.nn.Conv2d(4, 8, (3, 2), bias=False)
        self.point = torch.nn.Conv2d(8, 8, 1)
        self.space = torch.nn.Conv3d(2, 4, (2, 3, 1))
        self.head = torch.nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.line(self.tokens(tokens).mT).mean(-1))


def network(folder: Path, **changes: Any) -> Trial:
    """A model that is one file, with layers that only some of PEFT's adapters reach."""
    base = randomise(Network())
    save_file(base.state_dict(), folder / "base.safetensors")
    tuned = train(peft.get_peft_model(base, peft.LoraConfig(r=4, use_dora=True, **changes)))
    tuned.save_pretrained(folder / "adapter")
    right = tuned.merge_and_unload().state_dict()
    return Trial(folder / "base.safetensors", folder / "adapter", right)


for name, targets in {
    "Embedding": ["tokens"],
    "Conv1d": ["line"],
    "Conv2d": ["plane"],
    "Conv2d of one pixel": ["point"],
    "Conv3d": ["space"],
    "all kinds of layer": ["tokens", "line", "plane", "point", "space", "head"],
}.items():
    register(WRITER, name, functools.partial(network, target_modules=targets))
register(
    WRITER,
    "Conv2d with modules_to_save",
    functools.partial(network, target_modules=["plane"], modules_to_save=["head", "line"]),
)
