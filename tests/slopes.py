"""The derivatives of a function of a layer's inputs, by central differences.

One stack of layers has every input moved by every step, so that one forward computes all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from backends import Lane

# Truncation of order h⁴ against rounding of order ε/h: 1e-3 balances them near 1e-12.
_H = 1e-3
_STEPS = _H * np.array([-2, -1, 1, 2])
_FACTORS = np.array([1, -8, 8, -1]) / (12 * _H)


def moved(lane: Lane, inputs: dict[str, Any], directions: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs as a stack: each is moved by four steps, in layers of its own."""
    layers = {}
    for place, (name, array) in enumerate(inputs.items()):
        layers[name] = np.array(repeated(lane, array, len(inputs)))
        direction = lane.numpy(directions[name])
        layers[name][len(_STEPS) * place :][: len(_STEPS)] += np.multiply.outer(_STEPS, direction)
    return {name: lane.asarray(numbers) for name, numbers in layers.items()}


def repeated(lane: Lane, array: Any, count: int) -> np.ndarray:
    """Return an array as it is in each layer of the stack for `count` inputs."""
    numbers = lane.numpy(array)
    return np.broadcast_to(numbers, (len(_STEPS) * count, *numbers.shape))


def assert_transpose(
    lane: Lane, gradients: dict[str, Any], directions: dict[str, Any], dy: Any, y: Any
) -> None:
    """Assert ⟨Jᵀ dy, u⟩ by `backward` = ⟨dy, J u⟩ by the outputs y of the moved layers."""
    products = lane.numpy(y) * lane.numpy(dy)
    sums = products.reshape(len(directions), len(_STEPS), -1).sum(axis=2)  # (inputs, steps)
    for (name, direction), slope in zip(directions.items(), sums @ _FACTORS, strict=True):
        g, u = lane.numpy(gradients[name]), lane.numpy(direction)
        error = abs(float(np.sum(g * u)) - slope)
        assert error <= 1e-9 * np.linalg.norm(g) * np.linalg.norm(u), name
