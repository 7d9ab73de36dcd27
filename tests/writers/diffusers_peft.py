"""The adapters that diffusers itself saves: of one model, and of a pipeline's parts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from writers.images import image_model, image_outputs, text_encoder, text_outputs
from writers.matrix import BOUND16, CLOSE, Trial, read_tensors, register
from writers.peft_common import adapt, train

WRITER = "diffusers"
FILE = "pytorch_lora_weights.safetensors"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LAYERS = {
    "UNet": ["to_q", "to_v", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut", "time_emb_proj"],
    "SDXL's UNet": ["to_k", "proj_out", "ff.net.2", "conv2", "conv_in", "linear_1"],
    "Flux": ["to_q", "add_k_proj", "proj_mlp", "proj_out", "linear", "x_embedder", "to_add_out"],
    "SD3": ["to_q", "add_k_proj", "linear", "proj_out", "pos_embed.proj", "context_embedder"],
    "Wan": ["to_q", "ffn.net.2", "patch_embedding", "time_proj", "proj_out"],
    "VAE": ["conv1", "conv_in", "to_q", "quant_conv"],
}


def lora(targets: list[str], **changes: Any) -> peft.LoraConfig:
    config = {"r": 4, "lora_alpha": 6, "use_dora": True, **changes}
    return peft.LoraConfig(target_modules=targets, **config)


def fuse(model: Any, folder: Path) -> None:
    """Save the model with its adapter merged."""
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(folder)


def trial_of(
    folder: Path,
    title: str,
    targets: list[str],
    *,
    place: str = "",
    base: Any = None,
    **changes: Any,
) -> Trial:
    """Make a trial of one model; `base` has the arguments of save_pretrained."""
    model = image_model(title)
    model.save_pretrained(folder / "base", **(base or {}))
    model.add_adapter(lora(targets, **changes))
    train(model)
    model.save_lora_adapter(folder / "adapter")
    wanted = image_outputs(model, title)
    fuse(model, folder / "right")
    load = type(model).from_pretrained
    return Trial(
        folder / "base",
        folder / "adapter" / place,
        read_tensors(folder / "right"),
        lambda out: image_outputs(load(out).eval(), title),
        wanted,
    )


for title, targets in LAYERS.items():
    for what, make in {
        "attention, a folder": functools.partial(trial_of, targets=ATTENTION),
        "all kinds of layer, a file": functools.partial(trial_of, targets=targets, place=FILE),
    }.items():
        register(WRITER, f"{title}, {what}", functools.partial(make, title=title))

for title, size in {"UNet": "200KB", "Flux": "20KB"}.items():
    make = functools.partial(
        trial_of, title=title, targets=ATTENTION, base={"max_shard_size": size}
    )
    register(WRITER, f"{title}, base in shards", make)
for name, changes in {
    "use_rslora": {"use_rslora": True},
    "rank_pattern and alpha_pattern": {
        "rank_pattern": {"to_k": 2},
        "alpha_pattern": {"attn1.to_q": 3},
    },
}.items():
    make = functools.partial(trial_of, title="UNet", targets=ATTENTION, **changes)
    register(WRITER, f"UNet, {name}", make)


def by_peft(folder: Path, title: str, targets: list[str], **changes: Any) -> Trial:
    """Save the adapter of a model of diffusers by PEFT."""
    model = image_model(title)
    model.save_pretrained(folder / "base")
    tuned = adapt(model, target_modules=targets, **changes)
    tuned.save_pretrained(folder / "adapter")
    wanted = image_outputs(model, title)
    tuned.merge_and_unload().save_pretrained(folder / "right")
    load = type(model).from_pretrained
    return Trial(
        folder / "base",
        folder / "adapter",
        read_tensors(folder / "right"),
        lambda out: image_outputs(load(out).eval(), title),
        wanted,
    )


for title, targets in {**LAYERS, "PixArt": ["to_q", "linear_1", "proj", "net.2"]}.items():
    register(
        WRITER, f"{title}, saved by PEFT", functools.partial(by_peft, title=title, targets=targets)
    )


def beside_variant(folder: Path, title: str) -> Trial:
    """Save the same base in float16 beside, as the hub has it."""
    trial = trial_of(folder, title, ATTENTION)
    name = "diffusion_pytorch_model{}.safetensors"
    half = {key: x.half() for key, x in load_file(trial.base / name.format("")).items()}
    save_file(half, trial.base / name.format(".fp16"), {"format": "pt"})
    return trial


register(WRITER, "UNet, a variant fp16 beside", functools.partial(beside_variant, title="UNet"))
register(WRITER, "Flux, a variant fp16 beside", functools.partial(beside_variant, title="Flux"))


def half_base(folder: Path) -> Trial:
    """Save the base in float16. The right values are those of its float32 copy."""
    model = image_model("UNet").half()
    model.save_pretrained(folder / "base")
    model = model.float()
    model.add_adapter(lora(ATTENTION))
    train(model).save_lora_adapter(folder / "adapter")
    fuse(model, folder / "right")
    return Trial(folder / "base", folder / "adapter", read_tensors(folder / "right"))


register(WRITER, "UNet, base in float16", half_base, bound=BOUND16)

PARTS: Mapping[str, Any] = {
    "UNet": (
        diffusers.StableDiffusionPipeline,
        "unet",
        {"vae": None, "safety_checker": None, "feature_extractor": None, "tokenizer": None},
    ),
    "SDXL's UNet": (
        diffusers.StableDiffusionXLPipeline,
        "unet",
        {"vae": None, "tokenizer": None, "tokenizer_2": None, "text_encoder_2": None},
    ),
    "Flux": (
        diffusers.FluxPipeline,
        "transformer",
        {"vae": None, "tokenizer": None, "tokenizer_2": None, "text_encoder_2": None},
    ),
    "SD3": (
        diffusers.StableDiffusion3Pipeline,
        "transformer",
        {
            "vae": None,
            "tokenizer": None,
            "tokenizer_2": None,
            "text_encoder_2": None,
            "tokenizer_3": None,
            "text_encoder_3": None,
        },
    ),
}


def pipeline(title: str) -> Any:
    """Return a pipeline of an image model and a text encoder."""
    cls, part, absent = PARTS[title]
    if part == "unet":
        scheduler = diffusers.DDIMScheduler()
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = {part: image_model(title), "text_encoder": text_encoder(), "scheduler": scheduler}
    return cls(**parts, **absent)


def pipeline_trial(folder: Path, title: str, trained: tuple[str, ...], **changes: Any) -> Trial:
    """Train some parts of a pipeline, and save the adapters by `save_lora_weights`."""
    pipe = pipeline(title)
    part = PARTS[title][1]
    pipe.save_pretrained(folder / "base")
    tuned, layers = {}, {}
    for name in trained:
        targets = ["q_proj", "v_proj"] if name == "text_encoder" else ATTENTION
        tuned[name] = adapt(getattr(pipe, name), target_modules=targets, **changes)
        layers[f"{name}_lora_layers"] = {
            key.removeprefix("base_model.model."): tensor
            for key, tensor in get_peft_model_state_dict(tuned[name]).items()
        }
        layers[f"{name}_lora_adapter_metadata"] = tuned[name].peft_config["default"].to_dict()
    pipe.save_lora_weights(folder / "adapter", **layers)
    wanted = text_outputs(pipe.text_encoder), image_outputs(getattr(pipe, part), title)
    for model in tuned.values():
        model.merge_and_unload()
    pipe.save_pretrained(folder / "right")
    load = type(getattr(pipe, part)).from_pretrained

    def outputs(out: Path) -> torch.Tensor:
        encoder = transformers.CLIPTextModel.from_pretrained(out / "text_encoder")
        results = text_outputs(encoder.eval()), image_outputs(load(out / part).eval(), title)
        return torch.cat([result.flatten() for result in results])

    right = read_tensors(folder / "right")
    joined = torch.cat([result.flatten() for result in wanted])
    return Trial(folder / "base", folder / "adapter", right, outputs, joined)


for title, (_, part, _) in PARTS.items():
    for trained in (part,), (part, "text_encoder"):
        make = functools.partial(pipeline_trial, title=title, trained=trained)
        register(WRITER, f"pipeline of {title}: {' and '.join(trained)}", make)

LORA = {"use_dora": False}
for title, targets in LAYERS.items():
    for what, given in {
        "attention, a folder": {"targets": ATTENTION},
        "all kinds of layer, a file": {"targets": targets, "place": FILE},
        "lora_bias, a folder": {"targets": targets, "lora_bias": True},
    }.items():
        if "lora_bias" in given and title not in ("Flux", "SD3", "Wan"):
            continue  # PEFT cannot merge it into layers without a bias
        trial = functools.partial(trial_of, title=title, **given, **LORA)
        register(f"{WRITER}, LoRA", f"{title}, {what}", trial, bound=CLOSE)
    trial = functools.partial(by_peft, title=title, targets=targets, **LORA)
    register(f"{WRITER}, LoRA", f"{title}, saved by PEFT", trial, bound=CLOSE)
for name, changes in {
    "use_rslora": {"use_rslora": True},
    "rank_pattern and alpha_pattern": {
        "rank_pattern": {"to_k": 2},
        "alpha_pattern": {"attn1.to_q": 3},
    },
}.items():
    trial = functools.partial(trial_of, title="UNet", targets=ATTENTION, **changes, **LORA)
    register(f"{WRITER}, LoRA", f"UNet, {name}", trial, bound=CLOSE)
for title, (_, part, _) in PARTS.items():
    trial = functools.partial(pipeline_trial, title=title, trained=(part, "text_encoder"), **LORA)
    register(f"{WRITER}, LoRA", f"pipeline of {title}: {part} and text_encoder", trial, bound=CLOSE)
