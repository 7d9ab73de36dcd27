"""Embeddings of mlx-lm: an adapter with one magnitude for each token.

    W (tokens, dims)   lora_a (tokens, rank)   lora_b (rank, dims)   m (tokens,)
    W' = (m / ‖V‖)⊙V,  V = W + s lora_a lora_b,  norms by rows

This is DoRA of a linear layer on (tokens, dims) whose A is lora_b and whose B is lora_a. A linear
layer of mlx-lm has lora_a (in, rank) and lora_b (rank, out), and m (out,). The shapes tell the two
apart unless tokens = dims. There the numbers tell nothing: in both cases a fresh m has the norms of
the rows of W. The name of the module tells it, or the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from doraxp.checkpoint._adapters import AdapterSet
from doraxp.checkpoint._updated_layer import AnyLayer

_EMBEDDING = re.compile(
    r"wte|wpe|embed|embeddings?|embedders?|embed_(in|tokens|positions)(_per_layer)?"
    r"|(tok|token|word|pos|position|positional|type|token_type)_embeddings?(_table)?"
)
_LINEAR = re.compile(
    r".*(proj|linear|dense|head|gate|attn|router|query|key|value).*|fc\d*(_\w+)?|score|classifier"
    r"|(ff_)?out(put)?"
)


def kind_by_name(path: str) -> Literal["embedding", "linear"] | None:
    """Return the kind of module that has this name in the models of mlx-lm; None if both may."""
    *parents, last = [part for part in path.split(".") if not part.isdigit()]
    if _EMBEDDING.fullmatch(last):
        return "embedding"
    if "emb" in last:
        return None
    in_a_block = bool(parents) and re.search(r"\.\d+\.", f".{path}") is not None
    return "linear" if in_a_block or _LINEAR.fullmatch(last) else None


def by_token(adapters: Mapping[str, AnyLayer], path: str) -> bool:
    """Return True if the adapter of kind linear at `path` is one of an embedding.

    A file tells it; for other adapters the name does.
    """
    if isinstance(adapters, AdapterSet):
        return adapters.format == "mlx" and not adapters.layers[path].factors_transposed
    return kind_by_name(path) == "embedding"
