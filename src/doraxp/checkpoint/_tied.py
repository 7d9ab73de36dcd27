"""Embeddings that are also the output head, so that a model's file has them once.

An adapter changes the one or the other. PEFT trains each as a module of its own, so the result has
both, and its config.json says that they are not tied.

``heads.json`` has the heads of the model families, as transformers ties them: ``tied`` tells
whether a family ties them where config.json does not say it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection
from importlib import resources
from typing import NamedTuple

from doraxp.checkpoint._json import JsonObject

_WITH_HEAD = (
    *("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM"),
    *("DoubleHeadsModel", "BertGenerationDecoder", "MarianMTModel", "SpeechT5ForSpeechToText"),
    *("ForVisionText2Text", "ForCausalImageModeling", "SeamlessM4TModel", "SeamlessM4Tv2Model"),
)
_PRETRAINED = frozenset(
    f"{family}ForPreTraining"
    for family in (
        *("Albert", "Bert", "BigBird", "Ernie", "FNet", "Lxmert", "MegatronBert", "MobileBert"),
        *("RoCBert", "VisualBert"),
    )
)
"""The classes that have the head of a masked language model beside another one."""
_SEAMLESS = frozenset(
    f"SeamlessM4T{version}For{task}"
    for version in ("", "v2")
    for task in ("SpeechToSpeech", "SpeechToText", "TextToSpeech", "TextToText")
)
_WITH_DECODER = ("encoder-decoder", "vision-encoder-decoder", "speech-encoder-decoder")
"""Models of an encoder and a language model, whose configuration is in ``decoder``."""
_ALWAYS = ("t5", "mt5", "umt5", "longt5", "pop2piano", "udop")
"""Families that tie equal weights of embeddings and head whatever config.json says. Their encoder
and decoder have the shared embeddings unless the files have other ones."""
_ROWS_ALONE = ("t5gemma",)
"""Families whose input embeddings are those of the encoder, and tied ones those of the decoder."""
_EMBEDDINGS = tuple(
    f".{name}.weight"
    for name in (
        *("embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "word_embedding"),
        *("tok_embeddings", "tokens_embed", "backbone.embeddings", "transformer.embeddings"),
        *("transformer.w", "rwkv.embeddings", "transf_decoder._embedding.token_embedding"),
    )
)
_HEADS = (
    *("lm_head", "embed_out", "output_projection", "cls.predictions.decoder", "lm_head.decoder"),
    *("predictions.decoder", "mlm_score.decoder", "pred_layer.proj", "lm_head.out_proj"),
    *("vocab_projector", "generator_lm_head", "lm_loss"),
)
_BEFORE_HEAD = ("model", "transformer", "backbone", "gpt_neox", "decoder")
"""The part of a language model that has the embeddings; the head is beside it."""


class Tied(NamedTuple):
    """The embeddings that are also the output head."""

    embedding: str
    head: str
    """The name that the head has in a file of its own. "" if it is not known."""
    copies: tuple[str, ...] = ()
    """The names that the embeddings of encoder and decoder have if they are not tied either."""
    bias: str = ""
    """The bias that is the head's too; "" without it."""
    in_file: tuple[str, ...] = ()
    """The other names under which the base has the embeddings too."""
    rows_alone: bool = False
    """Whether PEFT trains single rows of the embeddings alone, and not those of the head."""

    @property
    def head_bias(self) -> str:
        """The name that the head's bias has in a file of its own."""
        return f"{self.head.removesuffix('weight')}bias"

    @property
    def sources(self) -> dict[str, str]:
        """The other names of tied tensors, and those of the tensors that they are."""
        biases = {self.head_bias: self.bias} if self.bias else {}
        return dict.fromkeys((self.head, *self.copies), self.embedding) | biases


class _Family(NamedTuple):
    """The head of a model family."""

    head: str
    bias: str
    tied: bool


@functools.cache
def _families() -> dict[str, _Family]:
    """Return the heads by ``model_type``."""
    text = resources.files(__package__).joinpath("heads.json").read_text("utf-8")
    return {
        family: _Family(entry["head"], entry.get("bias", ""), entry["tied"])
        for entry in json.loads(text)
        for family in entry["families"]
    }


def tied_head(names: Collection[str], config: JsonObject) -> Tied | None:
    """Return the names of the embeddings and of the head that they are too; None if not tied.

    A model type whose default is true may leave ``tie_word_embeddings`` out; then any language
    model without a head counts as tied.
    """
    decoder = _decoder(config)
    if decoder is not None:
        tied = tied_head(_in_decoder(names), decoder)
        return None if tied is None else _of_decoder(tied)
    architectures = config.get("architectures")
    models = [str(name) for name in architectures] if isinstance(architectures, list) else []
    family = _families().get(str(config.get("model_type")))
    if any(is_head(name) for name in names) or (family and f"{family.head}.weight" in names):
        return None
    with_head = any(name.endswith(_WITH_HEAD) or name in _PRETRAINED | _SEAMLESS for name in models)
    flag = _flag(config)
    found = _embeddings(names)
    if not (with_head if flag is None else flag) or not found or (models and not with_head):
        return None
    return _tied(found[0], names, config)


def tied_in_file(names: Collection[str], config: JsonObject) -> Tied | None:
    """Return the tie that the configuration states of embeddings and head in the files; or None.

    Transformers ties those that are equal.
    """
    decoder = _decoder(config)
    if decoder is not None:
        tied = tied_in_file(_in_decoder(names), decoder)
        return None if tied is None else _of_decoder(tied)
    family = _families().get(str(config.get("model_type")))
    flag = _flag(config)
    heads = {name for name in names if is_head(name)}
    if family is not None:
        heads |= {f"{family.head}.weight"} & set(names)
        flag = family.tied if flag is None else flag
    tied = tied_head(set(names) - heads, config) if flag and heads else None
    if tied is None or tied.head not in heads:
        return None
    bias = "" if tied.head_bias in names else tied.bias
    in_file = tuple(name for name in (tied.head, *tied.copies) if name in names)
    return tied._replace(bias=bias, in_file=in_file)


def has_head_alone(names: Collection[str], config: JsonObject) -> bool:
    """Return whether the files have a tied head, but not the embeddings that it is too."""
    family = _families().get(str(config.get("model_type")))
    flag = _flag(config)
    is_tied = flag is True or (flag is None and family is not None and family.tied)
    return is_tied and any(map(is_head, names)) and not any(map(is_embedding, names))


def shared_copies(names: Collection[str], config: JsonObject) -> tuple[str, tuple[str, ...]]:
    """Return the shared embeddings, and the names of those of encoder and decoder if they lack.

    Of models without shared embeddings, return "" and no names.
    """
    shared = next((name for name in _embeddings(names) if name.endswith("shared.weight")), "")
    if not shared or config.get("model_type") not in _ALWAYS:
        return "", ()
    return shared, tuple(name for name in _copies(shared) if name not in names)


def _copies(shared: str) -> tuple[str, ...]:
    """Return the names of the embeddings of encoder and decoder that are the shared ones."""
    lead = shared.removesuffix("shared.weight")
    return tuple(f"{lead}{side}.embed_tokens.weight" for side in ("encoder", "decoder"))


def _tied(embedding: str, names: Collection[str], config: JsonObject) -> Tied:
    """Return the head of these embeddings, by the model family."""
    kind = config.get("model_type")
    family = _families().get(str(kind), _Family("" if kind else "lm_head", "", tied=False))
    if family.head != "lm_head":
        bias = family.bias if family.bias in names else ""
        # DeBERTa's present head has no weight of its own: it reads that of the embeddings.
        is_known = family.head and config.get("legacy") is not False
        head = f"{family.head}.weight" if is_known else ""
        return Tied(embedding, head, bias=bias, rows_alone=kind in _ROWS_ALONE)
    copies = _copies(embedding) if embedding.endswith("shared.weight") else ()
    return Tied(embedding, _head_of(embedding), copies)


def _decoder(config: JsonObject) -> JsonObject | None:
    """Return the configuration of the language model beside an encoder; None for other models."""
    part = config.get("decoder")
    if config.get("model_type") not in _WITH_DECODER or not isinstance(part, dict):
        return None
    return {**part, "architectures": ["ForCausalLM"]}


def _in_decoder(names: Collection[str]) -> list[str]:
    return [name.removeprefix("decoder.") for name in names if name.startswith("decoder.")]


def _of_decoder(tied: Tied) -> Tied:
    """Return the names with the part that they have in the whole model."""
    return Tied(
        f"decoder.{tied.embedding}",
        f"decoder.{tied.head}" if tied.head else "",
        tuple(f"decoder.{name}" for name in tied.copies),
        f"decoder.{tied.bias}" if tied.bias else "",
        tuple(f"decoder.{name}" for name in tied.in_file),
        rows_alone=True,
    )


def _embeddings(names: Collection[str]) -> list[str]:
    """Return the embeddings; those of the head are the first."""
    return sorted(filter(is_embedding, names), key=lambda name: (name.count("."), name))


def is_tied_by_name(names: Collection[str], config: JsonObject) -> bool:
    """Return whether the configuration ties embeddings and head, and the files have both."""
    return _flag(config) is True and any(map(is_head, names)) and any(map(is_embedding, names))


def _flag(config: JsonObject) -> object:
    """Return ``tie_word_embeddings``, which may be in the part of the text; None without it."""
    if config.get("model_type") in _ALWAYS:
        return True
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return config.get("tie_word_embeddings", nested)


def is_head(name: str) -> bool:
    """Return whether a tensor is the weight of a language model's head."""
    ends = tuple(f".{head}.weight" for head in _HEADS)
    return name == "proj_out.weight" or f".{name}".endswith(ends)


def is_embedding(name: str) -> bool:
    """Return whether a tensor has a row for each token."""
    return f".{name}".endswith(_EMBEDDINGS)


def _head_of(embedding: str) -> str:
    """Return the name of the head: it is beside the part of the model that has the embeddings."""
    parts = embedding.split(".")
    place = next((place for place, part in enumerate(parts) if part in _BEFORE_HEAD), 0)
    return ".".join([*parts[:place], "lm_head", "weight"])
