"""The catalogue's optimizers: three steps with given gradients.

lora_a (2, 5)   lora_b (4, 2)   magnitude (4,)
"""

from __future__ import annotations

import zlib

import numpy as np

from doraxp.testing._cases import OptimizerCase
from doraxp.testing._formulas import Arrays


def optimizer_catalogue() -> tuple[OptimizerCase, ...]:
    """Return the cases that are optimizers, with three steps each.

    Returns
    -------
    tuple of OptimizerCase
    """
    adamw = {"learning_rate": 0.02, "beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.1}
    sgd = {"learning_rate": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    return (
        _steps("adamw", "moments, bias corrections, decoupled decay", "adamw", adamw),
        _steps("adamw, first gradient 0", "A's is, as B is 0 at init", "adamw", adamw, first=0.0),
        _steps("sgd", "momentum, coupled decay", "sgd", sgd),
        _steps("lora+", "B has another rate than A", "loraplus", adamw | {"ratio": 16.0}, since=4),
        _steps(
            "scaled adamw",
            "each gradient is divided by the Gram matrix of the other factor",
            "scaled_adamw",
            adamw | {"damping": 0.05},
            since=4,
        ),
    )


def _steps(
    name: str, reason: str, optimizer: str, numbers: dict[str, float], first: float = 1.0,
    since: int = 1,
) -> OptimizerCase:  # fmt: skip
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    shapes = {"lora_a": (2, 5), "lora_b": (4, 2), "magnitude": (4,)}

    def draw(scale: float = 1.0) -> Arrays:
        return {
            key: scale * rng.standard_normal(shape).astype(np.float32).astype(float)
            for key, shape in shapes.items()
        }

    grads = (draw(first), draw(2.0), draw())
    return OptimizerCase(name, reason, optimizer, numbers, draw(), grads, since=since)
