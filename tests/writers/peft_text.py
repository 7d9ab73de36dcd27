"""PEFT on the text models of transformers: all linear layers, and those of attention."""

from __future__ import annotations

import functools

from writers.matrix import register
from writers.peft_common import peft_trial, text_model

WRITER = "PEFT, text models"
QKV = ["q_proj", "k_proj", "v_proj"]
MODELS = {
    "Llama": ("LlamaForCausalLM", QKV, {"head_dim": 8}),
    "Mistral": ("MistralForCausalLM", QKV, {"head_dim": 8}),
    "Mixtral": ("MixtralForCausalLM", QKV, {"num_local_experts": 2, "head_dim": 8}),
    "Qwen2": ("Qwen2ForCausalLM", QKV, {}),
    "Qwen3": ("Qwen3ForCausalLM", QKV, {"head_dim": 8}),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", QKV, {"num_experts": 2, "num_experts_per_tok": 1}),
    "Gemma 2": ("Gemma2ForCausalLM", QKV, {"head_dim": 8}),
    "Gemma 3": ("Gemma3ForCausalLM", QKV, {"head_dim": 8, "sliding_window": 16}),
    "Phi": ("PhiForCausalLM", [*QKV, "dense"], {}),
    "Phi-3": ("Phi3ForCausalLM", ["qkv_proj", "o_proj"], {}),
    "OLMo 2": ("Olmo2ForCausalLM", QKV, {}),
    "Cohere": ("CohereForCausalLM", QKV, {}),
    "Granite": ("GraniteForCausalLM", QKV, {}),
    "StableLM": ("StableLmForCausalLM", QKV, {}),
    "StarCoder 2": ("Starcoder2ForCausalLM", QKV, {}),
    "SmolLM 3": ("SmolLM3ForCausalLM", QKV, {}),
    "GLM-4": ("Glm4ForCausalLM", QKV, {"head_dim": 8}),
    "GPT-2": ("GPT2LMHeadModel", ["c_attn"], {}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", ["query_key_value"], {}),
    "GPT-J": ("GPTJForCausalLM", QKV, {"rotary_dim": 4}),
    "OPT": ("OPTForCausalLM", QKV, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Falcon": ("FalconForCausalLM", ["query_key_value"], {}),
    "BLOOM": ("BloomForCausalLM", ["query_key_value"], {}),
    "MPT": ("MptForCausalLM", ["Wqkv"], {}),
    "T5": (
        "T5ForConditionalGeneration",
        ["q", "v"],
        {"d_kv": 8, "d_ff": 48, "decoder_start_token_id": 0},
    ),
    "BART": (
        "BartForConditionalGeneration",
        ["q_proj", "v_proj"],
        {
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
        },
    ),
    "BERT": ("BertForMaskedLM", ["query", "value"], {}),
    "RoBERTa": ("RobertaForMaskedLM", ["query", "value"], {}),
    "DistilBERT": ("DistilBertForMaskedLM", ["q_lin", "v_lin"], {"hidden_dim": 48}),
    "DeBERTa-v2": ("DebertaV2ForMaskedLM", ["query_proj", "value_proj"], {}),
    "ModernBERT": ("ModernBertForMaskedLM", ["Wqkv", "Wo"], {"cls_token_id": 1, "sep_token_id": 2}),
    "ELECTRA": ("ElectraForMaskedLM", ["query", "value"], {"embedding_size": 32}),
    "ALBERT": ("AlbertForMaskedLM", ["query", "value"], {"embedding_size": 32}),
    "MPNet": ("MPNetForMaskedLM", ["q", "v"], {}),
    "Mamba": ("MambaForCausalLM", ["x_proj"], {"state_size": 4}),
}

SOME_LINEAR = {
    "Mixtral": [*QKV, "o_proj", "lm_head"],  # its experts are stacks, which PEFT refuses
    "Mamba": ["in_proj", "x_proj"],  # PEFT refuses out_proj
}

for title, (name, attention, sizes) in MODELS.items():
    make = functools.partial(text_model, name, **sizes)
    for what, targets in {
        "attention": attention,
        "all-linear": SOME_LINEAR.get(title, "all-linear"),
    }.items():
        trial = functools.partial(peft_trial, make=make, target_modules=targets)
        register(WRITER, f"{title}, {what}", trial)
