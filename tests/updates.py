"""Updates of LyCORIS's algorithms with random factors, and their dense formulas in float64."""

from __future__ import annotations

import numpy as np
from checkpoints import draw

OUT, IN, KERNEL, RANK, ALPHA = 18, 12, (3, 2), 2, 5.0
PATHS = {"linear": "down.0", "conv": "down.1", "other": "up.0"}
SHAPES = {"linear": (OUT, IN), "conv": (OUT, IN, *KERNEL), "other": (7, 5)}
FACTORS = {"linear": IN, "conv": IN * 6}
"""The columns of a weight as a matrix."""


def prefixed(kind, leaves):
    name = f"lora_unet_{PATHS[kind].replace('.', '_')}"
    return {f"{name}.{leaf}": np.asarray(x, order="C") for leaf, x in leaves.items()}


def tucker(core, a, b):
    """Σij core[i, j, ...] a[i, p] b[j, q], as (p, q, ...)."""
    return np.einsum("ij...,ip,jq->pq...", core, a, b)


def lora(rng, kind):
    a, b = draw(rng, RANK, *SHAPES[kind][1:]), draw(rng, OUT, RANK)
    leaves = {"lora_down.weight": a, "lora_up.weight": b}
    if kind == "conv":
        leaves["lora_up.weight"] = b[..., None, None]
    return leaves, b.astype("f8") @ a.reshape(RANK, -1)


def lora_with_core(rng, kind):
    a, b, core = draw(rng, RANK, IN), draw(rng, OUT, RANK), draw(rng, RANK, RANK, *KERNEL)
    leaves = {"lora_down.weight": a, "lora_up.weight": b, "lora_mid.weight": core}
    for name in "lora_down.weight", "lora_up.weight":
        leaves[name] = leaves[name][..., None, None]
    return leaves, tucker(*(x.astype("f8") for x in (core, b.T, a)))


def loha(rng, kind):
    leaves = {}
    for half in "w1", "w2":
        leaves[f"hada_{half}_a"] = draw(rng, OUT, RANK)
        leaves[f"hada_{half}_b"] = draw(rng, RANK, FACTORS[kind])
    a1, b1, a2, b2 = (x.astype("f8") for x in leaves.values())
    return leaves, (a1 @ b1) * (a2 @ b2)


def loha_with_cores(rng, kind):
    leaves, halves = {}, []
    for half in "12":
        core = leaves[f"hada_t{half}"] = draw(rng, RANK, RANK, *KERNEL)
        a = leaves[f"hada_w{half}_a"] = draw(rng, RANK, OUT)
        b = leaves[f"hada_w{half}_b"] = draw(rng, RANK, IN)
        halves.append(tucker(*(x.astype("f8") for x in (core, a, b))))
    return leaves, halves[0] * halves[1]


def kron(one, other):
    """Return the product, whose first factor has no kernel."""
    one = one.reshape(*one.shape, *[1] * (other.ndim - 2))
    return np.kron(one.astype("f8"), other.astype("f8"))


def lokr(rng, kind):
    """A change of two whole factors. It has no scale: the one of `merged` is divided out."""
    leaves = {"lokr_w1": draw(rng, 3, 4), "lokr_w2": draw(rng, 6, 3, *SHAPES[kind][2:])}
    return leaves, kron(*leaves.values()) * (RANK / ALPHA)


def lokr_of_factors(rng, kind):
    columns = FACTORS[kind] // 4
    leaves = {
        "lokr_w1_a": draw(rng, 3, RANK), "lokr_w1_b": draw(rng, RANK, 4),
        "lokr_w2_a": draw(rng, 6, RANK), "lokr_w2_b": draw(rng, RANK, columns),
    }  # fmt: skip
    a1, b1, a2, b2 = (x.astype("f8") for x in leaves.values())
    return leaves, kron(a1 @ b1, (a2 @ b2).reshape(6, 3, *SHAPES[kind][2:]))


def lokr_with_core(rng, kind):
    leaves = {
        "lokr_w1": draw(rng, 3, 4), "lokr_t2": draw(rng, RANK, RANK, *KERNEL),
        "lokr_w2_a": draw(rng, RANK, 6), "lokr_w2_b": draw(rng, RANK, 3),
    }  # fmt: skip
    w1, *second = (x.astype("f8") for x in leaves.values())
    return leaves, kron(w1, tucker(*second))


ALGORITHMS = {
    "lora": (lora, ("linear", "conv")),
    "lora_mid": (lora_with_core, ("conv",)),
    "loha": (loha, ("linear", "conv")),
    "hada_t1": (loha_with_cores, ("conv",)),
    "lokr": (lokr, ("linear", "conv")),
    "lokr of factors": (lokr_of_factors, ("linear", "conv")),
    "lokr_t2": (lokr_with_core, ("conv",)),
}


def merged(weight, change, m=None):
    """W + s ΔW; with magnitudes, its rows or its columns have the norms m."""
    v = weight.astype("f8") + (ALPHA / RANK) * change.reshape(weight.shape)
    if m is None:
        return v
    axes = tuple(axis for axis in range(v.ndim) if axis != (1 if m.shape[0] == 1 else 0))
    return m.astype("f8") * v / np.sqrt(np.sum(v * v, axis=axes, keepdims=True))
