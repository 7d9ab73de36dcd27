"""PEFT on the vision, audio and vision-language models of transformers.

An adapter has the names of the modules in memory. The base has those that transformers publishes.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import transformers

from writers.matrix import Trial, read_tensors, register
from writers.peft_common import IDS, TEXT, adapt, finish, model, outputs, peft_trial, reload

QV = ["q_proj", "v_proj"]
EYE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
LLAMA = {**TEXT, "head_dim": 8, "model_type": "llama"}
QWEN = {
    **TEXT,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
}
QWEN_EYE = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
QWEN_EYE_2 = {**QWEN_EYE, "intermediate_size": 48, "out_hidden_size": 32}
TOKEN = {"image_token_id": 60, "image_token_index": 60}
SIGLIP = {"model_type": "siglip_vision_model", "projection_dim": 32, **EYE}
VISION_LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "LLaVA": (
        "LlavaForConditionalGeneration",
        {
            "text_config": LLAMA,
            "vision_config": {"model_type": "clip_vision_model", **EYE},
            **TOKEN,
        },
    ),
    "LLaVA-NeXT": (
        "LlavaNextForConditionalGeneration",
        {
            "text_config": LLAMA,
            "vision_config": {"model_type": "clip_vision_model", **EYE},
            **TOKEN,
        },
    ),
    "Qwen2-VL": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": QWEN,
            "vision_config": {**QWEN_EYE, "embed_dim": 32, "mlp_ratio": 2},
            **TOKEN,
        },
    ),
    "Qwen2.5-VL": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": QWEN,
            "vision_config": {**QWEN_EYE_2, "fullatt_block_indexes": [1]},
            **TOKEN,
        },
    ),
    "Qwen3-VL": (
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {**QWEN, "head_dim": 8},
            "vision_config": {**QWEN_EYE_2, "deepstack_visual_indexes": [1]},
            **TOKEN,
        },
    ),
    "PaliGemma": (
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {**TEXT, "head_dim": 8, "model_type": "gemma"},
            "vision_config": SIGLIP,
            "projection_dim": 32,
            **TOKEN,
        },
    ),
    "Gemma 3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "head_dim": 8, "sliding_window": 16},
            "vision_config": EYE,
            "mm_tokens_per_image": 4,
            **TOKEN,
        },
    ),
    "Mistral 3": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "head_dim": 8, "model_type": "mistral"},
            "vision_config": {"model_type": "pixtral", "head_dim": 8, **EYE},
            **TOKEN,
        },
    ),
    "InternVL": (
        "InternVLForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {
                "model_type": "internvl_vision",
                **EYE,
                "image_size": [16, 16],
                "patch_size": [4, 4],
            },
            **TOKEN,
        },
    ),
    "Idefics 3": (
        "Idefics3ForConditionalGeneration",
        {"text_config": LLAMA, "vision_config": EYE, "scale_factor": 2, **TOKEN},
    ),
    "SmolVLM": (
        "SmolVLMForConditionalGeneration",
        {"text_config": LLAMA, "vision_config": EYE, "scale_factor": 2, **TOKEN},
    ),
    "Aya Vision": (
        "AyaVisionForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "cohere2"},
            "vision_config": SIGLIP,
            "downsample_factor": 1,
            **TOKEN,
        },
    ),
}


def text_of(model: Any) -> dict[str, Any]:
    """Return a prompt without images."""
    return {"input_ids": IDS}


for title, (name, sizes) in VISION_LANGUAGE.items():
    make = functools.partial(model, name, **sizes)
    for what, targets in {
        "q_proj and v_proj": QV,
        "all-linear": "all-linear",
        "text only": r".*(language|text)_model.*\.(q_proj|o_proj|down_proj)",
    }.items():
        trial = functools.partial(peft_trial, make=make, inputs=text_of, target_modules=targets)
        register("PEFT, vision-language models", f"{title}, {what}", trial)


def text_adapter(folder: Path, name: str, sizes: dict[str, Any]) -> Trial:
    """Train an adapter on the text model alone, and merge it into the vision-language model."""
    whole = model(name, **sizes)
    whole.save_pretrained(folder / "base")
    text = transformers.AutoModelForCausalLM.from_config(whole.config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    tuned = adapt(text, target_modules=QV)
    tuned.save_pretrained(folder / "adapter")
    wanted = outputs(tuned, input_ids=IDS)
    merged = tuned.merge_and_unload()
    whole.model.language_model.load_state_dict(merged.model.state_dict())
    whole.save_pretrained(folder / "right")
    right = read_tensors(folder / "right")
    return Trial(
        folder / "base",
        folder / "adapter",
        right,
        lambda out: outputs(reload(out, name), input_ids=IDS),
        wanted,
    )


def adapter_of_the_whole(folder: Path, name: str, sizes: dict[str, Any]) -> Trial:
    """Train an adapter on the text part of a vision-language model, and merge it into the text."""
    whole = model(name, **sizes)
    text = transformers.AutoModelForCausalLM.from_config(whole.config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    text.save_pretrained(folder / "base")
    trial = finish(folder, adapt(whole, target_modules=r".*language_model.*\.(q|v)_proj"), text_of)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.save_pretrained(folder / "right-text")
    return trial._replace(
        right=read_tensors(folder / "right-text"), outputs=lambda out: outputs(reload(out))
    )


for title in "LLaVA", "LLaVA-NeXT", "Mistral 3", "InternVL":
    arguments = VISION_LANGUAGE[title]
    for what, make in {
        "adapter of the text model alone": text_adapter,
        "text model alone as base": adapter_of_the_whole,
    }.items():
        trial = functools.partial(make, name=arguments[0], sizes=arguments[1])
        register("PEFT, vision-language models", f"{title}, {what}", trial)
