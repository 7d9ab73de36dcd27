"""The words of a model's config.json about its quantisation."""

from __future__ import annotations

from doraxp.checkpoint._json import JsonObject
from doraxp.checkpoint._quantised.protocol import Settings

KEYS = ("quantization_config", "quantization")
"""Of transformers, and of mlx-lm, which writes both."""
PARTS = ("text_config", "llm_config", "language_config")
"""The parts of a configuration of several models that may say how the language model is stored."""
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def settings_of(config: JsonObject) -> Settings:
    """Return the words of a configuration about its quantisation."""
    parts = [config, *(part for key in PARTS if isinstance(part := config.get(key), dict))]
    entries = (part[key] for part in parts for key in KEYS if isinstance(part.get(key), dict))
    words = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    dtypes = (_DTYPES[word] for word in words if isinstance(word, str) and word in _DTYPES)
    found: object = next(entries, {})
    return Settings(found if isinstance(found, dict) else {}, next(dtypes, "BF16"))
