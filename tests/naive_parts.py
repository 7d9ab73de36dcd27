"""Convolutions, embeddings, other updates, sums and optimizers; `faults.py` plants faults here."""

import numpy as np


def adapted(base, update, scaling):
    v = base + scaling * update
    norm = np.sqrt((v * v).sum(axis=-1))
    return v, norm


def unfolded(x, kernel, stride, padding, dilation):
    """Return the windows of x, (batch, in, *positions, *kernel)."""
    spatial = tuple(range(2, x.ndim))
    padded = np.pad(x, [(0, 0), (0, 0)] + [(p, p) for p in padding])
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=spatial)
    index = [slice(None, None, s) for s in stride] + [slice(None, None, d) for d in dilation]
    return windows[(slice(None), slice(None), *index)]


def folded(windows, size, stride, padding, dilation):
    """Return the sum of windows where they came from, (batch, in, *size)."""
    dims = len(size)
    positions, kernel = windows.shape[2 : 2 + dims], windows.shape[2 + dims :]
    padded = np.zeros(
        windows.shape[:2] + tuple(n + 2 * p for n, p in zip(size, padding, strict=True))
    )
    for place in np.ndindex(*kernel):
        index = tuple(
            slice(k * d, k * d + s * (n - 1) + 1, s)
            for k, d, s, n in zip(place, dilation, stride, positions, strict=True)
        )
        padded[(slice(None), slice(None), *index)] += windows[(..., *place)]
    inside = tuple(slice(p, p + n) for p, n in zip(padding, size, strict=True))
    return padded[(slice(None), slice(None), *inside)]


class Convolution:
    @staticmethod
    def init(weight, groups):
        norm = np.sqrt((weight**2).reshape(len(weight), -1).sum(axis=1))
        return norm if groups == 1 else norm.reshape(groups, -1)

    @staticmethod
    def matrix(weight, groups):
        return weight.reshape(groups, len(weight) // groups, -1)

    @staticmethod
    def factors(lora_a, lora_b, magnitude, groups):
        a, b = (f if groups > 1 else f[None] for f in (lora_a, lora_b))
        return a, b, magnitude.reshape(groups, -1)

    @classmethod
    def merge(cls, weight, lora_a, lora_b, magnitude, scaling, groups):
        a, b, m = cls.factors(lora_a, lora_b, magnitude, groups)
        update = b @ a
        v, norm = adapted(cls.matrix(weight, groups), update, scaling)
        return ((m / norm)[..., None] * v).reshape(weight.shape)

    @classmethod
    def columns(cls, x, kernel, stride, padding, dilation, groups):
        """Return the windows as tokens, (groups, batch·positions, in/groups·kernel)."""
        windows = unfolded(x, kernel, stride, padding, dilation)
        batch, channels, dims = *windows.shape[:2], len(kernel)
        positions = windows.shape[2 : 2 + dims]
        by_group = windows.reshape(batch, groups, channels // groups, *positions, *kernel)
        last = tuple(range(3 + dims, 3 + 2 * dims))
        ordered = by_group.transpose(1, 0, *range(3, 3 + dims), 2, *last)
        return ordered.reshape(groups, batch * int(np.prod(positions)), -1)

    @classmethod
    def parts(cls, x, weight, lora_a, lora_b, magnitude, scaling, stride, padding, dilation, groups,
              mask):  # fmt: skip
        kernel = weight.shape[2:]
        a, b, m = cls.factors(lora_a, lora_b, magnitude, groups)
        update = b @ a
        v, norm = adapted(cls.matrix(weight, groups), update, scaling)
        seen = x if mask is None else mask * x
        xs, rest = (
            cls.columns(each, kernel, stride, padding, dilation, groups)
            for each in (seen, x - seen)
        )
        return a, b, m, v, norm, xs, rest

    @classmethod
    def forward(cls, x, weight, lora_a, lora_b, magnitude, bias, scaling, stride, padding, dilation,
                groups, dropout_mask=None):  # fmt: skip
        _, _, m, v, norm, xs, rest = cls.parts(
            x, weight, lora_a, lora_b, magnitude, scaling, stride, padding, dilation, groups,
            dropout_mask,
        )  # fmt: skip
        w = cls.matrix(weight, groups)
        gain = m / norm
        y = (xs @ v.swapaxes(1, 2)) * gain[:, None] + rest @ w.swapaxes(1, 2)
        spans = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
        positions = [
            (n + 2 * p - k) // s + 1
            for n, p, k, s in zip(x.shape[2:], padding, spans, stride, strict=True)
        ]
        y = y.reshape(groups, len(x), -1, y.shape[-1]).transpose(1, 0, 3, 2)
        y = y.reshape(len(x), len(weight), *positions)
        return y if bias is None else y + bias.reshape(-1, *(1 for _ in positions))

    @classmethod
    def gradients(cls, dy, x, weight, lora_a, lora_b, magnitude, bias, scaling, stride, padding,
                  dilation, groups, dropout_mask=None):  # fmt: skip
        a, b, m, v, norm, xs, rest = cls.parts(
            x, weight, lora_a, lora_b, magnitude, scaling, stride, padding, dilation, groups,
            dropout_mask,
        )  # fmt: skip
        w = cls.matrix(weight, groups)
        ds = dy.reshape(len(dy), groups, len(weight) // groups, -1).transpose(1, 0, 3, 2)
        ds = ds.reshape(groups, -1, len(weight) // groups)
        dmerged = ds.swapaxes(1, 2) @ xs
        e = (dmerged * v).sum(axis=-1)
        q = -m * e / norm**3
        dv = (m / norm)[..., None] * dmerged + q[..., None] * v
        da = scaling * b.swapaxes(1, 2) @ dv
        db = scaling * dv @ a.swapaxes(1, 2)
        dw = dv + ds.swapaxes(1, 2) @ rest
        kernel = weight.shape[2:]

        def back(tokens):
            dims, batch = len(kernel), len(x)
            inner = x.shape[1] // groups
            split = tokens.reshape(groups, batch, *dy.shape[2:], inner, *kernel)
            places, last = range(2, 2 + dims), range(3 + dims, 3 + 2 * dims)
            windows = split.transpose(1, 0, 2 + dims, *places, *last)
            windows = windows.reshape(batch, x.shape[1], *dy.shape[2:], *kernel)
            return folded(windows, x.shape[2:], stride, padding, dilation).astype(x.dtype)

        dx = back((ds * (m / norm)[:, None]) @ v)
        if dropout_mask is not None:
            dx = dropout_mask * dx + (1 - dropout_mask) * back(ds @ w)
        shaped = {"lora_a": da, "lora_b": db, "magnitude": e / norm}
        found = {key: f if groups > 1 else f[0] for key, f in shaped.items()}
        found |= {"x": dx.astype(x.dtype), "weight": dw.reshape(weight.shape)}
        if bias is not None:
            found["bias"] = ds.sum(axis=1).reshape(-1)
        return found


class Embedding:
    @staticmethod
    def init(weight):
        return np.sqrt((weight**2).sum(axis=0))

    @staticmethod
    def merge(weight, lora_a, lora_b, magnitude, scaling):
        update = lora_b @ lora_a
        v, norm = adapted(weight.T, update, scaling)
        return ((magnitude / norm)[:, None] * v).T

    @staticmethod
    def forward(x, weight, lora_a, lora_b, magnitude, scaling, scale):
        update = lora_b @ lora_a
        _, norm = adapted(weight.T, update, scaling)
        z = weight[x] * scale + scaling * (lora_a.T[x] * scale) @ lora_b.T
        return z * (magnitude / norm)

    @staticmethod
    def gradients(dy, x, weight, lora_a, lora_b, magnitude, scaling, scale):
        update = lora_b @ lora_a
        v, norm = adapted(weight.T, update, scaling)
        dmerged = np.zeros_like(weight)
        np.add.at(dmerged, x, scale * dy)
        dmerged = dmerged.T
        e = (dmerged * v).sum(axis=1)
        q = -magnitude * e / norm**3
        dv = (magnitude / norm)[:, None] * dmerged + q[:, None] * v
        da = scaling * lora_b.T @ dv
        db = scaling * dv @ lora_a.T
        return {"lora_a": da, "lora_b": db, "magnitude": e / norm, "weight": dv.T}


def merged(weight, update, magnitude, scaling):
    v, norm = adapted(weight, update, scaling)
    return v if magnitude is None else (magnitude / norm)[:, None] * v


class Loha:
    @staticmethod
    def merge(weight, first_a, first_b, second_a, second_b, magnitude, scaling):
        update = (first_b @ first_a) * (second_b @ second_a)
        return merged(weight, update, magnitude, scaling)


class Lokr:
    @staticmethod
    def merge(weight, left, right, right_a, right_b, magnitude, scaling):
        factor = right if right_a is None else right_b @ right_a
        return merged(weight, np.kron(left, factor), magnitude, scaling)


class Sums:
    @staticmethod
    def merge(weight, adapters, strengths, scalings):
        total = weight
        for adapter, strength, scaling in zip(adapters, strengths, scalings, strict=True):
            update = adapter["lora_b"] @ adapter["lora_a"]
            alone = merged(weight, update, adapter["magnitude"], scaling)
            total = total + strength * (alone - weight)
        return total


def adamw(p, g, state, t, learning_rate, beta1, beta2, eps, decay):
    mu, nu = state
    mu = beta1 * mu + (1 - beta1) * g
    nu = beta2 * nu + (1 - beta2) * g * g
    mean, square = mu / (1 - beta1**t), nu / (1 - beta2**t)
    return p - learning_rate * (mean / (np.sqrt(square) + eps) + decay * p), (mu, nu)


def loraplus_step(
    params, grads, state, learning_rate, beta1, beta2, eps, weight_decay, ratio
):  # fmt: skip
    if state is None:
        state = {"t": 0, **{name: (0 * p, 0 * p) for name, p in params.items()}}
    t = state["t"] + 1
    stepped, kept = {}, {"t": t}
    for name, p in params.items():
        rate = ratio * learning_rate if name == "lora_b" else learning_rate
        decay = 0.0 if name == "magnitude" else weight_decay
        stepped[name], kept[name] = adamw(
            p, grads[name], state[name], t, rate, beta1, beta2, eps, decay
        )
    return stepped, kept


def scaled_step(params, grads, state, damping, **numbers):
    a, b = params["lora_a"], params["lora_b"]
    shift = damping * np.eye(len(a), dtype=a.dtype)
    scaled = {
        "lora_a": np.linalg.solve(b.T @ b + shift, grads["lora_a"]),
        "lora_b": np.linalg.solve(a @ a.T + shift, grads["lora_b"].T).T,
    }
    return loraplus_step(params, {**grads, **scaled}, state, ratio=1.0, **numbers)


convolution, embedding, loha, lokr, sums = Convolution, Embedding, Loha, Lokr, Sums
