"""The optimizers against plain loops over single numbers, and their laws."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np
import pytest

from doraxp import (
    AdamWState,
    Adapter,
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
from doraxp.optim._trees import Aligned

RATES = Adapter(0.03, 0.3, 0.01)
DECAYS = Adapter(0.5, 0.2, 0.1)
OPTIMIZERS = {"sgd": (sgd_init, sgd_step), "adamw": (adamw_init, adamw_step)}

both = pytest.mark.parametrize(("init", "step"), OPTIMIZERS.values(), ids=OPTIMIZERS)


class Dense(NamedTuple):
    """Parameters that are not an adapter."""

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


# The oracle steps each number by itself, in float64, with Python's arithmetic. It writes the
# running means out as sums over the past; `src` computes them by recursion.


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


# Dtypes, and arguments that must not change


@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
@both
def test_parameters_keep_their_dtype_and_moments_are_wide(backend, draw, init, step, dtype):
    params = random_adapter(draw, dtype)
    stepped, state = train(backend, init, step, params, [params] * 2, learning_rate=RATES)
    assert [leaf.dtype for leaf in stepped] == [leaf.dtype for leaf in params]
    wide = backend.asarray(np.zeros(1, "float64" if dtype == "float64" else "float32")).dtype
    moments = state[-1]
    assert [leaf.dtype for leaf in moments] == [wide] * 3


@pytest.mark.dtypes("float16", "bfloat16")
@both
def test_low_precision_parameters_are_rounded_once(backend, draw, assert_close, init, step, dtype):
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
    moments = [tree for tree in state if isinstance(tree, Adapter)]
    arrays = [leaf for tree in (params, grads, *moments) for leaf in tree]
    before = [backend.numpy(leaf).copy() for leaf in arrays]
    step(params, grads, state, learning_rate=0.1)
    clip_by_global_norm(grads, 0.1)
    for leaf, values in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(backend.numpy(leaf), values)


@pytest.mark.parametrize("count", [12, 13, 30])
def test_many_leaves_of_two_compute_dtypes_are_stepped(backend, draw, assert_close, count):
    """CuPy steps 36 leaves of one compute dtype at once."""
    dtypes = ["float64" if i > 9 and i % 3 == 1 else "float32" for i in range(count)]
    params, grads = (
        {i: random_adapter(draw, dtype) for i, dtype in enumerate(dtypes)} for _ in range(2)
    )
    rates = {i: 0.01 * (i + 1) for i in range(count)}
    stepped, state = train(backend, adamw_init, adamw_step, params, [grads], learning_rate=rates)
    for i in range(count):
        numbers = {"learning_rate": rates[i]}
        alone, own = train(backend, adamw_init, adamw_step, params[i], [grads[i]], **numbers)
        rtol = np.finfo(dtypes[i]).eps if backend.fuses else 0
        for one, other in ((stepped[i], alone), (state.mu[i], own.mu), (state.nu[i], own.nu)):
            assert_same(assert_close, one, other, rtol=rtol)


# Arrays that are given up


def trained(backend, draw, dtype="float32"):
    """Return two entries of parameters, gradients, and a state that is not zero."""
    params, grads = ({name: random_adapter(draw, dtype) for name in "kq"} for _ in range(2))
    params, state = train(backend, adamw_init, adamw_step, params, [grads], learning_rate=0.1)
    return params, grads, state


def arrays_of(params, state):
    return [leaf for tree in (params, state.mu, state.nu) for name in tree for leaf in tree[name]]


def copied(backend, params, state):
    """Return equal parameters and an equal state, in arrays of their own."""

    def copy(tree):
        return {
            name: Adapter(*(backend.asarray(backend.numpy(leaf)) for leaf in tree[name]))
            for name in tree
        }

    return copy(params), AdamWState(state.step, copy(state.mu), copy(state.nu))


@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
def test_arrays_that_are_given_up_do_not_change_the_result(backend, draw, dtype):
    params, grads, state = trained(backend, draw, dtype)
    numbers = {"learning_rate": RATES, "weight_decay": 0.1}
    desired = arrays_of(*backend.run(adamw_step, params, grads, state, **numbers))
    own = copied(backend, params, state)
    result = backend.run(adamw_step, own[0], grads, own[1], **numbers, donate=True)
    assert int(result[1].step) == 2
    for one, other in zip(arrays_of(*result), desired, strict=True):
        np.testing.assert_array_equal(backend.numpy(one), backend.numpy(other))
        assert one.dtype == other.dtype


@pytest.mark.lanes("numpy", "cupy", "cuda-host")
@pytest.mark.dtypes("float16", "float32", "float64")
def test_the_results_are_the_arrays_that_were_given_up(backend, draw, dtype):
    params, grads, state = trained(backend, draw, dtype)
    given = [leaf for name in grads for leaf in grads[name]]
    before = [backend.numpy(leaf).copy() for leaf in given]
    result = backend.run(adamw_step, params, grads, state, learning_rate=0.1, donate=True)
    for one, other in zip(arrays_of(*result), arrays_of(params, state), strict=True):
        assert one is other
    for leaf, values in zip(given, before, strict=True):
        np.testing.assert_array_equal(backend.numpy(leaf), values)


@pytest.mark.lanes("numpy", "cupy", "cuda-host")
def test_an_array_that_cannot_be_reused_is_given_up_all_the_same(backend, draw, assert_close):
    """B is not in C order, and a moment is not in the compute dtype."""
    params, grads, state = trained(backend, draw)
    wide = backend.asarray(backend.numpy(state.mu["q"].lora_a).astype("float64"))
    state.mu["q"] = state.mu["q"]._replace(lora_a=wide)
    turned = backend.asarray(np.ascontiguousarray(backend.numpy(params["q"].lora_b).T)).T
    params["q"] = params["q"]._replace(lora_b=turned)
    desired = adamw_step(params, grads, state, learning_rate=0.1)
    result = backend.run(adamw_step, params, grads, state, learning_rate=0.1, donate=True)
    for one, other in zip(arrays_of(*result), arrays_of(*desired), strict=True):
        assert_close(one, other, rtol=0)


def test_an_array_that_is_read_only_is_not_written_to():
    params = whole()
    for leaf in params:
        leaf.setflags(write=False)
    stepped, _ = adamw_step(params, whole(), adamw_init(params), learning_rate=0.1, donate=True)
    for leaf, new in zip(params, stepped, strict=True):
        assert np.all(leaf == 1)
        assert np.all(new < 1)


@both
def test_a_scalar_is_a_parameter_too(backend, draw, init, step):
    params = Dense(draw(3, dtype="float32"), draw(dtype="float32"))
    stepped, _ = train(backend, init, step, params, [params] * 3, learning_rate=0.1)
    assert tuple(stepped.bias.shape) == ()
    assert stepped.bias.dtype == params.bias.dtype


# Numbers: one, or one per leaf


@both
def test_one_weight_decay_does_not_decay_the_magnitude(backend, draw, assert_close, init, step):
    params, grads = random_adapter(draw), random_adapter(draw)
    for one, explicit in [(0.5, Adapter(0.5, 0.5, 0.0)), (0, Adapter(0.0, 0, 0.0))]:
        numbers = {"learning_rate": 0.1}
        actual, _ = train(backend, init, step, params, [grads], weight_decay=one, **numbers)
        desired, _ = train(backend, init, step, params, [grads], weight_decay=explicit, **numbers)
        assert_same(assert_close, actual, desired)
    moved, _ = train(
        backend, init, step, params, [grads], weight_decay=Adapter(0, 0, 0.5), **numbers
    )
    assert_same(assert_close, moved._replace(magnitude=desired.magnitude), desired)
    shift = backend.numpy(desired.magnitude) - 0.05 * backend.numpy(params.magnitude)
    assert_close(moved.magnitude, shift, rtol=1e-15)


@both
def test_lora_plus_is_a_rate_per_leaf(backend, draw, assert_close, init, step):
    params, grads = random_adapter(draw), random_adapter(draw)
    numbers = {"weight_decay": 0.1}
    fast, _ = train(
        backend, init, step, params, [grads], learning_rate=Adapter(0.01, 0.16, 0.02), **numbers
    )
    for field, rate in [("lora_a", 0.01), ("lora_b", 0.16), ("magnitude", 0.02)]:
        plain, _ = train(backend, init, step, params, [grads], learning_rate=rate, **numbers)
        assert_close(getattr(fast, field), getattr(plain, field), rtol=0)


@both
def test_a_dict_is_stepped_entry_by_entry(backend, draw, assert_close, init, step):
    params = {"k": random_adapter(draw), "q": random_adapter(draw), "head": Dense(draw(3), draw(2))}
    gradients = [
        # The order of the keys differs: entries are matched by name.
        {"head": Dense(draw(3), draw(2)), "q": random_adapter(draw), "k": random_adapter(draw)}
        for _ in range(2)
    ]
    rates = {"q": 0.1, "head": Dense(0.2, 0.3), "k": RATES}
    decays = {"head": 0.1, "k": 0.2, "q": DECAYS}
    actual, _ = train(
        backend, init, step, params, gradients, learning_rate=rates, weight_decay=decays
    )
    assert actual.keys() == params.keys()
    for name in params:
        alone = [grads[name] for grads in gradients]
        numbers = {"learning_rate": rates[name], "weight_decay": decays[name]}
        desired, _ = train(backend, init, step, params[name], alone, **numbers)
        assert_same(assert_close, actual[name], desired)


@both
def test_numbers_for_one_adapter_serve_a_dict(backend, draw, assert_close, init, step):
    params, grads = ({"k": random_adapter(draw), "q": random_adapter(draw)} for _ in range(2))
    numbers = {"learning_rate": RATES, "weight_decay": 0.3}
    actual, _ = train(backend, init, step, params, [grads], **numbers)
    for name in params:
        desired, _ = train(backend, init, step, params[name], [grads[name]], **numbers)
        assert_same(assert_close, actual[name], desired)


@pytest.mark.dtypes("float32", "float64")
@both
def test_arrays_serve_as_numbers(backend, draw, assert_close, init, step, dtype):
    params, grads = random_adapter(draw, dtype), random_adapter(draw, dtype)
    zero_d = [backend.asarray(np.asarray(value)) for value in (0.25, 0.5)]  # float64 always
    actual, _ = train(
        backend, init, step, params, [grads], learning_rate=zero_d[0], weight_decay=zero_d[1]
    )
    desired, _ = train(backend, init, step, params, [grads], learning_rate=0.25, weight_decay=0.5)
    assert_same(assert_close, actual, desired, rtol=1e-7 if dtype == "float32" else 1e-15)


def test_a_traced_step_loses_no_digits(backend, draw, assert_close):
    params = random_adapter(draw, "float32")
    zeros = adamw_init(params).mu
    for taken in (0, 7):
        state = AdamWState(backend.asarray(np.asarray(taken)), zeros, zeros)
        actual, state = backend.run(adamw_step, params, params, state, learning_rate=1.0)
        desired, _ = adamw_step(
            params, params, state._replace(step=taken, mu=zeros, nu=zeros), learning_rate=1.0
        )
        assert int(backend.numpy(state.step)) == taken + 1
        assert_same(assert_close, actual, desired, rtol=1e-6)


def test_a_traced_step_keeps_the_dtype_of_each_leaf(backend, draw):
    params = random_adapter(draw)._replace(magnitude=draw(4, dtype="float32"))
    state = adamw_init(params)._replace(step=backend.asarray(np.asarray(0)))
    stepped, state = backend.run(adamw_step, params, params, state, learning_rate=1.0)
    dtypes = [leaf.dtype for leaf in params]
    for tree in (stepped, state.mu, state.nu):
        assert [leaf.dtype for leaf in tree] == dtypes


# Clipping


@pytest.mark.dtypes("float32", "float64")
def test_clipping_scales_all_gradients_to_the_bound(backend, draw, assert_close, dtype):
    grads = {
        "q": random_adapter(draw, dtype),
        "head": Dense(draw(3, dtype=dtype), draw(2, 2, dtype=dtype)),
    }
    values = {name: [backend.numpy(leaf) for leaf in grads[name]] for name in grads}
    squares = [float(value) ** 2 for name in values for leaf in values[name] for value in leaf.flat]
    length = math.sqrt(sum(squares))
    clipped, norm = backend.run(clip_by_global_norm, grads, 0.5)
    rtol = {"float32": 5e-7, "float64": 1e-15}[dtype]
    assert_close(norm, np.asarray(length, dtype), rtol=rtol)
    assert clipped.keys() == grads.keys()
    for name in grads:
        for leaf, given in zip(clipped[name], values[name], strict=True):
            assert_close(leaf, (0.5 / length * given.astype("float64")).astype(dtype), rtol=rtol)


def test_gradients_within_the_bound_are_unchanged(backend, draw, assert_close):
    grads = random_adapter(draw, "float32")
    _, norm = clip_by_global_norm(grads, 1.0)
    for bound in (float(backend.numpy(norm)), 1e30):
        clipped, _ = backend.run(clip_by_global_norm, grads, bound)
        assert_same(assert_close, clipped, grads)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_the_norm_neither_overflows_nor_underflows(backend, assert_close, scale):
    leaves = (np.full(shape, scale, "float32") for shape in ((1, 2), (1, 1), (1,)))
    grads = Adapter(*(backend.asarray(leaf) for leaf in leaves))
    clipped, norm = backend.run(clip_by_global_norm, grads, scale)
    assert_close(norm, np.asarray(2 * scale, "float32"), rtol=2e-7)
    assert_close(clipped.lora_a, np.full((1, 2), scale / 2, "float32"), rtol=2e-7)


def test_zero_gradients_are_unchanged(backend, assert_close):
    grads = Dense(*(backend.asarray(np.zeros(shape)) for shape in ((2, 3), (2,))))
    clipped, norm = backend.run(clip_by_global_norm, grads, 1.0)
    assert_close(norm, np.zeros(()), rtol=0)
    assert_same(assert_close, clipped, grads)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_makes_the_norm_nan(backend, bad):
    """And no warning comes, though the numbers beside it are so large that squares overflow."""
    values = (np.array([[1.0, bad]], "float32"), np.array([3e38], "float32"))
    clipped, norm = backend.run(clip_by_global_norm, Dense(*map(backend.asarray, values)), 1.0)
    assert np.isnan(backend.numpy(norm))
    for leaf, given in zip(clipped, values, strict=True):
        np.testing.assert_array_equal(backend.numpy(leaf), given)


@pytest.mark.dtypes("float32", "float64")
def test_finite_gradients_whose_norm_overflows_are_clipped(backend, dtype, assert_close):
    """The norm is infinite then. Small numbers beside the large ones keep their digits."""
    most = 0.9 * float(np.finfo(dtype).max)
    values = np.full((2, 5), most, dtype), np.array([-most, 0, 1e10], dtype)
    clipped, norm = backend.run(clip_by_global_norm, Dense(*map(backend.asarray, values)), 1e20)
    assert np.isposinf(backend.numpy(norm))
    part = 1e20 / math.sqrt(11)
    wanted = np.full((2, 5), part, dtype), np.array([-part, 0, part * (1e10 / most)], dtype)
    for leaf, given in zip(clipped, wanted, strict=True):
        assert_close(leaf, given, rtol=4 * np.finfo(dtype).eps)


@pytest.mark.dtypes("float16", "bfloat16")
def test_low_precision_gradients_are_clipped_in_float32(backend, assert_close, dtype):
    grads = Dense(*(backend.asarray(np.full(2, 300.0).astype(dtype)) for _ in range(2)))
    clipped, norm = backend.run(clip_by_global_norm, grads, 3.0)
    assert_close(norm, np.asarray(2 * backend.numpy(grads.bias)[0], "float32"), rtol=1e-6)
    assert_close(clipped.bias, np.full(2, 1.5).astype(dtype), rtol=0)


# Schedules


def test_constant_schedule_warms_up_and_stays():
    assert [constant_schedule(0.5)(step) for step in (0, 1, 10**6)] == [0.5] * 3
    schedule = constant_schedule(0.5, warmup_steps=3)
    assert [schedule(step) for step in range(6)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("schedule", [linear_schedule, cosine_schedule])
def test_a_decaying_schedule_at_its_first_and_last_steps(schedule):
    full = schedule(0.8, total_steps=10)
    assert full(0) == 0.8
    assert full(5) == pytest.approx(0.4, rel=1e-15)
    assert 0 < full(9) < full(8) < 0.8
    assert [full(step) for step in (10, 11, 10**6)] == [0.0] * 3

    warm = schedule(0.8, total_steps=12, warmup_steps=4, final=0.3)
    assert [warm(step) for step in range(4)] == [0.8 * k / 5 for k in (1, 2, 3, 4)]
    assert warm(4) == 0.8
    assert warm(8) == pytest.approx(0.55, rel=1e-15)
    assert 0.3 < warm(11) < warm(10) < 0.8
    assert [warm(step) for step in (12, 13)] == [0.3] * 2

    all_warm = schedule(0.8, total_steps=3, warmup_steps=3, final=0.1)
    assert [all_warm(step) for step in range(4)] == [0.8 / 4, 1.6 / 4, 0.8 * 3 / 4, 0.1]


def test_a_decaying_schedule_between_its_ends():
    assert linear_schedule(0.8, total_steps=8, final=0.4)(2) == pytest.approx(0.7, rel=1e-15)
    quarter = 0.4 + 0.2 * (1 + math.sqrt(0.5))
    assert cosine_schedule(0.8, total_steps=8, final=0.4)(2) == pytest.approx(quarter, rel=1e-15)


@pytest.mark.parametrize(
    "schedule",
    [
        constant_schedule(np.float32(0.5), warmup_steps=np.int64(2)),
        linear_schedule(1, total_steps=np.int64(6), warmup_steps=2),
        cosine_schedule(1, total_steps=6, warmup_steps=2, final=np.float64(0.5)),
    ],
)
def test_schedules_return_python_floats(schedule):
    assert {type(schedule(step)) for step in (0, 2, np.int64(3), 7)} == {float}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: constant_schedule(-1),
            ValueError,
            "learning_rate must be at least 0 and finite, got -1.0",
        ),
        (lambda: constant_schedule("1"), TypeError, "learning_rate must be a number, got '1'"),
        (
            lambda: constant_schedule(1, warmup_steps=-1),
            ValueError,
            "warmup_steps must be at least 0, got -1",
        ),
        (
            lambda: constant_schedule(1, warmup_steps=1.5),
            TypeError,
            "warmup_steps must be an integer, got 1.5",
        ),
        (
            lambda: constant_schedule(1, warmup_steps=True),
            TypeError,
            "warmup_steps must be an integer, got True",
        ),
        (lambda: constant_schedule(1)(-1), ValueError, "step must be at least 0, got -1"),
        (
            lambda: linear_schedule(math.nan, total_steps=1),
            ValueError,
            "learning_rate must be at least 0 and finite, got nan",
        ),
        (
            lambda: linear_schedule(1, total_steps=0),
            ValueError,
            "total_steps must be at least 1, got 0",
        ),
        (
            lambda: linear_schedule(1, total_steps=2, final=math.inf),
            ValueError,
            "final must be at least 0 and finite, got inf",
        ),
        (
            lambda: cosine_schedule(1, total_steps=2, warmup_steps=-1),
            ValueError,
            "warmup_steps must be at least 0, got -1",
        ),
        (
            lambda: cosine_schedule(1, total_steps=2, warmup_steps=3),
            ValueError,
            "warmup_steps must be at most total_steps = 2, got 3",
        ),
    ],
)
def test_bad_arguments_of_a_schedule_are_refused(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


# Errors


def whole(**leaves):
    return Adapter(np.ones((2, 5)), np.ones((4, 2)), np.ones(4))._replace(**leaves)


ONE, TWO = {"q": whole()}, {"q": whole(), "k": whole()}
TREES = [  # params, grads, error, message
    (
        whole(),
        whole(lora_a=np.ones((2, 4))),
        ValueError,
        "grads.lora_a must have the shape of params.lora_a, (2, 5), got (2, 4)",
    ),
    (
        TWO,
        {**TWO, "k": whole(magnitude=np.ones((4, 1)))},
        ValueError,
        "grads['k'].magnitude must have the shape of params['k'].magnitude, (4,), got (4, 1)",
    ),
    (
        ONE,
        whole(),
        ValueError,
        "grads and params must have the same entries; missing: grads['q'].lora_a, "
        "grads['q'].lora_b, grads['q'].magnitude, params.lora_a, params.lora_b, "
        "params.magnitude",
    ),
    (
        ONE,
        {"q": Dense(np.ones(1), np.ones(1))},
        ValueError,
        "grads and params must have the same entries; missing: grads['q'].lora_a, "
        "grads['q'].lora_b, grads['q'].magnitude, params['q'].weight, params['q'].bias",
    ),
    (
        whole(),
        whole(lora_b=np.ones((4, 2), int)),
        TypeError,
        "grads.lora_b must be of dtype float16, bfloat16, float32, float64, got int64",
    ),
    (
        ONE,
        {"q": whole(lora_b=None)},
        TypeError,
        "grads['q'].lora_b must be an array of a library that array-api-compat knows, got NoneType",
    ),
    (
        [whole()],
        whole(),
        TypeError,
        "params must be a NamedTuple of arrays or a dict of arrays and such trees, got list",
    ),
    (
        ONE,
        {"q": np.ones(3)},
        ValueError,
        "grads and params must have the same entries; missing: grads['q'].lora_a, "
        "grads['q'].lora_b, grads['q'].magnitude, params['q']",
    ),
    ({}, {}, ValueError, "params must hold at least one array, got {}"),
]
RATE_RULE = "must be a number or a 0-d array of the library of params, got"
NUMBERS = [  # value of learning_rate or of weight_decay, params, error, message after the name
    (np.array(-0.5), whole(), ValueError, " must be at least 0 and finite, got -0.5"),
    (np.array(1j), whole(), TypeError, " must be of a real dtype, got complex128"),
    (-1, whole(), ValueError, " must be at least 0 and finite, got -1.0"),
    (math.inf, whole(), ValueError, " must be at least 0 and finite, got inf"),
    (True, whole(), TypeError, " must be a number, got True"),
    ("a", whole(), TypeError, f" {RATE_RULE} 'a'"),
    (None, whole(), TypeError, f" {RATE_RULE} None"),
    (np.ones(1), whole(), TypeError, f" {RATE_RULE} array([1.])"),
    (Adapter(1, 1, -1), whole(), ValueError, ".magnitude must be at least 0 and finite, got -1.0"),
    (
        {"q": 1},
        whole(),
        ValueError,
        " and params must have the same entries; missing: {name}.lora_a, {name}.lora_b, "
        "{name}.magnitude, params['q']",
    ),
    (Adapter(1, {}, 1), ONE, TypeError, f"['q'].lora_b {RATE_RULE} {{}}"),
    ({"q": 1, "k": -1}, TWO, ValueError, "['k'] must be at least 0 and finite, got -1.0"),
    (
        {"v": 1},
        ONE,
        ValueError,
        " and params must have the same entries; missing: {name}['q'], params['v']",
    ),
    (
        {"q": 1, "k": Dense(1, 1)},
        TWO,
        ValueError,
        " and params must have the same entries; missing: {name}['k'].lora_a, "
        "{name}['k'].lora_b, {name}['k'].magnitude, params['k'].weight, params['k'].bias",
    ),
]
LIMITS = [
    (sgd_step, "momentum", 1, "must be at least 0 and below 1, got 1.0"),
    (sgd_step, "momentum", -0.1, "must be at least 0 and below 1, got -0.1"),
    (adamw_step, "beta1", 1, "must be at least 0 and below 1, got 1.0"),
    (adamw_step, "beta2", 1.5, "must be at least 0 and below 1, got 1.5"),
    (adamw_step, "eps", 0, "must be above 0 and finite, got 0.0"),
    (adamw_step, "eps", math.nan, "must be above 0 and finite, got nan"),
]


def exactly(message):
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize(("params", "grads", "error", "message"), TREES, ids=range(len(TREES)))
@both
def test_trees_that_do_not_fit_are_refused(init, step, params, grads, error, message):
    state = init(TWO if params is TWO else ONE if isinstance(params, dict) else whole())
    with pytest.raises(error, match=exactly(message)):
        step(params, grads, state, learning_rate=0.1)


@pytest.mark.parametrize(
    ("step", "state", "name"),
    [
        (sgd_step, SGDState(ONE), "state.velocity"),
        (adamw_step, AdamWState(0, ONE, whole()), "state.mu"),
        (adamw_step, AdamWState(0, whole(), ONE), "state.nu"),
    ],
)
def test_a_state_of_other_parameters_is_refused(step, state, name):
    message = f"{name} and params must have the same entries; missing: {name}.lora_a, "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        step(whole(), whole(), state, learning_rate=0.1)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
@pytest.mark.parametrize(("value", "params", "error", "message"), NUMBERS, ids=range(len(NUMBERS)))
@both
def test_numbers_that_do_not_fit_are_refused(init, step, name, value, params, error, message):
    numbers = {"learning_rate": 0.1, name: value}
    message = name + message.replace("{name}", name)
    with pytest.raises(error, match=exactly(message)):
        step(params, params, init(params), **numbers)


@pytest.mark.parametrize(("step", "name", "value", "message"), LIMITS)
def test_numbers_out_of_range_are_refused(step, name, value, message):
    init = sgd_init if step is sgd_step else adamw_init
    with pytest.raises(ValueError, match=exactly(f"{name} {message}")):
        step(whole(), whole(), init(whole()), learning_rate=0.1, **{name: value})
    with pytest.raises(TypeError, match=exactly(f"{name} must be a number, got None")):
        step(whole(), whole(), init(whole()), learning_rate=0.1, **{name: None})


def test_an_eps_below_the_smallest_normal_is_refused():
    narrow = Adapter(*(np.asarray(leaf, dtype="float32") for leaf in whole()))
    state = adamw_init(narrow)
    least = float(np.finfo("float32").smallest_normal)
    with pytest.raises(
        ValueError, match=exactly(f"eps must be at least {least} in float32, got 1e-50")
    ):
        adamw_step(narrow, narrow, state, learning_rate=0.1, eps=1e-50)
    adamw_step(narrow, narrow, state, learning_rate=0.1, eps=least)
    adamw_step(whole(), whole(), adamw_init(whole()), learning_rate=0.1, eps=1e-50)


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (-1, ValueError, "state.step must be at least 0, got -1"),
        (2.0, TypeError, "state.step must be an integer, got 2.0"),
        ("1", TypeError, "state.step must be an integer, got '1'"),
        (np.array(1.0), TypeError, "state.step must be an integer, got array(1.)"),
        (np.array([1]), TypeError, "state.step must be an integer, got array([1])"),
    ],
)
def test_a_step_that_is_not_a_count_is_refused(step, error, message):
    state = adamw_init(whole())._replace(step=step)
    with pytest.raises(error, match=exactly(message)):
        adamw_step(whole(), whole(), state, learning_rate=0.1)


def test_an_array_that_is_given_up_twice_is_refused():
    """As a parameter and a gradient too: a step that writes p would lose g of another leaf."""
    params, grads = {"q": whole(), "k": whole()}, {"q": whole(), "k": whole()}
    state, rule = adamw_init(params), "with donate each array must occur once, but"
    shared = {**params, "k": params["q"]}
    message = exactly(f"{rule} params['q'].lora_a and params['k'].lora_a are the same one")
    with pytest.raises(ValueError, match=message):
        adamw_step(shared, grads, state, learning_rate=0.1, donate=True)
    crossed = {**grads, "k": grads["k"]._replace(magnitude=params["q"].magnitude)}
    message = exactly(f"{rule} params['q'].magnitude and grads['k'].magnitude are the same one")
    with pytest.raises(ValueError, match=message):
        adamw_step(params, crossed, state, learning_rate=0.1, donate=True)
    adamw_step(shared, crossed, state, learning_rate=0.1)


def test_donate_that_is_not_a_bool_is_refused():
    with pytest.raises(TypeError, match="donate must be True or False, got 1"):
        adamw_step(whole(), whole(), adamw_init(whole()), learning_rate=0.1, donate=1)


@both
def test_keys_that_are_equal_but_of_two_types_differ(init, step):
    message = "grads and params must have the same entries; missing: grads[1].lora_a"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        step({1: whole()}, {True: whole()}, init({1: whole()}), learning_rate=0.1)


@both
def test_trees_in_trees_are_stepped(backend, draw, assert_close, init, step):
    params, grads = ({"block": {0: random_adapter(draw)}} for _ in range(2))
    actual, _ = train(backend, init, step, params, [grads], learning_rate=RATES)
    alone = params["block"][0], [grads["block"][0]]
    desired, _ = train(backend, init, step, *alone, learning_rate=RATES)
    assert_same(assert_close, actual["block"][0], desired)


def test_a_state_of_another_optimizer_is_refused():
    with pytest.raises(TypeError, match="state must be of type AdamWState, got SGDState"):
        adamw_step(whole(), whole(), sgd_init(whole()), learning_rate=0.1)
    with pytest.raises(TypeError, match="state must be of type SGDState, got NoneType"):
        sgd_step(whole(), whole(), None, learning_rate=0.1)


def test_nesterov_that_is_not_a_bool_is_refused():
    with pytest.raises(TypeError, match="nesterov must be True or False, got 'no'"):
        sgd_step(whole(), whole(), sgd_init(whole()), learning_rate=0.1, nesterov="no")


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(
        ValueError, match=exactly("nesterov must come with a momentum above 0, got 0.0")
    ):
        sgd_step(whole(), whole(), sgd_init(whole()), learning_rate=0.1, nesterov=True)


@pytest.mark.parametrize("bound", [0, -1.0, math.inf, math.nan])
def test_a_bad_bound_is_refused(bound):
    message = f"max_norm must be above 0 and finite, got {float(bound)}"
    with pytest.raises(ValueError, match=exactly(message)):
        clip_by_global_norm(whole(), bound)
    with pytest.raises(TypeError, match=exactly("max_norm must be a number, got '1'")):
        clip_by_global_norm(whole(), "1")


def test_arguments_that_are_not_trees_are_refused():
    for call in (sgd_init, adamw_init):
        with pytest.raises(TypeError, match=exactly(TREES[6][3])):
            call([whole()])
    with pytest.raises(TypeError, match=exactly(TREES[6][3].replace("params", "grads"))):
        clip_by_global_norm([whole()], 1.0)
    with pytest.raises(ValueError, match=exactly("grads must hold at least one array, got {}")):
        clip_by_global_norm({}, 1.0)


class Foreign:
    """A 0-d array whose library is not installed."""

    ndim = 0
    shape = ()

    def __array_namespace__(self, api_version=None):
        return math

    def __repr__(self):
        return "Foreign()"


@both
def test_arrays_of_two_libraries_are_refused(init, step):
    state = init(whole())
    message = exactly(
        "all arrays must be of one library: params.lora_a is of numpy, grads.lora_b of math"
    )
    with pytest.raises(TypeError, match=message):
        step(whole(), whole(lora_b=Foreign()), state, learning_rate=0.1)
    for name in ("learning_rate", "weight_decay"):
        numbers = {"learning_rate": 0.1, name: Foreign()}
        with pytest.raises(TypeError, match=exactly(f"{name} {RATE_RULE} Foreign()")):
            step(whole(), whole(), state, **numbers)


def test_a_column_is_built_in_the_structure_of_its_own_tree():
    first = {"x": Adapter(np.ones(2), np.ones(3), np.ones(4)), "y": Adapter(*np.ones((3, 2)))}
    second = {"y": first["y"], "x": first["x"]}
    aligned = Aligned({"params": first, "grads": second})
    assert aligned.build("params", aligned.columns[0]) is first
    built = aligned.build("grads", [array + 1 for array in aligned.columns[0]])
    assert list(built) == ["y", "x"]
    np.testing.assert_array_equal(built["x"].magnitude, 2 * np.ones(4))


def test_an_entry_beside_good_ones_is_named():
    good = Adapter(*np.ones((3, 2)))
    message = r"params\['y'\] must be an array of a library that array-api-compat knows, got int"
    with pytest.raises(TypeError, match=message):
        Aligned({"params": {"x": good, "y": 3}})
