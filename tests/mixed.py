"""Naive models of 16-bit layers in NumPy: mixed precision, and PEFT's. All else is in float64.

    x (tokens, in)   W (out, in)   A (rank, in)   B (out, rank)   m, bias (out,)   dy (tokens, out)

`round16(dtype)` rounds to the storage dtype. `step` names each array that it rounds; `also` names
arrays to round that mixed precision does not, so that a test sees whether its bounds notice.
"""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np

from doraxp import Config
from doraxp.testing import Case, expected
from doraxp.testing._formulas import deviating
from doraxp.testing._mixed import MixedFormulas
from doraxp.testing._reference import _rounding_to, bounded, shapes
from doraxp.testing._rounding import Rounded

KINDS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ALSO = ("L", "low", "R", "p", "dz", "U")
"""Arrays of `step` that mixed precision keeps in float32. "dz" in place of g⊙dy in dA and dB."""


def layer(config, *, stack=(), out=24, inner=40, tokens=16, dy=1.0, update=0.5, mask=False):
    """Return a layer of random numbers. ‖s B A‖ is about `update` ‖W‖, and |dy| ≤ `dy`."""
    rng = np.random.default_rng(7)
    rank, draw = config.rank, rng.standard_normal
    weight = draw((*stack, out, inner)) / np.sqrt(inner)
    b = draw((*stack, out, rank)) / np.sqrt(rank) * (update / config.scaling)
    if config.form == "direction":
        b = b / np.linalg.norm(weight, axis=-1, keepdims=True)
    arrays = {
        "x": draw((*stack, tokens, inner)),
        "weight": weight,
        "lora_a": draw((*stack, rank, inner)) / np.sqrt(inner),
        "lora_b": b,
        "magnitude": rng.uniform(0.5, 1.5, (*stack, out)),
        "bias": draw((*stack, out)),
        "dy": dy * rng.choice([-1.0, 1.0], (*stack, tokens, out)) * rng.uniform(0.1, 1.0, out),
    }
    if mask:
        arrays["dropout_mask"] = np.where(rng.uniform(size=arrays["x"].shape) < 0.2, 0.0, 1.25)
    return Case("random", "", config, arrays)


def changed(case, config=None, **arrays):
    """Return a case with another config or with other arrays."""
    new = {**case.arrays, **arrays}
    return replace(case, config=config or case.config, arrays=new)


def distance(actual, right):
    """Return ‖actual − right‖ / ‖right‖."""
    return np.linalg.norm(np.asarray(actual, np.float64) - right) / np.linalg.norm(right)


def with_tokens(case, dtype):
    """Return the stored arrays of a case in float64: one axis of tokens, and always a bias."""
    arrays = {name: array.astype(np.float64) for name, array in case.stored(dtype).items()}
    *stack, out, inner = arrays["weight"].shape
    arrays.setdefault("bias", np.zeros((*stack, out)))
    lengths = {"x": inner, "dropout_mask": inner, "dy": out}
    return arrays | {
        name: arrays[name].reshape(*stack, -1, size)
        for name, size in lengths.items()
        if name in arrays
    }


def expected_from(z, case, dtype):
    """Return the gradients that follow from a stored z. Their bounds have float32's roundings only.

    dA, dB, dm and dW; with a dropout mask, also the roundings of x~ and x − x~.
    """
    formulas = deviating(MixedFormulas, {"z": lambda _: Rounded.exact(z)})
    found = formulas(case.config, case.stored(dtype), Rounded.exact, _rounding_to(dtype))
    return {
        name: bounded(name, getattr(found, name), shapes(case)[name], dtype, "mixed")
        for name in ("da", "db", "dm", "dw")
    }


def round16(dtype):
    return lambda array: np.asarray(array).astype(KINDS[dtype]).astype(np.float64)


def turned(array):
    return np.swapaxes(array, -1, -2)


def over(a, b):
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b != 0)


def step(arrays, config, dtype, also=()):
    """Return y, the merged weight and all gradients in mixed precision, by the names of `expected`.

    `arrays` are those of `with_tokens`. The result also has z, as it is stored.
    """
    narrow = round16(dtype)

    def keep(name, array):
        return narrow(array) if name in also else array

    w, a, b, m, x, dy, bias = (
        np.asarray(arrays[name], np.float64)
        for name in ("weight", "lora_a", "lora_b", "magnitude", "x", "dy", "bias")
    )
    m, bias, sb = m[..., None], bias[..., None, :], config.scaling * b
    mask = arrays.get("dropout_mask")
    only_update = mask is not None and config.dropout == "low_rank"
    seen = x if mask is None else narrow(mask * x)  # x~
    rest = narrow(x - seen)
    whole = x if only_update else seen

    length = np.linalg.norm(w, axis=-1, keepdims=True)
    rho = over(np.ones_like(m), length) if config.form == "direction" else np.ones_like(m)
    base, update = rho * w, sb @ a
    rho = np.where(rho == 0, 1, rho)
    v = base + update
    n2, terms = (np.sum(part**2, axis=-1, keepdims=True) for part in (v, base))
    typical = np.sum(sb**2, -1, keepdims=True) * np.sum(a**2, (-1, -2), keepdims=True) / a.shape[-2]
    terms = terms + np.maximum(np.sum(update**2, -1, keepdims=True), typical)
    limits = np.finfo(np.float32)
    least = w.shape[-1] * float(limits.smallest_normal / limits.eps)
    suspect = ~((n2 > terms / 2 + least) & (n2 < float(limits.max)))
    n = np.sqrt(n2)
    g = over(m, n)
    projection = keep("U", over(v @ turned(a), n))

    low = keep("L", seen @ turned(a))
    z = narrow(whole @ turned(w) + narrow(low @ turned(sb / rho)))
    z = narrow(turned(rho) * z)
    formed = narrow(whole @ turned(v) + ((seen - x) @ turned(update) if only_update else 0))
    z = np.where(turned(suspect), formed, z)
    y = narrow(turned(g) * z + bias)
    if mask is not None and not only_update:
        y = narrow(y + rest @ turned(w))

    dz = narrow(turned(rho * g) * dy)
    dm = over(turned(np.sum(dy * z, -2, keepdims=True)), n)
    p = keep("p", g * dm) if config.norm_gradient == "exact" else 0 * dm
    gdy = dz / turned(rho) if "dz" in also else turned(g) * dy
    back = keep("low", gdy @ sb)
    r = keep("R", -over(p, n) * sb)
    da = turned(back) @ seen + turned(r) @ v
    db = config.scaling * (turned(gdy) @ low - p * projection)
    dw = turned(gdy) @ whole - over(p, n) * v

    hidden = np.where(turned(suspect), 1, 0)
    of_suspect = (hidden * gdy) @ v
    through = ((1 - hidden) * gdy) @ sb @ a
    if mask is None:
        through = narrow(through)
        if np.any(suspect):
            through = narrow(through + of_suspect)
        dx = narrow(((1 - hidden) * dz) @ w + through)
    else:
        dx = ((1 - hidden) * dz) @ w + through + of_suspect
    if only_update:
        dx = narrow(dx + (mask - 1) * (gdy @ sb @ a))
    elif mask is not None:
        dx = narrow(mask * dx + (1 - mask) * (dy @ w))
    if config.form == "direction":
        along = np.sum(base * dw, -1, keepdims=True)
        dw = over(dw - base * along, length)
    if mask is not None and not only_update:
        dw = dw + turned(dy) @ rest
    return {
        "norm": n[..., 0], "merged": narrow(g * v), "z": z, "y": y, "dx": dx, "da": da, "db": db,
        "dm": dm[..., 0], "dw": dw, "dbias": np.sum(dy, -2),
    }  # fmt: skip


def peft_step(arrays, config, dtype):
    """Return dA, dB and dm of PEFT's detached DoRA, with each intermediate in the storage dtype.

    PEFT 0.21.2, ``lora/dora.py``: y = base + (g − 1)⊙base + g⊙(s (x Aᵀ) Bᵀ), base = x Wᵀ, and n
    in g = m / n is a constant. Its gradients are those of autograd.
    """
    narrow = round16(dtype)
    w, a, b, m, x, dy = (
        np.asarray(arrays[name], np.float64)
        for name in ("weight", "lora_a", "lora_b", "magnitude", "x", "dy")
    )
    a, b, m, s = narrow(a), narrow(b), narrow(m), config.scaling
    v = narrow(w + narrow(s * narrow(b @ a)))
    n = narrow(np.linalg.norm(v, axis=-1))
    g = narrow(m / n)
    base, low = narrow(x @ w.T), narrow(x @ a.T)
    through = narrow(low @ b.T)
    dg = narrow(np.sum(narrow(dy * narrow(base + narrow(s * through))), axis=0))
    dthrough = narrow(s * narrow(g * dy))
    dlow = narrow(dthrough @ b)
    return {"da": narrow(dlow.T @ x), "db": narrow(dthrough.T @ low), "dm": narrow(dg / n)}


def main():
    """Print the errors of dA and dB in both models, ‖error‖ / ‖exact‖."""
    head = f"{'':9} {'norm':9} {'‖sBA‖/‖W‖':10} {'dA: PEFT':>9} {'mixed':>9} {'dB: PEFT':>9}"
    print(f"{head} {'mixed':>9} {'dm: PEFT':>9} {'mixed':>9}")
    for dtype in KINDS:
        for norm_gradient in ("detached", "exact"):
            for update in (0.02, 0.2, 1.0):
                config = Config(8, 16.0, norm_gradient=norm_gradient)
                case = layer(config, out=256, inner=512, tokens=256, update=update)
                without = changed(case, config=Config(8, 16.0, norm_gradient="detached"))
                arrays = with_tokens(case, dtype)
                row = f"{dtype:9} {norm_gradient:9} {update:<10}"
                for name in ("da", "db", "dm"):
                    theirs = expected(without, dtype, names=[name])[name].value
                    ours = expected(case, dtype, names=[name])[name].value
                    row += f" {distance(peft_step(arrays, config, dtype)[name], theirs):9.0e}"
                    row += f" {distance(step(arrays, config, dtype)[name], ours):9.0e}"
                print(row)


if __name__ == "__main__":
    main()
