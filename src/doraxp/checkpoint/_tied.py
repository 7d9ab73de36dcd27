"""Embeddings that are also the output head, so that a model's file has them once.

An adapter changes the one or the other. PEFT trains each as a module of its own, so the result has
both, and its config.json says that they are not tied.
"""

from __future__ import annotations

from collections.abc import Collection

from doraxp.checkpoint._json import JsonObject

_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_EMBEDDINGS = tuple(
    f".{name}.weight" for name in ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in")
)
_HEADS = ("lm_head", "embed_out", "output_projection")
_BEFORE_HEAD = ("model", "transformer", "backbone", "gpt_neox", "decoder")
"""The part of a language model that has the embeddings; the head is beside it."""


def tied_head(names: Collection[str], config: JsonObject) -> tuple[str, str] | None:
    """Return the names of the embeddings and of the head that they are too; None if not tied.

    A model type whose default is true may leave ``tie_word_embeddings`` out; then any language
    model without a head counts as tied.
    """
    if any(is_head(name) for name in names):
        return None
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    tied = config.get("tie_word_embeddings", nested)
    architectures = config.get("architectures")
    models = architectures if isinstance(architectures, list) else []
    with_head = any(str(name).endswith(_WITH_HEAD) for name in models)
    if tied is None:
        tied = with_head
    found = sorted(
        (name for name in names if is_embedding(name)), key=lambda name: (name.count("."), name)
    )
    if not tied or not found or (models and not with_head):
        return None
    return found[0], _head_of(found[0], config)


def is_head(name: str) -> bool:
    """Return whether a tensor is the weight of a language model's head."""
    return f".{name}".endswith(tuple(f".{head}.weight" for head in _HEADS))


def is_embedding(name: str) -> bool:
    """Return whether a tensor has a row for each token."""
    return f".{name}".endswith(_EMBEDDINGS)


def _head_of(embedding: str, config: JsonObject) -> str:
    """Return the name of the head: it is beside the part of the model that has the embeddings."""
    head = "embed_out" if config.get("model_type") == "gpt_neox" else "lm_head"
    parts = embedding.split(".")
    place = next((place for place, part in enumerate(parts) if part in _BEFORE_HEAD), 0)
    return ".".join([*parts[:place], head, "weight"])
