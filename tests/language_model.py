"""A small language model: its embeddings, its head, and one layer that has an adapter."""

from __future__ import annotations

import json

from checkpoints import dense, draw, near

EMBED, HEAD, QUERY = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.0.self_attn.q_proj.weight",
)
TIED = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
TOKENS, WIDTH = 10, 5


def model(rng, **others):
    return {EMBED: draw(rng, TOKENS, WIDTH), QUERY: draw(rng, 6, WIDTH), **others}


def query(rng, base, name=QUERY):
    """Return A, B and m of an adapter of the query or of another layer, and its merged weight."""
    leaves = near(rng, base[name])
    return {name.removesuffix(".weight"): leaves}, {name: dense(base[name], *leaves)}


def embedding(rng, weight):
    """Return PEFT's tensors of an embedding's adapter by their ends, and the merged weight."""
    a, b, m = near(rng, weight.T)
    names = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    return dict(zip(names, (a, b, m), strict=True)), dense(weight.T, a, b, m).T


def config_of(folder):
    return json.loads((folder / "out" / "config.json").read_text())
