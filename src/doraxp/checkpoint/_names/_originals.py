"""The original names of image models, in the names of diffusers.

Names are flat: an underscore stands for each dot, as kohya's files have them, and N for a number. A
module of several names is their rows, one below the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_FLUX: Mapping[str, tuple[str, ...]] = {
    "double_blocks_N_img_attn_proj": ("transformer_blocks_N_attn_to_out_0",),
    "double_blocks_N_img_attn_qkv": (
        "transformer_blocks_N_attn_to_q",
        "transformer_blocks_N_attn_to_k",
        "transformer_blocks_N_attn_to_v",
    ),
    "double_blocks_N_img_mlp_0": ("transformer_blocks_N_ff_net_0_proj",),
    "double_blocks_N_img_mlp_2": ("transformer_blocks_N_ff_net_2",),
    "double_blocks_N_img_mod_lin": ("transformer_blocks_N_norm1_linear",),
    "double_blocks_N_txt_attn_proj": ("transformer_blocks_N_attn_to_add_out",),
    "double_blocks_N_txt_attn_qkv": (
        "transformer_blocks_N_attn_add_q_proj",
        "transformer_blocks_N_attn_add_k_proj",
        "transformer_blocks_N_attn_add_v_proj",
    ),
    "double_blocks_N_txt_mlp_0": ("transformer_blocks_N_ff_context_net_0_proj",),
    "double_blocks_N_txt_mlp_2": ("transformer_blocks_N_ff_context_net_2",),
    "double_blocks_N_txt_mod_lin": ("transformer_blocks_N_norm1_context_linear",),
    "single_blocks_N_linear1": (
        "single_transformer_blocks_N_attn_to_q",
        "single_transformer_blocks_N_attn_to_k",
        "single_transformer_blocks_N_attn_to_v",
        "single_transformer_blocks_N_proj_mlp",
    ),
    "single_blocks_N_linear2": ("single_transformer_blocks_N_proj_out",),
    "single_blocks_N_modulation_lin": ("single_transformer_blocks_N_norm_linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in_in_layer": ("time_text_embed_timestep_embedder_linear_1",),
    "time_in_out_layer": ("time_text_embed_timestep_embedder_linear_2",),
    "vector_in_in_layer": ("time_text_embed_text_embedder_linear_1",),
    "vector_in_out_layer": ("time_text_embed_text_embedder_linear_2",),
    "guidance_in_in_layer": ("time_text_embed_guidance_embedder_linear_1",),
    "guidance_in_out_layer": ("time_text_embed_guidance_embedder_linear_2",),
    "final_layer_linear": ("proj_out",),
    "final_layer_adaLN_modulation_1": ("norm_out_linear",),
}
_SD3: Mapping[str, tuple[str, ...]] = {
    "joint_blocks_N_x_block_attn_qkv": (
        "transformer_blocks_N_attn_to_q",
        "transformer_blocks_N_attn_to_k",
        "transformer_blocks_N_attn_to_v",
    ),
    "joint_blocks_N_context_block_attn_qkv": (
        "transformer_blocks_N_attn_add_q_proj",
        "transformer_blocks_N_attn_add_k_proj",
        "transformer_blocks_N_attn_add_v_proj",
    ),
    "joint_blocks_N_x_block_attn_proj": ("transformer_blocks_N_attn_to_out_0",),
    "joint_blocks_N_context_block_attn_proj": ("transformer_blocks_N_attn_to_add_out",),
    "joint_blocks_N_x_block_adaLN_modulation_1": ("transformer_blocks_N_norm1_linear",),
    "joint_blocks_N_context_block_adaLN_modulation_1": (
        "transformer_blocks_N_norm1_context_linear",
    ),
    "joint_blocks_N_x_block_mlp_fc1": ("transformer_blocks_N_ff_net_0_proj",),
    "joint_blocks_N_x_block_mlp_fc2": ("transformer_blocks_N_ff_net_2",),
    "joint_blocks_N_context_block_mlp_fc1": ("transformer_blocks_N_ff_context_net_0_proj",),
    "joint_blocks_N_context_block_mlp_fc2": ("transformer_blocks_N_ff_context_net_2",),
    "x_embedder_proj": ("pos_embed_proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder_mlp_0": ("time_text_embed_timestep_embedder_linear_1",),
    "t_embedder_mlp_2": ("time_text_embed_timestep_embedder_linear_2",),
    "y_embedder_mlp_0": ("time_text_embed_text_embedder_linear_1",),
    "y_embedder_mlp_2": ("time_text_embed_text_embedder_linear_2",),
    "final_layer_linear": ("proj_out",),
    "final_layer_adaLN_modulation_1": ("norm_out_linear",),
}
_TRANSFORMERS = {**_FLUX, **_SD3}
_NUMBER = re.compile(r"(?<=blocks_)\d+")
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_UNET = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}
_BLOCK = re.compile(r"(input|output)_blocks_(\d+)_(\d)_(.+)|(middle)_block_(\d)_(.+)")
_PER_LEVEL = 3
"""Blocks of one resolution: in Stable Diffusion 1, 2 and XL alike."""
SWAPPED = ("final_layer_adaLN_modulation_1", "context_block_adaLN_modulation_1")
"""The modules whose halves of rows diffusers swaps: shift and scale, of a last layer."""


def in_diffusers(name: str) -> tuple[str, ...]:
    """Return the names in diffusers of a module with an original name; empty for another name."""
    if name in _UNET:
        return (_UNET[name],)
    block = _BLOCK.fullmatch(name)
    if block is not None:
        renamed = _block(block)
        return () if renamed is None else (renamed,)
    number = _NUMBER.search(name)
    found = _TRANSFORMERS.get(_NUMBER.sub("N", name, count=1), ())
    return tuple(re.sub(r"(?<=blocks_)N", number[0], own) for own in found) if number else found


def _block(block: re.Match[str]) -> str | None:
    """Return the name of a module in a block of a U-Net.

    ::

        input_blocks.(3 i + j + 1).0    down_blocks.i.resnets.j        .1   its attention
        input_blocks.(3 i + 3).0        down_blocks.i.downsamplers.0
        output_blocks.(3 i + j).0       up_blocks.i.resnets.j          .1   its attention
        output_blocks.(3 i + 2).1 or 2  up_blocks.i.upsamplers.0
    """
    way, place, layer, rest, middle, middle_layer, middle_rest = block.groups()
    if middle:
        if middle_layer == "1":
            return f"mid_block_attentions_0_{middle_rest}"
        resnet = _RESNET.get(middle_rest)
        return resnet and f"mid_block_resnets_{int(middle_layer) // 2}_{resnet}"
    level, inner = divmod(int(place) - (way == "input"), _PER_LEVEL)
    side = "down" if way == "input" else "up"
    if way == "input" and inner == _PER_LEVEL - 1:
        return f"down_blocks_{level}_downsamplers_0_conv" if rest == "op" else None
    if layer == "0":
        resnet = _RESNET.get(rest)
        return resnet and f"{side}_blocks_{level}_resnets_{inner}_{resnet}"
    if rest == "conv":
        return f"up_blocks_{level}_upsamplers_0_conv"
    return f"{side}_blocks_{level}_attentions_{inner}_{rest}"
