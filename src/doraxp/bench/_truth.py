"""The right answers to a workload, by the dense formulas in float64.

    V = W + s B A      n = ‖V‖ by rows      W' = (m / n)⊙V

They share no code with doraxp, whose answers they check.
"""

from __future__ import annotations

import functools

from array_api_compat import array_namespace

from doraxp._base.types import Array, Namespace
from doraxp.backends import transpose
from doraxp.bench._workloads import LEARNING_RATE, Inputs


class Truth:
    """The right answers to a workload, by the kind of contestant that must give them.

    bare: the layer without an adapter; exact, detached: DoRA by its norm gradient; LoRA.
    """

    def __init__(self, inputs: Inputs, scaling: float) -> None:
        weight, adapter, x, dy = inputs
        xp: Namespace = array_namespace(weight)
        self.weight, self.x, self.dy = (xp.astype(a, xp.float64) for a in (weight, x, dy))
        self.a, self.b, self.m = (xp.astype(leaf, xp.float64) for leaf in adapter)
        self.b *= scaling
        self.scaling = scaling
        self.xp = xp

    def answers(self, task: str, kind: str) -> dict[str, Array]:
        """Return the right results of a task, by name."""
        if task == "adamw":  # g = p, and the first step is p − η g / (|g| + ε)
            leaves = {"lora_a": self.a, "lora_b": self.b / self.scaling, "magnitude": self.m}
            return {k: p - LEARNING_RATE * p / (self.xp.abs(p) + 1e-8) for k, p in leaves.items()}
        if task == "norm":
            return {"W Aᵀ": self.weight @ transpose(self.a)} if kind == "bare" else {"n": self.norm}
        acting = self.acting(kind)  # (out, in)
        if task == "merge":
            return {"W'": acting}
        y = {"y": self.x @ transpose(acting)}  # (tokens, out)
        if task not in ("backward", "step"):
            return y
        gradients = {"dx": self.dy @ acting, **self.gradients(kind)}
        return gradients if task == "backward" else {**y, **gradients}

    def acting(self, kind: str) -> Array:
        """Return W', the plain weight that acts as the layer does."""
        if kind == "bare":
            return self.weight
        return self.v if kind == "LoRA" else (self.m / self.norm)[:, None] * self.v

    def gradients(self, kind: str) -> dict[str, Array]:
        """Return the gradients of the parameters, by way of dW', the gradient of W'."""
        if kind == "bare":
            return {}
        dv, dm = self.dacting, {}
        if kind != "LoRA":
            gain, along = self.m / self.norm, self.xp.vecdot(dv, self.v) / self.norm
            dm = {"dm": along}
            if kind == "exact":
                dv = dv - (along / self.norm)[:, None] * self.v
            dv = gain[:, None] * dv
        return {"dA": transpose(self.b) @ dv, "dB": self.scaling * dv @ transpose(self.a), **dm}

    @functools.cached_property
    def v(self) -> Array:
        """V, (out, in)."""
        return self.weight + self.b @ self.a

    @functools.cached_property
    def norm(self) -> Array:
        """n, (out,)."""
        return self.xp.sqrt(self.xp.vecdot(self.v, self.v))

    @functools.cached_property
    def dacting(self) -> Array:
        """dW', (out, in)."""
        return transpose(self.dy) @ self.x
