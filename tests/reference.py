"""The oracle: DoRA in float64, one number at a time, from the paper (arXiv:2402.09353).

    W' = m · V / ‖V‖ by output rows (equation 5)     y = x W'ᵀ + bias
    V  = W + s B A, or W/‖W‖ + s B A                 s = scaling

It does not share code or formulas with src: the gradients go through the dense W' by the chain
rule, row by row. The weight must be a matrix, and x must have one axis of tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Layer(NamedTuple):
    weight: np.ndarray
    lora_a: np.ndarray
    lora_b: np.ndarray
    magnitude: np.ndarray
    scaling: float
    form: str

    def wide(self) -> Layer:
        return Layer(*(np.asarray(array, np.float64) for array in self[:4]), *self[4:])


class Result(NamedTuple):
    norm: np.ndarray
    merged: np.ndarray
    y: np.ndarray
    x: np.ndarray
    lora_a: np.ndarray
    lora_b: np.ndarray
    magnitude: np.ndarray
    weight: np.ndarray
    bias: np.ndarray


def dot(a: np.ndarray, b: np.ndarray) -> float:
    return math.fsum(float(p) * float(q) for p, q in zip(a, b, strict=True))


def length(row: np.ndarray) -> float:
    return math.hypot(*map(float, row))


def direction_rows(layer: Layer) -> np.ndarray:
    """Return V."""
    weight, a, b, _, s, form = layer
    v = np.zeros_like(weight)
    for i, row in enumerate(weight):
        size = length(row) if form == "direction" else 1.0
        for j, w in enumerate(row):
            update = s * dot(b[i], a[:, j])
            v[i, j] = (w / size if size > 0 else 0.0) + update
    return v


def solve(
    layer: Layer,
    x: np.ndarray,
    bias: np.ndarray,
    dy: np.ndarray,
    norm_gradient: str,
    mask: np.ndarray | None = None,
    dropout: str = "input",
) -> Result:
    """Run forward, backward and merge. `dropout` tells how the mask is applied, as in `Config`."""
    layer = layer.wide()
    x, bias, dy = (np.asarray(array, np.float64) for array in (x, bias, dy))
    weight, a, b, m, s, form = layer
    out, inner = weight.shape
    v = direction_rows(layer)
    norm = np.array([length(row) for row in v])
    merged = np.zeros_like(weight)
    for i in range(out):
        if norm[i] > 0:
            merged[i] = m[i] / norm[i] * v[i]
    mask = np.ones_like(x) if mask is None else np.asarray(mask, np.float64)
    seen = mask * x  # multiplied by W'; the rest of x is multiplied by `beside`
    beside = weight.copy()
    if dropout == "low_rank":
        nothing = np.zeros_like(b)
        base = direction_rows(layer._replace(lora_b=nothing))
        for i in range(out):
            beside[i] = m[i] / norm[i] * base[i] if norm[i] > 0 else 0.0
    y = np.array(
        [
            [dot(t, merged[i]) + dot(rest, beside[i]) + bias[i] for i in range(out)]
            for t, rest in zip(seen, x - seen, strict=True)
        ]
    )
    y = y.reshape(len(x), out)

    dx = np.array(
        [
            [
                keep[j] * dot(d, merged[:, j]) + (1 - keep[j]) * dot(d, beside[:, j])
                for j in range(inner)
            ]
            for d, keep in zip(dy, mask, strict=True)
        ]
    ).reshape(x.shape)
    dmerged = np.array([[dot(dy[:, i], seen[:, j]) for j in range(inner)] for i in range(out)])
    drest = np.array([[dot(dy[:, i], (x - seen)[:, j]) for j in range(inner)] for i in range(out)])
    dm = np.zeros(out)
    dv = np.zeros_like(weight)
    dweight = np.zeros_like(weight)
    for i in range(out):
        if norm[i] == 0:
            continue
        unit = v[i] / norm[i]
        dm[i] = dot(unit, dmerged[i])
        if dropout == "low_rank":
            dm[i] += dot(base[i], drest[i]) / norm[i]
        along = dm[i] if norm_gradient == "exact" else 0.0
        dv[i] = m[i] / norm[i] * (dmerged[i] - along * unit)
        dweight[i] = dv[i]
        if dropout == "low_rank":
            dweight[i] += m[i] / norm[i] * drest[i]
        if form == "direction":
            size = length(weight[i])
            row = weight[i] / size if size > 0 else np.zeros(inner)
            dweight[i] = (dweight[i] - dot(row, dweight[i]) * row) / size if size > 0 else 0.0
    if dropout == "input":
        dweight += drest
    da = np.array([[s * dot(b[:, k], dv[:, j]) for j in range(inner)] for k in range(len(a))])
    db = np.array([[s * dot(dv[i], a[k]) for k in range(len(a))] for i in range(out)])
    dbias = np.array([math.fsum(dy[:, i]) for i in range(out)])
    return Result(norm, merged, y, dx, da, db, dm, dweight, dbias)
