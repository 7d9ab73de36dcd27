"""forward, backward and merge equal the oracle, and obey the laws that connect them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference

import doraxp
from doraxp import Adapter, Config
from doraxp.backends import operations

FORMS = ("weight", "direction")
NORM_GRADIENTS = ("exact", "detached")
RTOL = {"float32": 4e-6, "float64": 1e-14}


def random_adapter(draw, config, *stack, out, inner, dtype="float64"):
    return Adapter(
        draw(*stack, config.rank, inner, dtype=dtype),
        draw(*stack, out, config.rank, dtype=dtype),
        draw(*stack, out, dtype=dtype),  # negative ones too
    )


def solve(backend, x, weight, adapter, config, bias, dy):
    layer = reference.Layer(
        *(backend.numpy(array) for array in (weight, *adapter)), config.scaling, config.form
    )
    x, bias, dy = (backend.numpy(array) for array in (x, bias, dy))
    return reference.solve(layer, x, bias, dy, config.norm_gradient)


@pytest.mark.dtypes("float32", "float64")
@pytest.mark.parametrize("norm_gradient", NORM_GRADIENTS)
@pytest.mark.parametrize("form", FORMS)
def test_core_equals_oracle(backend, draw, assert_close, form, norm_gradient, dtype):
    config = Config(3, 5.0, form=form, norm_gradient=norm_gradient)
    weight = draw(7, 6, dtype=dtype)  # all sizes different: a swapped axis fails
    adapter = random_adapter(draw, config, out=7, inner=6, dtype=dtype)
    x, bias, dy = draw(5, 6, dtype=dtype), draw(7, dtype=dtype), draw(5, 7, dtype=dtype)

    prepared = backend.run(doraxp.prepare, weight, adapter, config)
    y, cache = backend.run(doraxp.forward, x, weight, adapter, config, bias=bias)
    grads = backend.run(doraxp.backward, dy, cache, train_base=True)
    merged = backend.run(doraxp.merge, weight, adapter, config)

    expected = solve(backend, x, weight, adapter, config, bias, dy)
    actual = {
        "norm": prepared.norm,
        "merged": merged,
        "y": y,
        "x": grads.x,
        **grads.adapter._asdict(),
        "weight": grads.weight,
        "bias": grads.bias,
    }
    for name, array in actual.items():
        assert_close(array, getattr(expected, name).astype(dtype), rtol=RTOL[dtype])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm_gradient", NORM_GRADIENTS)
def test_a_stack_equals_its_layers_one_by_one(backend, draw, assert_close, form, norm_gradient):
    config = Config(2, form=form, norm_gradient=norm_gradient)
    stack = (2, 3)
    weight = draw(*stack, 7, 6)
    adapter = random_adapter(draw, config, *stack, out=7, inner=6)
    x, bias, dy = draw(*stack, 5, 6), draw(*stack, 7), draw(*stack, 5, 7)
    y, cache = backend.run(doraxp.forward, x, weight, adapter, config, bias=bias)
    grads = backend.run(doraxp.backward, dy, cache, train_base=True)
    merged = backend.run(doraxp.merge, weight, adapter, config)
    for i in range(2):
        for j in range(3):
            one = Adapter(*(leaf[i, j, ...] for leaf in adapter))
            y_one, cache_one = doraxp.forward(
                x[i, j, ...], weight[i, j, ...], one, config, bias=bias[i, j, ...]
            )
            grads_one = doraxp.backward(dy[i, j, ...], cache_one, train_base=True)
            assert_close(y[i, j, ...], y_one, rtol=1e-14)
            merged_one = doraxp.merge(weight[i, j, ...], one, config)
            assert_close(merged[i, j, ...], merged_one, rtol=1e-14)
            assert_close(grads.x[i, j, ...], grads_one.x, rtol=1e-14)
            assert_close(grads.weight[i, j, ...], grads_one.weight, rtol=1e-13)
            assert_close(grads.bias[i, j, ...], grads_one.bias, rtol=1e-14)
            for leaf, leaf_one in zip(grads.adapter, grads_one.adapter, strict=True):
                assert_close(leaf[i, j, ...], leaf_one, rtol=1e-13)


@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3), (3, 1, 2)])
def test_leading_axes_of_x_are_tokens(backend, draw, assert_close, stack, leading):
    config = Config(2)
    weight = draw(*stack, 7, 6)
    adapter = random_adapter(draw, config, *stack, out=7, inner=6)
    x, dy = draw(*stack, *leading, 6), draw(*stack, *leading, 7)
    tokens = math.prod(leading)
    xp = backend.namespace()
    y, cache = backend.run(doraxp.forward, x, weight, adapter, config)
    grads = backend.run(doraxp.backward, dy, cache)
    y_flat, cache_flat = doraxp.forward(xp.reshape(x, (*stack, tokens, 6)), weight, adapter, config)
    grads_flat = doraxp.backward(xp.reshape(dy, (*stack, tokens, 7)), cache_flat)
    assert y.shape == dy.shape
    assert_close(y, xp.reshape(y_flat, dy.shape), rtol=1e-14)
    assert_close(grads.x, xp.reshape(grads_flat.x, x.shape), rtol=1e-14)
    for leaf, leaf_flat in zip(grads.adapter, grads_flat.adapter, strict=True):
        assert_close(leaf, leaf_flat, rtol=1e-14)


@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
@pytest.mark.parametrize("stack", [(), (3,)])
def test_identity_at_init_is_exact(backend, draw, assert_close, dtype, stack):
    config = Config(4, 8.0)
    weight, x = draw(*stack, 33, 65, dtype=dtype), draw(*stack, 5, 65, dtype=dtype)
    adapter = backend.run(doraxp.init, weight, config, seed=0)
    prepared = backend.run(doraxp.prepare, weight, adapter, config)
    y, _ = backend.run(doraxp.forward, x, weight, adapter, config)
    xp = backend.namespace()
    wide = xp.float64 if dtype == "float64" else xp.float32
    if backend.name in ("cupy", "cuda-host"):  # cuBLAS may round one product in several ways
        ops = operations(weight=weight)
        base = ops.product(x, xp.matrix_transpose(weight))
    else:
        base = backend.run(
            lambda x, w: x @ xp.matrix_transpose(w), xp.astype(x, wide), xp.astype(weight, wide)
        )
    assert_close(prepared.gain, np.ones((*stack, 33), backend.numpy(base).dtype), rtol=0)
    assert_close(y, xp.astype(base, x.dtype), rtol=0)
    assert_close(backend.run(doraxp.merge, weight, adapter, config), weight, rtol=0)


@pytest.mark.lanes("numpy", "strict", "torch")
@pytest.mark.dtypes("float32", "float64")
@pytest.mark.parametrize("tokens", [1, 5])
def test_identity_with_an_earlier_norm_is_that_of_its_one_product(
    backend, draw, assert_close, dtype, tokens
):
    """One product takes x and A, and may round x Wᵀ in another way than a product of x alone."""
    xp, config = backend.namespace(), Config(4, 8.0)
    weight, x = draw(48, 64, dtype=dtype), draw(tokens, 64, dtype=dtype)
    first, other = (doraxp.init(weight, config, seed=seed) for seed in (0, 1))
    previous = doraxp.prepare(weight, first, config)
    y, cache = backend.run(doraxp.forward, x, weight, other, config, previous=previous)
    both = xp.concat([x, other.lora_a]) @ xp.matrix_transpose(weight)
    assert_close(y, both[:tokens, :], rtol=0)
    assert_close(cache.prepared.gain, np.ones(48, dtype), rtol=0)
    merged = doraxp.merge(weight, other, config, prepared=cache.prepared)
    assert_close(merged, weight, rtol=0)


def test_merge_equals_forward(backend, draw, assert_close):
    config = Config(3, 4.0, rslora=True)
    weight, x = draw(7, 6), draw(5, 6)
    adapter = random_adapter(draw, config, out=7, inner=6)
    y, _ = backend.run(doraxp.forward, x, weight, adapter, config)
    merged = backend.run(doraxp.merge, weight, adapter, config)
    assert_close(y, x @ backend.namespace().matrix_transpose(merged), rtol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_a_prepared_norm_changes_no_result(backend, draw, assert_close, form):
    config = Config(3, form=form)
    weight, x = draw(7, 6), draw(5, 6)
    adapter = random_adapter(draw, config, out=7, inner=6)
    prepared = backend.run(doraxp.prepare, weight, adapter, config)
    # jit returns new arrays: the prepared norm belongs to those that it holds.
    weight, adapter = prepared.weight, prepared.adapter
    plain, _ = doraxp.forward(x, weight, adapter, config)
    again = doraxp.prepare(weight, adapter, config, previous=prepared)
    for reused in (prepared, again):
        y, _ = doraxp.forward(x, weight, adapter, config, prepared=reused)
        assert_close(y, plain, rtol=1e-15)
        merged = doraxp.merge(weight, adapter, config, prepared=reused)
        assert_close(merged, doraxp.merge(weight, adapter, config), rtol=1e-15)


@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize("form", FORMS)
def test_an_earlier_norm_changes_no_result(backend, draw, assert_close, form, stack):
    """W Aᵀ is then a part of the product x Wᵀ. A row that cancels is still noticed."""
    config = Config(3, form=form)
    adapter = random_adapter(draw, config, *stack, out=7, inner=6)
    rows = backend.numpy(draw(*stack, 7, 6)).copy()
    update = backend.numpy(adapter.lora_b) @ backend.numpy(adapter.lora_a)
    rows[..., 2, :] = -update[..., 2, :] * (1 + 1e-6)
    weight, x, dy = backend.asarray(rows), draw(*stack, 5, 6), draw(*stack, 5, 7)
    other = random_adapter(draw, config, *stack, out=7, inner=6)
    previous = backend.run(doraxp.prepare, weight, other, config)
    weight = previous.weight  # jit returns a new array
    y, cache = doraxp.forward(x, weight, adapter, config)
    y_again, again = doraxp.forward(x, weight, adapter, config, previous=previous)
    assert_close(y_again, y, rtol=1e-13)
    assert_close(again.prepared.norm, cache.prepared.norm, rtol=1e-13)
    grads, grads_again = (doraxp.backward(dy, each) for each in (cache, again))
    for actual, desired in zip(grads_again.adapter, grads.adapter, strict=True):
        assert_close(actual, desired, rtol=1e-12)
    assert again.prepared.weight_squares is previous.weight_squares


def test_prepare_reuses_the_squares_of_the_weight(draw, backend, monkeypatch):
    weight, config = draw(7, 6), Config(2)
    adapter = random_adapter(draw, config, out=7, inner=6)
    first = doraxp.prepare(weight, adapter, config)

    def refuse(*_):
        raise AssertionError("‖w‖² was computed again")

    ops = doraxp.backends.operations(weight=weight)
    monkeypatch.setattr(ops, "row_squares", refuse)
    assert doraxp.prepare(weight, adapter, config, previous=first).weight_squares is (
        first.weight_squares
    )
    with pytest.raises(AssertionError, match="computed again"):
        doraxp.prepare(weight, adapter, config)


def test_squares_of_another_dtype_are_not_reused(backend, draw):
    config = Config(2)
    weight = draw(7, 6, dtype="float32")
    narrow = random_adapter(draw, config, out=7, inner=6, dtype="float32")
    wide = random_adapter(draw, config, out=7, inner=6, dtype="float64")
    first = doraxp.prepare(weight, narrow, config)
    again = doraxp.prepare(weight, wide, config, previous=first)
    assert again.norm.dtype == again.weight_squares.dtype == wide.lora_a.dtype


@pytest.mark.uses("NaN")
def test_exact_and_detached_agree_where_the_norm_term_is_zero(backend, draw, assert_close):
    weight, x = draw(7, 6), draw(5, 6)
    exact, detached = Config(2), Config(2, norm_gradient="detached")
    adapter = random_adapter(draw, exact, out=7, inner=6)
    y, cache = backend.run(doraxp.forward, x, weight, adapter, exact)
    _, cache_detached = backend.run(doraxp.forward, x, weight, adapter, detached)
    # Subtract from dy its part along z: then e = Σ dy⊙z = 0.
    xp = backend.namespace()
    z = y / adapter.magnitude
    dy = draw(5, 7)
    dy = dy - z * (xp.sum(dy * z, axis=0) / xp.sum(z * z, axis=0))
    grads = backend.run(doraxp.backward, dy, cache)
    grads_detached = backend.run(doraxp.backward, dy, cache_detached)
    for leaf, leaf_detached in zip(grads.adapter[:2], grads_detached.adapter[:2], strict=True):
        assert_close(leaf, leaf_detached, rtol=1e-13)


@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
def test_conversion_keeps_the_merged_weight(backend, draw, assert_close, source, target):
    config = Config(3, 2.0, form=source)
    weight = backend.asarray(backend.numpy(draw(7, 6)) * np.array([[0.0]] + [[3.0]] * 6))
    adapter = random_adapter(draw, config, out=7, inner=6)
    converted, other = backend.run(doraxp.convert_form, weight, adapter, config, target)
    assert other == Config(3, 2.0, form=target)
    assert_close(
        doraxp.merge(weight, converted, other), doraxp.merge(weight, adapter, config), rtol=1e-14
    )
    back, same = doraxp.convert_form(weight, converted, other, source)
    assert same == config
    for leaf, leaf_back in zip(adapter, back, strict=True):
        assert_close(leaf_back, leaf, rtol=1e-15)


@pytest.mark.parametrize("method", ["kaiming", "gaussian"])
def test_init_is_drawn_from_the_seed(backend, draw, assert_close, method):
    config, weight = Config(40), draw(60, 50, dtype="float32")
    adapter = backend.run(doraxp.init, weight, config, seed=1, method=method)
    again = backend.run(doraxp.init, weight, config, seed=1, method=method)
    other = backend.run(doraxp.init, weight, config, seed=2, method=method)
    on_numpy = doraxp.init(backend.numpy(weight), config, seed=1, method=method)
    assert_close(adapter.lora_a, on_numpy.lora_a, rtol=0)
    assert_close(again.lora_a, adapter.lora_a, rtol=0)
    assert not np.array_equal(backend.numpy(other.lora_a), backend.numpy(adapter.lora_a))
    assert_close(adapter.lora_b, np.zeros((60, 40), "float32"), rtol=0)
    a = backend.numpy(adapter.lora_a)
    # The standard errors of 2000 numbers: 1.6 % of the deviation, and 2.2 % of it for the mean.
    deviation = 1 / math.sqrt(3 * 50) if method == "kaiming" else 1 / math.sqrt(40)
    assert abs(a.std() / deviation - 1) < 0.08
    assert abs(a.mean() / deviation) < 0.11
    if method == "kaiming":
        limit = 1 / math.sqrt(50)
        assert 0.99 * limit < abs(a).max() <= limit


def test_stacked_init_draws_every_element(backend, draw):
    adapter = doraxp.init(draw(2, 5, 4), Config(3), seed=0)
    assert [tuple(leaf.shape) for leaf in adapter] == [(2, 3, 4), (2, 5, 3), (2, 5)]
    first, second = backend.numpy(adapter.lora_a)
    assert not np.array_equal(first, second)


@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
def test_outputs_have_the_dtype_of_x_and_gradients_the_compute_dtype(backend, draw, dtype):
    weight, config = draw(7, 6, dtype=dtype), Config(2)
    compute = draw(1, dtype="float64" if dtype == "float64" else "float32").dtype
    adapter = backend.run(doraxp.init, weight, config, seed=0)
    assert {leaf.dtype for leaf in adapter} == {compute}
    assert backend.run(doraxp.merge, weight, adapter, config).dtype == weight.dtype
    for x_dtype in filter(backend.has, ("float16", "bfloat16", "float32", "float64")):
        x = draw(5, 6, dtype=x_dtype)
        y, cache = backend.run(doraxp.forward, x, weight, adapter, config, bias=draw(7))
        grads = backend.run(doraxp.backward, y, cache, train_base=True)
        assert y.dtype == grads.x.dtype == x.dtype
        others = (*grads.adapter, grads.weight, grads.bias)
        assert {gradient.dtype for gradient in others} == {compute}


@pytest.mark.dtypes("float16", "bfloat16")
@pytest.mark.parametrize("form", FORMS)
def test_results_with_a_low_precision_weight_are_computed_in_float32(
    backend, draw, assert_close, dtype, form
):
    config = Config(3, form=form)
    weight = draw(7, 6, dtype=dtype)
    adapter = random_adapter(draw, config, out=7, inner=6, dtype="float32")
    x, bias, dy = (draw(*shape, dtype="float32") for shape in ((5, 6), (7,), (5, 7)))
    y, cache = backend.run(doraxp.forward, x, weight, adapter, config, bias=bias)
    grads = backend.run(doraxp.backward, dy, cache, train_base=True)
    expected = solve(backend, x, weight, adapter, config, bias, dy)
    assert_close(y, expected.y.astype("float32"), rtol=4e-6)
    for name, leaf in {"x": grads.x, "weight": grads.weight, **grads.adapter._asdict()}.items():
        assert_close(leaf, getattr(expected, name).astype("float32"), rtol=4e-6)
    merged = backend.run(doraxp.merge, weight, adapter, config)
    step = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]  # half a unit in the last place
    assert_close(merged, expected.merged.astype(backend.numpy(weight).dtype), rtol=2 * step)


def test_without_train_base_the_base_has_no_gradient(backend, draw):
    weight, config = draw(7, 6), Config(2)
    adapter = doraxp.init(weight, config, seed=0)
    y, cache = doraxp.forward(draw(5, 6), weight, adapter, config, bias=draw(7))
    assert doraxp.backward(y, cache)[2:] == (None, None)
    _, cache = doraxp.forward(draw(5, 6), weight, adapter, config)
    assert doraxp.backward(y, cache, train_base=True).bias is None


def test_the_same_inputs_give_the_same_bits(backend, draw, assert_close):
    weight, x, config = draw(7, 6, dtype="float32"), draw(5, 6, dtype="float32"), Config(2)
    adapter = random_adapter(draw, config, out=7, inner=6, dtype="float32")
    runs = []
    for _ in range(2):
        y, cache = backend.run(doraxp.forward, x, weight, adapter, config)
        grads = backend.run(doraxp.backward, y, cache, train_base=True)
        runs.append((y, grads.x, *grads.adapter, grads.weight))
    for first, second in zip(*runs, strict=True):
        assert_close(first, second, rtol=0)


def test_arguments_are_never_written_to(backend, draw):
    config = Config(2, form="direction")
    weight, x, bias, dy = draw(7, 6), draw(5, 6), draw(7), draw(5, 7)
    adapter = random_adapter(draw, config, out=7, inner=6)
    arrays = (weight, x, bias, dy, *adapter)
    before = [np.array(backend.numpy(array)) for array in arrays]
    _, cache = doraxp.forward(x, weight, adapter, config, bias=bias)
    kept = [np.array(backend.numpy(array)) for array in (cache.z, cache.low_rank)]
    doraxp.backward(dy, cache, train_base=True)
    doraxp.merge(weight, adapter, config)
    doraxp.convert_form(weight, adapter, config, "weight")
    for array, values in zip((*arrays, cache.z, cache.low_rank), (*before, *kept), strict=True):
        np.testing.assert_array_equal(backend.numpy(array), values)


# Examples that can be checked by hand.

W = np.array([[3.0, 4.0], [0.0, 5.0]])


def test_a_fresh_adapter_gives_the_base_output_of_an_example(backend, assert_close):
    weight, config = backend.asarray(W), Config(1)
    adapter = doraxp.init(weight, config, seed=0)
    y, _ = doraxp.forward(backend.asarray(np.array([1.0, 2.0])), weight, adapter, config)
    assert_close(y, np.array([11.0, 10.0]), rtol=0)
    y, _ = doraxp.forward(backend.asarray(np.eye(2)), weight, adapter, config)
    assert_close(y, np.array([[3.0, 0.0], [4.0, 5.0]]), rtol=0)


def test_the_update_alone_gives_the_output_of_an_example(backend, assert_close):
    # W = 0, and m is the norm of V: then y = x Vᵀ = 2 x Aᵀ Bᵀ.
    a = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).T
    b = np.array([[1.0, 2.0], [3.0, 4.0]]).T
    config = Config(2, 4.0)
    assert config.scaling == 2
    weight = np.zeros((2, 3))
    magnitude = np.linalg.norm(2 * b @ a, axis=1)
    adapter = Adapter(*map(backend.asarray, (a, b, magnitude)))
    x = backend.asarray(np.array([1.0, 2.0, 3.0]))
    y, _ = backend.run(doraxp.forward, x, backend.asarray(weight), adapter, config)
    assert_close(y, np.array([38.0, 56.0]), rtol=1e-15)
