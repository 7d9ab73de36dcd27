"""Layers that are not matrices: convolutions, embeddings, and operators of a framework."""

from __future__ import annotations

import math
import sys
import tracemalloc
from types import SimpleNamespace

import array_api_compat.numpy
import numpy as np
import pytest
from convolutions import convolved, outputs, slopes

import doraxp
from doraxp import Adapter, Config, Convolution, Embedding, LayerKind, MatMul
from doraxp._base.pytrees import register_static
from doraxp._base.words import counted
from doraxp.backends import Operations, Windows, operations
from doraxp.testing import expected_of_operator, operator_catalogue

CONVOLUTIONS = [
    pytest.param((5,), (3,), 1, {"padding": 1}, id="1d"),
    pytest.param(
        (6, 5), (3, 2), 1, {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}, id="2d"
    ),
    pytest.param((5, 4), (2, 3), 2, {"stride": 2, "padding": 1}, id="2d-groups"),
    pytest.param((3, 4, 5), (2, 1, 3), 1, {"stride": (1, 2, 3), "padding": (0, 0, 2)}, id="3d"),
]
CHOICES = [
    pytest.param(None, "weight", "exact", id="exact"),
    pytest.param(None, "direction", "detached", id="direction-detached"),
    pytest.param("input", "weight", "exact", id="input"),
    pytest.param("low_rank", "direction", "exact", id="low_rank-direction"),
    pytest.param("low_rank", "weight", "detached", id="low_rank-detached"),
]
FORMS = [("weight", "exact"), ("direction", "detached")]
INPUTS = ("x", "lora_a", "lora_b", "magnitude", "weight", "bias")
KINDS = [pytest.param(name, marks=pytest.mark.uses(name)) for name in ("convolution", "embedding")]
CATALOGUE = [
    pytest.param(case, id=case.name, marks=pytest.mark.uses(case.kind))
    for case in operator_catalogue()
]


def settings(operator):
    return {name: getattr(operator, name) for name in ("stride", "padding", "dilation")}


def of_convolution(size, kernel, groups, scale=1.0):
    """Return NumPy inputs of a convolution of 4 channels to 6, and its kind."""
    rng = np.random.default_rng(5)
    kind = LayerKind("conv", groups=groups)
    weight = rng.standard_normal((6, 4 // groups, *kernel))
    *stack, out, inner = kind.matrix_shape(weight.shape)
    shapes = {"lora_a": (*stack, 2, inner), "lora_b": (*stack, out, 2), "magnitude": (*stack, out)}
    inputs = {"x": rng.standard_normal((3, 4, *size)), "weight": weight}
    inputs |= {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return inputs | {"bias": rng.standard_normal(6)}, kind


def of_embedding():
    """Return NumPy inputs of a table of 9 rows, with ids that repeat, and its kind."""
    rng = np.random.default_rng(6)
    shapes = {"weight": (9, 5), "lora_a": (2, 9), "lora_b": (5, 2), "magnitude": (5,)}
    inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return inputs | {"x": np.array([[3, 0, 3], [8, 3, 1]])}, LayerKind("embedding")


def adapter_of(inputs):
    return Adapter(*(inputs[name] for name in Adapter._fields))


def on(backend, inputs):
    return {name: backend.asarray(array) for name, array in inputs.items()}


def forward(inputs, mask, config, operator, kind=None, **others):
    return doraxp.forward(
        inputs["x"], inputs["weight"], adapter_of(inputs), config, bias=inputs.get("bias"),
        dropout_mask=mask, operator=operator, kind=kind, **others,
    )  # fmt: skip


def all_gradients(dy, cache):
    x, adapter, weight, bias = doraxp.backward(dy, cache, train_base=True)
    return {"x": x, **adapter._asdict(), "weight": weight, "bias": bias}


def mask_like(x):
    return (np.random.default_rng(7).uniform(size=x.shape) > 0.25) / 0.75


def assert_slopes(gradients, expected, directions):
    for name, slope in expected.items():
        g, u = gradients[name], directions[name]
        assert g.shape == u.shape
        error = abs(float(np.sum(g * u)) - slope)
        assert error <= 1e-9 * np.linalg.norm(g) * np.linalg.norm(u), name


@pytest.mark.uses("convolution")
@pytest.mark.parametrize(("dropout", "form", "norm_gradient"), CHOICES)
@pytest.mark.parametrize(("size", "kernel", "groups", "shape"), CONVOLUTIONS)
def test_a_convolution_equals_the_dense_formula_and_its_slopes(
    backend, assert_close, size, kernel, groups, shape, dropout, form, norm_gradient
):
    config = Config(2, 3.0, form=form, norm_gradient=norm_gradient, dropout=dropout or "input")
    (inputs, kind), operator = of_convolution(size, kernel, groups), Convolution(**shape)
    mask = None if dropout is None else mask_like(inputs["x"])

    def apply(x, weight):
        return convolved(x, weight, **settings(operator))

    desired, _ = outputs(apply, inputs, config, kind, mask)
    given = None if mask is None else backend.asarray(mask)
    y, cache = backend.run(forward, on(backend, inputs), given, config, operator, kind)
    assert_close(y, desired, rtol=1e-13)

    rng = np.random.default_rng(8)
    dy = rng.standard_normal(desired.shape)
    directions = {name: rng.standard_normal(inputs[name].shape) for name in INPUTS}
    found = backend.run(all_gradients, backend.asarray(dy), cache)
    found = {name: backend.numpy(array) for name, array in found.items()}
    expected = slopes(apply, inputs, directions, dy, config, kind, mask)
    assert_slopes(found, expected, directions)


@pytest.mark.uses("embedding")
@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize(
    ("form", "norm_gradient"), [("weight", "exact"), ("direction", "detached")]
)
def test_an_embedding_equals_the_dense_formula_and_its_slopes(
    backend, assert_close, form, norm_gradient, scale
):
    config = Config(2, 3.0, form=form, norm_gradient=norm_gradient)
    (inputs, kind), operator = of_embedding(), Embedding(scale)

    def apply(ids, weight):
        return scale * weight[ids]

    desired, _ = outputs(apply, inputs, config, kind)
    y, cache = backend.run(forward, on(backend, inputs), None, config, operator)
    assert_close(y, desired, rtol=1e-13)
    rng = np.random.default_rng(8)
    dy = rng.standard_normal(desired.shape)
    directions = {n: rng.standard_normal(inputs[n].shape) for n in (*Adapter._fields, "weight")}
    found = backend.run(all_gradients, backend.asarray(dy), cache)
    assert found["x"] is None
    assert found["bias"] is None
    found = {name: backend.numpy(found[name]) for name in directions}
    assert_slopes(found, slopes(apply, inputs, directions, dy, config, kind), directions)


GENERIC = Operations(array_api_compat.numpy)
WINDOWS = [
    pytest.param(Windows((9,), (3,), (2,), (1,), (2,)), 1, 40, 3, id="1d"),
    pytest.param(Windows((7, 6), (3, 2), (1, 1), (1, 0), (1, 2)), 2, 24, 4, id="2d-groups"),
    pytest.param(Windows((4, 5, 3), (2, 3, 1), (1, 2, 1), (0, 1, 0), (1, 1, 1)), 1, 3, 8, id="3d"),
    pytest.param(Windows((6, 6), (1, 1), (1, 1), (0, 0), (1, 1)), 1, 5, 5, id="1x1"),
]


@pytest.mark.uses("convolution")
@pytest.mark.once
@pytest.mark.parametrize("block", [1, 1 << 19], ids=["samples", "one-block"])
@pytest.mark.parametrize(("windows", "groups", "channels", "out"), WINDOWS)
def test_the_convolution_of_each_library_equals_the_generic_one(
    backend, assert_close, monkeypatch, windows, groups, channels, out, block
):
    """Few outputs beside many channels, and the reverse; blocks of a sample, and of all."""
    monkeypatch.setattr("doraxp.backends._numpy_layers.WINDOW_BLOCK", block)
    rng, (p, k) = np.random.default_rng(3), (windows.positions, windows.kernel)
    stack = (groups,) if groups > 1 else ()
    x = rng.standard_normal((5, channels, *windows.size))
    weight = rng.standard_normal((*stack, out, channels // groups * math.prod(k)))
    d = rng.standard_normal((*stack, 5 * math.prod(p), out))
    ops = operations(x=backend.asarray(x))
    here = [backend.asarray(array) for array in (x, weight, d)]
    for name, places in (
        ("convolve", (0, 1)), ("convolve_transposed", (2, 1)), ("convolve_gradient", (2, 0)),
    ):  # fmt: skip
        desired = getattr(GENERIC, name)(*((x, weight, d)[place] for place in places), windows)
        actual = getattr(ops, name)(*(here[place] for place in places), windows)
        assert_close(actual, desired, rtol=1e-13)


@pytest.mark.uses("embedding")
@pytest.mark.once
@pytest.mark.parametrize("count", [9, 70_000])
def test_the_lookups_of_each_library_equal_the_generic_ones(
    backend, assert_close, monkeypatch, count
):
    monkeypatch.setattr("doraxp.backends._layers.ONE_HOT", 100)
    rng = np.random.default_rng(3)
    ids, table = np.array([3, 0, 3, 8, 3, count - 1]), rng.standard_normal((count, 4))
    rows = rng.standard_normal((6, 4))
    ops = operations(table=backend.asarray(table))
    turned = doraxp.backends.transpose(backend.asarray(np.ascontiguousarray(table.T)))
    for given in (backend.asarray(table), turned):  # A is a transposed view
        found = ops.rows_at(backend.asarray(ids), given)
        assert_close(found, GENERIC.rows_at(ids, table), rtol=0)
    if count < 100:
        sums = ops.sums_at(backend.asarray(ids), backend.asarray(rows), count)
        assert_close(sums, GENERIC.sums_at(ids, rows, count), rtol=1e-15)
        assert backend.numpy(sums)[1].max() == 0


class Wrapped:
    """A framework's own matrix product, with the outputs of its layers on the first axis."""

    kind = LayerKind("linear")
    channel_axis = 0

    def apply(self, x, weight):
        return weight @ doraxp.backends.transpose(x)

    def transpose(self, dy, weight, x_shape):
        return doraxp.backends.transpose(dy) @ weight

    def weight_gradient(self, dy, x, weight_shape):
        return dy @ x


@pytest.mark.once
@pytest.mark.parametrize(("dropout", "form", "norm_gradient"), CHOICES)
def test_an_operator_of_a_framework_gives_the_results_of_a_matrix_product(
    backend, draw, assert_close, dropout, form, norm_gradient
):
    config = Config(3, 2.0, form=form, norm_gradient=norm_gradient, dropout=dropout or "input")
    inputs = {
        "x": draw(5, 6), "lora_a": draw(3, 6), "lora_b": draw(7, 3), "magnitude": draw(7),
        "weight": draw(7, 6), "bias": draw(7),
    }  # fmt: skip
    mask = None if dropout is None else backend.asarray(mask_like(backend.numpy(inputs["x"])))
    dy = draw(5, 7)
    y, cache = backend.run(forward, inputs, mask, config, None)
    desired = backend.run(all_gradients, dy, cache)
    turned, cache = backend.run(forward, inputs, mask, config, Wrapped())
    actual = backend.run(all_gradients, doraxp.backends.transpose(dy), cache)
    transpose = doraxp.backends.transpose
    assert_close(transpose(turned), y, rtol=1e-13)
    for name in INPUTS:
        assert_close(actual[name], desired[name], rtol=1e-13)


class Framework:
    """A framework's own product of stacks."""

    kind = LayerKind("experts")
    channel_axis = -1
    apply, transpose = MatMul().apply, MatMul().transpose
    weight_gradient = MatMul().weight_gradient


def test_a_product_that_a_framework_derives_is_called(backend, draw, assert_close):
    class Doubled(MatMul):
        def apply(self, x, weight):
            return 2 * super().apply(x, weight)

    x, weight = draw(5, 6), draw(7, 6)
    adapter = doraxp.init(weight, Config(3), seed=0)
    plain, _ = doraxp.forward(x, weight, adapter, Config(3))
    doubled, _ = doraxp.forward(x, weight, adapter, Config(3), operator=Doubled())
    assert_close(doubled, 2 * backend.numpy(plain), rtol=1e-13)


@pytest.mark.once
@pytest.mark.parametrize("dropout", [None, "input", "low_rank"])
def test_an_operator_of_a_framework_takes_stacks(backend, draw, assert_close, dropout):
    config = Config(3, 2.0, dropout=dropout or "input")
    inputs = {
        "x": draw(2, 4, 5, 6), "lora_a": draw(2, 3, 6), "lora_b": draw(2, 7, 3),
        "magnitude": draw(2, 7), "weight": draw(2, 7, 6), "bias": draw(2, 7),
    }  # fmt: skip
    mask = None if dropout is None else backend.asarray(mask_like(backend.numpy(inputs["x"])))
    dy, results = draw(2, 4, 5, 7), []
    for operator in (None, Framework()):
        y, cache = backend.run(forward, inputs, mask, config, operator)
        results.append({"y": y, **backend.run(all_gradients, dy, cache)})
    for name, desired in results[0].items():
        assert_close(results[1][name], desired, rtol=1e-13)


@pytest.mark.once
@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
def test_a_transposed_weight_gives_the_results_of_its_matrix(
    backend, draw, assert_close, norm_gradient
):
    config, kind = Config(3, 2.0, norm_gradient=norm_gradient), LayerKind("transposed")
    inputs = {
        "x": draw(5, 6), "lora_a": draw(3, 6), "lora_b": draw(7, 3), "magnitude": draw(7),
        "weight": draw(7, 6), "bias": draw(7),
    }  # fmt: skip
    dy, transpose = draw(5, 7), doraxp.backends.transpose
    y, cache = backend.run(forward, inputs, None, config, None)
    desired = backend.run(all_gradients, dy, cache)
    turned = inputs | {"weight": transpose(inputs["weight"])}
    other, cache = backend.run(forward, turned, None, config, MatMul(), kind)
    actual = backend.run(all_gradients, dy, cache)
    assert_close(other, y, rtol=1e-14)
    assert_close(transpose(actual.pop("weight")), desired.pop("weight"), rtol=1e-14)
    for name, gradient in actual.items():
        assert_close(gradient, desired[name], rtol=1e-14)


@pytest.mark.uses("convolution")
@pytest.mark.once
@pytest.mark.parametrize("groups", [1, 2])
def test_a_fresh_adapter_and_a_merge_act_as_the_convolution(backend, assert_close, groups):
    (inputs, kind), operator = of_convolution((6, 5), (3, 2), groups), Convolution(padding=1)
    inputs, config = on(backend, inputs), Config(2, 3.0)
    fresh = backend.run(doraxp.init, inputs["weight"], config, seed=0, kind=kind)
    bare = backend.run(operator.apply, inputs["x"], inputs["weight"])
    y, _ = backend.run(
        doraxp.forward, inputs["x"], inputs["weight"], fresh, config, operator=operator, kind=kind
    )
    assert_close(y, bare, rtol=1e-14)
    adapter = adapter_of(inputs)
    merged = backend.run(doraxp.merge, inputs["weight"], adapter, config, kind=kind)
    y, _ = backend.run(
        doraxp.forward, inputs["x"], inputs["weight"], adapter, config, operator=operator, kind=kind
    )
    assert_close(backend.run(operator.apply, inputs["x"], merged), y, rtol=1e-13)


@pytest.mark.once
@pytest.mark.parametrize("of", KINDS)
@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
def test_rows_that_cancel_keep_their_digits_through_an_operator(
    backend, assert_close, of, norm_gradient
):
    """B A is W's opposite, except for a millionth: the factors alone would lose six digits."""
    if of == "convolution":
        (inputs, kind), operator = of_convolution((5, 4), (3, 2), 1), Convolution(padding=1)

        def apply(x, weight):
            return convolved(x, weight, **settings(operator))
    else:
        (inputs, kind), operator = of_embedding(), Embedding()

        def apply(ids, weight):
            return weight[ids]

    config = Config(2, norm_gradient=norm_gradient)
    near = -(inputs["lora_b"] @ inputs["lora_a"])
    near = near * (1 + 1e-6 * np.random.default_rng(9).standard_normal(near.shape))
    turned = near.T if kind.name == "embedding" else near.reshape(inputs["weight"].shape)
    inputs = inputs | {"weight": np.ascontiguousarray(turned)}
    desired, _ = outputs(apply, inputs, config, kind)
    y, cache = backend.run(forward, on(backend, inputs), None, config, operator)
    assert_close(y, desired, rtol=1e-8)
    dy = np.random.default_rng(8).standard_normal(desired.shape)
    found = backend.run(all_gradients, backend.asarray(dy), cache)
    v = near + inputs["lora_b"] @ inputs["lora_a"]
    gain = (inputs["magnitude"] / np.linalg.norm(v, axis=-1))[:, None]
    if of == "convolution":
        merged = (gain * v).reshape(inputs["weight"].shape)
        back = backend.run(
            operator.transpose, backend.asarray(dy), backend.asarray(merged), inputs["x"].shape
        )
        assert_close(found["x"], back, rtol=1e-8)


@pytest.mark.once
@pytest.mark.parametrize("of", KINDS)
def test_a_row_of_zeros_gives_the_bias_and_no_gradient(backend, of):
    (inputs, kind), operator = of_embedding(), Embedding()
    if of == "convolution":
        (inputs, kind), operator = of_convolution((5, 4), (3, 2), 1), Convolution()
    matrix = kind.matrix(inputs["weight"]).copy()
    matrix[1] = 0
    inputs["lora_b"][1] = 0
    inputs["weight"] = np.ascontiguousarray(kind.restore(matrix, inputs["weight"].shape))
    y, cache = backend.run(forward, on(backend, inputs), None, Config(2), operator)
    y = np.moveaxis(backend.numpy(y), operator.channel_axis, 0)[1]
    np.testing.assert_array_equal(y, inputs["bias"][1] if of == "convolution" else 0.0)
    shape = cache.through.y_shape
    found = backend.run(all_gradients, backend.asarray(np.ones(shape)), cache)
    assert backend.numpy(found["magnitude"])[1] == 0
    assert all(
        np.isfinite(backend.numpy(each)).all() for each in found.values() if each is not None
    )


@pytest.mark.uses("convolution")
def test_a_prepared_norm_serves_the_forwards_of_its_weight(backend, assert_close):
    (inputs, kind), operator = of_convolution((6, 5), (3, 2), 2), Convolution()
    inputs, config = on(backend, inputs), Config(2)
    adapter = adapter_of(inputs)
    plain, _ = forward(inputs, None, config, operator, kind)
    prepared = doraxp.prepare(inputs["weight"], adapter, config, kind=kind)
    assert prepared.weight is inputs["weight"]
    y, cache = forward(inputs, None, config, operator, kind, prepared=prepared)
    assert cache.prepared is prepared
    assert_close(y, plain, rtol=1e-15)
    moved = inputs | {"magnitude": 2 * inputs["magnitude"]}
    anew, cache = forward(moved, None, config, operator, kind, previous=prepared)
    assert cache.prepared.weight_squares is prepared.weight_squares
    assert_close(anew, forward(moved, None, config, operator, kind)[0], rtol=1e-15)
    merged = doraxp.merge(inputs["weight"], adapter, config, kind=kind, prepared=prepared)
    assert_close(merged, doraxp.merge(inputs["weight"], adapter, config, kind=kind), rtol=1e-14)


def test_a_prepared_norm_is_refused_for_another_kind(backend, draw):
    weight, kind = draw(4, 4), LayerKind("transposed")
    adapter = doraxp.init(weight, Config(2), seed=0)
    prepared = doraxp.prepare(weight, adapter, Config(2), kind=kind)
    with pytest.raises(ValueError, match=r"the kind was .*'transposed'.*, is None"):
        doraxp.merge(weight, adapter, Config(2), prepared=prepared)
    with pytest.raises(ValueError, match="previous must be of the kind None"):
        doraxp.prepare(weight, adapter, Config(2), previous=prepared)


@pytest.mark.once
@pytest.mark.dtypes("float16", "bfloat16", "float32")
@pytest.mark.parametrize("of", KINDS)
def test_results_have_the_dtypes_of_x_and_of_the_computation(backend, dtype, of):
    (inputs, _), operator = of_embedding(), Embedding()
    if of == "convolution":
        (inputs, _), operator = of_convolution((5, 4), (3, 2), 1), Convolution(padding=1)
    wide, cache = forward(inputs, None, Config(2), operator)
    narrow = {
        name: backend.asarray(array if array.dtype == int else array.astype(dtype))
        for name, array in inputs.items()
    }
    y, cache = backend.run(forward, narrow, None, Config(2), operator)
    assert y.dtype == narrow["weight"].dtype
    error = np.abs(backend.numpy(y).astype("float64") - wide).max() / np.abs(wide).max()
    assert error < {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}[dtype]
    found = backend.run(all_gradients, backend.asarray(np.ones(wide.shape, dtype)), cache)
    single = backend.asarray(np.zeros(1, "float32")).dtype
    assert found["lora_a"].dtype == found["weight"].dtype == single
    assert of == "embedding" or found["x"].dtype == narrow["x"].dtype


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_frozen_step_of_an_embedding_stores_no_array_of_its_size(order):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((20_000, 96)).astype("float32", order=order)
    config, ids = Config(4), rng.integers(0, 20_000, 256)
    adapter = doraxp.init(weight, config, seed=0, kind=LayerKind("embedding"))
    adapter = adapter._replace(lora_b=rng.standard_normal((96, 4)).astype("float32"))
    prepared = doraxp.prepare(weight, adapter, config, kind=LayerKind("embedding"))
    tracemalloc.start()
    y, cache = doraxp.forward(ids, weight, adapter, config, operator=Embedding(), previous=prepared)
    doraxp.backward(y, cache)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < weight.nbytes / 2


def refused(error, match, **changes):
    (inputs, kind), operator = of_convolution((6, 5), (3, 2), 1), Convolution()
    arguments = {"mask": None, "config": Config(2), "operator": operator, "kind": kind}
    arguments |= {name: changes.pop(name) for name in list(changes) if name in arguments}
    with pytest.raises(error, match=match):
        forward(inputs | changes, *arguments.values())


def test_a_convolution_refuses_what_does_not_fit():
    refused(ValueError, r"the kernel must fit into x: it spans \(3, 2\)", x=np.zeros((1, 4, 2, 5)))
    refused(ValueError, r"padding must be one number or 2", operator=Convolution(padding=(1, 1, 1)))
    refused(ValueError, r"x must have shape \(batch, in, \*size\)", x=np.zeros((1, 4, 6)))
    refused(ValueError, r"x must have shape \(batch, in, \*size\)", x=np.zeros((1, 3, 6, 5)))
    refused(ValueError, r"bias must have shape \(\*stack, out\)", bias=np.zeros(5))
    refused(TypeError, "must be of dtype float16", x=np.zeros((3, 4, 6, 5), int))
    refused(ValueError, "dropout_mask must have the shape of x", mask=np.ones((3, 4, 6, 4)))
    refused(ValueError, "kind must be 'conv' for operator Convolution", kind=LayerKind("linear"))
    refused(ValueError, "operator must be given for a weight of kind 'conv'", operator=None)
    refused(TypeError, "operator must have kind, channel_axis", operator=object())
    refused(TypeError, "must be an object, got the class Convolution: call", operator=Convolution)
    refused(ValueError, "kind must be another kind", operator=Wrapped(), kind=LayerKind("columns"))
    refused(ValueError, "kind must be 'linear' or", operator=None, kind=LayerKind("columns"))
    for operator in ({"stride": 0}, {"padding": -1}, {"dilation": (1, 0)}):
        with pytest.raises(ValueError, match=f"{next(iter(operator))} must be at least"):
            Convolution(**operator)
    with pytest.raises(ValueError, match="stride must have 1 to 3 numbers"):
        Convolution(stride=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="padding must have 1 to 3 numbers"):
        Convolution(padding=())
    with pytest.raises(TypeError, match="stride must be an integer"):
        Convolution(stride="same")
    with pytest.raises(ValueError, match="a kernel of 1 to 3 dimensions"):
        Convolution().apply(np.zeros((1, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"no axis of length 0, got \(2, 0, 2\)"):
        Convolution().apply(np.zeros((1, 2, 3)), np.zeros((2, 0, 2)))
    for x in (np.zeros((1, 0, 3)), np.zeros((1, 2, 0))):
        with pytest.raises(ValueError, match=r"x must have shape \(batch, in, \*size\)"):
            Convolution(padding=1).apply(x, np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="dy must have the shape of y"):
        Convolution().transpose(np.zeros((1, 2, 3)), np.zeros((2, 2, 2)), (1, 2, 3))


@pytest.mark.parametrize(("groups", "inputs"), [(1, 8), (2, 4)])
def test_an_x_of_other_groups_than_the_kind_is_refused(groups, inputs):
    """The operator alone would take x: A below V has 8 outputs, for 1 and for 2 groups."""
    kind = LayerKind("conv", groups=groups)
    weight, x = np.ones((6, 4, 3)), np.ones((2, inputs, 9))
    adapter = doraxp.init(weight, Config(2), seed=0, kind=kind)
    match = (
        rf"x must have in = {counted(groups, 'group')} · 4 = {groups * 4}, .* got {inputs}: "
        rf"for other groups pass kind=LayerKind\('conv', groups={inputs // 4}\) everywhere"
    )
    with pytest.raises(ValueError, match=match):
        doraxp.forward(x, weight, adapter, Config(2), kind=kind, operator=Convolution())


def test_a_message_about_x_names_the_shape_of_the_weight():
    refused(ValueError, r"for a weight of shape \(6, 4, 3, 2\), got", x=np.zeros((1, 3, 6, 5)))


def test_an_operator_with_its_outputs_on_another_axis_is_refused(draw):
    class Misplaced(Wrapped):
        channel_axis = 1

    inputs = {
        "x": draw(5, 6), "lora_a": draw(3, 6), "lora_b": draw(7, 3), "magnitude": draw(7),
        "weight": draw(7, 6),
    }  # fmt: skip
    match = r"must return the 10 outputs of the weight on axis 1, its channel_axis, .* \(10, 5\)"
    with pytest.raises(ValueError, match=match):
        forward(inputs, None, Config(3), Misplaced())
    Misplaced.channel_axis = 2
    with pytest.raises(ValueError, match="must return the 10 outputs of the weight on axis 2"):
        forward(inputs, None, Config(3), Misplaced())


def test_groups_refuse_a_bias_of_another_shape():
    (inputs, kind), operator = of_convolution((6, 5), (3, 2), 2), Convolution()
    with pytest.raises(ValueError, match=r"bias must have shape \(out,\) = \(6,\)"):
        forward(inputs | {"bias": np.zeros((2, 3))}, None, Config(2), operator, kind)


def test_an_embedding_refuses_other_numbers_than_ids(backend):
    (inputs, _), operator = of_embedding(), Embedding()
    inputs = on(backend, inputs)
    for ids, error, match in (
        (np.array([0.0, 1.0]), TypeError, "ids must be of an integer dtype"),
        (np.zeros(2), TypeError, "ids must be of an integer dtype"),
    ):
        with pytest.raises(error, match=match):
            forward(inputs | {"x": backend.asarray(ids)}, None, Config(2), operator)
    with pytest.raises(ValueError, match="dropout_mask must be None where x has ids"):
        forward(inputs, inputs["x"], Config(2), operator)
    with pytest.raises(TypeError, match="x must be an array of a library"):
        forward(inputs | {"x": [0, 1]}, None, Config(2), operator)
    with pytest.raises(ValueError, match=r"dy must have the shape of y, \(2, 3, 5\)"):
        operator.weight_gradient(inputs["lora_b"], inputs["x"], (9, 5))
    with pytest.raises(TypeError, match="no gradient by its ids"):
        operator.transpose(inputs["weight"], inputs["weight"], (9,))
    with pytest.raises(ValueError, match=r"must have shape \(tokens, dim\)"):
        operator.apply(inputs["x"], inputs["magnitude"])


def test_ids_out_of_range_are_refused_where_they_can_be_read():
    (inputs, _), operator = of_embedding(), Embedding()
    for wrong in (9, -1):
        ids = np.array([0, wrong])
        with pytest.raises(ValueError, match=rf"ids must be in 0 ≤ id < 9.*got {wrong}"):
            forward(inputs | {"x": ids}, None, Config(2), operator)
    with pytest.raises(TypeError, match="ids must be an array of the library of the weight"):
        operator.apply([1, 2], inputs["weight"])
    with pytest.raises(ValueError, match="scale must be finite and not 0"):
        Embedding(scale=0)
    y, cache = forward(inputs | {"x": np.zeros((0, 2), int)}, None, Config(2), operator)
    assert y.shape == (0, 2, 5)
    assert not doraxp.backward(y, cache).adapter.magnitude.any()


def test_ids_must_be_where_the_table_is(monkeypatch):
    ids, table = np.array([0, 1]), np.ones((3, 2))
    monkeypatch.setattr("doraxp._core.operators.device", lambda array: f"GPU {array.ndim}")
    with pytest.raises(ValueError, match="ids must be on GPU 2, where the weight is"):
        Embedding().apply(ids, table)


def test_a_class_without_arrays_is_static_for_jax_once(monkeypatch):
    found = []

    def register(kind):
        found.append(kind)
        if len(found) > 1:
            raise ValueError("registered already")

    tree = SimpleNamespace(register_static=register)
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(tree_util=tree))
    for _ in range(2):
        register_static(LayerKind)
    assert found == [LayerKind, LayerKind]
    monkeypatch.delitem(sys.modules, "jax")
    register_static(LayerKind)
    assert len(found) == 2


def test_ids_and_tables_that_jax_traces_have_no_device(jax):
    """Of the two, `vmap` and `grad` trace one."""
    (inputs, _), operator = of_embedding(), Embedding()
    ids, table = jax.numpy.asarray(inputs["x"]), jax.numpy.asarray(inputs["weight"])
    adapter = jax.tree.map(jax.numpy.asarray, adapter_of(inputs))

    def act(ids, adapter):
        return doraxp.forward(ids, table, adapter, Config(2), operator=operator)[0]

    def loss(adapter):
        return jax.numpy.sum(jax.numpy.sin(act(ids, adapter)))

    y, cache = doraxp.forward(ids, table, adapter, Config(2), operator=operator)
    np.testing.assert_allclose(jax.vmap(act, (0, None))(ids, adapter), y, rtol=1e-6)
    found = jax.grad(loss)(adapter)
    expected = doraxp.backward(jax.numpy.cos(y), cache).adapter
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_weights_by_rows_take_no_operator():
    weight = doraxp.QuantisedWeight(
        np.zeros((4, 4), np.uint8), np.zeros((256, 1), np.float32), np.ones((4, 1), np.float32),
        group=(1, 4),
    )  # fmt: skip
    adapter = doraxp.init(weight, Config(2), seed=0)
    with pytest.raises(ValueError, match="operator must be None for a weight that is given by"):
        doraxp.forward(np.zeros((2, 4), "f4"), weight, adapter, Config(2), operator=Wrapped())


def test_the_shape_with_other_outputs_is_that_of_a_weight_of_the_kind():
    for name, shape, other in (
        ("linear", (7, 6), (3, 6)), ("experts", (2, 7, 6), (2, 3, 6)),
        ("conv", (7, 6, 5), (3, 6, 5)),
        ("transposed", (6, 7), (6, 3)), ("transposed_experts", (2, 6, 7), (2, 6, 3)),
        ("embedding", (9, 7), (9, 3)), ("columns", (6, 7, 5), (6, 3, 5)),
    ):  # fmt: skip
        kind = LayerKind(name)
        assert kind.shape_with(shape, 3) == other
        assert kind.matrix_shape(other)[-2] == 3
    assert LayerKind("conv", groups=2).shape_with((8, 6, 5), 3) == (6, 6, 5)


def test_kinds_without_one_input_axis_take_no_reduce():
    (inputs, kind), operator = of_convolution((6, 5), (3, 2), 1), Convolution()
    with pytest.raises(ValueError, match="reduce must be None for a weight of kind 'conv'"):
        forward(inputs, None, Config(2), operator, kind, reduce=lambda part: part)
    inputs = {name: np.ones(shape) for name, shape in (("x", (5, 6)), ("weight", (7, 6)))}
    adapter = doraxp.init(inputs["weight"], Config(2), seed=0)
    with pytest.raises(ValueError, match="reduce must be None with an operator"):
        doraxp.forward(*inputs.values(), adapter, Config(2), operator=Wrapped(), reduce=np.copy)


@pytest.mark.once
def test_a_matrix_product_as_an_operator_has_its_gradients(backend, draw, assert_close):
    x, weight, dy = draw(2, 4, 5, 6), draw(2, 7, 6), draw(2, 4, 5, 7)
    operator, transpose = MatMul(), doraxp.backends.transpose
    desired = backend.numpy(x) @ backend.numpy(weight)[:, None].mT
    assert_close(backend.run(operator.apply, x, weight), desired, rtol=1e-14)
    dx = backend.numpy(dy) @ backend.numpy(weight)[:, None]
    assert_close(backend.run(operator.transpose, dy, weight, (2, 4, 5, 6)), dx, rtol=1e-14)
    dw = np.einsum("eabo,eabi->eoi", backend.numpy(dy), backend.numpy(x))
    assert_close(backend.run(operator.weight_gradient, dy, x, (2, 7, 6)), dw, rtol=1e-14)
    assert transpose(weight).shape == (2, 6, 7)


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CATALOGUE)
def test_every_number_of_the_catalogue_is_within_its_bound(backend, case, dtype):
    inputs, kind, operator = on(backend, case.stored(dtype)), case.layer_kind, case.operator
    adapter, config, mask = adapter_of(inputs), case.config, inputs.get("dropout_mask")
    y, cache = backend.run(forward, inputs, mask, config, operator, kind)
    grads = backend.run(all_gradients, inputs["dy"], cache)
    fresh = backend.run(doraxp.init, inputs["weight"], config, seed=0, kind=kind)
    found = {
        "y": y, "norm": cache.prepared.norm, "gain": cache.prepared.gain,
        "merged": backend.run(doraxp.merge, inputs["weight"], adapter, config, kind=kind),
        "initial": fresh.magnitude, "dx": grads["x"], "da": grads["lora_a"],
        "db": grads["lora_b"], "dm": grads["magnitude"], "dw": grads["weight"],
        "dbias": grads["bias"],
    }  # fmt: skip
    for name, want in expected_of_operator(case, dtype).items():
        assert want.share(backend.numpy(found[name])) <= 1, name
