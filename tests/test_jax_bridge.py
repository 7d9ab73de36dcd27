"""`doraxp.jax` against JAX's own derivatives of the dense formula, in float64."""

from __future__ import annotations

import collections
import math
import os
import subprocess
import sys
from pathlib import Path

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


def assert_finite(jax, tree):
    for leaf in jax.tree.leaves(tree):
        assert jax.numpy.isfinite(leaf).all()


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


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("form", "norm_gradient"), RULES)
def test_forward_mode_is_that_of_the_dense_formula(jax, shapes, form, norm_gradient):
    """Of all arguments at once, and of each one alone, where JAX knows that the others stay."""
    inputs = draw(jax, shapes)
    changes = [jax.numpy.cos(leaf) for leaf in inputs]
    config = Config(2, 3, form=form, norm_gradient=norm_gradient)

    def slopes(function):
        def alone(index):
            def of_one(leaf):
                return function(*inputs[:index], leaf, *inputs[index + 1 :])

            return jax.jvp(of_one, (inputs[index],), (changes[index],))[1]

        together = jax.jvp(function, tuple(inputs), tuple(changes))
        return [*together, *(alone(index) for index in range(len(inputs)))]

    got = slopes(lambda *i: ours(config, *i))
    assert_same(got, slopes(lambda *i: dense(jax, config, *i)))
    linearized = jax.linearize(lambda *i: ours(config, *i), *inputs)
    assert_same([linearized[0], linearized[1](*changes)], got[:2])


@pytest.mark.parametrize("index", range(6), ids=["x", "w", "a", "b", "m", "bias"])
@pytest.mark.parametrize(("form", "norm_gradient"), RULES)
def test_the_gradient_by_one_argument_alone_is_that_of_all(jax, form, norm_gradient, index):
    inputs = draw(jax)
    config = Config(2, 3, form=form, norm_gradient=norm_gradient)

    def loss(*inputs):
        return jax.numpy.sum(ours(config, *inputs) ** 2)

    every = jax.grad(loss, range(6))(*inputs)
    assert_same([jax.grad(loss, index)(*inputs)], [every[index]])


def test_jacobians_of_both_modes_agree(jax):
    x, w, a, b, m, bias = draw(jax)

    def function(b):
        return ours(Config(2, 3), x, w, a, b, m, bias)

    forward, reverse = (jax.jit(mode(function))(b) for mode in (jax.jacfwd, jax.jacrev))
    assert_same([forward], [reverse])


@pytest.mark.parametrize("reuse", [False, True], ids=["alone", "prepared"])
@pytest.mark.parametrize(("form", "norm_gradient"), RULES)
def test_second_derivatives_are_those_of_the_dense_formula(jax, form, norm_gradient, reuse):
    """Forward over reverse, and reverse over reverse, of y and of the merged weight."""
    from doraxp.jax import dora_linear, merge

    inputs = draw(jax)
    config = Config(2, 3, form=form, norm_gradient=norm_gradient)

    def loss(x, w, a, b, m, bias):
        adapter = Adapter(a, b, m)
        prepared = doraxp.prepare(w, adapter, config) if reuse else None
        y = dora_linear(x, w, adapter, config, bias, prepared=prepared, train_base=True)
        return jax.numpy.sum(y**3) + jax.numpy.sum(merge(w, adapter, config, train_base=True) ** 3)

    def dense_loss(*inputs):
        y, merged = dense(jax, config, *inputs), dense_merge(jax, config, *inputs[1:5])
        return jax.numpy.sum(y**3) + jax.numpy.sum(merged**3)

    def seconds(loss):
        changes = tuple(map(jax.numpy.sin, inputs))

        def slope(*inputs):
            gradients = jax.grad(loss, range(6))(*inputs)
            return sum(jax.numpy.vdot(*pair) for pair in zip(gradients, changes, strict=True))

        _, forward = jax.jvp(jax.grad(loss, range(6)), tuple(inputs), changes)
        return [*forward, *jax.grad(slope, range(6))(*inputs)]

    got, want = (jax.jit(lambda f=f: seconds(f))() for f in (loss, dense_loss))
    assert_same(got, want, 1e-11)


def test_a_checkpointed_layer_has_the_same_gradients(jax):
    inputs = draw(jax)

    def loss(*inputs):
        return jax.numpy.sum(ours(Config(2, 3), *inputs) ** 2)

    kept, again = (jax.jit(jax.grad(f, range(6)))(*inputs) for f in (loss, jax.checkpoint(loss)))
    assert_same(again, kept)


def products(jax, function, *arguments):
    """Count the multiplications of each product that the result needs."""
    counts = collections.Counter()
    for equation in equations_of_products(jax, function, *arguments):
        (inner, _), _ = equation.params["dimension_numbers"]
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        counts[math.prod(out) * math.prod(left[axis] for axis in inner)] += 1
    return counts


def equations_of_products(jax, function, *arguments):
    """Yield the equations of the products that the result needs."""
    from jax.extend.core import jaxprs_in_params
    from jax.interpreters import partial_eval

    def within(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation
            for part in jaxprs_in_params(equation.params):
                yield from within(part)

    closed = jax.make_jaxpr(function)(*arguments)
    yield from within(partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))[0])


@pytest.mark.parametrize(("form", "norm_gradient"), RULES)
def test_all_products_follow_the_precision_that_jax_is_told(jax, form, norm_gradient):
    from doraxp.jax import dora_linear, merge

    x, w, *rest = draw(jax)
    adapter, config = Adapter(*rest[:3]), Config(2, form=form, norm_gradient=norm_gradient)

    def loss(x, w, adapter):
        y = dora_linear(x, w, adapter, config, train_base=True)
        return (y**2).sum() + (merge(w, adapter, config) ** 2).sum()

    with jax.default_matmul_precision("highest"):
        found = list(equations_of_products(jax, jax.grad(loss, (0, 1, 2)), x, w, adapter))
    assert len(found) > 8
    assert {one.params["precision"] for one in found} == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize("trained", ["adapter", "x and adapter", "all"])
@pytest.mark.parametrize(("form", "norm_gradient"), RULES)
def test_a_step_costs_as_many_products_as_the_backward(jax, form, norm_gradient, trained):
    """A product with V is one of x, one of dx, one of dW. Each other one has `rank` columns."""
    x, w, *rest = draw(jax, [(70, 60), (40, 60), (2, 60), (40, 2), (40,)])
    config = Config(2, 3, form=form, norm_gradient=norm_gradient)

    def loss(x, w, adapter):
        from doraxp.jax import dora_linear

        y = dora_linear(x, w, adapter, config, train_base=trained == "all")
        return jax.numpy.sum(y**2)

    arguments = {"adapter": (2,), "x and adapter": (0, 2), "all": (0, 1, 2)}[trained]
    counts = products(jax, jax.grad(loss, arguments), x, w, Adapter(*rest))
    sizes = {"full": 70 * 40 * 60, "weight": 2 * 40 * 60, "x": 70 * 2 * 60, "y": 70 * 40 * 2}
    exact = norm_gradient == "exact"
    assert {name: counts.pop(size) for name, size in sizes.items()} == {
        "full": len(arguments),
        "weight": 3 if exact else 1,  # B A; V Aᵀ and (q⊙(s B))ᵀ V
        "x": 2,  # x Aᵀ and (dz s B)ᵀ x
        "y": 2,  # dz s B and dzᵀ L
    }
    assert not counts


@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
def test_the_gradients_of_a_merge_cost_products_of_rank_columns(jax, norm_gradient):
    from doraxp.jax import merge

    _, w, *rest = draw(jax, [(1,), (40, 60), (2, 60), (40, 2), (40,)])
    config = Config(2, norm_gradient=norm_gradient)
    gradient = jax.grad(lambda adapter: (merge(w, adapter, config) ** 2).sum())
    assert products(jax, gradient, Adapter(*rest)) == {2 * 40 * 60: 3}  # B A, dV Aᵀ and Bᵀ dV


def test_the_reverse_mode_keeps_x_in_its_own_dtype(jax):
    x, w, *leaves = draw(jax, [(7, 6), *LEAVES[:4]], "float32")
    x, w = x.astype("bfloat16"), w.astype("bfloat16")
    _, pull = jax.vjp(lambda *leaves: ours(Config(2), x, w, *leaves), *leaves)
    kept = [leaf.dtype for leaf in jax.tree.leaves(pull) if leaf.shape == x.shape]
    assert kept == ["bfloat16"]


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
    assert_finite(jax, grads)
    assert not grads[3][1].any()
    keep = np.array([0, 2, 3])
    assert_same([y[:, keep]], [dense(jax, config, x, w[keep], a, b[keep], m[keep])], 1e-6)
    plain = jax.grad(lambda a: doraxp.forward(x, w, Adapter(a, b, m), config)[0].sum())(a)
    ours_alone = jax.grad(lambda a: ours(config, x, w, a, b, m).sum())(a)
    assert_same([plain], [ours_alone], 1e-6)


@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
def test_a_zero_row_is_safe_in_forward_mode_and_in_second_derivatives(jax, norm_gradient):
    from doraxp.jax import merge

    x, w, a, b, m, _ = draw(jax)
    w, b = w.at[1].set(0), b.at[1].set(0)
    config = Config(2, norm_gradient=norm_gradient)

    def both(a, b, m):
        y = ours(config, x, w, a, b, m)
        return y, merge(w, Adapter(a, b, m), config, train_base=True)

    def total(a, b, m):
        y, merged = both(a, b, m)
        return (y**2).sum() + (merged**4).sum()

    leaves = a, b, m
    _, (dy, dmerged) = jax.jvp(both, leaves, leaves)
    assert not dy[:, 1].any()
    assert not dmerged[1].any()
    assert_finite(jax, (dy, dmerged))
    second = jax.jit(lambda *leaves: jax.jvp(jax.grad(total, range(3)), leaves, leaves)[1])
    assert_finite(jax, second(*leaves))


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
    given = {"x": x, "weight": w, "bias": bias, "adapter": Adapter(a, b, m), "config": Config(2)}
    flag = {"train_base": 1} if name == "base" else {}
    if name == "lora_a":
        given["adapter"] = Adapter(a.tolist(), b, m)
    elif name != "base":
        given[name] = (1, 2)
    with pytest.raises(TypeError, match="train_base" if name == "base" else name):
        dora_linear(**given, **flag)


@pytest.mark.parametrize("mixed", [False, True], ids=["all", "mixed"])
def test_numpy_arrays_may_stand_for_jax_arrays(jax, mixed):
    """Also as the arguments that are differentiated, and as constants inside of a jit."""
    from doraxp.jax import merge

    given = draw(jax)
    host = [leaf if mixed and i % 2 else np.asarray(leaf) for i, leaf in enumerate(given)]
    config = Config(2, 3)

    def loss(*inputs):
        merged = merge(inputs[1], Adapter(*inputs[2:5]), config, train_base=True)
        return jax.numpy.sum(ours(config, *inputs) ** 2) + jax.numpy.sum(merged**4)

    step = jax.value_and_grad(loss, range(6))
    want = jax.tree.leaves(step(*given))
    for got in (step(*host), jax.jit(step)(*host), jax.jit(lambda: step(*host))()):
        assert_same(jax.tree.leaves(got), want)
    outputs = ours(config, *host), merge(host[1], Adapter(*host[2:5]), config)
    assert_same(outputs, [ours(config, *given), merge(given[1], Adapter(*given[2:5]), config)])
    assert all(isinstance(output, jax.Array) for output in outputs)


def test_a_prepared_norm_of_numpy_arrays_is_refused(jax):
    from doraxp.jax import dora_linear

    x, w, a, b, m, _ = map(np.asarray, draw(jax))
    prepared = doraxp.prepare(w, Adapter(a, b, m), Config(2))
    with pytest.raises(TypeError, match="prepared must be of JAX arrays"):
        dora_linear(x, w, Adapter(a, b, m), Config(2), prepared=prepared)


def test_an_adapter_goes_where_its_weight_goes(jax):
    """JAX may move an array that the user did not put on a device, and its adapter with it."""
    weight = jax.numpy.ones((4, 6))
    put = jax.device_put(weight, jax.devices()[0])
    for array, committed in ((weight, False), (put, True)):
        adapter = doraxp.init(array, Config(2), seed=0)
        assert {leaf.committed for leaf in adapter} == {committed}


REGISTERED = """
config = doraxp.Config(2)
weight = jax.numpy.eye(4)
adapter = doraxp.init(weight, config, seed=0)
prepare = jax.jit(lambda weight, adapter, config: doraxp.prepare(weight, adapter, config))
assert prepare(weight, adapter, config).config == config
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import jax, doraxp",
        "import doraxp, jax",
        "import doraxp.jax, jax",
        "import jax, doraxp; jax.tree_util.register_static(doraxp.Config)",
        "import doraxp, jax; jax.tree_util.register_static(doraxp.Config)",
        "import jax, doraxp; jax.tree_util.register_static(doraxp.Config); import doraxp.jax",
    ],
)
def test_a_config_is_static_after_the_first_call_with_jax_arrays(jax, imports):
    """In any order of the imports, and where the user registers it."""
    run_python(f"{imports}\n{REGISTERED}")


def test_the_import_of_doraxp_imports_no_jax(jax):
    run_python("import doraxp, sys; assert 'jax' not in sys.modules")


def run_python(code):
    source = str(Path(doraxp.__file__).parents[1])
    path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_shapes_that_do_not_fit_are_refused_inside_a_jit(jax):
    from doraxp.jax import dora_linear

    x, w, a, b, m, _ = draw(jax)
    with pytest.raises(ValueError, match="x must have shape"):
        jax.jit(lambda x: dora_linear(x, w, Adapter(a, b, m), Config(2)))(x[:, :-1])
