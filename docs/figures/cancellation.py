"""Print the errors that cancellation causes in float32: of n, y and the worst gradient.

B A is random, and W is such that every row of V = W + B A has `ratio` times the length of the row
of B A. An error is the largest one over the largest value, against the dense formulas in float64.

    python docs/figures/cancellation.py
"""

from __future__ import annotations

from typing import Any

import numpy as np

import doraxp

OUT, IN, RANK, TOKENS = 384, 512, 8, 32
RATIOS = (10.0, 1.0, 0.1, 0.01, 0.001)
CONFIG = doraxp.Config(RANK)


def draw(ratio: float) -> tuple[Any, ...]:
    """Return x, W, A, B, m and dy in float32."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((RANK, IN)) / IN**0.5
    b = rng.standard_normal((OUT, RANK))
    update, rest = b @ a, rng.standard_normal((OUT, IN))
    rest *= ratio * (row_norms(update) / row_norms(rest))[:, None]
    x, dy = rng.standard_normal((TOKENS, IN)), rng.standard_normal((TOKENS, OUT))
    weight = rest - update
    return tuple(v.astype(np.float32) for v in (x, weight, a, b, row_norms(weight), dy))


def row_norms(v: Any) -> Any:
    """Return ‖vᵢ‖."""
    return np.sqrt(np.sum(v * v, axis=1))


def expanded_norms(weight: Any, a: Any, b: Any) -> Any:
    """Return n by the three terms of n² alone."""
    u, gram = weight @ a.T, a @ a.T
    n2 = np.sum(weight * weight, axis=1) + 2 * np.sum(b * u, axis=1) + np.sum(b @ gram * b, axis=1)
    return np.sqrt(np.maximum(n2, 0))


def dense(x: Any, weight: Any, a: Any, b: Any, m: Any, dy: Any) -> dict[str, Any]:
    """Return n, y and the gradients, computed through a stored V."""
    v = weight + b @ a
    n = row_norms(v)
    g = m / n
    z = x @ v.T
    dm = np.sum(dy * z, axis=0) / n
    dz = g * dy
    dv = dz.T @ x - (g * dm / n)[:, None] * v
    return {"n": n, "y": g * z, "x": dz @ v, "a": b.T @ dv, "b": dv @ a.T, "m": dm}


def guarded(x: Any, weight: Any, a: Any, b: Any, m: Any, dy: Any) -> dict[str, Any]:
    """Return the same quantities, computed by doraxp."""
    adapter = doraxp.Adapter(a, b, m)
    y, cache = doraxp.forward(x, weight, adapter, CONFIG)
    gradients = doraxp.backward(dy, cache)
    da, db, dm = gradients.adapter
    return {"n": cache.prepared.norm, "y": y, "x": gradients.x, "a": da, "b": db, "m": dm}


def errors(ratio: float) -> dict[str, dict[str, float]]:
    """Return the errors of n, of y and of the worst gradient, for each way to compute them."""
    arrays = draw(ratio)
    exact = dense(*(v.astype(np.float64) for v in arrays))

    def error(name: str, value: Any) -> float:
        return float(np.max(np.abs(value - exact[name])) / np.max(np.abs(exact[name])))

    table = {"expanded": {"n": error("n", expanded_norms(*arrays[1:4]))}}
    for way in (guarded, dense):
        each = {name: error(name, value) for name, value in way(*arrays).items()}
        worst = max(each[name] for name in "xabm")
        table[way.__name__] = {"n": each["n"], "y": each["y"], "gradient": worst}
    return table


if __name__ == "__main__":
    print("              n                             y                   worst gradient")
    print("‖V‖ / ‖BA‖    expanded  guarded  dense      guarded  dense      guarded  dense")
    for ratio in RATIOS:
        e = errors(ratio)
        line = [e["expanded"]["n"], e["guarded"]["n"], e["dense"]["n"]]
        line += [e[way][name] for name in ("y", "gradient") for way in ("guarded", "dense")]
        form = "{:<10g}    {:<8.0e}  {:<7.0e}  {:<9.0e}  {:<7.0e}  {:<9.0e}  {:<7.0e}  {:.0e}"
        print(form.format(ratio, *line))
