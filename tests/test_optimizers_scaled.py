"""Gradients in the metric of the product B A, against plain loops, and their law."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import pytest

from doraxp import Adapter, adamw_init, adamw_step, scaled_gradients, sgd_init, sgd_step
from doraxp.backends import Operations, operations

SHAPES = {"lora_a": (2, 5), "lora_b": (4, 2), "magnitude": (4,)}


class Pair(NamedTuple):
    """A and B without a magnitude."""

    lora_b: Any
    lora_a: Any


def random_layer(draw, *stack, dtype="float64"):
    return {name: draw(*stack, *shape, dtype=dtype) for name, shape in SHAPES.items()}


# The oracle inverts a 2×2 matrix by its formula, and multiplies number by number.


def inverse(matrix):
    (a, b), (c, d) = matrix
    det = a * d - b * c
    return [[d / det, -b / det], [-c / det, a / det]]


def product(left, right):
    return [
        [
            sum(x * y for x, y in zip(row, column, strict=True))
            for column in zip(*right, strict=True)
        ]
        for row in left
    ]


def damped(gram, damping):
    return [[each + damping * (i == j) for j, each in enumerate(row)] for i, row in enumerate(gram)]


def by_loops(a, b, da, db, damping):
    a, b, da, db = (each.astype(np.float64).tolist() for each in (a, b, da, db))
    a_t, b_t = (list(zip(*each, strict=True)) for each in (a, b))
    new_a = product(inverse(damped(product(b_t, b), damping)), da)
    return np.asarray(new_a), np.asarray(product(db, inverse(damped(product(a, a_t), damping))))


@pytest.mark.dtypes("float32", "float64")
@pytest.mark.parametrize("damping", [0.0, 0.25])
def test_scaled_gradients_equal_loops(backend, draw, assert_close, dtype, damping):
    params, grads = (random_layer(draw, dtype=dtype) for _ in range(2))
    actual = backend.run(scaled_gradients, params, grads, damping=damping)
    arrays = [
        backend.numpy(tree[name]) for tree in (params, grads) for name in ("lora_a", "lora_b")
    ]
    rtol = {"float32": 1e-5, "float64": 1e-13}[dtype]
    for name, wanted in zip(("lora_a", "lora_b"), by_loops(*arrays, damping), strict=True):
        assert_close(actual[name], wanted.astype(dtype), rtol=rtol)
    assert_close(actual["magnitude"], grads["magnitude"], rtol=0)


def test_the_damping_of_the_papers_code_is_the_default(backend, draw, assert_close):
    params, grads = random_layer(draw), random_layer(draw)
    params["lora_b"] = 1e-3 * params["lora_b"]
    actual = backend.run(scaled_gradients, params, grads)
    desired = backend.run(scaled_gradients, params, grads, damping=1e-6)
    for name in SHAPES:
        assert_close(actual[name], desired[name], rtol=0)
    other = backend.run(scaled_gradients, params, grads, damping=0)
    assert np.any(backend.numpy(other["lora_a"]) != backend.numpy(actual["lora_a"]))


@pytest.mark.parametrize("seed", range(5))
def test_a_scaled_step_of_a_product_is_the_same_for_all_of_its_pairs(
    backend, draw, assert_close, seed
):
    """With A → R⁻¹A and B → B R the gradients become Rᵀ dA and dB R⁻ᵀ, and B A stays."""
    rng = np.random.default_rng(seed)
    a, b, slope = (rng.standard_normal(shape) for shape in ((2, 5), (4, 2), (4, 5)))
    turn = rng.standard_normal((2, 2)) + 2 * np.eye(2)
    products, plain = [], []
    for one, other in ((a, b), (np.linalg.inv(turn) @ a, b @ turn)):
        pair = Pair(backend.asarray(other), backend.asarray(one))
        grads = Pair(backend.asarray(slope @ one.T), backend.asarray(other.T @ slope))
        scaled = backend.run(scaled_gradients, pair, grads, damping=0)
        assert type(scaled) is Pair
        for along, found in ((scaled, products), (grads, plain)):
            new, _ = sgd_step(pair, along, sgd_init(pair), learning_rate=0.1)
            found.append(backend.numpy(new.lora_b) @ backend.numpy(new.lora_a))
    np.testing.assert_allclose(*products, rtol=0, atol=1e-11)
    assert np.max(np.abs(plain[0] - plain[1])) > 1e-3  # the law is one of the scaled gradients


def test_scaled_gradients_are_found_by_their_names(backend, draw, assert_close):
    """In a NamedTuple and a dict, at any depth; an A or a B that is alone is not scaled."""
    layers = [random_layer(draw) for _ in range(4)]
    params, grads = (
        {"x": {"q": one, "bias": one["magnitude"]}, "v": Adapter(**other), "lora_a": one["lora_a"]}
        for one, other in (layers[:2], layers[2:])
    )
    actual = backend.run(scaled_gradients, params, grads)
    assert_close(actual["lora_a"], grads["lora_a"], rtol=0)
    assert_close(actual["x"]["bias"], grads["x"]["bias"], rtol=0)
    wanted = backend.run(scaled_gradients, Adapter(**layers[0]), Adapter(**layers[2]))
    for name in SHAPES:
        assert_close(actual["x"]["q"][name], getattr(wanted, name), rtol=0)
    wanted = backend.run(scaled_gradients, layers[1], layers[3])
    for name in SHAPES:
        assert_close(getattr(actual["v"], name), wanted[name], rtol=0)


def test_a_stack_is_scaled_matrix_by_matrix(backend, draw, assert_close):
    params, grads = random_layer(draw, 3, 2), random_layer(draw, 3, 2)
    actual = backend.run(scaled_gradients, params, grads)
    for index in np.ndindex(3, 2):
        alone = (
            {name: leaf[*index, ...] for name, leaf in tree.items()} for tree in (params, grads)
        )
        desired = backend.run(scaled_gradients, *alone)
        for name in ("lora_a", "lora_b"):
            assert_close(actual[name][*index, ...], desired[name], rtol=1e-13)


@pytest.mark.dtypes("float16", "bfloat16")
def test_low_precision_gradients_are_scaled_in_float32(backend, draw, assert_close, dtype):
    params, grads = (random_layer(draw, dtype=dtype) for _ in range(2))
    actual = backend.run(scaled_gradients, params, grads)
    wide = [
        {
            name: backend.asarray(backend.numpy(leaf).astype("float32"))
            for name, leaf in tree.items()
        }
        for tree in (params, grads)
    ]
    desired = backend.run(scaled_gradients, *wide)
    for name in SHAPES:
        assert_close(actual[name], backend.numpy(desired[name]).astype(dtype), rtol=0)


@pytest.mark.dtypes("float32", "float64")
@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_a_pair_whose_matrix_is_singular_has_finite_gradients(backend, draw, dtype, damping):
    """B is 0 at the start, and then dA is too; later the columns of B may be the same."""
    params, grads = (random_layer(draw, dtype=dtype) for _ in range(2))
    zero = backend.asarray(np.zeros((2, 5), dtype))
    start = {**params, "lora_b": backend.asarray(np.zeros((4, 2), dtype))}
    first = backend.run(scaled_gradients, start, {**grads, "lora_a": zero}, damping=damping)
    np.testing.assert_array_equal(backend.numpy(first["lora_a"]), np.zeros((2, 5)))
    same = backend.asarray(np.full((4, 2), 100, dtype))
    scaled = backend.run(scaled_gradients, {**params, "lora_b": same}, grads, damping=damping)
    assert np.all(np.isfinite(backend.numpy(scaled["lora_a"])))


def test_scaled_gradients_feed_adamw(backend, draw, assert_close):
    """The moments are those of scaled gradients, as in algorithm 2 of the paper."""
    params, grads = random_layer(draw), random_layer(draw)
    scaled = backend.run(scaled_gradients, params, grads)
    _, state = backend.run(adamw_step, params, scaled, adamw_init(params), learning_rate=0.1)
    assert_close(state.mu["lora_a"], 0.1 * backend.numpy(scaled["lora_a"]), rtol=1e-15)


@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_the_gradients_that_are_scaled_keep_their_dtype(backend, draw, name):
    params, grads = random_layer(draw, dtype="float32"), random_layer(draw)
    scaled = backend.run(scaled_gradients, params, grads)
    assert scaled[name].dtype == grads[name].dtype


class WithoutLinalg:
    """The namespace of a library that does not have the extension `linalg`."""

    def __init__(self, xp):
        self.xp = xp

    def __getattr__(self, name):
        if name == "linalg":
            raise AttributeError(name)
        return getattr(self.xp, name)


def test_a_library_without_linalg_solves_too(draw, backend, assert_close):
    rows, right = draw(3, 4, 6), draw(3, 4, 5)
    matrix = rows @ backend.namespace().matrix_transpose(rows)
    wanted = np.linalg.solve(backend.numpy(matrix), backend.numpy(right))
    for ops in (
        operations(matrix=matrix, right=right),
        Operations(WithoutLinalg(backend.namespace())),
    ):
        assert_close(ops.solve(matrix, right), wanted, rtol=1e-11)


def whole(**leaves):
    return {"lora_a": np.ones((2, 5)), "lora_b": np.ones((4, 2)), **leaves}


FIT = (
    "params['q']['lora_b'] must have shape (*stack, out, rank) and params['q']['lora_a'] "
    "(*stack, rank, in), got "
)


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"lora_b": np.ones((4, 3))}, "(4, 3) and (2, 5)"),
        ({"lora_b": np.ones((1, 4, 2))}, "(1, 4, 2) and (2, 5)"),
        ({"lora_b": np.ones(2)}, "(2,) and (2, 5)"),
        ({"lora_a": np.ones(5)}, "(4, 2) and (5,)"),
        ({"lora_a": np.ones(()), "lora_b": np.ones(())}, "() and ()"),
        ({"lora_a": np.ones((2, 5, 3, 3))}, "(4, 2) and (2, 5, 3, 3)"),
    ],
)
def test_a_pair_that_is_not_a_product_is_refused(leaves, message):
    params = {"q": whole(**leaves)}
    with pytest.raises(ValueError, match=f"^{re.escape(FIT + message)}$"):
        scaled_gradients(params, params)


def test_a_damping_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match=r"^damping must be at least 0 and finite, got -1.0$"):
        scaled_gradients(whole(), whole(), damping=-1)
    with pytest.raises(TypeError, match=r"^damping must be a number, got None$"):
        scaled_gradients(whole(), whole(), damping=None)
    with pytest.raises(ValueError, match="grads and params must have the same entries"):
        scaled_gradients(whole(), {"lora_a": np.ones((2, 5))})
