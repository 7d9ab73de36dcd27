"""Modules of image models by their original names, and the tensors of diffusers that they are.

A name with several tensors is one matrix, whose rows are theirs in this order. A name in SWAPPED
has its two halves of rows in the other order.
"""

from __future__ import annotations

FLUX = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "final_layer.linear": ["proj_out"],
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.net.0.proj"],
    "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.net.2"],
    "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
    "double_blocks.0.txt_mod.lin": ["transformer_blocks.0.norm1_context.linear"],
    "single_blocks.0.linear1": [
        *[f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "single_transformer_blocks.0.proj_mlp",
    ],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    "single_blocks.0.modulation.lin": ["single_transformer_blocks.0.norm.linear"],
}
FLUX_FINAL = {"final_layer.adaLN_modulation.1": ["norm_out.linear"]}
SD3 = {
    "x_embedder.proj": ["pos_embed.proj"],
    "context_embedder": ["context_embedder"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
    "joint_blocks.0.x_block.attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "joint_blocks.1.x_block.attn.proj": ["transformer_blocks.1.attn.to_out.0"],
    "joint_blocks.0.context_block.attn.qkv": [
        f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"
    ],
    "joint_blocks.0.context_block.attn.proj": ["transformer_blocks.0.attn.to_add_out"],
    "joint_blocks.0.x_block.adaLN_modulation.1": ["transformer_blocks.0.norm1.linear"],
    "joint_blocks.0.context_block.adaLN_modulation.1": [
        "transformer_blocks.0.norm1_context.linear"
    ],
    "joint_blocks.0.x_block.mlp.fc1": ["transformer_blocks.0.ff.net.0.proj"],
    "joint_blocks.0.context_block.mlp.fc2": ["transformer_blocks.0.ff_context.net.2"],
}
SD3_FINAL = {"final_layer.adaLN_modulation.1": ["norm_out.linear"]}
SD3_LAST_CONTEXT = {
    "joint_blocks.1.context_block.adaLN_modulation.1": ["transformer_blocks.1.norm1_context.linear"]
}
SWAPPED = {"final_layer.adaLN_modulation.1", *SD3_LAST_CONTEXT}
"""Their output is shift and scale in the original, and scale and shift in diffusers."""
BLOCK = "transformer_blocks.0"
SDXL = {
    "time_embed.0": ["time_embedding.linear_1"],
    "label_emb.0.2": ["add_embedding.linear_2"],
    "input_blocks.0.0": ["conv_in"],
    "input_blocks.1.0.in_layers.2": ["down_blocks.0.resnets.0.conv1"],
    "input_blocks.2.0.emb_layers.1": ["down_blocks.0.resnets.1.time_emb_proj"],
    "input_blocks.3.0.op": ["down_blocks.0.downsamplers.0.conv"],
    "input_blocks.4.0.skip_connection": ["down_blocks.1.resnets.0.conv_shortcut"],
    "input_blocks.4.1.proj_in": ["down_blocks.1.attentions.0.proj_in"],
    f"input_blocks.5.1.{BLOCK}.attn1.to_q": [f"down_blocks.1.attentions.1.{BLOCK}.attn1.to_q"],
    f"input_blocks.8.1.{BLOCK}.attn2.to_k": [f"down_blocks.2.attentions.1.{BLOCK}.attn2.to_k"],
    "middle_block.0.out_layers.3": ["mid_block.resnets.0.conv2"],
    f"middle_block.1.{BLOCK}.ff.net.2": [f"mid_block.attentions.0.{BLOCK}.ff.net.2"],
    f"output_blocks.2.1.{BLOCK}.attn1.to_out.0": [
        f"up_blocks.0.attentions.2.{BLOCK}.attn1.to_out.0"
    ],
    "output_blocks.2.2.conv": ["up_blocks.0.upsamplers.0.conv"],
    f"output_blocks.3.1.{BLOCK}.ff.net.0.proj": [f"up_blocks.1.attentions.0.{BLOCK}.ff.net.0.proj"],
    "output_blocks.8.0.in_layers.2": ["up_blocks.2.resnets.2.conv1"],
    "out.2": ["conv_out"],
}
