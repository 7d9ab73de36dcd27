"""The oracle of operators: plain loops over the numbers of a convolution or a lookup, in NumPy."""

from __future__ import annotations

import itertools
import math

import numpy as np

from doraxp import Config, LayerKind

H = 1e-3  # as in `slopes`
STEPS, FACTORS = H * np.array([-2, -1, 1, 2]), np.array([1, -8, 8, -1]) / (12 * H)


def convolved(x, weight, stride, padding, dilation):
    """Return the convolution of x (batch, in, *size) with weight (out, in/groups, *kernel)."""
    dims = x.ndim - 2
    numbers = stride, padding, dilation
    stride, padding, dilation = ((n,) * dims if np.isscalar(n) else n for n in numbers)
    kernel = weight.shape[2:]
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(dims)
    ]
    groups = x.shape[1] // weight.shape[1]
    out, inner = weight.shape[0] // groups, weight.shape[1]
    y = np.zeros((x.shape[0], weight.shape[0], *sizes))
    for position in itertools.product(*map(range, sizes)):
        for offset in itertools.product(*map(range, kernel)):
            place = [
                position[i] * stride[i] - padding[i] + offset[i] * dilation[i] for i in range(dims)
            ]
            if any(not 0 <= place[i] < x.shape[2 + i] for i in range(dims)):
                continue
            for group in range(groups):
                outs = slice(group * out, (group + 1) * out)
                seen = x[(slice(None), slice(group * inner, (group + 1) * inner), *place)]
                y[(slice(None), outs, *position)] += seen @ weight[(outs, slice(None), *offset)].T
    return y


def matrix(weight, kind: LayerKind):
    if kind.name in ("embedding", "transposed"):
        return weight.T
    if kind.name == "linear":
        return weight
    groups = (kind.groups,) if kind.groups > 1 else ()
    return weight.reshape(*groups, weight.shape[0] // kind.groups, math.prod(weight.shape[1:]))


def stored(rows, weight, kind: LayerKind):
    return rows.T if kind.name in ("embedding", "transposed") else rows.reshape(weight.shape)


def outputs(apply, inputs, config: Config, kind: LayerKind, mask=None, norm=None):
    """Return y by the dense formula, and n; `apply(x, weight)` is the layer's own map."""
    x, weight = inputs["x"], inputs["weight"]
    w = matrix(weight, kind)
    base = w / np.linalg.norm(w, axis=-1, keepdims=True) if config.form == "direction" else w
    update = config.scaling * inputs["lora_b"] @ inputs["lora_a"]
    n = np.linalg.norm(base + update, axis=-1)
    gain = (inputs["magnitude"] / (n if norm is None else norm))[..., None]
    part = lambda rows, seen: apply(seen, stored(rows, weight, kind))  # noqa: E731
    if mask is None:
        y = part(gain * (base + update), x)
    elif config.dropout == "input":
        y = part(gain * (base + update), mask * x) + apply(x - mask * x, weight)
    else:
        y = part(gain * base, x) + part(gain * update, mask * x)
    if "bias" in inputs:
        bias = inputs["bias"]
        y = y + (bias.reshape(-1, *(1,) * (y.ndim - 2)) if kind.name == "conv" else bias)
    return y, n


def slopes(apply, inputs, directions, dy, config: Config, kind: LayerKind, mask=None):
    """Return ⟨dy, J u⟩ for each input and its direction u, by central differences."""
    norm = outputs(apply, inputs, config, kind, mask)[1]
    fixed = norm if config.norm_gradient == "detached" else None
    found = {}
    for name, direction in directions.items():
        values = [
            np.sum(
                dy
                * outputs(
                    apply, inputs | {name: inputs[name] + h * direction}, config, kind, mask, fixed
                )[0]
            )
            for h in STEPS
        ]
        found[name] = float(np.dot(FACTORS, values))
    return found
