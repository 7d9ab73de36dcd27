"""PEFT on models with tied embeddings, new tokens and new heads: whole tensors in the file."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from writers.matrix import Trial, read_tensors, register
from writers.peft_common import adapt, finish, model, outputs, reload, text_model

LLAMA = "LlamaForCausalLM"
TIED = {
    "modules_to_save=[embed_tokens]": {"modules_to_save": ["embed_tokens"]},
    "modules_to_save=[embed_tokens, lm_head]": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "the same with ensure_weight_tying": {
        "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "DoRA on embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "DoRA on lm_head": {"target_modules": ["q_proj", "lm_head"]},
}
TIED_MODELS = {
    "Llama": functools.partial(text_model, LLAMA, head_dim=8, tie_word_embeddings=True),
    "Qwen3": functools.partial(
        text_model, "Qwen3ForCausalLM", head_dim=8, tie_word_embeddings=True
    ),
    "Gemma 3": functools.partial(text_model, "Gemma3ForCausalLM", head_dim=8, sliding_window=16),
}


def tied(folder: Path, make: Any, **changes: Any) -> Trial:
    """Make a trial whose right tensors are those of the adapted modules, merged one by one.

    PEFT merges an adapter of one of two tied modules into both. So the right embedding and head
    come from the modules themselves. OUT may share one tensor if the two are equal.
    """
    base = make()
    base.save_pretrained(folder / "base")
    tuned = adapt(base, **{"target_modules": ["q_proj"], **changes})
    ends = {
        "lm_head.weight": effective(tuned.base_model.model.get_output_embeddings()),
        "model.embed_tokens.weight": effective(tuned.base_model.model.get_input_embeddings()),
    }
    trial = finish(folder, tuned)
    equal = torch.equal(*ends.values())
    return trial._replace(
        right={**trial.right, **ends}, free=frozenset(["lm_head.weight"] if equal else [])
    )


@torch.no_grad()
def effective(module: Any) -> torch.Tensor:
    """Return the weight of a module of PEFT as its forward pass applies it."""
    if hasattr(module, "modules_to_save"):
        return module.modules_to_save["default"].weight.clone()
    if not hasattr(module, "base_layer"):
        return module.weight.clone()
    layer = module.base_layer
    if isinstance(layer, torch.nn.Embedding):
        return module(torch.arange(layer.num_embeddings)) / getattr(layer, "embed_scale", 1.0)
    return module(torch.eye(layer.in_features)).mT.contiguous()


for title, make in TIED_MODELS.items():
    for name, changes in TIED.items():
        trial = functools.partial(tied, make=make, **changes)
        register("PEFT, tied embeddings", f"{title}: {name}", trial)


def new_tokens(folder: Path, *, resized_base: bool, save: Any = "auto", **changes: Any) -> Trial:
    """Add 6 tokens; the base is the model before or after the embeddings were resized."""
    base = text_model(LLAMA, head_dim=8)
    base.save_pretrained(folder / "base")
    base = reload(folder / "base")
    torch.manual_seed(2)
    base.resize_token_embeddings(70)
    if resized_base:
        base.save_pretrained(folder / "base")
    tuned = adapt(base, **{"target_modules": ["q_proj"], **changes})
    tuned.peft_config["default"].base_model_name_or_path = str(folder / "base")
    return finish(folder, tuned, save={"save_embedding_layers": save})


BOTH = ["embed_tokens", "lm_head"]
for name, changes in {
    "saved by PEFT itself": {"save": True},
    "modules_to_save": {"modules_to_save": BOTH, "save": False},
    "modules_to_save, PEFT's defaults": {"modules_to_save": BOTH},
    "DoRA on embed_tokens and lm_head": {"target_modules": BOTH, "save": True},
}.items():
    for resized in True, False:
        title = f"{name}, base {'as resized' if resized else 'of the old vocabulary'}"
        trial = functools.partial(new_tokens, resized_base=resized, **changes)
        register("PEFT, new tokens", title, trial)

HEADS: dict[str, tuple[str, str, list[str]]] = {
    "Llama": (LLAMA, "LlamaForSequenceClassification", ["q_proj"]),
    "Llama, tokens": (LLAMA, "LlamaForTokenClassification", ["q_proj"]),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification", ["q_proj"]),
    "GPT-2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification", ["c_attn"]),
    "BERT": ("BertModel", "BertForSequenceClassification", ["query"]),
    "BERT, tokens": ("BertModel", "BertForTokenClassification", ["query"]),
    "BERT of a masked model": ("BertForMaskedLM", "BertForSequenceClassification", ["query"]),
    "RoBERTa": ("RobertaForMaskedLM", "RobertaForSequenceClassification", ["query"]),
    "DistilBERT": ("DistilBertForMaskedLM", "DistilBertForSequenceClassification", ["q_lin"]),
    "DeBERTa-v2": ("DebertaV2Model", "DebertaV2ForSequenceClassification", ["query_proj"]),
    "ModernBERT": ("ModernBertForMaskedLM", "ModernBertForSequenceClassification", ["Wqkv"]),
    "ELECTRA": ("ElectraModel", "ElectraForSequenceClassification", ["query"]),
}
NEW = {"BERT of a masked model": ["pooler"], "DeBERTa-v2": ["pooler"]}
"""New layers that PEFT does not save without being told, so that a reload draws them again."""


def classifier(folder: Path, base: str, head: str, **changes: Any) -> Trial:
    """Train a classifier of 3 labels on a base that lacks its head."""
    text_model(base).save_pretrained(folder / "base")
    model = getattr(transformers, head).from_pretrained(folder / "base", num_labels=3)
    task = "TOKEN_CLS" if "Token" in head else "SEQ_CLS"
    trial = finish(folder, adapt(model, task_type=task, **changes))
    return trial._replace(
        options=("--architecture", head, "--labels", "no,maybe,yes"),
        outputs=lambda out: outputs(reload(out)),  # by the class that OUT's config.json names
        free=frozenset(read_tensors(folder / "base").keys() - trial.right.keys()),
        prefix=f"{model.base_model_prefix}.",
    )


for name, (base, head, targets) in HEADS.items():
    make = functools.partial(
        classifier, base=base, head=head, target_modules=targets, modules_to_save=NEW.get(name)
    )
    register("PEFT, new heads", name, make)


def old_norms(folder: Path) -> None:
    """Give the norms of a model the names that they have in old files."""
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    file = folder / "model.safetensors"
    tensors = {
        functools.reduce(lambda name, end: name.replace(end, names[end]), names, name): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})


def norms(folder: Path) -> Trial:
    """Train the norms of a model whose file has their old names."""
    base = text_model("BertForMaskedLM")
    base.save_pretrained(folder / "base")
    old_norms(folder / "base")
    trial = finish(folder, adapt(base, target_modules=["query"], modules_to_save=["LayerNorm"]))
    old_norms(folder / "right")
    return trial._replace(right=read_tensors(folder / "right"))


register("PEFT, new heads", "BERT, norms of old names", norms)

PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)}
SOUND = {"input_values": torch.linspace(-1, 1, 800).sin()[None]}
VIT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TRAINED = {
    "YOLOS": (
        functools.partial(
            model, "YolosModel", image_size=[32, 32], patch_size=8, num_detection_tokens=5, **VIT
        ),
        ("YolosForObjectDetection", {"num_labels": 6}),
        PIXELS,
        {
            "target_modules": r".*\.(query|q_proj)",
            "modules_to_save": ["class_labels_classifier", "bbox_predictor"],
        },
    ),
    "SegFormer": (
        functools.partial(
            model,
            "SegformerForSemanticSegmentation",
            hidden_sizes=[16, 16, 32, 32],
            depths=[1] * 4,
            num_attention_heads=[1, 2, 2, 4],
            decoder_hidden_size=32,
            num_labels=5,
        ),
        ("SegformerForSemanticSegmentation", {}),
        PIXELS,
        {"target_modules": r".*\.(query|q_proj)", "modules_to_save": ["decode_head"]},
    ),
    "Wav2Vec2": (
        functools.partial(
            model,
            "Wav2Vec2Model",
            conv_dim=[16, 16],
            conv_stride=[5, 2],
            conv_kernel=[10, 3],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            **VIT,
        ),
        ("Wav2Vec2ForCTC", {"vocab_size": 40}),
        SOUND,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
}
"""The base, the class with its head, inputs, and what is trained."""


def trained_head(folder: Path, name: str) -> Trial:
    """Train the head of a model that is not one of text; OUT's files tell its class."""
    make, (head, sizes), inputs, changes = TRAINED[name]
    before = make()
    before.save_pretrained(folder / "base")
    base = getattr(transformers, head).from_pretrained(folder / "base", **sizes)
    save = {"save_embedding_layers": False}
    trial = finish(folder, adapt(base, **changes), lambda _: inputs, save)
    is_bare = type(before) is not type(base)
    return trial._replace(
        outputs=lambda out: outputs(reload(out), **inputs),
        free=frozenset(read_tensors(folder / "base").keys() - trial.right.keys()),
        prefix=f"{base.base_model_prefix}." if is_bare else "",
    )


for name in TRAINED:
    register("PEFT, new heads", name, functools.partial(trained_head, name=name))
