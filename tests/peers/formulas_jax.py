"""DoRA of convolutions by the dense formulas in JAX, with `jax.grad`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

AXES = {1: ("NCW", "OIW", "NCW"), 2: ("NCHW", "OIHW", "NCHW"), 3: ("NCDHW", "OIDHW", "NCDHW")}


class Convolution:
    """A convolution without dropout."""

    def result(
        self, leaves: Any, groups: int, scaling: float, stride: Any, padding: Any, dilation: Any
    ) -> Any:
        weight, lora_a = leaves["weight"], leaves["lora_a"]
        base = weight.reshape(*lora_a.shape[:-2], len(weight) // groups, -1)
        v = base + scaling * (leaves["lora_b"] @ lora_a)
        merged = (leaves["magnitude"] / jnp.linalg.norm(v, axis=-1))[..., None] * v
        x = leaves["x"]
        y = jax.lax.conv_general_dilated(
            x, merged.reshape(weight.shape), stride, [(p, p) for p in padding],
            rhs_dilation=dilation, feature_group_count=groups,
            dimension_numbers=AXES[x.ndim - 2], precision="highest",
        )  # fmt: skip
        if "bias" in leaves:
            y = y + leaves["bias"].reshape(-1, *(1,) * (x.ndim - 2))
        return y

    def forward(self, bias: Any, **arrays: Any) -> np.ndarray:
        leaves, numbers = split(arrays, bias)
        return np.asarray(self.result(leaves, **numbers))

    def gradients(self, dy: np.ndarray, bias: Any, **arrays: Any) -> dict[str, np.ndarray]:
        leaves, numbers = split(arrays, bias)
        found = jax.grad(lambda leaves: (self.result(leaves, **numbers) * dy).sum())(leaves)
        return {name: np.asarray(value) for name, value in found.items()}


def split(arrays: dict[str, Any], bias: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays, with the bias if there is one, and the numbers."""
    given = {name: each for name, each in arrays.items() if isinstance(each, np.ndarray)}
    numbers = {name: each for name, each in arrays.items() if name not in given}
    leaves = given if bias is None else {**given, "bias": bias}
    return {name: jnp.asarray(each) for name, each in leaves.items()}, numbers
