"""DoRA and AdamW as an author of a framework would write them; `faults.py` plants faults here."""

import numpy as np


def init(weight):
    return np.linalg.norm(weight, axis=1)


def adapted(weight, lora_a, lora_b, scaling):
    delta = scaling * (lora_b @ lora_a)
    v = weight + delta
    norm = np.sqrt((v * v).sum(axis=1))
    return v, norm


def forward(x, weight, lora_a, lora_b, magnitude, bias, scaling, dropout_mask=None):
    v, norm = adapted(weight, lora_a, lora_b, scaling)
    gain = magnitude / norm
    seen = x if dropout_mask is None else dropout_mask * x
    y = (seen @ v.T) * gain + (x - seen) @ weight.T
    if bias is not None:
        y = y + bias
    return y


def merge(weight, lora_a, lora_b, magnitude, scaling):
    v, norm = adapted(weight, lora_a, lora_b, scaling)
    gain = magnitude / norm
    return gain[:, None] * v


def gradients(dy, x, weight, lora_a, lora_b, magnitude, bias, scaling, dropout_mask=None):
    v, norm = adapted(weight, lora_a, lora_b, scaling)
    gain = magnitude / norm
    tokens, ds = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    keep = np.ones_like(tokens) if dropout_mask is None else dropout_mask.reshape(tokens.shape)
    xs = keep * tokens
    z = xs @ v.T
    dz = ds * gain
    e = (ds * z).sum(axis=0)
    dm = e / norm
    q = -magnitude * e / norm**3
    plain = dz.T @ xs
    dv = plain + q[:, None] * v
    da = scaling * lora_b.T @ dv
    db = scaling * dv @ lora_a.T
    dx = (dz @ v) * keep + (1 - keep) * (ds @ weight)
    dw = dv + ds.T @ (tokens - xs)
    found = {"x": dx.reshape(x.shape), "lora_a": da, "lora_b": db, "magnitude": dm, "weight": dw}
    if bias is not None:
        found["bias"] = ds.sum(axis=0)
    return found


def step(params, grads, state, learning_rate, beta1, beta2, eps, weight_decay):
    if state is None:
        state = {"t": 0, **{name: (0 * p, 0 * p) for name, p in params.items()}}
    t = state["t"] + 1
    stepped, kept = {}, {"t": t}
    for name, p in params.items():
        mu, nu = state[name]
        g = grads[name]
        decay = 0.0 if name == "magnitude" else weight_decay
        mu = beta1 * mu + (1 - beta1) * g
        nu = beta2 * nu + (1 - beta2) * g * g
        mean = mu / (1 - beta1**t)
        square = nu / (1 - beta2**t)
        stepped[name] = p - learning_rate * (mean / (np.sqrt(square) + eps) + decay * p)
        kept[name] = mu, nu
    return stepped, kept
