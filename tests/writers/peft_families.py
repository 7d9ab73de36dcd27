"""PEFT on models whose published names, or fused tensors, are unlike their modules in memory.

A slice of a fused tensor has rows of its own, so it can be merged. It cannot where the published
tensor has the rows in another order.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from writers.matrix import Trial, read_tensors, register
from writers.peft_common import TEXT, adapt, model, peft_trial, text_inputs
from writers.peft_towers import IMAGE, image, sound
from writers.peft_vision import EYE, LLAMA, QV

EAR = {
    "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "d_model": 32,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_mel_bins": 8, "max_source_positions": 20,
}  # fmt: skip
HEAD = {**TEXT, "head_dim": 8}


def frames(model: Any) -> dict[str, Any]:
    return {"pixel_values": torch.stack([IMAGE, -IMAGE], 1)}


def spectrogram(model: Any) -> dict[str, Any]:
    return {"input_values": sound(model)["input_values"][:, :512].reshape(1, 32, 16)}


def masked(model: Any) -> dict[str, Any]:
    return {**image(model), "noise": torch.linspace(0, 1, 16)[None]}


FUSED: dict[str, tuple[str, dict[str, Any], Any, list[str]]] = {
    "NomicBERT": ("NomicBertModel", TEXT, text_inputs, ["q_proj", "k_proj", "down_proj"]),
    "Jina embeddings v3": ("JinaEmbeddingsV3Model", TEXT, text_inputs, [*QV, "fc1"]),
    "GTE": ("GteModel", TEXT, text_inputs, [*QV, "down_proj", "gate_proj"]),
    "HRM": ("HrmTextModel", HEAD, text_inputs, ["q_proj", "gate_proj", "o_proj"]),
    "Molmo 2": ("Molmo2TextModel", HEAD, text_inputs, [*QV, "gate_proj"]),
    "TIPS v2, images": ("Tipsv2VisionModel", EYE, image, [*QV, "fc1"]),
    "TIPS v2, text": ("Tipsv2TextModel", TEXT, text_inputs, [*QV, "fc1"]),
    "Sapiens 2": ("Sapiens2Model", EYE, image, ["q_proj", "gate_proj"]),
}
RENAMED: dict[str, tuple[str, dict[str, Any], Any, list[str]]] = {
    "Nemotron-H": ("NemotronHForCausalLM", TEXT, text_inputs, ["in_proj"]),
    "Mllama": (
        "MllamaForConditionalGeneration",
        {"text_config": TEXT, "vision_config": EYE},
        text_inputs,
        QV,
    ),
    "GOT-OCR 2": (
        "GotOcr2ForConditionalGeneration",
        {"text_config": {**TEXT, "model_type": "qwen2"}, "vision_config": EYE},
        text_inputs,
        QV,
    ),
    "Fuyu": (
        "FuyuForCausalLM",
        {**TEXT, "text_config": {**TEXT, "model_type": "persimmon"}, "patch_size": 4},
        text_inputs,
        ["query_key_value", "lm_head"],
    ),
    "Qwen2-Audio": (
        "Qwen2AudioForConditionalGeneration",
        {"text_config": {**TEXT, "model_type": "qwen2"}, "audio_config": EAR},
        text_inputs,
        [*QV, "lm_head"],
    ),
    "Voxtral": (
        "VoxtralForConditionalGeneration",
        {"text_config": LLAMA, "audio_config": EAR},
        text_inputs,
        [*QV, "fc1"],
    ),
    "AST": (
        "ASTForAudioClassification",
        {**EYE, "max_length": 32, "num_mel_bins": 16},
        spectrogram,
        [*QV, "fc1"],
    ),
    "ViT-MAE": ("ViTMAEModel", EYE, masked, [*QV, "fc1"]),
    "Pixio": ("PixioModel", EYE, image, [*QV, "fc2"]),
    "ViViT": ("VivitModel", {**EYE, "num_frames": 2, "tubelet_size": [1, 4, 4]}, frames, QV),
    "DINOv3": ("DINOv3ViTModel", EYE, image, ["q_proj", "up_proj"]),
}

for what, models in {"fused": FUSED, "renamed": RENAMED}.items():
    for title, (name, sizes, inputs, targets) in models.items():
        make = functools.partial(model, name, **sizes)
        trial = functools.partial(peft_trial, make=make, inputs=inputs, target_modules=targets)
        register("PEFT, other names on disk", f"{title}, {what}", trial)


def without_outputs(folder: Path) -> Trial:
    """Adapt a model whose tiny sizes do not run."""
    base = model("MistralLarge4TextModel", **TEXT)
    base.save_pretrained(folder / "base")
    tuned = adapt(base, target_modules=["q_proj", "o_proj"])
    tuned.save_pretrained(folder / "adapter")
    tuned.merge_and_unload().save_pretrained(folder / "right")
    return Trial(folder / "base", folder / "adapter", read_tensors(folder / "right"))


register("PEFT, other names on disk", "Mistral Large 4, text", without_outputs)
