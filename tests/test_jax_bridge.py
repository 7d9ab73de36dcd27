"""`doraxp.jax` against `jax.grad` of the dense formula, in float64."""

from __future__ import annotations

import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config

RULES = [(form, norm) for form in ("weight", "direction") for norm in ("exact", "detached")]
LEAVES = [(4, 6), (2, 6), (4, 2), (4,), (4,)]
SHAPES = {
    "matrix": [(5, 6), *LEAVES],
    "vector": [(6,), *LEAVES],
    "batch": [(3, 5, 6), *LEAVES],
    "stack": [(3, 5, 6), *((3, *leaf) for leaf in LEAVES)],
}


def draw(jax, shapes=SHAPES["matrix"], dtype="float64"):
    rng = np.random.default_rng(5)
    return [jax.numpy.asarray(rng.standard_normal(shape), dtype=dtype) for shape in shapes]


def ours(config, x, w, a, b, m, bias=None):
    from doraxp.jax import dora_linear

    return dora_linear(x, w, Adapter(a, b, m), config, bias, train_base=True)


def dense_merge(jax, config, w, a, b, m):
    jnp = jax.numpy
    d = w / jnp.linalg.norm(w, axis=-1, keepdims=True) if config.form == "direction" else w
    v = d + config.scaling * b @ a
    n = jnp.linalg.norm(v, axis=-1)
    n = jax.lax.stop_gradient(n) if config.norm_gradient == "detached" else n
    return (m / n)[..., None] * v


def dense(jax, config, x, w, a, b, m, bias=None):
    y = x @ dense_merge(jax, config, w, a, b, m).mT
    return y if bias is None else y + (bias[..., None, :] if w.ndim > 2 else bias)


def gradients(jax, function, inputs, dy):
    return jax.vjp(function, *inputs)[1](dy)


def assert_same(actual, desired, rtol=1e-12):
    for got, want in zip(actual, desired, strict=True):
        assert got.dtype == want.dtype
        bound = rtol * float(np.max(np.abs(want)))
        np.testing.assert_allclose(got, want, rtol=0, atol=bound)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("form", "norm_gradient"), RULES)
def test_gradients_are_those_of_the_dense_formula(jax, shapes, form, norm_gradient, jit):
    inputs = draw(jax, shapes)
    config = Config(2, 3, form=form, norm_gradient=norm_gradient)

    def function(*inputs):
        return ours(config, *inputs)

    function = jax.jit(function) if jit else function
    want = dense(jax, config, *inputs)
    dy = jax.numpy.cos(want)
    assert_same([function(*inputs)], [want])
    expected = gradients(jax, lambda *i: dense(jax, config, *i), inputs, dy)
    assert_same(gradients(jax, function, inputs, dy), expected)


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize(("form", "norm_gradient"), RULES)
def test_the_merged_weight_has_the_gradients_of_the_dense_formula(jax, form, norm_gradient, stack):
    from doraxp.jax import merge

    inputs = draw(jax, [(*stack, *leaf) for leaf in LEAVES[:4]])
    config = Config(2, 3, form=form, norm_gradient=norm_gradient)

    def function(w, *leaves):
        return merge(w, Adapter(*leaves), config, train_base=True)

    want = dense_merge(jax, config, *inputs)
    assert_same([jax.jit(function)(*inputs)], [want])
    expected = gradients(jax, lambda *i: dense_merge(jax, config, *i), inputs, jax.numpy.cos(want))
    assert_same(gradients(jax, function, inputs, jax.numpy.cos(want)), expected)


@pytest.mark.parametrize("axis", ["x", "adapter", "weight"])
def test_vmap_equals_a_loop(jax, axis):
    """Over inputs, over adapters of one weight, and over whole layers; output and gradients."""
    jnp, config = jax.numpy, Config(2, 3)
    inputs = draw(jax)
    mapped = {"x": [0], "adapter": [2, 3, 4], "weight": range(6)}[axis]
    axes = [0 if index in mapped else None for index in range(6)]
    many = [
        jnp.stack([leaf, -2 * leaf, leaf + 1]) if index in mapped else leaf
        for index, leaf in enumerate(inputs)
    ]

    def step(*inputs):
        return jax.value_and_grad(lambda *i: jnp.sum(ours(config, *i) ** 2), range(6))(*inputs)

    got = jax.tree.leaves(jax.jit(jax.vmap(step, axes))(*many))
    one_by_one = [
        step(*(leaf[i] if a == 0 else leaf for leaf, a in zip(many, axes, strict=True)))
        for i in range(3)
    ]
    want = jax.tree.leaves(jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one))
    assert_same(got, want)


def test_a_zero_row_and_a_cancelled_row_are_safe(jax):
    from doraxp.jax import merge

    x, w, a, b, m, _ = draw(jax)
    w, b = w.at[1].set(0), b.at[1].set(0)
    w = w.at[2].set(-(b[2] @ a) * (1 - 1e-9))
    config = Config(2)

    def total(x, w, a, b, m):
        y = ours(config, x, w, a, b, m)
        return y.sum() + merge(w, Adapter(a, b, m), config, train_base=True).sum(), y

    grads, y = jax.jit(jax.grad(total, range(5), has_aux=True))(x, w, a, b, m)
    assert not y[:, 1].any()
    for gradient in grads:
        assert jax.numpy.isfinite(gradient).all()
    assert not grads[3][1].any()
    keep = np.array([0, 2, 3])
    assert_same([y[:, keep]], [dense(jax, config, x, w[keep], a, b[keep], m[keep])], 1e-6)
    plain = jax.grad(lambda a: doraxp.forward(x, w, Adapter(a, b, m), config)[0].sum())(a)
    assert jax.numpy.isnan(plain).any()  # the case that the gradient rules of doraxp.jax avoid


@pytest.mark.parametrize("function", ["dora_linear", "merge"])
def test_the_weight_has_a_gradient_only_with_train_base(jax, function):
    import doraxp.jax

    x, w, a, b, m, _ = draw(jax)
    arguments = [x] if function == "dora_linear" else []

    def total(w, train_base):
        call = getattr(doraxp.jax, function)
        return call(*arguments, w, Adapter(a, b, m), Config(2), train_base=train_base).sum()

    assert not jax.grad(total)(w, False).any()
    assert jax.grad(total)(w, True).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gradients_have_the_dtypes_of_their_arrays(jax, dtype):
    from doraxp.jax import merge

    x, w, *rest = draw(jax, dtype="float32")
    x, w, rest[-1] = (array.astype(dtype) for array in (x, w, rest[-1]))
    inputs = [x, w, *rest]
    y, pull = jax.vjp(lambda *i: ours(Config(2, 3), *i), *inputs)
    assert y.dtype == dtype
    assert [g.dtype for g in pull(y)] == [i.dtype for i in inputs]
    merged, pull = jax.vjp(
        lambda w, *leaves: merge(w, Adapter(*leaves), Config(2, 3), train_base=True), w, *rest[:3]
    )
    assert merged.dtype == dtype
    assert [g.dtype for g in pull(merged)] == [i.dtype for i in inputs[1:5]]


@pytest.mark.parametrize(("form", "norm_gradient"), RULES)
def test_a_prepared_norm_changes_nothing(jax, form, norm_gradient):
    """One norm serves two inputs in one loss, as in training with micro-batches."""
    from doraxp.jax import dora_linear

    x, w, a, b, m, bias = draw(jax)
    config = Config(2, 3, form=form, norm_gradient=norm_gradient)

    def loss(adapter, reuse):
        prepared = doraxp.prepare(w, adapter, config) if reuse else None
        y = [dora_linear(i, w, adapter, config, bias, prepared=prepared) for i in (x, 2 * x)]
        return jax.numpy.sum(y[0] ** 2) + jax.numpy.sum(y[1])

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    got, want = (jax.tree.leaves(step(Adapter(a, b, m), reuse)) for reuse in (True, False))
    assert_same(got, want)


def test_a_prepared_norm_on_a_zero_row_leaves_no_nan(jax):
    from doraxp.jax import dora_linear

    x, w, a, b, m, _ = draw(jax)
    w, b, config = w.at[1].set(0), b.at[1].set(0), Config(2)

    def loss(adapter):
        prepared = jax.jit(lambda adapter: doraxp.prepare(w, adapter, config))(adapter)
        adapter, weight = prepared.adapter, prepared.weight
        return dora_linear(x, weight, adapter, config, prepared=prepared).sum()

    for leaf in jax.grad(loss)(Adapter(a, b, m)):
        assert jax.numpy.isfinite(leaf).all()


def test_a_prepared_norm_of_another_adapter_is_refused(jax):
    from doraxp.jax import dora_linear

    x, w, a, b, m, _ = draw(jax)
    prepared = doraxp.prepare(w, Adapter(a, b, m), Config(2))
    with pytest.raises(ValueError, match="the adapter has changed"):
        dora_linear(x, w, Adapter(a + 1, b, m), Config(2), prepared=prepared)


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "bias", "adapter", "config", "base"])
def test_an_argument_of_another_class_is_refused(jax, name):
    from doraxp.jax import dora_linear

    x, w, a, b, m, bias = draw(jax)
    given = {"x": x, "weight": w, "lora_a": a, "bias": bias, "adapter": None, "config": Config(2)}
    flag = {"train_base": 1} if name == "base" else {}
    given["adapter"] = Adapter(a, b, m)
    if name == "lora_a":
        given["adapter"] = Adapter(np.asarray(a), b, m)
    elif name != "base":
        given[name] = (1, 2) if name in ("adapter", "config") else np.asarray(given[name])
    del given["lora_a"]
    with pytest.raises(TypeError, match="train_base" if name == "base" else name):
        dora_linear(**given, **flag)


def test_shapes_that_do_not_fit_are_refused_inside_a_jit(jax):
    from doraxp.jax import dora_linear

    x, w, a, b, m, _ = draw(jax)
    with pytest.raises(ValueError, match="x must have shape"):
        jax.jit(lambda x: dora_linear(x, w, Adapter(a, b, m), Config(2)))(x[:, :-1])
