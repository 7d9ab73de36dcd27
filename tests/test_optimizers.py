"""The optimizers against plain loops over single numbers, and the laws that they follow."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest

import doraxp
from doraxp import (
    Adapter,
    AdamWState,
    SGDState,
    adamw_init,
    adamw_step,
    clip_by_global_norm,
    sgd_init,
    sgd_step,
)

STEPS = 6
RATE = 0.03


class Dense(NamedTuple):
    """What is trained need not be an adapter."""

    weight: Any
    bias: Any


def random_adapter(draw, dtype="float64"):
    return Adapter(draw(2, 5, dtype=dtype), draw(4, 2, dtype=dtype), draw(4, dtype=dtype))


def train(backend, init, step, params, gradients, **numbers):
    """Return the parameters and the state after one step along each of `gradients`."""
    state = init(params)
    for grads in gradients:
        params, state = backend.run(step, params, grads, state, **numbers)
    return params, state


def by_loops(rule, backend, params, gradients, **numbers):
    """Step every single number by itself, in float64, with Python's arithmetic."""
    stepped = []
    for leaf, *grads in zip(params, *gradients, strict=True):
        flat = backend.numpy(leaf).astype(np.float64)
        histories = [backend.numpy(g).astype(np.float64).ravel().tolist() for g in grads]
        values = [
            rule(p, history, **numbers)
            for p, history in zip(flat.ravel().tolist(), zip(*histories, strict=True), strict=True)
        ]
        stepped.append(np.asarray(values).reshape(flat.shape))
    return type(params)(*stepped)


def sgd_of_one(p, history, *, rate, momentum, nesterov, decay):
    pushes = []
    for g in history:
        pushes.append(g + decay * p)
        velocity = sum(momentum**age * push for age, push in enumerate(reversed(pushes)))
        p -= rate * (pushes[-1] + momentum * velocity if nesterov else velocity)
    return p


def adamw_of_one(p, history, *, rate, beta1, beta2, eps, decay):
    for t in range(1, len(history) + 1):
        ages = range(t)
        weights1 = [beta1**age for age in ages]
        weights2 = [beta2**age for age in ages]
        recent = history[t - 1 :: -1] if t < len(history) else history[::-1]
        mean = sum(w * g for w, g in zip(weights1, recent, strict=True)) / sum(weights1)
        square = sum(w * g**2 for w, g in zip(weights2, recent, strict=True)) / sum(weights2)
        p -= rate * mean / (math.sqrt(square) + eps) + rate * decay * p
    return p
