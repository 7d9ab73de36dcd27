"""PEFT on tied embeddings of more models, and with new tokens. Only outputs are compared.

PEFT merges the adapter of the embeddings or of the head into both, so that its own merge is not the
model that was trained.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from writers.matrix import Trial, register
from writers.peft_common import TEXT, adapt, model, outputs, reload, text_inputs, text_model

SIZES = {"vocab_size": 64, "max_position_embeddings": 64}
SMALL = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
BART = {**SMALL, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
EYE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "image_size": 16}
VISION = {**EYE, "num_attention_heads": 4, "patch_size": 4}
NESTED = {**TEXT, "head_dim": 8, "sliding_window": 16, "tie_word_embeddings": True}
GEMMA = {"text_config": NESTED, "vision_config": VISION, "mm_tokens_per_image": 4}
MODELS: dict[str, tuple[str, dict[str, Any], str, str, list[str]]] = {
    "GPT-2": ("GPT2LMHeadModel", TEXT, "wte", "lm_head", ["c_attn"]),
    "OPT": ("OPTForCausalLM", {**TEXT, "word_embed_proj_dim": 32}, "embed_tokens", "lm_head",
            ["q_proj"]),
    "BLOOM": ("BloomForCausalLM", TEXT, "word_embeddings", "lm_head", ["query_key_value"]),
    "Falcon": ("FalconForCausalLM", TEXT, "word_embeddings", "lm_head", ["query_key_value"]),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {**TEXT, "tie_word_embeddings": True}, "embed_in",
                 "embed_out", ["query_key_value"]),
    "T5": ("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}, "shared", "lm_head",
           ["q"]),
    "BART": ("BartForConditionalGeneration", {**BART, **SIZES}, "shared", "lm_head", ["q_proj"]),
    "BERT": ("BertForMaskedLM", TEXT, "word_embeddings", "decoder", ["query"]),
    "BERT, two heads": ("BertForPreTraining", TEXT, "word_embeddings", "decoder", ["query"]),
    "RoBERTa": ("RobertaForMaskedLM", TEXT, "word_embeddings", "decoder", ["query"]),
    "ALBERT": ("AlbertForMaskedLM", {**TEXT, "embedding_size": 16}, "word_embeddings", "decoder",
               ["query"]),
    "DeBERTa-v2": ("DebertaV2ForMaskedLM", TEXT, "word_embeddings", "decoder", ["query_proj"]),
    "ELECTRA": ("ElectraForMaskedLM", {**TEXT, "embedding_size": 16}, "word_embeddings",
                "generator_lm_head", ["query"]),
    "BioGPT": ("BioGptForCausalLM", TEXT, "embed_tokens", "output_projection", ["q_proj"]),
    "ModernBERT, decoder": ("ModernBertDecoderForCausalLM", {**TEXT, "tie_word_embeddings": True},
                            "tok_embeddings", "decoder.decoder", ["q_proj"]),
    "Marian": ("MarianMTModel", {**BART, **SIZES, "pad_token_id": 0, "decoder_start_token_id": 0},
               "shared", "lm_head", ["q_proj"]),
    "mT5": ("MT5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0,
            "tie_word_embeddings": True}, "shared", "lm_head", ["q"]),
    "Gemma 3, images": ("Gemma3ForConditionalGeneration", GEMMA, "embed_tokens", "lm_head",
                        ["q_proj"]),
}  # fmt: skip


def trial_of(folder: Path, tuned: Any) -> Trial:
    """Save the adapter; the right outputs are those of the adapted model."""
    inner = tuned.base_model.model
    wanted = outputs(tuned, **text_inputs(inner))
    tuned.save_pretrained(folder / "adapter")
    load = functools.partial(reload, name=type(inner).__name__)
    return Trial(folder / "base", folder / "adapter", {}, lambda out: outputs(load(out)), wanted)


def tied(folder: Path, name: str, sizes: dict[str, Any], **changes: Any) -> Trial:
    """Adapt the embeddings or the head of a model that ties them."""
    model(name, **sizes).save_pretrained(folder / "base")
    return trial_of(folder, adapt(reload(folder / "base", name), **changes))


def old_t5(folder: Path, **changes: Any) -> Trial:
    """Adapt a T5 whose config.json is from before the entries that scale the logits."""
    name, sizes, *_ = MODELS["T5"]
    model(name, **sizes).save_pretrained(folder / "base")
    path = folder / "base" / "config.json"
    config = json.loads(path.read_text())
    for entry in ("scale_decoder_outputs", "tie_word_embeddings"):
        config.pop(entry, None)
    path.write_text(json.dumps(config))
    return trial_of(folder, adapt(reload(folder / "base", name), **changes))


def grown(folder: Path, **changes: Any) -> Trial:
    """Add 6 tokens to a Llama that ties its embeddings; the base has the old vocabulary."""
    text_model("LlamaForCausalLM", head_dim=8, tie_word_embeddings=True).save_pretrained(
        folder / "base"
    )
    base = reload(folder / "base")
    base.resize_token_embeddings(70)
    return trial_of(folder, adapt(base, **{"target_modules": ["q_proj"], **changes}))


for title, (name, sizes, embedding, head, targets) in MODELS.items():
    for what, changes in {
        "modules_to_save of the embeddings": {"modules_to_save": [embedding]},
        "modules_to_save of both": {"modules_to_save": [embedding, head]},
        "DoRA on the embeddings": {"target_modules": [*targets, embedding]},
        "DoRA on the head": {"target_modules": [*targets, head]},
    }.items():
        make = functools.partial(
            tied, name=name, sizes=sizes, **{"target_modules": targets} | changes
        )
        register("PEFT, tied embeddings", f"{title}: {what}", make)

for what, changes in {
    "modules_to_save of the embeddings": {"target_modules": ["q"], "modules_to_save": ["shared"]},
    "DoRA on the head": {"target_modules": ["q", "lm_head"]},
}.items():
    title = f"T5, an old configuration: {what}"
    register("PEFT, tied embeddings", title, functools.partial(old_t5, **changes))

BOTH = ["embed_tokens", "lm_head"]
for what, changes in {
    "embeddings saved by PEFT itself": {},
    "modules_to_save of the embeddings": {"modules_to_save": BOTH[:1]},
    "modules_to_save of both": {"modules_to_save": BOTH},
    "the same, ensure_weight_tying": {"modules_to_save": BOTH, "ensure_weight_tying": True},
    "DoRA on the embeddings": {"target_modules": BOTH[:1]},
    "DoRA on the head": {"target_modules": BOTH[1:]},
    "trainable_token_indices": {"trainable_token_indices": [1, 64, 66]},
}.items():
    make = functools.partial(grown, **changes)
    register("PEFT, tied embeddings", f"Llama, 6 new tokens: {what}", make)
