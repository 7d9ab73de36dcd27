"""What is measured: the arrays of one layer, and what each task must come to.

    dense, in float64:   V = W + s B A      n = ‖V‖ by rows      W' = (m / n)⊙V

The dense formulas are the plain ones, so that nothing is held to itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from doraxp._base.types import Adapter, Array, Config

TASKS = ("forward", "backward", "step", "evaluation", "norm", "merge", "adamw")
DTYPES = ("float32", "float64", "float16", "bfloat16")
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Case:
    """A layer, how many tokens it is given, and the dtype that its weight is stored in."""

    out: int
    inner: int
    tokens: int
    rank: int
    dtype: str = "float32"

    def __str__(self) -> str:
        tokens = f"{self.tokens} token{'s' if self.tokens > 1 else ''}"
        return f"{self.out}×{self.inner} {self.dtype}, rank {self.rank}, {tokens}"

    @property
    def config(self) -> Config:
        """The adapter's."""
        return Config(self.rank)


class Inputs(NamedTuple):
    """The arrays of a case; all but the weight are in the compute dtype."""

    weight: Array
    adapter: Adapter
    x: Array
    dy: Array


@functools.lru_cache(maxsize=1)
def draw(case: Case) -> Inputs:
    """Return a layer after some training: ‖s B A‖ about a quarter of ‖W‖, m near the norms."""
    rng = np.random.default_rng(0)
    wide = np.float64 if case.dtype == "float64" else np.float32

    def normal(*shape: int, scale: float = 1.0) -> Array:
        array = rng.standard_normal(shape, wide)
        array *= scale
        return array

    weight = normal(case.out, case.inner, scale=case.inner**-0.5)
    lora_a = normal(case.rank, case.inner, scale=(3 * case.inner) ** -0.5)
    lora_b = normal(case.out, case.rank, scale=0.4 * case.rank**-0.5)
    magnitude = np.sqrt(np.vecdot(weight, weight)) * (1 + normal(case.out, scale=0.1))
    return Inputs(
        weight.astype(numpy_dtype(case.dtype), copy=False),
        Adapter(lora_a, lora_b, magnitude),
        normal(case.tokens, case.inner),
        normal(case.tokens, case.out),
    )


def numpy_dtype(name: str) -> Any:
    """Return a dtype of `DTYPES` as NumPy has it, bfloat16 through ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


class Dense:
    """The answers to a case. A contestant is held to those of its `kind`.

    bare: the layer without an adapter; exact, detached: DoRA by its norm gradient; LoRA.
    """

    def __init__(self, inputs: Inputs, scaling: float) -> None:
        weight, adapter, x, dy = inputs
        self.weight, self.x, self.dy = (a.astype(np.float64) for a in (weight, x, dy))
        self.a, self.b, self.m = (leaf.astype(np.float64) for leaf in adapter)
        self.b *= scaling
        self.scaling = scaling
        self.xp = array_namespace(weight)

    def answers(self, task: str, kind: str) -> dict[str, Array]:
        """Return what a contestant's results must be, by name."""
        if task == "adamw":  # g = p, and the first step is p − η g / (|g| + ε)
            leaves = {"lora_a": self.a, "lora_b": self.b / self.scaling, "magnitude": self.m}
            return {k: p - LEARNING_RATE * p / (abs(p) + 1e-8) for k, p in leaves.items()}
        if task == "norm":
            return {"W Aᵀ": self.weight @ self.a.T} if kind == "bare" else {"n": self.norm}
        acting = self.acting(kind)  # (out, in)
        if task == "merge":
            return {"W'": acting}
        y = {"y": self.x @ acting.T}  # (tokens, out)
        if task not in ("backward", "step"):
            return y
        gradients = {"dx": self.dy @ acting, **self.gradients(kind)}
        return gradients if task == "backward" else {**y, **gradients}

    def acting(self, kind: str) -> Array:
        """Return the plain weight that acts as the layer does."""
        if kind == "bare":
            return self.weight
        return self.v if kind == "LoRA" else (self.m / self.norm)[:, None] * self.v

    def gradients(self, kind: str) -> dict[str, Array]:
        """Return those of the parameters, through the gradient of the weight that acts."""
        if kind == "bare":
            return {}
        dv, dm = self.dacting, {}
        if kind != "LoRA":
            gain, along = self.m / self.norm, self.xp.vecdot(dv, self.v) / self.norm
            dm = {"dm": along}
            if kind == "exact":
                dv = dv - (along / self.norm)[:, None] * self.v
            dv = gain[:, None] * dv
        return {"dA": self.b.T @ dv, "dB": self.scaling * dv @ self.a.T, **dm}

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
        return self.dy.T @ self.x
