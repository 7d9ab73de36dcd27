"""Small image models of diffusers with random weights, and the inputs that they take."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch
import transformers

from writers.peft_common import IDS, TEXT, randomise

diffusers.utils.logging.set_verbosity_error()

HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
    "block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 16,
    "attention_head_dim": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SDXL = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
    "block_out_channels": (8, 16, 16), "norm_num_groups": 4, "cross_attention_dim": 16,
    "attention_head_dim": (2, 4, 4), "transformer_layers_per_block": (1, 1, 1),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64, "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
    "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": [2, 2, 4], **HEADS,
}  # fmt: skip
SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16,
    "pos_embed_max_size": 8, **HEADS,
}  # fmt: skip
PIXART = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 1,
    "cross_attention_dim": 16, "caption_channels": 16, "norm_num_groups": 8, **HEADS,
}  # fmt: skip
WAN = {
    "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16,
    "ffn_dim": 32, "num_layers": 1, "cross_attn_norm": True, **HEADS,
}  # fmt: skip
VAE = {
    "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


def drawn(*shape: int) -> torch.Tensor:
    """Return the same numbers at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def unet_inputs() -> dict[str, Any]:
    return {
        "sample": drawn(1, 4, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": drawn(1, 5, 16),
    }


def sdxl_inputs() -> dict[str, Any]:
    conditions = {"text_embeds": drawn(1, 16), "time_ids": drawn(1, 6)}
    return {**unet_inputs(), "added_cond_kwargs": conditions}


def transformer_inputs(*shape: int) -> dict[str, Any]:
    return {
        "hidden_states": drawn(*shape),
        "encoder_hidden_states": drawn(1, 5, 16),
        "timestep": torch.tensor([0.5]),
    }


def flux_inputs() -> dict[str, Any]:
    places = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    return {**transformer_inputs(1, 16, 4), "pooled_projections": drawn(1, 16), **places}


def sd3_inputs() -> dict[str, Any]:
    return {**transformer_inputs(1, 4, 8, 8), "pooled_projections": drawn(1, 16)}


def pixart_inputs() -> dict[str, Any]:
    conditions = {"resolution": None, "aspect_ratio": None}
    return {**transformer_inputs(1, 4, 8, 8), "added_cond_kwargs": conditions}


INPUTS = {
    "UNet": unet_inputs,
    "SDXL's UNet": sdxl_inputs,
    "Flux": flux_inputs,
    "SD3": sd3_inputs,
    "PixArt": pixart_inputs,
    "Wan": functools.partial(transformer_inputs, 1, 4, 2, 8, 8),
    "VAE": lambda: {"sample": drawn(1, 3, 16, 16)},
}
CLASSES = {
    "UNet": ("UNet2DConditionModel", UNET),
    "SDXL's UNet": ("UNet2DConditionModel", SDXL),
    "Flux": ("FluxTransformer2DModel", FLUX),
    "SD3": ("SD3Transformer2DModel", SD3),
    "PixArt": ("PixArtTransformer2DModel", PIXART),
    "Wan": ("WanTransformer3DModel", WAN),
    "VAE": ("AutoencoderKL", VAE),
}


def image_model(title: str) -> Any:
    name, sizes = CLASSES[title]
    return randomise(getattr(diffusers, name)(**sizes))


@torch.no_grad()
def image_outputs(model: Any, title: str) -> torch.Tensor:
    return model(**INPUTS[title](), return_dict=False)[0].clone()


def text_encoder(size: int = 16) -> Any:
    """Return a text encoder of CLIP; the UNet takes hidden states of 16 numbers."""
    sizes = {**TEXT, "hidden_size": size, "projection_dim": 16}
    return randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes)))


def t5_encoder() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=64, **sizes)
    return randomise(transformers.T5EncoderModel(config))


@torch.no_grad()
def text_outputs(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).last_hidden_state.clone()
