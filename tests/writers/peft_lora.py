"""PEFT's plain LoRA, LoHa and LoKr: no magnitudes, W' = W + ΔW."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file

from writers.matrix import BOUND16, CLOSE, Trial, read_tensors, register
from writers.peft_common import adapt, finish, peft_trial, randomise, reload, train
from writers.peft_options import LAYER, OPTIONS, Network, gpt2, llama, qwen
from writers.peft_text import MODELS, QKV, SOME_LINEAR, text_model
from writers.peft_towers import image
from writers.peft_vision import EYE, VISION_LANGUAGE, model, text_of

LORA = {"use_dora": False}
TEXT_MODELS = (
    "Llama", "Mixtral", "Qwen3", "Phi-3", "GPT-2", "GPT-NeoX", "Falcon", "T5", "BART", "BERT",
    "DistilBERT", "ModernBERT", "ALBERT", "Mamba",
)  # fmt: skip

for title in TEXT_MODELS:
    name, attention, sizes = MODELS[title]
    make = functools.partial(text_model, name, **sizes)
    for what, targets in {
        "attention": attention,
        "all-linear": SOME_LINEAR.get(title, "all-linear"),
    }.items():
        trial = functools.partial(peft_trial, make=make, target_modules=targets, **LORA)
        register("PEFT, LoRA, models", f"{title}, {what}", trial, bound=CLOSE)
for title, sizes in {
    "ViT": ("ViTForImageClassification", EYE),
    "SigLIP": ("SiglipVisionModel", EYE),
    "DINOv2": ("Dinov2Model", EYE),
}.items():
    make = functools.partial(model, sizes[0], **sizes[1])
    trial = functools.partial(
        peft_trial, make=make, inputs=image, target_modules="all-linear", **LORA
    )
    register("PEFT, LoRA, models", f"{title}, all-linear", trial, bound=CLOSE)
for title in "LLaVA", "Qwen2.5-VL":
    name, sizes = VISION_LANGUAGE[title]
    make = functools.partial(model, name, **sizes)
    trial = functools.partial(
        peft_trial, make=make, inputs=text_of, target_modules="all-linear", **LORA
    )
    register("PEFT, LoRA, models", f"{title}, all-linear", trial, bound=CLOSE)

WRITER = "PEFT, LoRA, options"
MORE: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora_bias": (qwen, {"lora_bias": True}),
    "lora_bias beside bias=all": (qwen, {"lora_bias": True, "bias": "all"}),
    "lora_bias, GPT-2": (gpt2, {"lora_bias": True, "target_modules": ["c_attn", "c_proj"]}),
    "q, k and v": (llama, {"target_modules": QKV}),
}


def lora_trial(folder: Path, make: Any, changes: dict[str, Any]) -> Trial:
    return peft_trial(folder, make, **{"target_modules": LAYER, **changes, **LORA})


for name, (make, changes) in {**OPTIONS, **MORE}.items():
    register(WRITER, name, functools.partial(lora_trial, make=make, changes=changes), bound=CLOSE)


def residual(folder: Path, way: str) -> Trial:
    """Save as the base the residual that PEFT's initialisation of A and B leaves of it."""
    tuned = adapt(llama(), target_modules=LAYER, init_lora_weights=way, **LORA)
    copy.deepcopy(tuned).unload().save_pretrained(folder / "base")
    return finish(folder, tuned)._replace(options=("--base-is-residual",))


def converted(folder: Path, way: str, **changes: Any) -> Trial:
    """Let PEFT save an adapter of the residual as one of twice the rank, for the base itself."""
    llama().save_pretrained(folder / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=LAYER, init_lora_weights=way, **changes
    )
    tuned = peft.get_peft_model(reload(folder / "base"), config)
    tuned.save_pretrained(folder / "first")
    return finish(
        folder,
        train(tuned),
        save={"path_initial_model_for_weight_conversion": str(folder / "first")},
    )


for way in "pissa", "olora":
    register(WRITER, f"residual base of {way}", functools.partial(residual, way=way), bound=CLOSE)
    register(
        WRITER, f"{way}, converted to LoRA", functools.partial(converted, way=way), bound=CLOSE
    )
register(
    WRITER,
    "pissa, converted to LoRA, use_rslora",
    functools.partial(converted, way="pissa", use_rslora=True),
)


def stored(folder: Path, dtype: torch.dtype, size: str = "1GB") -> Trial:
    """Save the base in the dtype and in shards. The right values are those of a float32 copy."""
    llama().to(dtype).save_pretrained(folder / "base", max_shard_size=size)
    return finish(folder, adapt(reload(folder / "base"), target_modules="all-linear", **LORA))


register(WRITER, "base in shards", functools.partial(stored, dtype=torch.float32, size="9KB"))
register(WRITER, "base in float16", functools.partial(stored, dtype=torch.float16), bound=BOUND16)


def in_bfloat16(folder: Path) -> Trial:
    """Let PEFT merge in bfloat16. The outputs are the shares of equal numbers, of each tensor.

    PEFT adds the change, of float32, to a bfloat16 weight, and rounds once, as doraxp does.
    """
    llama().to(torch.bfloat16).save_pretrained(folder / "base")
    base = reload(folder / "base").to(torch.bfloat16)
    trial = finish(folder, adapt(base, target_modules="all-linear", **LORA))
    before = read_tensors(folder / "base")
    changed = [name for name, x in trial.right.items() if not torch.equal(x, before[name])]

    def equal(out: Path) -> torch.Tensor:
        got = read_tensors(out)
        shares = [(got[name] == trial.right[name]).float().mean() for name in changed]
        return torch.stack(shares)

    return trial._replace(outputs=equal, wanted=torch.ones(len(changed)))


register(WRITER, "base in bfloat16, bit for bit", in_bfloat16, bound=BOUND16)


def network(folder: Path, config: Any) -> Trial:
    """A model that is one file, with layers of all kinds."""
    base = randomise(Network())
    save_file(base.state_dict(), folder / "base.safetensors")
    tuned = train(peft.get_peft_model(base, config))
    tuned.save_pretrained(folder / "adapter")
    right = tuned.merge_and_unload().state_dict()
    return Trial(folder / "base.safetensors", folder / "adapter", right)


ALL = ["tokens", "line", "plane", "point", "space", "head"]
for name, targets in {
    "Embedding": ["tokens"],
    "Conv1d": ["line"],
    "Conv2d": ["plane"],
    "Conv2d of one pixel": ["point"],
    "Conv3d": ["space"],
    "all kinds of layer": ALL,
}.items():
    config = peft.LoraConfig(r=4, target_modules=targets, lora_alpha=6)
    register(WRITER, name, functools.partial(network, config=config), bound=CLOSE)
config = peft.LoraConfig(r=4, target_modules=["plane"], modules_to_save=["head", "line"])
register(WRITER, "Conv2d with modules_to_save", functools.partial(network, config=config))
config = peft.LoraConfig(r=4, target_modules=["line", "point", "head"], lora_bias=True)
register(
    WRITER, "Conv1d, Conv2d and Linear with lora_bias", functools.partial(network, config=config)
)

KINDS: dict[str, dict[str, Any]] = {
    "LoHa": {},
    "LoHa, alpha is the rank": {"alpha": 4},
    "LoHa, rank_pattern and alpha_pattern": {
        "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 9},
    },
    "LoHa, modules_to_save": {"modules_to_save": ["lm_head"]},
    "LoKr": {},
    "LoKr, r=2": {"r": 2},
    "LoKr, both factors whole": {"r": 40},
    "LoKr, decompose_both": {"r": 1, "decompose_both": True},
    "LoKr, decompose_factor": {"r": 2, "decompose_factor": 2},
    "LoKr, rank_pattern and alpha_pattern": {
        "r": 2, "rank_pattern": {"v_proj": 40}, "alpha_pattern": {"q_proj": 9},
    },
    "LoKr, init_weights=lycoris": {"r": 2, "init_weights": "lycoris"},
    "LoKr, modules_to_save": {"r": 2, "modules_to_save": ["lm_head"]},
}  # fmt: skip
WRITER = "PEFT, LoHa and LoKr"


def lycoris_config(name: str, **changes: Any) -> Any:
    make = peft.LoHaConfig if name.startswith("LoHa") else peft.LoKrConfig
    return make(**{"r": 4, "alpha": 6, **changes})


def lycoris_trial(folder: Path, name: str, targets: list[str], **changes: Any) -> Trial:
    base = llama()
    base.save_pretrained(folder / "base")
    config = lycoris_config(name, target_modules=targets, **changes)
    return finish(folder, train_all(peft.get_peft_model(base, config)))


@torch.no_grad()
def train_all(tuned: Any) -> Any:
    """Change the factors by more than `train`: the change of LoHa has four of them."""
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return tuned.eval()


class Convolutions(torch.nn.Module):
    """Layers that are large enough for factors of rank 2."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Conv1d(12, 18, 3)
        self.plane = torch.nn.Conv2d(12, 18, (3, 2))
        self.point = torch.nn.Conv2d(12, 18, 1)
        self.groups = torch.nn.Conv2d(12, 18, 3, groups=2)


def lycoris_layer(folder: Path, name: str, layer: str, **changes: Any) -> Trial:
    base = randomise(Convolutions())
    save_file(base.state_dict(), folder / "base.safetensors")
    config = lycoris_config(name, target_modules=[layer], **changes)
    tuned = train_all(peft.get_peft_model(base, config))
    tuned.save_pretrained(folder / "adapter")
    right = tuned.merge_and_unload().state_dict()
    return Trial(folder / "base.safetensors", folder / "adapter", right)


for name, changes in KINDS.items():
    trial = functools.partial(lycoris_trial, name=name, targets=[*LAYER, "up_proj"], **changes)
    register(WRITER, f"Llama, {name}", trial, bound=CLOSE)
LAYERS = {
    "Conv1d": "line",
    "Conv2d": "plane",
    "Conv2d of one pixel": "point",
    "Conv2d of two groups": "groups",
}
OF_LAYERS: dict[str, dict[str, Any]] = {
    "LoHa": {"r": 2},
    "LoHa, use_effective_conv2d": {"r": 2, "use_effective_conv2d": True},
    "LoHa, r=40": {"r": 40},
    "LoKr": {"r": 2},
    "LoKr, use_effective_conv2d": {"r": 2, "use_effective_conv2d": True},
    "LoKr, decompose_both": {"r": 1, "decompose_both": True},
    "LoKr, both factors whole": {"r": 40},
}
for title, layer in LAYERS.items():
    for name, changes in OF_LAYERS.items():
        if name == "LoKr, use_effective_conv2d" and layer == "groups":
            continue  # its second factor is whole
        trial = functools.partial(lycoris_layer, name=name, layer=layer, **changes)
        register(WRITER, f"{title}, {name}", trial, bound=CLOSE)
