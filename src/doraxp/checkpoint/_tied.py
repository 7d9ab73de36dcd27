"""Embeddings that are also the output head, so that a model's file has them once.

An adapter changes the one or the other. PEFT trains each as a module of its own, so the result has
both, and its config.json says that they are not tied.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from doraxp.checkpoint._json import JsonObject

_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_MASKED = "ForMaskedLM"
_EMBEDDINGS = tuple(
    f".{name}.weight"
    for name in (
        *("embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "word_embedding"),
        *("tok_embeddings", "tokens_embed", "backbone.embeddings"),
    )
)
_HEADS = ("lm_head", "embed_out", "output_projection")
_BEFORE_HEAD = ("model", "transformer", "backbone", "gpt_neox", "decoder")
"""The part of a language model that has the embeddings; the head is beside it."""
_OTHER_HEADS = {
    **dict.fromkeys(
        ("bert", "deberta", "deberta-v2", "mobilebert", "big_bird", "roformer", "rembert"),
        "cls.predictions.decoder",
    ),
    **dict.fromkeys(
        ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "esm", "data2vec-text"),
        "lm_head.decoder",
    ),
    "albert": "predictions.decoder",
    "distilbert": "vocab_projector",
    "electra": "generator_lm_head",
    "gpt_neox": "embed_out",
    "modernbert": "decoder",
    "whisper": "proj_out",
    "xlnet": "lm_loss",
}
"""The heads that are not ``lm_head``, by model type."""


class Tied(NamedTuple):
    """The embeddings that are also the output head."""

    embedding: str
    head: str
    """The name that the head has in a file of its own; the base does not have it. "" if it is not
    known."""
    copies: tuple[str, ...] = ()
    """The names that the embeddings of encoder and decoder have if they are not tied either."""


def tied_head(names: Collection[str], config: JsonObject) -> Tied | None:
    """Return the names of the embeddings and of the head that they are too; None if not tied.

    A model type whose default is true may leave ``tie_word_embeddings`` out; then any language
    model without a head counts as tied.
    """
    architectures = config.get("architectures")
    models = [str(name) for name in architectures] if isinstance(architectures, list) else []
    masked = any(name.endswith(_MASKED) for name in models)
    other = _OTHER_HEADS.get(str(config.get("model_type")))
    if any(is_head(name) for name in names) or (other and f"{other}.weight" in names):
        return None
    with_head = masked or any(name.endswith(_CAUSAL) for name in models)
    tied = _flag(config)
    if tied is None:
        tied = with_head
    found = sorted(filter(is_embedding, names), key=lambda name: (name.count("."), name))
    if not tied or not found or (models and not with_head):
        return None
    if other is not None or masked:
        return Tied(found[0], f"{other}.weight" if other else "")
    lead = found[0].removesuffix("shared.weight")
    copies = [f"{lead}{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
    return Tied(found[0], _head_of(found[0]), tuple(copies) if lead != found[0] else ())


def is_tied_by_name(names: Collection[str], config: JsonObject) -> bool:
    """Return whether the configuration ties embeddings and head, and the files have both."""
    return _flag(config) is True and any(map(is_head, names)) and any(map(is_embedding, names))


def _flag(config: JsonObject) -> object:
    """Return ``tie_word_embeddings``, which may be in the part of the text; None without it."""
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return config.get("tie_word_embeddings", nested)


def is_head(name: str) -> bool:
    """Return whether a tensor is the weight of a language model's head."""
    return f".{name}".endswith(tuple(f".{head}.weight" for head in _HEADS))


def is_embedding(name: str) -> bool:
    """Return whether a tensor has a row for each token."""
    return f".{name}".endswith(_EMBEDDINGS)


def _head_of(embedding: str) -> str:
    """Return the name of the head: it is beside the part of the model that has the embeddings."""
    parts = embedding.split(".")
    place = next((place for place, part in enumerate(parts) if part in _BEFORE_HEAD), 0)
    return ".".join([*parts[:place], "lm_head", "weight"])
