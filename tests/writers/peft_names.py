"""PEFT's adapters whose modules or adapters have other names than those of the base."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

from writers.matrix import Trial, read_tensors, register
from writers.peft_common import (
    adapt,
    finish,
    model,
    outputs,
    peft_trial,
    reload,
    text_model,
    train,
)  # fmt: skip
from writers.peft_towers import EYE, IMAGE

WRITER = "PEFT, names"
FILE = "adapter_model.safetensors"
P = "base_model.model."
llama = functools.partial(text_model, "LlamaForCausalLM", head_dim=8)


def within(wrapper: str) -> Callable[[str], str]:
    """Return a function that puts each block of the model into a wrapper."""
    return lambda name: re.sub(r"(layers\.\d+)\.", rf"\1.{wrapper}.", name)


def raw(adapter: str) -> Callable[[str], str]:
    """Return a function that names tensors as the model's own state_dict does."""

    def rename(name: str) -> str:
        name = re.sub(r"(lora_[AB])\.", rf"\1.{adapter}.", name)
        return name.replace("magnitude_vector", f"magnitude_vector.{adapter}.weight")

    return rename


WAYS: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "torch.compile around PEFT": (lambda name: f"_orig_mod.{name}", ()),
    "PEFT around torch.compile": (lambda name: name.replace(P, f"{P}_orig_mod."), ()),
    "each block compiled": (within("_orig_mod"), ()),
    "DistributedDataParallel": (lambda name: f"module.{name}", ()),
    "DistributedDataParallel around torch.compile": (lambda name: f"module._orig_mod.{name}", ()),
    "FSDP": (within("_fsdp_wrapped_module"), ()),
    "FSDP around all": (lambda name: f"_fsdp_wrapped_module.{name}", ()),
    "activation checkpoints": (within("_checkpoint_wrapped_module"), ()),
    "FSDP and activation checkpoints": (
        within("_fsdp_wrapped_module._checkpoint_wrapped_module"), (),
    ),
    "a PEFT model wrapped again": (lambda name: P + name, ()),
    "state_dict of the adapter default": (raw("default"), ()),
    "state_dict of the adapter math": (raw("math"), ()),
    "no base_model.model": (lambda name: name.removeprefix(P), ()),
    "a module in front, --rename": (
        lambda name: name.replace(P, f"{P}0.auto_model."), ("--rename", r"0\.auto_model\.=",),
    ),
    "another name of a module, --rename": (
        lambda name: name.replace("self_attn", "attention"), ("--rename", r"attention=self_attn"),
    ),
    "two renames": (
        lambda name: name.replace("self_attn", "attention").replace("layers", "blocks"),
        ("--rename", r"attention=self_attn", "--rename", r"blocks\.(\d+)=layers.\1"),
    ),
}  # fmt: skip


def renamed(folder: Path, way: Callable[[str], str], options: tuple[str, ...]) -> Trial:
    trial = peft_trial(folder, llama, target_modules=["q_proj", "down_proj"])
    file = trial.adapter / FILE
    save_file({way(name): tensor for name, tensor in load_file(file).items()}, file)
    return trial._replace(options=options)


for name, (way, options) in WAYS.items():
    register(WRITER, name, functools.partial(renamed, way=way, options=options))


def misled(folder: Path) -> Trial:
    """Rename q to o, which has the same shape: the norms of the rows show that it is wrong."""
    many = functools.partial(text_model, "LlamaForCausalLM", head_dim=8)
    trial = peft_trial(folder, many, target_modules=["q_proj"])
    return trial._replace(options=("--rename", "q_proj=o_proj"))


register(WRITER, "--rename to a wrong module of the same shape", misled, refused="norm")


def nvlabs(folder: Path) -> Trial:
    """Write the names of NVlabs' own fork of PEFT."""
    trial = peft_trial(folder, llama, target_modules=["q_proj", "down_proj"])
    tensors = {
        name.replace("lora_magnitude_vector", "weight_m_wdecomp.weight"): (
            tensor[:, None] if "magnitude" in name else tensor
        )
        for name, tensor in load_file(trial.adapter / FILE).items()
    }
    save_file(tensors, trial.adapter / FILE)
    file = trial.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "DORA"}))
    return trial


register(WRITER, "NVlabs", nvlabs)


def two_adapters(folder: Path, place: str, *options: str) -> Trial:
    """Train two adapters, `math` and `chat`, and merge `math`."""
    base = llama()
    base.save_pretrained(folder / "base")
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])
    tuned = peft.get_peft_model(base, config, adapter_name="math")
    tuned.add_adapter("chat", config)
    for name in "chat", "math":
        tuned.set_adapter(name)
        train(tuned)
    state = {name: x for name, x in tuned.state_dict().items() if "lora_" in name}
    trial = finish(folder, tuned)  # the adapter `math` is active
    if place == "state_dict":
        save_file(state, folder / "adapter" / FILE)
        config.save_pretrained(folder / "adapter")
        place = ""
    return trial._replace(adapter=folder / "adapter" / place, options=options)


register(WRITER, "folder of one of two adapters", lambda folder: two_adapters(folder, "math"))
register(
    WRITER,
    "parent folder of two adapters, --subfolder",
    lambda folder: two_adapters(folder, "", "--subfolder", "math"),
)
register(
    WRITER,
    "parent folder of two adapters",
    lambda folder: two_adapters(folder, ""),
    refused="math",
)
register(
    WRITER,
    "state_dict of two adapters, --adapter-name",
    lambda folder: two_adapters(folder, "state_dict", "--adapter-name", "math"),
)
register(
    WRITER,
    "state_dict of two adapters",
    lambda folder: two_adapters(folder, "state_dict"),
    refused="math",
)

SIBLINGS: dict[str, tuple[Callable[[], Any], dict[str, Any], list[str]]] = {
    "Llama": (llama, {}, ["q_proj", "down_proj"]),
    "GPT-2": (functools.partial(text_model, "GPT2LMHeadModel"), {}, ["c_attn"]),
    "BERT": (functools.partial(text_model, "BertForMaskedLM"), {}, ["query", "dense"]),
    "RoBERTa": (functools.partial(text_model, "RobertaForMaskedLM"), {}, ["query"]),
    "DistilBERT": (
        functools.partial(text_model, "DistilBertForMaskedLM", hidden_dim=48),
        {},
        ["q_lin", "lin1"],
    ),
    "ViT": (
        functools.partial(model, "ViTForImageClassification", **EYE),
        {"pixel_values": IMAGE},
        ["q_proj", "fc1"],
    ),
}  # fmt: skip


def sibling(
    folder: Path, make: Any, inputs: dict[str, Any], targets: list[str], *, has_head: bool
) -> Trial:
    """Train on a model without its head, and merge into a file with one; or the other way round."""
    whole = make()
    core = whole.base_model
    base, tuned = (whole, core) if has_head else (core, whole)
    base.save_pretrained(folder / "base")
    chosen = rf"(?!cls|lm_head|classifier).*\.({'|'.join(targets)})"
    tuned = adapt(tuned, target_modules=chosen)
    tuned.save_pretrained(folder / "adapter")
    with torch.no_grad():
        wanted = outputs(base, **inputs)
    tuned.merge_and_unload()
    base.save_pretrained(folder / "right")
    right = read_tensors(folder / "right")
    return Trial(
        folder / "base",
        folder / "adapter",
        right,
        lambda out: outputs(reload(out, type(base).__name__), **inputs),
        wanted,
    )


for title, arguments in SIBLINGS.items():
    for has_head in True, False:
        place = "adapter of the model without its head" if has_head else "base without its head"
        make = functools.partial(sibling, has_head=has_head)
        register(
            WRITER,
            f"{title}, {place}",
            lambda folder, make=make, a=arguments: make(folder, *a),
        )
