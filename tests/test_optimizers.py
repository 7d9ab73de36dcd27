"""The optimizers against plain loops over single numbers, and the laws that they follow."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np
import pytest

from doraxp import (
    Adapter,
    AdamWState,
    SGDState,
    adamw_init,
    adamw_step,
    clip_by_global_norm,
    constant_schedule,
    cosine_schedule,
    linear_schedule,
    sgd_init,
    sgd_step,
)

RATES = Adapter(0.03, 0.3, 0.01)
DECAYS = Adapter(0.5, 0.2, 0.1)
OPTIMIZERS = {"sgd": (sgd_init, sgd_step), "adamw": (adamw_init, adamw_step)}

both = pytest.mark.parametrize(("init", "step"), OPTIMIZERS.values(), ids=OPTIMIZERS)


class Dense(NamedTuple):
    """What is trained need not be an adapter."""

    weight: Any
    bias: Any


def random_adapter(draw, dtype="float64"):
    return Adapter(draw(2, 5, dtype=dtype), draw(4, 2, dtype=dtype), draw(4, dtype=dtype))


def train(backend, init, step, params, gradients, **numbers):
    """Return the parameters and the state after one step along each of `gradients`."""
    state = backend.run(init, params)
    for grads in gradients:
        params, state = backend.run(step, params, grads, state, **numbers)
    return params, state


def assert_same(assert_close, actual, desired, rtol=0):
    assert type(actual) is type(desired)
    assert actual._fields == desired._fields
    for one, other in zip(actual, desired, strict=True):
        assert_close(one, other, rtol=rtol)


# The oracle: each single number by itself, in float64, with Python's arithmetic. The running
# means are written out as sums over the past, as nothing in `src` does it.


def by_loops(rule, backend, params, gradients, rates=RATES, decays=DECAYS, **numbers):
    stepped = []
    for leaf, rate, decay, *grads in zip(params, rates, decays, *gradients, strict=True):
        values = backend.numpy(leaf).astype(np.float64)
        past = [backend.numpy(g).astype(np.float64).ravel().tolist() for g in grads]
        flat = [
            rule(p, list(history), rate=rate, decay=decay, **numbers)
            for p, *history in zip(values.ravel().tolist(), *past, strict=True)
        ]
        stepped.append(np.asarray(flat).reshape(values.shape))
    return Adapter(*stepped)


def sgd_of_one(p, history, *, rate, decay, momentum=0.0, nesterov=False):
    pushes = []
    for g in history:
        pushes.append(g + decay * p)
        velocity = sum(momentum**age * push for age, push in enumerate(reversed(pushes)))
        p -= rate * (pushes[-1] + momentum * velocity if nesterov else velocity)
    return p


def adamw_of_one(p, history, *, rate, decay, beta1=0.9, beta2=0.999, eps=1e-8):
    def running_mean(values, beta):
        weights = [beta**age for age in range(len(values))]
        return sum(w * v for w, v in zip(weights, reversed(values), strict=True)) / sum(weights)

    for t in range(1, len(history) + 1):
        mean = running_mean(history[:t], beta1)
        square = running_mean([g * g for g in history[:t]], beta2)
        p -= rate * mean / (math.sqrt(square) + eps) + rate * decay * p
    return p


@pytest.mark.dtypes("float32", "float64")
@pytest.mark.parametrize(
    "numbers",
    [{}, {"momentum": 0.9}, {"momentum": 0.7, "nesterov": True}],
    ids=["plain", "momentum", "nesterov"],
)
def test_sgd_equals_loops(backend, draw, assert_close, dtype, numbers):
    params = random_adapter(draw, dtype)
    gradients = [random_adapter(draw, dtype) for _ in range(6)]
    actual, _ = train(
        backend,
        sgd_init,
        sgd_step,
        params,
        gradients,
        learning_rate=RATES,
        weight_decay=DECAYS,
        **numbers,
    )
    desired = by_loops(sgd_of_one, backend, params, gradients, **numbers)
    rtol = {"float32": 1e-6, "float64": 1e-14}[dtype]
    for one, other in zip(actual, desired, strict=True):
        assert_close(one, other.astype(dtype), rtol=rtol)


@pytest.mark.dtypes("float32", "float64")
@pytest.mark.parametrize(
    "numbers",
    [{}, {"beta1": 0.5, "beta2": 0.75, "eps": 0.1}, {"beta1": 0.0, "beta2": 0.0}],
    ids=["defaults", "others", "no-memory"],
)
def test_adamw_equals_loops(backend, draw, assert_close, dtype, numbers):
    params = random_adapter(draw, dtype)
    gradients = [random_adapter(draw, dtype) for _ in range(6)]
    actual, _ = train(
        backend,
        adamw_init,
        adamw_step,
        params,
        gradients,
        learning_rate=RATES,
        weight_decay=DECAYS,
        **numbers,
    )
    desired = by_loops(adamw_of_one, backend, params, gradients, **numbers)
    rtol = {"float32": 1e-6, "float64": 1e-13}[dtype]
    for one, other in zip(actual, desired, strict=True):
        assert_close(one, other.astype(dtype), rtol=rtol)


def test_sgd_by_hand(backend, assert_close):
    params = Adapter(*(backend.asarray(np.full(shape, 4.0)) for shape in ((1, 2), (3, 1), (3,))))
    grads = Adapter(*(backend.asarray(np.full(shape, 2.0)) for shape in ((1, 2), (3, 1), (3,))))
    numbers = {"learning_rate": 0.25, "weight_decay": 0.5, "momentum": 0.5}

    first, state = train(backend, sgd_init, sgd_step, params, [grads], **numbers)
    assert_close(state.velocity.lora_a, np.full((1, 2), 4.0), rtol=0)  # 2 + 4 / 2
    assert_close(first.lora_a, np.full((1, 2), 3.0), rtol=0)  # 4 − 4 / 4
    assert_close(first.magnitude, np.full(3, 3.5), rtol=0)  # not decayed: 4 − 2 / 4

    second, state = backend.run(sgd_step, first, grads, state, **numbers)
    assert_close(state.velocity.lora_a, np.full((1, 2), 5.5), rtol=0)  # 4 / 2 + 2 + 3 / 2
    assert_close(second.lora_a, np.full((1, 2), 1.625), rtol=0)  # 3 − 5.5 / 4

    first, _ = train(backend, sgd_init, sgd_step, params, [grads], nesterov=True, **numbers)
    assert_close(first.lora_a, np.full((1, 2), 2.5), rtol=0)  # 4 − (4 + 4 / 2) / 4


def test_adamw_by_hand(backend, assert_close):
    params = Adapter(*(backend.asarray(np.full(shape, 4.0)) for shape in ((1, 2), (3, 1), (3,))))
    grads = Adapter(*(backend.asarray(np.full(shape, -3.0)) for shape in ((1, 2), (3, 1), (3,))))
    numbers = {"learning_rate": 0.5, "beta1": 0.75, "beta2": 0.5, "eps": 1.0, "weight_decay": 0.25}
    stepped, state = train(backend, adamw_init, adamw_step, params, [grads], **numbers)
    assert int(state.step) == 1
    assert_close(state.mu.lora_b, np.full((3, 1), -0.75), rtol=0)  # −3 / 4
    assert_close(state.nu.lora_b, np.full((3, 1), 4.5), rtol=0)  # 9 / 2
    # At t = 1 the corrected moments are g and g²: the step is −3 / (3 + 1), the decay 4 / 4.
    assert_close(stepped.lora_b, np.full((3, 1), 3.875), rtol=1e-15)
    assert_close(stepped.magnitude, np.full(3, 4.375), rtol=1e-15)


def test_defaults_are_those_of_torch(backend, draw, assert_close):
    params, grads = random_adapter(draw), random_adapter(draw)
    plain, _ = train(backend, sgd_init, sgd_step, params, [grads] * 2, learning_rate=0.1)
    nothing = Adapter(0.0, 0.0, 0.0)
    rates = Adapter(0.1, 0.1, 0.1)
    desired = by_loops(sgd_of_one, backend, params, [grads] * 2, rates, nothing)
    for one, other in zip(plain, desired, strict=True):
        assert_close(one, other, rtol=1e-15)
    plain, _ = train(backend, adamw_init, adamw_step, params, [grads] * 2, learning_rate=0.1)
    decays = Adapter(0.01, 0.01, 0.0)
    desired = by_loops(adamw_of_one, backend, params, [grads] * 2, rates, decays)
    for one, other in zip(plain, desired, strict=True):
        assert_close(one, other, rtol=1e-14)


# What the state and the arguments keep


@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
@both
def test_dtype_is_kept_and_moments_are_wide(backend, draw, init, step, dtype):
    params = random_adapter(draw, dtype)
    stepped, state = train(backend, init, step, params, [params] * 2, learning_rate=RATES)
    assert [leaf.dtype for leaf in stepped] == [leaf.dtype for leaf in params]
    wide = backend.asarray(np.zeros(1, "float64" if dtype == "float64" else "float32")).dtype
    moments = state[-1]
    assert [leaf.dtype for leaf in moments] == [wide] * 3


@pytest.mark.dtypes("float16", "bfloat16")
@both
def test_low_precision_is_rounded_once(backend, draw, assert_close, init, step, dtype):
    params = random_adapter(draw, dtype)
    wide = Adapter(*(backend.asarray(backend.numpy(leaf).astype("float32")) for leaf in params))
    actual, _ = train(backend, init, step, params, [wide], learning_rate=RATES)
    desired, _ = train(backend, init, step, wide, [wide], learning_rate=RATES)
    for one, other in zip(actual, desired, strict=True):
        assert_close(one, backend.numpy(other).astype(dtype), rtol=0)


@both
def test_gradients_of_another_dtype_do_not_widen(backend, draw, init, step):
    params, grads = random_adapter(draw, "float32"), random_adapter(draw, "float64")
    stepped, state = train(backend, init, step, params, [grads], learning_rate=0.1)
    assert [leaf.dtype for leaf in (*stepped, *state[-1])] == [leaf.dtype for leaf in params] * 2


@both
def test_numpy_scalars_do_not_widen(backend, draw, init, step):
    params = random_adapter(draw, "float32")
    numbers = {"momentum": np.float64(0.5)}
    if step is adamw_step:
        numbers = {"beta1": np.float64(0.9), "beta2": np.float64(0.99), "eps": np.float64(1e-6)}
    numbers |= {"learning_rate": np.float64(0.1), "weight_decay": Adapter(*np.ones(3))}
    stepped, state = train(backend, init, step, params, [params], **numbers)
    clipped, norm = backend.run(clip_by_global_norm, params, np.float64(1.0))
    (dtype,) = {leaf.dtype for leaf in params}
    assert all(leaf.dtype == dtype for leaf in (*stepped, *state[-1], *clipped, norm))


@both
def test_arguments_are_not_written_to(backend, draw, init, step):
    params, grads = random_adapter(draw), random_adapter(draw)
    state = init(params)
    _, state = step(params, grads, state, learning_rate=0.1)
    arrays = [leaf for tree in (params, grads, *state[-2:]) if tree != state[0] for leaf in tree]
    before = [backend.numpy(leaf).copy() for leaf in arrays]
    step(params, grads, state, learning_rate=0.1)
    clip_by_global_norm(grads, 0.1)
    for leaf, values in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(backend.numpy(leaf), values)
