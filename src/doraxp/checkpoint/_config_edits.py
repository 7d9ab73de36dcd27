"""`ConfigEdits`: the entries of config.json that follow from the tensors that a merge adds."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import cast

from doraxp.checkpoint._json import JsonObject
from doraxp.checkpoint._quantised.declared import declared

_TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "CAUSAL_LM": "ForCausalLM",
}
_TEXT = {"Gemma3ForCausalLM": "Gemma3Text", "Qwen3_5ForCausalLM": "Qwen3_5Text"}
"""The families whose classes with a new head have another name than the language model."""
_WITH_TOKENS = ("text_config", "encoder", "decoder")
"""The parts of a configuration that may have a vocabulary; in one that grew, all have one size."""
_SCALED = ("t5", "umt5", "longt5", "pop2piano")
"""Families that scale the input of the head by d_model^-0.5: where ``scale_decoder_outputs`` is
true, or, without that entry, unless ``tie_word_embeddings`` is false."""
_MODEL = re.compile(
    r"(?P<family>.+?)(For[A-Z]\w+|LMHeadModel|DoubleHeadsModel|PreTrainedModel|Model)"
)


@dataclass(frozen=True)
class ConfigEdits:
    """Changes of a model's configuration."""

    untied: bool = False
    """The head has a tensor of its own: ``tie_word_embeddings`` false, also in nested parts."""
    vocab_size: int | None = None
    """The number of tokens, if the vocabulary has grown."""
    labels: tuple[str, ...] | None = None
    """The names of the classes, if the head is new."""
    architecture: str | None = None
    """The class of the model with its new head."""
    dense: tuple[str, ...] = ()
    """Dense modules of a quantised model that its ``quantization_config`` names now."""

    def __bool__(self) -> bool:
        return self != ConfigEdits()

    def entries(self) -> dict[str, object]:
        """Return the new entries, without those that do not change."""
        return {key: value for key, value in vars(self).items() if value}

    def written(self) -> JsonObject:
        """Return the entries as `apply` writes them, without the names of dense modules."""
        return replace(self, dense=()).apply({})

    def apply(self, config: JsonObject) -> JsonObject:
        """Return the configuration with the changes."""
        edited = dict(config)
        if self.untied:
            edited = _untied(edited)
        if self.vocab_size is not None:
            parts = {key: edited[key] for key in _WITH_TOKENS if isinstance(edited.get(key), dict)}
            for key, part in parts.items():
                if isinstance(part, dict) and "vocab_size" in part:
                    edited[key] = part | {"vocab_size": self.vocab_size}
            if "vocab_size" in edited or not parts:
                edited["vocab_size"] = self.vocab_size
        if self.labels is not None:
            edited["id2label"] = {str(place): label for place, label in enumerate(self.labels)}
            edited["label2id"] = {label: place for place, label in enumerate(self.labels)}
            edited.pop("num_labels", None)  # transformers counts id2label
            edited.pop("_num_labels", None)
        if self.architecture is not None:
            edited["architectures"] = [self.architecture]
        if self.dense:
            edited = declared(edited, self.dense)
        return edited


def _untied(part: JsonObject) -> JsonObject:
    """Return a part of a configuration, and its own parts, with untied embeddings."""
    edited: JsonObject = {}
    for key, value in part.items():
        is_part = isinstance(value, dict) and (
            key in ("text_config", "decoder") or "tie_word_embeddings" in value
        )
        edited[key] = _untied(cast(JsonObject, value)) if is_part else value
    if part.get("model_type") in _SCALED and part.get("tie_word_embeddings") is not False:
        edited.setdefault("scale_decoder_outputs", True)
    return edited | {"tie_word_embeddings": False}


def architecture_for(task: str | None, architectures: object) -> str | None:
    """Return the class of a model with the head of a task, such as BertForTokenClassification.

    None if the base's configuration does not tell its family.

    Parameters
    ----------
    task : str or None
        PEFT's ``task_type``.
    architectures : object
        Those of the base's config.json.
    """
    suffix = _TASKS.get(str(task))
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    match = _MODEL.fullmatch(first) if isinstance(first, str) else None
    if match is None or suffix is None:
        return None
    return f"{_TEXT.get(match[0], match['family'])}{suffix}"
