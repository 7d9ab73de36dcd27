"""PEFT on models of images and of sound; transformers 5 renames their modules when it loads."""

from __future__ import annotations

import functools
from typing import Any

import torch

from writers.matrix import register
from writers.peft_common import IDS, TEXT, model, peft_trial
from writers.peft_vision import EYE, QV

IMAGE = torch.linspace(-1, 1, 3 * 16 * 16).sin().reshape(1, 3, 16, 16)
SOUND = torch.linspace(-40, 40, 1200).sin()[None]
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
SEGFORMER = {
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "num_attention_heads": [1, 2],
    "num_encoder_blocks": 2,
    "sr_ratios": [2, 1],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
WAV = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 20,
    "mask_time_prob": 0.0,
    "pad_token_id": 0,
}
WIDE = {"projection_dim": 32}
CLIP = {"text_config": {**TEXT, **WIDE}, "vision_config": {**EYE, **WIDE}, **WIDE}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}


def image(model: Any) -> dict[str, Any]:
    return {"pixel_values": IMAGE}


def mel(model: Any) -> dict[str, Any]:
    return {"input_features": SOUND[:, :320].reshape(1, 8, 40), "decoder_input_ids": IDS[:, :5]}


def sound(model: Any) -> dict[str, Any]:
    return {"input_values": SOUND}


def both(model: Any) -> dict[str, Any]:
    return {"input_ids": IDS, "pixel_values": IMAGE}


def text(model: Any) -> dict[str, Any]:
    return {"input_ids": IDS}


MODELS: dict[str, tuple[str, Any, dict[str, Any], Any]] = {
    "ViT": ("ViTForImageClassification", image, EYE, QV),
    "ViT without a head": ("ViTModel", image, EYE, QV),
    "DeiT": ("DeiTForImageClassification", image, EYE, QV),
    "BEiT": ("BeitForImageClassification", image, EYE, QV),
    "DINOv2": ("Dinov2ForImageClassification", image, EYE, QV),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", image, EYE, QV),
    "ViT-MSN": ("ViTMSNModel", image, EYE, QV),
    "I-JEPA": ("IJepaModel", image, EYE, QV),
    "Swin": ("SwinForImageClassification", image, SWIN, QV),
    "Swin V2": ("Swinv2ForImageClassification", image, SWIN, ["query", "value"]),
    "SegFormer": ("SegformerForSemanticSegmentation", image, SEGFORMER, QV),
    "ConvNeXT": ("ConvNextForImageClassification", image, CONVNEXT, ["pwconv1", "pwconv2"]),
    "CLIP": ("CLIPModel", both, CLIP, QV),
    "CLIP's text model": ("CLIPTextModelWithProjection", text, {**TEXT, **WIDE}, QV),
    "CLIP's vision model": ("CLIPVisionModelWithProjection", image, {**EYE, **WIDE}, QV),
    "SigLIP": ("SiglipModel", both, {"text_config": TEXT, "vision_config": EYE}, QV),
    "Whisper": ("WhisperForConditionalGeneration", mel, WHISPER, QV),
    "Wav2Vec2": ("Wav2Vec2ForCTC", sound, WAV, QV),
    "HuBERT": ("HubertForCTC", sound, WAV, QV),
}  # fmt: skip

ALL_LINEAR = {
    # PEFT leaves the projections of nn.MultiheadAttention out of its forward pass.
    "SigLIP": r".*encoder.*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)|.*head\.mlp\.fc1",
    # PEFT does not find the linear layers of these two.
    "Wav2Vec2": ["q_proj", "out_proj", "intermediate_dense", "projection"],
    "HuBERT": ["q_proj", "out_proj", "intermediate_dense", "projection"],
}

for title, (name, inputs, sizes, targets) in MODELS.items():
    make = functools.partial(model, name, **sizes)
    for what, chosen in {
        "attention": targets,
        "all-linear": ALL_LINEAR.get(title, "all-linear"),
    }.items():
        trial = functools.partial(peft_trial, make=make, inputs=inputs, target_modules=chosen)
        register("PEFT, vision and sound", f"{title}, {what}", trial)
