"""Dropout with a mask that the caller draws: the formulas, every gradient, bad masks."""

from __future__ import annotations

import numpy as np
import pytest
from slopes import assert_transpose, moved, repeated

import doraxp
from doraxp import Adapter, Config, backends
from doraxp.backends import Factored

INPUTS = ("x", "lora_a", "lora_b", "magnitude", "weight", "bias")
MODES = ("input", "low_rank")
CHOICES = [
    pytest.param(dropout, form, norm_gradient, id=f"{dropout}-{form}-{norm_gradient}")
    for dropout in MODES
    for form in ("weight", "direction")
    for norm_gradient in ("exact", "detached")
]


@pytest.fixture
def draw_mask(backend):
    """Return a function that draws masks: each number is 0, or 1/(1 − p) with p = 1/4."""
    rng = np.random.default_rng(4)

    def draw(*shape, dtype="float64"):
        kept = rng.uniform(size=shape) > 0.25
        return backend.asarray((kept / 0.75).astype(dtype))

    return draw


def draw_inputs(draw, *stack, dtype="float64"):
    shapes = {
        "x": (*stack, 5, 6),
        "lora_a": (*stack, 3, 6),
        "lora_b": (*stack, 7, 3),
        "magnitude": (*stack, 7),
        "weight": (*stack, 7, 6),
        "bias": (*stack, 7),
    }
    return {name: draw(*shape, dtype=dtype) for name, shape in shapes.items()}


def adapter_of(inputs):
    return Adapter(*(inputs[name] for name in Adapter._fields))


def forward(inputs, mask, config, **others):
    return doraxp.forward(
        inputs["x"],
        inputs["weight"],
        adapter_of(inputs),
        config,
        bias=inputs["bias"],
        dropout_mask=mask,
        **others,
    )


def all_gradients(dy, cache):
    x, adapter, weight, bias = doraxp.backward(dy, cache, train_base=True)
    return {"x": x, **adapter._asdict(), "weight": weight, "bias": bias}


def dense(x, a, b, m, weight, bias, mask, config):
    """Return y by the formulas of both kinds of dropout, with V stored, from NumPy's arrays."""
    unit = weight
    if config.form == "direction":
        unit = weight / np.linalg.norm(weight, axis=-1, keepdims=True)
    update = config.scaling * b @ a
    norm = np.linalg.norm(unit + update, axis=-1)
    gain = (m / norm)[..., None, :]
    bias = bias[..., None, :]
    if config.dropout == "low_rank":
        return gain * (x @ unit.mT + (mask * x) @ update.mT) + bias
    seen = mask * x
    correction = gain * (seen @ unit.mT + seen @ update.mT) - seen @ weight.mT
    return x @ weight.mT + correction + bias


@pytest.mark.dtypes("float32", "float64")
@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("dropout", MODES)
def test_forward_is_the_dense_formula(
    backend, draw, draw_mask, assert_close, dropout, form, stack, dtype
):
    config = Config(3, 5.0, form=form, dropout=dropout)
    inputs = draw_inputs(draw, *stack, dtype=dtype)
    mask = draw_mask(*stack, 5, 6, dtype=dtype)
    y, _ = backend.run(forward, inputs, mask, config)
    wide = [backend.numpy(array).astype("float64") for array in (*inputs.values(), mask)]
    rtol = {"float32": 4e-6, "float64": 1e-14}[dtype]
    assert_close(y, dense(*wide, config).astype(dtype), rtol=rtol)


@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize(("dropout", "form", "norm_gradient"), CHOICES)
def test_each_gradient_is_the_transpose_of_the_derivative(
    backend, draw, draw_mask, dropout, form, norm_gradient, stack
):
    """⟨dy, J u⟩ by central differences equals ⟨Jᵀ dy, u⟩ by `backward`, for a random u."""
    config = Config(3, 2.0, form=form, norm_gradient=norm_gradient, dropout=dropout)
    inputs, directions = draw_inputs(draw, *stack), draw_inputs(draw, *stack)
    mask, dy = draw_mask(*stack, 5, 6), draw(*stack, 5, 7)
    _, cache = backend.run(forward, inputs, mask, config)
    gradients = backend.run(all_gradients, dy, cache)
    layers = moved(backend, inputs, directions)
    if norm_gradient == "detached":  # n is a constant: undo the change of n in m / n
        now = doraxp.prepare(layers["weight"], adapter_of(layers), config).norm
        layers["magnitude"] = layers["magnitude"] * now / cache.prepared.norm
    y, _ = forward(layers, backend.asarray(repeated(backend, mask, len(inputs))), config)
    assert_transpose(backend, gradients, directions, dy, y)


@pytest.mark.parametrize(("dropout", "form", "norm_gradient"), CHOICES)
def test_gradients_equal_autograd_of_the_dense_formula(
    backend, draw, draw_mask, assert_close, torch, dropout, form, norm_gradient
):
    config = Config(3, 2.0, form=form, norm_gradient=norm_gradient, dropout=dropout)
    inputs, mask, dy = draw_inputs(draw), draw_mask(5, 6), draw(5, 7)
    y, cache = backend.run(forward, inputs, mask, config)
    actual = backend.run(all_gradients, dy, cache)

    leaves = {
        name: torch.tensor(backend.numpy(array), requires_grad=True)
        for name, array in inputs.items()
    }
    x, a, b, m, weight, bias = leaves.values()
    seen = x * torch.tensor(backend.numpy(mask))
    unit = weight if form == "weight" else weight / weight.norm(dim=1, keepdim=True)
    update = config.scaling * b @ a
    norm = (unit + update).norm(dim=1)
    gain = m / (norm.detach() if norm_gradient == "detached" else norm)
    if dropout == "input":
        y_dense = x @ weight.T + gain * (seen @ (unit + update).T) - seen @ weight.T + bias
    else:
        y_dense = gain * (x @ unit.T + seen @ update.T) + bias
    y_dense.backward(torch.tensor(backend.numpy(dy)))

    assert_close(y, y_dense.detach().numpy(), rtol=1e-14)
    for name, leaf in leaves.items():
        assert_close(actual[name], leaf.grad.numpy(), rtol=2e-14)


@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("dropout", MODES)
def test_a_mask_of_ones_drops_nothing(backend, draw, assert_close, dropout, form):
    config = Config(3, form=form, dropout=dropout)
    inputs, dy = draw_inputs(draw), draw(5, 7)
    runs = []
    for mask in (None, backend.asarray(np.ones((5, 6)))):
        y, cache = backend.run(forward, inputs, mask, config)
        runs.append({"y": y, **backend.run(all_gradients, dy, cache)})
    plain, masked = runs
    for name, array in plain.items():
        assert_close(masked[name], array, rtol=1e-15)


def test_without_a_mask_the_choice_changes_nothing(backend, draw, assert_close):
    inputs, dy = draw_inputs(draw), draw(5, 7)
    runs = []
    for dropout in MODES:
        y, cache = backend.run(forward, inputs, None, Config(3, dropout=dropout))
        assert cache.dropout_mask is None
        runs.append({"y": y, **backend.run(all_gradients, dy, cache)})
    for name, array in runs[0].items():
        assert_close(runs[1][name], array, rtol=0)


@pytest.mark.parametrize("dropout", MODES)
def test_a_fresh_adapter_gives_the_base_product_whatever_is_dropped(
    backend, draw, draw_mask, assert_close, dropout
):
    config, weight, x = Config(3, dropout=dropout), draw(7, 6), draw(5, 6)
    adapter = doraxp.init(weight, config, seed=0)
    y, _ = backend.run(doraxp.forward, x, weight, adapter, config, dropout_mask=draw_mask(5, 6))
    assert_close(y, backend.numpy(x) @ backend.numpy(weight).T, rtol=1e-15)
    if dropout == "low_rank":  # the dropped x is multiplied by B = 0
        plain, _ = backend.run(doraxp.forward, x, weight, adapter, config)
        assert_close(y, plain, rtol=0)


@pytest.mark.parametrize("dropout", MODES)
def test_rows_that_cancel_keep_their_digits(backend, draw, draw_mask, assert_close, dropout):
    """Where rows of V are stored, the update still gets the dropped x, and the base all of x."""
    config = Config(3, dropout=dropout)
    inputs, mask, dy = draw_inputs(draw), draw_mask(5, 6), draw(5, 7)
    host = {name: backend.numpy(array) for name, array in inputs.items()}
    weight = host["weight"].copy()
    weight[::2] = 1e-3 * weight[::2] - (host["lora_b"] @ host["lora_a"])[::2]
    inputs["weight"], host["weight"] = backend.asarray(weight), weight
    y, cache = backend.run(forward, inputs, mask, config)
    assert not isinstance(cache.prepared.direction, Factored)
    gradients = backend.run(all_gradients, dy, cache)
    mask, dy = backend.numpy(mask), backend.numpy(dy)
    assert_close(y, dense(*host.values(), mask, config), rtol=1e-12)

    update = host["lora_b"] @ host["lora_a"]
    v = weight + update
    gain = host["magnitude"] / np.linalg.norm(v, axis=1)
    dz = gain * dy
    if dropout == "input":
        dx = mask * (dz @ v) + (1 - mask) * (dy @ weight)
    else:
        dx = dz @ weight + mask * (dz @ update)
    assert_close(gradients["x"], dx, rtol=1e-12)


def test_a_zero_row_gives_what_the_base_gives(backend, draw, draw_mask, assert_close):
    config = Config(3)
    inputs, mask, dy = draw_inputs(draw), draw_mask(5, 6), draw(5, 7)
    keep = backend.asarray(np.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]))
    for name in ("weight", "lora_b"):
        inputs[name] = inputs[name] * keep[:, None]
    y, cache = backend.run(forward, inputs, mask, config)
    gradients = backend.run(all_gradients, dy, cache)
    assert_close(y[:, 2], np.full(5, backend.numpy(inputs["bias"])[2]), rtol=1e-15)
    assert all(np.isfinite(backend.numpy(array)).all() for array in gradients.values())
    assert float(gradients["magnitude"][2]) == 0


@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("dropout", MODES)
def test_an_earlier_norm_changes_nothing(backend, draw, draw_mask, assert_close, dropout, form):
    config = Config(3, form=form, dropout=dropout)
    inputs, mask = draw_inputs(draw), draw_mask(5, 6)
    weight, adapter = inputs["weight"], adapter_of(inputs)
    older = doraxp.prepare(weight, adapter._replace(lora_b=draw(7, 3)), config)
    prepared = doraxp.prepare(weight, adapter, config)
    y, _ = backend.run(forward, inputs, mask, config)
    for known in ({"previous": older}, {"prepared": prepared}):
        again, _ = forward(inputs, mask, config, **known)
        assert_close(again, y, rtol=1e-14)


@pytest.mark.parametrize("dropout", MODES)
def test_leading_axes_are_tokens(backend, draw, draw_mask, assert_close, dropout):
    config, inputs, mask, dy = (
        Config(3, dropout=dropout), draw_inputs(draw), draw_mask(6, 6), draw(6, 7),
    )  # fmt: skip
    inputs["x"] = draw(6, 6)
    y, cache = backend.run(forward, inputs, mask, config)
    gradients = backend.run(all_gradients, dy, cache)
    xp = backend.namespace()
    folded = inputs | {"x": xp.reshape(inputs["x"], (2, 3, 6))}
    y2, cache = backend.run(forward, folded, xp.reshape(mask, (2, 3, 6)), config)
    again = backend.run(all_gradients, xp.reshape(dy, (2, 3, 7)), cache)
    assert_close(xp.reshape(y2, (6, 7)), y, rtol=1e-15)
    assert_close(xp.reshape(again["x"], (6, 6)), gradients["x"], rtol=1e-15)
    for name in INPUTS[1:]:
        assert_close(again[name], gradients[name], rtol=1e-15)


@pytest.mark.dtypes("float16", "bfloat16")
@pytest.mark.parametrize("dropout", MODES)
def test_results_with_low_precision_are_computed_in_float32(
    backend, draw, draw_mask, assert_close, dropout, dtype
):
    config = Config(3, dropout=dropout)
    xp = backend.namespace()
    low = draw_inputs(draw, dtype=dtype)
    mask, dy = draw_mask(5, 6, dtype=dtype), draw(5, 7, dtype=dtype)
    wide = {name: xp.astype(array, xp.float32) for name, array in low.items()}
    with backends.exact_products():  # else CuPy rounds z
        y, cache = backend.run(forward, low, mask, config)
    y32, cache32 = backend.run(forward, wide, xp.astype(mask, xp.float32), config)
    gradients = backend.run(all_gradients, dy, cache)
    gradients32 = backend.run(all_gradients, xp.astype(dy, xp.float32), cache32)
    assert y.dtype == gradients["x"].dtype == low["x"].dtype
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    assert_close(xp.astype(y, xp.float32), y32, rtol=eps)
    assert_close(xp.astype(gradients["x"], xp.float32), gradients32["x"], rtol=eps)
    for name in INPUTS[1:]:
        assert_close(gradients[name], gradients32[name], rtol=1e-5)


@pytest.mark.parametrize("dropout", MODES)
def test_arguments_are_never_written_to(backend, draw, draw_mask, dropout):
    config = Config(3, dropout=dropout)
    inputs, mask, dy = draw_inputs(draw), draw_mask(5, 6), draw(5, 7)
    arrays = (*inputs.values(), mask, dy)
    before = [np.array(backend.numpy(array)) for array in arrays]
    _, cache = forward(inputs, mask, config)
    all_gradients(dy, cache)
    for array, values in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(backend.numpy(array), values)


@pytest.mark.parametrize("dropout", MODES)
def test_the_layer_passes_the_mask_on(backend, draw, draw_mask, assert_close, dropout):
    config = Config(3, dropout=dropout)
    inputs, mask, dy = draw_inputs(draw), draw_mask(5, 6), draw(5, 7)
    base = doraxp.Linear(inputs["weight"], inputs["bias"])
    layer = doraxp.DoRALayer(base, config, seed=0)
    layer.adapter = adapter_of(inputs)
    y, cache = forward(inputs, mask, config)
    gradients = doraxp.backward(dy, cache)
    assert_close(layer.forward(inputs["x"], dropout_mask=mask), y, rtol=1e-15)
    assert_close(layer.backward(dy), gradients.x, rtol=1e-15)
    for name, gradient in gradients.adapter._asdict().items():
        assert_close(layer.gradients[name], gradient, rtol=1e-15)
    assert_close(layer.forward(inputs["x"]), forward(inputs, None, config)[0], rtol=1e-15)


def test_a_mask_that_does_not_fit_is_refused(backend, draw, draw_mask):
    config, inputs = Config(3), draw_inputs(draw)
    for shape in ((6,), (5, 3), (1, 6), (5, 1)):  # one that broadcasts is refused too
        message = r"dropout_mask must have the shape of x, \(5, 6\), got \(" + str(shape[0])
        with pytest.raises(ValueError, match=message):
            forward(inputs, draw_mask(*shape), config)
    for dtype in ("bool", "int64"):
        with pytest.raises(TypeError, match=r"dropout_mask must be of dtype .* got"):
            forward(inputs, draw_mask(5, 6, dtype=dtype), config)
    with pytest.raises(TypeError, match="dropout_mask must be an array of a library"):
        forward(inputs, 0.5, config)


def test_a_mask_of_another_library_is_refused(torch):
    weight, config = np.ones((7, 6)), Config(3)
    adapter = doraxp.init(weight, config, seed=0)
    with pytest.raises(TypeError, match=r"one library: .* dropout_mask of torch"):
        doraxp.forward(np.ones((5, 6)), weight, adapter, config, dropout_mask=torch.ones(5, 6))


def test_an_unknown_kind_of_dropout_is_refused():
    with pytest.raises(ValueError, match=r"dropout must be one of .*low_rank.* got 'output'"):
        Config(3, dropout="output")


@pytest.mark.parametrize("dropout", MODES)
def test_dx_is_rounded_once(dropout):
    """The mask scales dx before it is rounded to the dtype of x."""
    rng, config = np.random.default_rng(3), Config(3, dropout=dropout)
    weight = rng.standard_normal((7, 6)).astype("float16")
    adapter = doraxp.init(weight, config, seed=0)
    adapter = adapter._replace(lora_b=rng.standard_normal((7, 3)).astype("float32"))
    x, dy = (rng.standard_normal((50, k)).astype("float16") for k in (6, 7))
    mask = ((rng.uniform(size=x.shape) > 0.3) / 0.7).astype("float16")

    def dx(dtype):
        _, cache = doraxp.forward(
            x.astype(dtype), weight, adapter, config, dropout_mask=mask.astype(dtype)
        )
        return doraxp.backward(dy.astype(dtype), cache).x

    np.testing.assert_array_equal(dx("float16"), dx("float32").astype("float16"))
