"""Mixtures of experts of transformers 5: fused in memory, and in most files one tensor per expert.

PEFT's `target_parameters` adapts the fused tensors. Adapters of single experts have the names of
the files; PEFT cannot use them as DoRA, so their right values are those of the formula.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from doraxp import AdaptedLayer, Adapter, Config, LayerKind
from doraxp.checkpoint import save_adapters
from writers.matrix import CLOSE, Trial, read_tensors, register
from writers.peft_common import model, outputs, reload, train

SIZES = {
    "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "head_dim": 8}
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2,
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("MixtralForCausalLM", LOCAL),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {**FOUR, "head_dim": 8}),
    "OLMoE": ("OlmoeForCausalLM", FOUR),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", LATENT),
    "gpt-oss": ("GptOssForCausalLM", {**LOCAL, "num_experts_per_tok": 2}),
    "Llama 4": ("Llama4ForCausalLM", {**LOCAL, "intermediate_size_mlp": 48,
                                      "interleave_moe_layer_step": 1}),
}  # fmt: skip
SQUARE = {"intermediate_size": 32, "moe_intermediate_size": 32}
"""Sizes with which down_proj is square, so its shape does not tell which axis is its output."""
TARGETS = {
    "gate_up_proj": ["gate_up_proj"],
    "down_proj": ["down_proj"],
    "both": ["gate_up_proj", "down_proj"],
    "both, named in the other order": ["down_proj", "gate_up_proj"],
}
PARTS = ("gate_proj", "up_proj", "down_proj")
OF_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@torch.no_grad()
def new_model(title: str, sizes: dict[str, Any] | None = None) -> Any:
    """Return a model whose experts, too, have rows of unlike norms."""
    name, changes = MODELS[title]
    made = model(name, **{**SIZES, **changes, **(sizes or {})})
    for parameter in made.parameters():
        if parameter.ndim == 3:
            parameter.mul_(0.5 + torch.rand(*parameter.shape[:2], 1))
    return made


def fused(
    folder: Path,
    title: str,
    parameters: list[str],
    targets: list[str] | str | None = None,
    sizes: dict[str, Any] | None = None,
    by_layer: bool = False,
    whole: bool = False,
    **changes: Any,
) -> Trial:
    """Adapt fused experts by `target_parameters`. The right outputs are those of PEFT's merge.

    `by_layer` adapts gate_up_proj of the first layer and down_proj of the second. `parameters` are
    the ends of whole names where `whole` is true.
    """
    base = new_model(title, sizes)
    base.save_pretrained(folder / "base")
    block = "feed_forward" if title == "Llama 4" else "mlp"
    if by_layer:
        parameters = [f"0.{block}.experts.gate_up_proj", f"1.{block}.experts.down_proj"]
    elif not whole:
        parameters = [f"{block}.experts.{name}" for name in parameters]
    config = peft.LoraConfig(
        target_parameters=parameters or None,
        target_modules=["q_proj", "o_proj"] if targets is None else targets,
        **{"r": 3, "lora_alpha": 5, **changes},
    )
    tuned = train(peft.get_peft_model(reload(folder / "base"), config))
    tuned.save_pretrained(folder / "adapter")
    merged = tuned.merge_and_unload()
    merged.save_pretrained(folder / "right")
    right = read_tensors(folder / "right")
    wanted = outputs(merged)
    name = type(base).__name__
    return Trial(
        folder / "base",
        folder / "adapter",
        right,
        lambda out: outputs(reload(out, name)),
        wanted,
    )


for title in MODELS:
    own = {"targets": ["o_proj"]} if title == "DeepSeek-V3" else {}
    for what, parameters in TARGETS.items():
        trial = functools.partial(fused, title=title, parameters=parameters, **own)
        register("PEFT, target_parameters", f"{title}, {what}", trial, bound=CLOSE)
    for what, changes in {
        "both, without other modules": {"targets": []},
        "both, use_rslora": {"use_rslora": True, **own},
        "both, r=1": {"r": 1, **own},
        "both, square down_proj": {"sizes": SQUARE, **own},
        "both, rank_pattern and alpha_pattern": {
            "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 9},
            **own,
        },
        "both, patterns that match modules alone": {
            "rank_pattern": {"o_proj": 2, "experts": 2}, "alpha_pattern": {"o_proj": 3}, **own,
        },
        "both, modules_to_save": {"modules_to_save": ["lm_head"], **own},
    }.items():  # fmt: skip
        trial = functools.partial(fused, title=title, parameters=TARGETS["both"], **changes)
        register("PEFT, target_parameters", f"{title}, {what}", trial, bound=CLOSE)
    trial = functools.partial(fused, title=title, parameters=["gate_up_proj"], by_layer=True, **own)
    name = f"{title}, gate_up_proj of one layer and down_proj of the other"
    if title != "DeepSeek-V3":  # it has experts in one layer only
        register("PEFT, target_parameters", name, trial, bound=CLOSE)
trial = functools.partial(
    fused, title="gpt-oss", parameters=["gate_up_proj", "down_proj", "down_proj_bias"]
)
register("PEFT, target_parameters", "gpt-oss, a bias of the experts", trial, bound=CLOSE)


def by_modules(folder: Path, title: str, targets: Any, **changes: Any) -> Trial:
    """Name modules, which PEFT writes as the fused parameters that have them."""
    return fused(folder, title, [], targets, **changes)


NAMES = {"Mixtral": ["w1", "w2", "w3"]}
for title in "Mixtral", "Qwen3-MoE", "OLMoE", "DeepSeek-V3":
    names = NAMES.get(title, list(PARTS))
    for what, targets, changes in (
        ("all-linear", "all-linear", {}),
        ("all-linear, use_rslora", "all-linear", {"use_rslora": True}),
        (", ".join(names), names, {}),
        (", ".join([*names, "o_proj"]), [*names, "o_proj"], {}),
    ):
        trial = functools.partial(by_modules, title=title, targets=targets, **changes)
        register("PEFT, modules of experts", f"{title}, {what}", trial, bound=CLOSE)
for title, parameters in {"Qwen3-MoE": ["mlp.gate.weight"], "Llama 4": ["q_proj.weight"]}.items():
    trial = functools.partial(fused, title=title, parameters=parameters, targets=[], whole=True)
    name = f"{title}, {parameters[0]}"
    register("PEFT, target_parameters", name, trial, bound=CLOSE)


def per_expert(folder: Path, title: str, targets: Callable[[str], bool]) -> Trial:
    """Adapt single experts as DoRA, under their names in the file.

    The right values are m (W + s B A) / ‖W + s B A‖ by rows, in float64. The right outputs are
    those of a model with these weights.
    """
    base = new_model(title)
    base.save_pretrained(folder / "base")
    right = read_tensors(folder / "base")
    config = Config(rank=3, alpha=5.0)
    layers, changed = {}, {}
    for name, tensor in right.items():
        path = name.removesuffix(".weight")
        if tensor.ndim == 2 and targets(path):
            weight = tensor.double()
            a = 0.2 * torch.randn(config.rank, weight.shape[1])
            b = 0.2 * torch.randn(len(weight), config.rank)
            m = (weight.norm(dim=1) * (1 + 0.1 * torch.randn(len(weight)))).float()
            adapter = Adapter(*(np.array(x) for x in (a, b, m)))
            layers[path] = AdaptedLayer(adapter, config, LayerKind(), tuple(weight.shape))
            v = weight + config.alpha / config.rank * b.double() @ a.double()
            changed[name] = (m[:, None] * v / v.norm(dim=1, keepdim=True)).float()
    save_adapters(folder / "adapter", layers)
    name = type(base).__name__
    wanted = outputs(with_weights(folder / "base", name, changed))
    return Trial(
        folder / "base",
        folder / "adapter",
        right | changed,
        lambda out: outputs(reload(out, name)),
        wanted,
    )


@torch.no_grad()
def with_weights(base: Path, name: str, changed: dict[str, torch.Tensor]) -> Any:
    """Load a model, and set weights by their names in the file; the experts are fused by hand."""
    loaded = getattr(transformers, name).from_pretrained(base, dtype=torch.float32).eval()
    for key, value in changed.items():
        path, _, last = key.removesuffix(".weight").rpartition(".")
        block, found, number = path.rpartition(".experts.")
        if not found:
            loaded.get_parameter(key).copy_(value)
            continue
        block = block.replace("block_sparse_moe", "mlp")
        kind = next(part for part in PARTS if last in (part, OF_MIXTRAL[part]))
        experts = loaded.get_submodule(f"{block}.experts")
        if kind == "down_proj":
            experts.down_proj[int(number)].copy_(value)
        else:
            start = 0 if kind == "gate_proj" else len(value)
            experts.gate_up_proj[int(number), start : start + len(value)].copy_(value)
    return loaded


def is_expert(path: str) -> bool:
    return ".experts." in path


def is_expert_or_attention(path: str) -> bool:
    return is_expert(path) or "self_attn" in path


def is_one_expert(path: str) -> bool:
    return ".experts.2." in path


def is_down(path: str) -> bool:
    return is_expert(path) and path.endswith(("down_proj", "w2"))


for title in "Mixtral", "Qwen3-MoE", "OLMoE", "DeepSeek-V3":
    for what, targets in {
        "experts": is_expert,
        "experts and attention": is_expert_or_attention,
        "one of four experts": is_one_expert,
        "the down projections of experts": is_down,
        "experts, shared experts and dense layers": lambda path: "mlp" in path or is_expert(path),
    }.items():
        trial = functools.partial(per_expert, title=title, targets=targets)
        register("DoRA of single experts", f"{title}, {what}", trial, bound=CLOSE)


def fused_dora(
    folder: Path, title: str, parameters: list[str], sizes: dict[str, Any] | None = None
) -> Trial:
    """Adapt fused experts as DoRA, in the layout of doraxp, which PEFT does not have.

    The right values are m (W + s B A) / ‖W + s B A‖ by rows of each expert, in float64. They are
    set in a model in memory, which transformers writes and runs.
    """
    base = new_model(title, sizes)
    base.save_pretrained(folder / "base")
    config = Config(rank=3, alpha=5.0)
    kind = LayerKind("transposed_experts" if title in ("gpt-oss", "Llama 4") else "experts")
    layers = {}
    tuned = reload(folder / "base", type(base).__name__)
    for name, parameter in tuned.named_parameters():
        if parameter.ndim == 3 and name.endswith(tuple(parameters)):
            stored = parameter.detach().double()
            weight = stored.mT if kind.is_transposed else stored
            experts, out, inner = weight.shape
            a = 0.2 * torch.randn(experts, config.rank, inner)
            b = 0.2 * torch.randn(experts, out, config.rank)
            m = (weight.norm(dim=2) * (1 + 0.1 * torch.randn(experts, out))).float()
            adapter = Adapter(*(np.array(x) for x in (a, b, m)))
            layers[name] = AdaptedLayer(adapter, config, kind, tuple(stored.shape))
            v = weight + config.alpha / config.rank * b.double() @ a.double()
            new = m[..., None] * v / v.norm(dim=2, keepdim=True)
            with torch.no_grad():
                parameter.copy_(new.mT if kind.is_transposed else new)
    save_adapters(folder / "adapter", layers)
    tuned.save_pretrained(folder / "right")
    right, wanted = read_tensors(folder / "right"), outputs(tuned)
    name = type(base).__name__
    return Trial(
        folder / "base",
        folder / "adapter",
        right,
        lambda out: outputs(reload(out, name)),
        wanted,
    )


for title in MODELS:
    for what in ("gate_up_proj", "down_proj", "both"):
        trial = functools.partial(fused_dora, title=title, parameters=TARGETS[what])
        register("DoRA of fused experts", f"{title}, {what}", trial, bound=CLOSE)
    trial = functools.partial(fused_dora, title=title, parameters=TARGETS["both"], sizes=SQUARE)
    register("DoRA of fused experts", f"{title}, both, square down_proj", trial, bound=CLOSE)
