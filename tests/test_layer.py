"""DoRALayer and Linear: their values, their vector and state, and what they keep between calls."""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config, DoRALayer, LayerKind, Linear

W = np.array([[3.0, 4.0], [0.0, 5.0]])
OPERATORS = [
    pytest.param("conv", marks=pytest.mark.uses("convolution")),
    pytest.param("grouped", marks=pytest.mark.uses("convolution")),
    pytest.param("embedding", marks=pytest.mark.uses("embedding")),
]


class Plain:
    """A user's layer without a bias."""

    def __init__(self, weight):
        self.weight = weight
        self.buffers = [weight]


def make(draw, config=None, *, train_base=False, bias=True, **options):
    base = Linear(draw(7, 6), draw(7) if bias else None)
    return DoRALayer(base, config or Config(2), seed=0, train_base=train_base, **options)


def step(layer, draw, rate=0.1):
    y = layer.forward(draw(5, 6))
    layer.backward(y)
    layer.update_parameters(rate)


def bits(backend, layer):
    return {name: backend.numpy(array).tobytes() for name, array in layer.state_dict().items()}


def test_forward_merge_and_count_by_hand(backend, assert_close):
    layer = DoRALayer(Linear(backend.asarray(W)), Config(1), seed=0)
    assert_close(
        layer.forward(backend.asarray(np.array([1.0, 2.0]))), np.array([11.0, 10.0]), rtol=0
    )
    assert_close(
        layer.forward(backend.asarray(np.eye(2))), np.array([[3.0, 0.0], [4.0, 5.0]]), rtol=0
    )
    assert_close(layer.merge_to_original_layer().weight, W, rtol=0)
    wide = DoRALayer(Linear(backend.asarray(np.ones((5, 10)))), Config(2), seed=0)
    assert wide.parameter_count == 35


def test_linear_is_the_dense_formula(backend, draw, assert_close):
    weight, bias, x, dy = draw(7, 6), draw(7), draw(2, 5, 6), draw(2, 5, 7)
    layer = Linear(weight, bias)
    w, c, x_np, d = map(backend.numpy, (weight, bias, x, dy))
    for times in (1, 2):  # gradients add up
        assert_close(layer.forward(x), x_np @ w.T + c, rtol=1e-14)
        assert_close(layer.backward(dy), d @ w, rtol=1e-14)
        dweight = times * np.einsum("abo,abi->oi", d, x_np)
        assert_close(layer.weight_gradient, dweight, rtol=1e-14)
        assert_close(layer.bias_gradient, times * d.sum(axis=(0, 1)), rtol=1e-14)
    layer.clear_gradients()
    assert layer.weight_gradient is layer.bias_gradient is None
    plain = Linear(weight)
    assert_close(plain.forward(x), x_np @ w.T, rtol=1e-14)
    plain.backward(dy)
    assert plain.bias_gradient is None


def test_linear_refuses_bad_arguments(draw):
    with pytest.raises(RuntimeError, match="backward needs a forward: call"):
        Linear(draw(7, 6)).backward(draw(5, 7))
    with pytest.raises(ValueError, match=r"bias must have shape .* got \(6,\)"):
        Linear(draw(7, 6), draw(6))
    with pytest.raises(ValueError, match="weight must have shape"):
        Linear(draw(6))
    layer = Linear(draw(7, 6))
    with pytest.raises(ValueError, match="x must have shape"):
        layer.forward(draw(5, 7))
    layer.forward(draw(5, 6))
    with pytest.raises(ValueError, match="dy must have the shape of y"):
        layer.backward(draw(5, 6))


@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("train_base", [False, True])
def test_the_layer_equals_the_functions(
    backend, draw, assert_close, form, norm_gradient, train_base
):
    config = Config(2, 4.0, form=form, norm_gradient=norm_gradient)
    layer = make(draw, config, train_base=train_base)
    weight, bias = layer.base.weight, layer.base.bias
    adapter = doraxp.init(weight, config, seed=0)
    for _ in range(2):
        x, dy = draw(5, 6), draw(5, 7)
        y, cache = doraxp.forward(x, weight, adapter, config, bias=bias)
        dx, grads, dweight, dbias = doraxp.backward(dy, cache, train_base=train_base)
        assert_close(layer.forward(x), y, rtol=1e-15)
        assert_close(layer.backward(dy), dx, rtol=1e-15)
        layer.update_parameters(0.25)
        adapter = Adapter(*(p - 0.25 * g for p, g in zip(adapter, grads, strict=True)))
        if train_base:
            weight, bias = weight - 0.25 * dweight, bias - 0.25 * dbias
        for leaf, expected in zip(layer.adapter, adapter, strict=True):
            assert_close(leaf, expected, rtol=1e-14)
        assert_close(layer.weight, weight, rtol=1e-14)
        assert_close(layer.bias, bias, rtol=1e-14)


def test_training_lowers_the_loss_and_leaves_the_base_alone(backend, draw):
    layer = make(draw, train_base=True)
    before = backend.numpy(layer.base.weight).copy()
    x, target, losses = draw(5, 6), draw(5, 7), []
    for _ in range(20):
        error = layer.forward(x) - target
        losses.append(float(np.sum(backend.numpy(error) ** 2)))
        layer.backward(2 * error)
        layer.update_parameters(0.01)
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_array_equal(backend.numpy(layer.base.weight), before)


def test_gradients_add_up_until_a_step_uses_them(backend, draw, assert_close):
    layer = make(draw)
    assert_close(layer.get_parameter_gradients(), np.zeros(layer.parameter_count), rtol=0)
    y = layer.forward(draw(5, 6))
    layer.backward(y)
    once = layer.get_parameter_gradients()
    layer.backward(y)
    assert_close(layer.get_parameter_gradients(), 2 * once, rtol=1e-15)
    layer.clear_gradients()
    assert_close(layer.get_parameter_gradients(), 0 * once, rtol=0)
    layer.backward(y)
    layer.update_parameters(0.1)
    assert layer.gradients is None


def test_a_step_needs_gradients_and_a_backward_a_forward(draw):
    layer = make(draw)
    with pytest.raises(RuntimeError, match="backward needs a forward with the current parameters"):
        layer.backward(draw(5, 7))
    with pytest.raises(
        RuntimeError, match="update_parameters needs gradients of the current parameters"
    ):
        layer.update_parameters(0.1)
    step(layer, draw)
    with pytest.raises(
        RuntimeError, match="update_parameters needs gradients of the current parameters"
    ):
        layer.update_parameters(0.1)
    with pytest.raises(RuntimeError, match="again after the parameters change"):
        layer.backward(draw(5, 7))
    for drop in (
        lambda: layer.set_parameters(layer.get_parameters()),
        lambda: layer.load_state_dict(layer.state_dict()),
        layer.reset_state,
    ):
        layer.backward(layer.forward(draw(5, 6)))
        drop()
        assert layer.gradients is None
        with pytest.raises(RuntimeError, match="the state is reset"):
            layer.backward(draw(5, 7))


def test_gradients_of_earlier_parameters_are_not_used(draw, assert_close):
    layer = make(draw)
    layer.backward(layer.forward(draw(5, 6)))
    layer.adapter = layer.adapter._replace(magnitude=2 * layer.adapter.magnitude)
    assert layer.diagnostics().gradient_norms == {}
    with pytest.raises(
        RuntimeError, match="update_parameters needs gradients of the current parameters"
    ):
        layer.update_parameters(0.1)
    x = draw(5, 6)
    layer.backward(layer.forward(x))
    expected = make(draw)
    expected.weight, expected.bias, expected.adapter = layer.weight, layer.bias, layer.adapter
    expected.backward(expected.forward(x))
    for name, gradient in layer.gradients.items():
        assert_close(gradient, expected.gradients[name], rtol=0)


def test_training_runs_inside_a_compiler(backend, draw, assert_close):
    """Under jit no value is known, and a Dask graph is built without computing."""

    def train(weight, bias, x, dy):
        layer = DoRALayer(Linear(weight, bias), Config(2), seed=0)
        layer.forward(x)
        dx = layer.backward(dy)
        layer.update_parameters(0.1)
        return dx, layer.forward(x), layer.merge_to_original_layer().weight

    arrays = draw(7, 6), draw(7), draw(5, 6), draw(5, 7)
    expected = train(*map(backend.numpy, arrays))
    for actual, desired in zip(backend.run(train, *arrays), expected, strict=True):
        assert_close(actual, desired, rtol=1e-13)


def test_a_module_of_torch_stays_out_of_the_graph(torch):
    base = torch.nn.Linear(6, 7, dtype=torch.float64)
    layer = DoRALayer(base, Config(2), seed=0, train_base=True)
    for _ in range(2):
        layer.backward(layer.forward(torch.ones(5, 6, dtype=torch.float64)))
        layer.update_parameters(0.1)
    assert not any(array.requires_grad for array in layer.state_dict().values())
    assert base.weight.requires_grad
    with pytest.raises(TypeError, match="weight and bias can be assigned, got Linear: "):
        layer.merge_to_original_layer()


def test_reset_keeps_the_parameters(backend, draw):
    layer = make(draw, train_base=True)
    step(layer, draw)
    before = bits(backend, layer)
    layer.reset_state()
    assert bits(backend, layer) == before


def test_the_norm_is_prepared_once_per_change(draw, monkeypatch):
    calls = []
    prepare = doraxp._core.prepared._measure

    def count(weight, adapter, config, previous, *rest, ops):
        calls.append(previous)
        return prepare(weight, adapter, config, previous, *rest, ops=ops)

    monkeypatch.setattr(doraxp._core.prepared, "_measure", count)
    layer = make(draw)
    for _ in range(3):
        layer.backward(layer.forward(draw(5, 6)))
    layer.merge_to_original_layer()
    layer.diagnostics()
    assert len(calls) == 1
    layer.update_parameters(0.1)
    layer.forward(draw(5, 6))
    assert len(calls) == 2
    assert calls[0] is None
    assert calls[1] is not None  # the weight's squares are used again


def test_a_trained_base_is_prepared_anew_after_a_step(draw, assert_close):
    layer = make(draw, train_base=True)
    step(layer, draw)
    x = draw(5, 6)
    y, _ = doraxp.forward(x, layer.weight, layer.adapter, layer.config, bias=layer.bias)
    assert_close(layer.forward(x), y, rtol=1e-15)


def test_a_write_into_the_adapter_is_noticed():
    layer = DoRALayer(Linear(W.copy()), Config(1), seed=0)
    x = np.eye(2)
    y = layer.forward(x)
    layer.adapter.lora_b[...] = 1
    with pytest.raises(RuntimeError, match="with the current parameters"):
        layer.backward(y)
    expected, _ = doraxp.forward(x, W, layer.adapter, layer.config)
    np.testing.assert_array_equal(layer.forward(x), expected)


@pytest.mark.parametrize("train_base", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_vector_is_weight_bias_a_b_magnitude(backend, draw, assert_close, train_base, bias):
    layer = make(draw, train_base=train_base, bias=bias)
    arrays = [*layer.adapter]
    if train_base:
        arrays = [layer.weight, *([layer.bias] if bias else []), *arrays]
    expected = np.concatenate([backend.numpy(array).ravel() for array in arrays])
    assert layer.parameter_count == expected.size
    assert_close(layer.get_parameters(), expected, rtol=0)
    layer.set_parameters(backend.asarray(2 * expected))
    assert_close(layer.get_parameters(), 2 * expected, rtol=0)
    assert_close(layer.adapter.magnitude, 2 * expected[-7:], rtol=0)
    layer.backward(layer.forward(draw(5, 6)))
    gradients = np.concatenate([backend.numpy(g).ravel() for g in layer.gradients.values()])
    assert list(layer.gradients) == list(layer.state_dict())
    assert_close(layer.get_parameter_gradients(), gradients, rtol=0)


@pytest.mark.parametrize("train_base", [False, True])
def test_a_base_stored_in_out_acts_as_its_transpose(backend, draw, assert_close, train_base):
    weight, bias = draw(7, 6), draw(7)
    turned = backend.asarray(backend.numpy(weight).T.copy())
    options = {"seed": 0, "train_base": train_base}
    one = DoRALayer(Linear(weight, bias), Config(2), **options)
    other = DoRALayer(Linear2(turned, bias), Config(2), weight_layout="in_out", **options)
    for _ in range(2):
        x, dy = draw(5, 6), draw(5, 7)
        assert_close(other.forward(x), one.forward(x), rtol=1e-14)
        assert_close(other.backward(dy), one.backward(dy), rtol=1e-14)
        changes = [layer.diagnostics().change.direction_rows for layer in (one, other)]
        np.testing.assert_allclose(*map(backend.numpy, changes), rtol=1e-9, atol=1e-15)
        if train_base:
            turned = backend.numpy(other.gradients["weight"]).T
            assert_close(one.gradients["weight"], turned, rtol=1e-14)
        for layer in (one, other):
            layer.update_parameters(0.1)
    merged = backend.numpy(one.merge_to_original_layer().weight)
    assert_close(other.merge_to_original_layer().weight, merged.T, rtol=1e-14)
    if train_base:
        stored = backend.numpy(other.state_dict()["weight"])
        assert_close(one.state_dict()["weight"], stored.T, rtol=1e-14)
        assert_close(other.get_parameters()[:42], stored.ravel(), rtol=0)


class Linear2:
    """A base stored (in, out)."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias


def test_the_merged_layer_acts_as_the_adapted_one(backend, draw, assert_close):
    layer = make(draw)
    step(layer, draw)
    before = backend.numpy(layer.base.weight).copy()
    merged = layer.merge_to_original_layer()
    x = draw(5, 6)
    assert type(merged) is Linear
    assert_close(merged.forward(x), layer.forward(x), rtol=1e-14)
    np.testing.assert_array_equal(backend.numpy(layer.base.weight), before)
    layer.base.forward(x)
    assert layer.merge_to_original_layer()._cache is None


def test_the_merged_layer_shares_no_array_with_the_base():
    base = Plain(W.copy())
    base.bias = np.ones(2)
    merged = DoRALayer(base, Config(1), seed=0).merge_to_original_layer()
    merged.weight[...] = merged.bias[...] = 9
    np.testing.assert_array_equal(base.bias, np.ones(2))
    assert merged.buffers is not base.buffers
    np.testing.assert_array_equal(base.weight, W)


class ReadOnly:
    def __init__(self, weight):
        self._weight = weight

    @property
    def weight(self):
        return self._weight


@dataclasses.dataclass(frozen=True)
class Frozen:
    weight: object


class Tuple(NamedTuple):
    weight: object


class Uncopied(Plain):
    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("kind", [ReadOnly, Frozen, Tuple, Uncopied])
def test_a_base_that_cannot_be_copied_or_assigned_is_refused(draw, kind):
    layer = DoRALayer(kind(draw(7, 6)), Config(2), seed=0)
    message = f"weight can be assigned, got {kind.__name__}: "
    with pytest.raises(TypeError, match=message):
        layer.merge_to_original_layer()


def test_a_bad_base_or_option_is_refused(draw):
    for base in (None, object(), Plain(None)):
        with pytest.raises(TypeError, match="base must be a layer with a weight, got"):
            DoRALayer(base, Config(1), seed=0)
    with pytest.raises(TypeError, match="without an adapter, got DoRALayer: merge it first, with"):
        DoRALayer(make(draw), Config(1), seed=0)
    with pytest.raises(TypeError, match="train_base must be True or False, got 'no'"):
        make(draw, train_base="no")
    with pytest.raises(TypeError, match="config must be of type Config, got int"):
        make(draw, 2)
    with pytest.raises(ValueError, match=r"weight_layout must be one of .*in_out.* got 'T'"):
        make(draw, weight_layout="T")
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.6"):
        make(draw, Config(7))
    with pytest.raises(ValueError, match="weight must have shape"):
        DoRALayer(Plain(draw(6)), Config(1), seed=0)
    bad = Linear(draw(7, 6))
    bad.bias = draw(6)
    with pytest.raises(ValueError, match="bias must have shape"):
        DoRALayer(bad, Config(1), seed=0)


def test_init_options_reach_the_adapter(draw, assert_close):
    layer = make(draw, method="gaussian")
    expected = doraxp.init(layer.weight, layer.config, seed=0, method="gaussian")
    assert_close(layer.adapter.lora_a, expected.lora_a, rtol=0)


@pytest.mark.parametrize("train_base", [False, True])
def test_a_loaded_state_gives_the_same_parameters(backend, draw, train_base):
    layer, other = make(draw, train_base=train_base), make(draw, train_base=train_base)
    step(layer, draw)
    state = layer.state_dict()
    names = ["lora_a", "lora_b", "magnitude"]
    assert list(state) == (["weight", "bias", *names] if train_base else names)
    other.load_state_dict(state)
    assert bits(backend, other) == bits(backend, layer)
    partial = {"magnitude": 2 * state["magnitude"], "surplus": state["lora_a"]}
    other.load_state_dict(partial, strict=False)
    expected = bits(backend, layer)
    expected["magnitude"] = backend.numpy(partial["magnitude"]).tobytes()
    assert bits(backend, other) == expected


def test_loaded_arrays_are_copied():
    layer = DoRALayer(Linear(W.copy()), Config(1), seed=0)
    state = {name: array.copy() for name, array in layer.state_dict().items()}
    layer.load_state_dict(state)
    state["lora_b"][...] = 7
    assert (layer.adapter.lora_b == 0).all()


def test_a_state_that_does_not_fit_lists_its_problems_and_changes_nothing(backend, draw):
    layer = make(draw, train_base=True)
    step(layer, draw)
    layer.backward(layer.forward(draw(5, 6)))
    before, state = bits(backend, layer), layer.state_dict()
    broken = {"lora_a": draw(3, 6), "lora_b": state["lora_b"], "extra": state["lora_b"]}
    message = (
        r"lora_a must have shape \(2, 6\), got \(3, 6\); missing weight; missing bias; "
        r"missing magnitude; unexpected extra"
    )
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(broken)
    with pytest.raises(ValueError, match="lora_a must have shape"):
        layer.load_state_dict(broken, strict=False)
    count = layer.parameter_count
    for shape in ((count + 1,), (1, count)):
        with pytest.raises(ValueError, match=r"vector must have shape \(parameter_count,\)"):
            layer.set_parameters(draw(*shape))
    with pytest.raises(TypeError, match="vector must be of dtype"):
        layer.set_parameters(draw(count, dtype="int64"))
    with pytest.raises(TypeError, match="lora_a must be an array"):
        layer.load_state_dict(state | {"lora_a": [1.0]})
    with pytest.raises(ValueError, match="missing lora_a"):
        layer.load_state_dict(state | {"lora_a": None})
    with pytest.raises(TypeError, match="state must be of type Mapping, got list"):
        layer.load_state_dict([1.0])
    assert bits(backend, layer) == before
    assert layer.gradients is not None
    layer.update_parameters(0.1)


def test_diagnostics_of_a_fresh_and_of_a_trained_layer(backend, draw, assert_close):
    layer = make(draw, Config(2, 4.0), train_base=True)
    fresh = layer.diagnostics()
    assert fresh.shapes == {
        "weight": (7, 6), "bias": (7,), "lora_a": (2, 6), "lora_b": (7, 2), "magnitude": (7,),
    }  # fmt: skip
    assert (fresh.rank, fresh.scaling, fresh.gradient_norms) == (2, 2.0, {})
    assert_close(fresh.change.magnitude_rows, np.zeros(7), rtol=0)
    step(layer, draw)
    layer.backward(layer.forward(draw(5, 6)))
    later = layer.diagnostics()
    merged = layer.merge_to_original_layer().weight
    expected = doraxp.magnitude_direction_change(layer.base.weight, merged)
    assert_close(later.change.direction_rows, expected.direction_rows, rtol=1e-14)
    assert_close(later.change.magnitude, expected.magnitude, rtol=1e-14)
    for name, gradient in layer.gradients.items():
        norm = np.linalg.norm(backend.numpy(gradient))
        assert_close(later.gradient_norms[name], np.asarray(norm), rtol=1e-14)
    assert "bias" not in make(draw, bias=False).diagnostics().shapes


@pytest.mark.dtypes("float16", "bfloat16")
def test_a_low_precision_base_keeps_its_dtype(backend, draw, dtype):
    weight = draw(7, 6, dtype=dtype)
    layer = DoRALayer(Plain(weight), Config(2), seed=0, train_base=True)
    x = draw(5, 6, dtype="float32")
    layer.backward(layer.forward(x))
    assert layer.get_parameters().dtype == x.dtype
    layer.update_parameters(0.5)
    assert layer.weight.dtype == weight.dtype
    assert layer.adapter.lora_a.dtype == x.dtype
    assert layer.merge_to_original_layer().weight.dtype == weight.dtype
    assert not np.array_equal(backend.numpy(layer.weight), backend.numpy(weight))


def test_a_bad_learning_rate_is_refused(draw):
    layer = make(draw)
    layer.backward(layer.forward(draw(5, 6)))
    with pytest.raises((TypeError, ValueError), match="learning_rate"):
        layer.update_parameters("fast")


# Names, kinds and layouts of the base


class Named:
    """A base with other names for its arrays."""

    def __init__(self, kernel, b):
        self.kernel, self.b = kernel, b


@pytest.mark.parametrize("train_base", [False, True])
def test_the_attributes_of_the_base_may_have_other_names(draw, assert_close, train_base):
    weight, bias = draw(7, 6), draw(7)
    options = {"seed": 0, "train_base": train_base}
    plain = DoRALayer(Linear(weight, bias), Config(2), **options)
    named = DoRALayer(Named(weight, bias), Config(2), weight="kernel", bias="b", **options)
    x = draw(5, 6)
    for layer in (plain, named):
        layer.backward(layer.forward(x))
        layer.update_parameters(0.1)
    assert list(named.state_dict()) == list(plain.state_dict())
    merged, expected = named.merge_to_original_layer(), plain.merge_to_original_layer()
    assert_close(merged.kernel, expected.weight, rtol=0)
    assert_close(merged.b, expected.bias, rtol=0)
    with pytest.raises(
        TypeError, match="base must be a layer with a kernel, got Linear with the arr"
    ):
        DoRALayer(Linear(weight), Config(2), seed=0, weight="kernel")


class Dense:
    """A base with other names, and perhaps without an offset."""

    def __init__(self, kernel, **others):
        self.kernel, self.name, self._cache = kernel, "dense", kernel[..., 0]
        vars(self).update(others)


@pytest.mark.once
def test_a_base_without_a_weight_is_refused_with_the_arrays_that_it_has():
    base = Dense(np.eye(4), offset=np.ones(4))
    message = (
        r"^base must be a layer with a weight, got Dense with the arrays 'kernel', 'offset': pass "
        r"weight= for an attribute of another name$"
    )
    with pytest.raises(TypeError, match=message):
        DoRALayer(base, Config(2), seed=0)
    message = (
        r"^layers must have a layer with a weight, got layers with the arrays 'kernel', 'offset': "
        r"pass weight= for an attribute of another name$"
    )
    with pytest.raises(ValueError, match=message):
        doraxp.adapt_layers({"q": base}, ["q"], Config(2), seed=0)
    for bare in (np.eye(4), [[1.0]]):
        message = (
            rf"^base must be a layer with a weight, got {type(bare).__name__}: wrap an array in "
            r"doraxp\.Linear$"
        )
        with pytest.raises(TypeError, match=message):
            DoRALayer(bare, Config(2), seed=0)


@pytest.mark.once
def test_a_named_tuple_without_a_weight_is_a_layer_and_no_list_of_numbers():
    message = r"got Tuple: pass weight= for an attribute of another name$"
    with pytest.raises(TypeError, match=message):
        DoRALayer(Tuple(np.eye(4)), Config(2), seed=0, weight="kernel")


def test_a_name_of_the_bias_that_the_base_lacks_is_refused(draw):
    message = (
        r"^base must be a layer with an ofset, got Dense with the arrays 'kernel', 'offset': pass "
        r"bias= for an attribute of another name, or bias=None if the layer has no bias$"
    )
    with pytest.raises(ValueError, match=message):
        DoRALayer(
            Dense(draw(7, 6), offset=draw(7)), Config(2), seed=0, weight="kernel", bias="ofset"
        )
    with pytest.raises(ValueError, match="with an offset, got Linear with the array 'weight': "):
        DoRALayer(Linear(draw(7, 6)), Config(2), seed=0, bias="offset")


@pytest.mark.parametrize(
    ("shape", "options"), [((7,), {}), ((3, 7), {"kind": LayerKind("experts")})]
)
def test_an_array_that_may_be_a_forgotten_bias_is_refused(draw, shape, options):
    base = Dense(draw(*shape, 6), offset=draw(*shape), scale=draw(6))
    given = {"seed": 0, "weight": "kernel", **options}
    message = (
        rf"Dense has an array 'offset' of shape {re.escape(str(shape))} that nothing uses: pass "
        r"bias='offset', or bias=None if it is not a bias"
    )
    with pytest.raises(ValueError, match=message):
        DoRALayer(base, Config(2), **given)
    assert DoRALayer(base, Config(2), bias="offset", **given).bias is not None
    layer = DoRALayer(base, Config(2), bias=None, **given)
    assert layer.bias is None
    assert layer.merge_to_original_layer().offset.shape == shape


def test_a_forgotten_bias_may_be_that_of_the_other_layout(draw):
    given = {"seed": 0, "weight": "kernel"}
    base = Dense(draw(7, 5), offset=draw(5))
    message = (
        r"Dense has an array 'offset' of shape \(5,\) that nothing uses: pass bias='offset' and "
        r"weight_layout='in_out' if the weight is stored \(in, out\), or bias=None if it is not a "
        r"bias$"
    )
    with pytest.raises(ValueError, match=message):
        DoRALayer(base, Config(2), **given)
    layer = DoRALayer(base, Config(2), bias="offset", weight_layout="in_out", **given)
    assert layer.bias is not None
    assert DoRALayer(base, Config(2), bias=None, **given).bias is None
    scaled = Dense(draw(7, 5), scale=draw(7))  # the layout was chosen: no bias has this length
    assert DoRALayer(scaled, Config(2), weight_layout="in_out", **given).bias is None
    both = Dense(draw(7, 5), scale=draw(5), offset=draw(7))
    with pytest.raises(ValueError, match=r"pass bias='offset', or bias=None if it is not a bias$"):
        DoRALayer(both, Config(2), **given)


@pytest.mark.once
def test_only_an_array_of_the_shape_and_library_of_a_bias_may_be_one():
    rng = np.random.default_rng(0)
    others = {"scale": np.ones(5), "order": np.arange(7), "sizes": [1.0] * 7}
    kernel = rng.standard_normal((7, 6))
    stated = Dense(kernel, offset=np.ones(7), bias=None)
    for base in (Dense(kernel, **others), stated, Dense(np.eye(7), rate=np.ones(()))):
        assert DoRALayer(base, Config(2), seed=0, weight="kernel").bias is None
    named = Linear(rng.standard_normal((7, 6)))
    named.scale = np.ones(7)  # the default name of the weight
    assert DoRALayer(named, Config(2), seed=0).bias is None


@pytest.mark.once
def test_the_parameters_of_a_module_may_be_a_forgotten_bias():
    class Module:
        """Lists its parameters as a module of PyTorch does, and has them in no `__dict__`."""

        def __init__(self):
            self.order, self._parameters = [1], {"kernel": np.eye(4), "offset": np.ones(4)}

        def __getattr__(self, name):
            if name in (parameters := vars(self)["_parameters"]):
                return parameters[name]
            raise AttributeError(name)

        def named_parameters(self, recurse):
            return iter(self._parameters.items())

    with pytest.raises(ValueError, match="Module has an array 'offset' of shape"):
        DoRALayer(Module(), Config(2), seed=0, weight="kernel")
    with pytest.raises(TypeError, match="a kernal, got Module with the arrays 'kernel', 'offset'"):
        DoRALayer(Module(), Config(2), seed=0, weight="kernal")


def test_a_linear_layer_is_called_as_its_forward(draw, assert_close):
    layer, x = Linear(draw(7, 6), draw(7)), draw(5, 6)
    assert_close(layer(x), layer.forward(x), rtol=0)
    layer.backward(layer(x))
    assert layer.weight_gradient is not None


def test_a_stack_of_matrices_must_be_named_as_one(draw, assert_close):
    base = Plain(draw(3, 7, 6))
    message = r"kind must be given .*LayerKind\('experts'\) for a stack .*operator=doraxp\.Conv"
    with pytest.raises(ValueError, match=message):
        DoRALayer(base, Config(2), seed=0)
    layer = DoRALayer(base, Config(2), seed=0, kind=LayerKind("experts"))
    x = draw(3, 5, 6)
    y, _ = doraxp.forward(x, base.weight, layer.adapter, layer.config)
    assert_close(layer(x), y, rtol=0)


def test_a_convolution_must_have_an_operator(draw):
    message = r"operator must be given .*operator=doraxp\.Convolution\(stride=\.\.\., padding="
    with pytest.raises(ValueError, match=message):
        DoRALayer(Plain(draw(4, 3, 2, 2)), Config(1), seed=0, kind=LayerKind("conv"))


@pytest.mark.parametrize("kind", ["transposed", "transposed_experts"])
def test_a_transposed_kind_is_the_layout_in_out(backend, draw, assert_close, kind):
    shape, plain = ((6, 7), None) if kind == "transposed" else ((2, 6, 7), LayerKind("experts"))
    base = Plain(draw(*shape))
    options = {"seed": 0, "train_base": True}
    one = DoRALayer(base, Config(2), kind=LayerKind(kind), **options)
    other = DoRALayer(base, Config(2), kind=plain, weight_layout="in_out", **options)
    x = draw(*shape[:-2], 5, 6)
    for layer in (one, other):
        layer.backward(layer.forward(x))
        layer.update_parameters(0.1)
    assert bits(backend, one) == bits(backend, other)
    merged = one.merge_to_original_layer().weight
    assert tuple(merged.shape) == shape
    y, _ = doraxp.forward(x, one.weight, one.adapter, one.config)
    matrix = LayerKind(kind).matrix(merged)
    assert_close(
        y, np.matmul(backend.numpy(x), np.swapaxes(backend.numpy(matrix), -1, -2)), rtol=1e-13
    )
    with pytest.raises(ValueError, match="weight_layout must be 'out_in' for a layer of kind"):
        DoRALayer(base, Config(2), kind=LayerKind(kind), weight_layout="in_out", seed=0)


def test_an_argument_that_fits_the_other_layout_alone_gets_advice(draw):
    advice = r"; it would fit if the weight were not stored \(out, in\): weight_layout='in_out'"
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\).*got \(7,\)" + advice):
        DoRALayer(Linear2(draw(6, 7), draw(7)), Config(2), seed=0)
    layer = DoRALayer(Plain(draw(6, 7)), Config(2), seed=0)
    with pytest.raises(ValueError, match="x must have shape.*" + advice):
        layer.forward(draw(5, 6))
    with pytest.raises(ValueError, match="x must have shape") as error:
        layer.forward(draw(5, 8))
    assert "weight_layout" not in str(error.value)
    turned = DoRALayer(Plain(draw(6, 7)), Config(2), seed=0, weight_layout="in_out")
    with pytest.raises(ValueError, match="weight_layout='out_in'"):
        turned.forward(draw(5, 7))
    with pytest.raises(ValueError, match="bias must have shape") as error:
        DoRALayer(Linear2(draw(6, 7), draw(5)), Config(2), seed=0)
    assert "weight_layout" not in str(error.value)
    square = DoRALayer(Plain(draw(3, 6, 6)), Config(2), seed=0, kind=LayerKind("experts"))
    with pytest.raises(ValueError, match="x must have shape") as error:
        square.forward(draw(2, 5, 6))
    assert "weight_layout" not in str(error.value)


def test_a_layer_shows_itself_in_one_line(draw):
    layer = make(draw, Config(2, 4.0), dropout=0.25)
    assert repr(layer) == (
        "<DoRALayer linear (7, 6), bias, rank 2, scaling 2, dropout 0.25, 33 trained parameters>"
    )
    layer.name = "encoder.fc1"
    assert repr(layer).startswith("<DoRALayer encoder.fc1: linear")


def test_errors_begin_with_the_name_of_the_layer(draw):
    layer = make(draw)
    layer.name = "encoder.fc1"
    with pytest.raises(ValueError, match=r"^encoder\.fc1: x must have shape"):
        layer.forward(draw(5, 8))
    with pytest.raises(RuntimeError, match=r"^encoder\.fc1: backward needs a forward"):
        layer.backward(draw(5, 7))


def test_an_error_of_another_class_passes_through_a_layer_as_it_is(draw):
    """Its arguments are not known, so that it cannot be made again with a name."""

    class OwnError(ValueError):
        def __init__(self, shape, device):
            super().__init__(shape, device)

    class Failing(doraxp.MatMul):
        def apply(self, x, weight):
            raise OwnError(x.shape, "here")

    layer = DoRALayer(Plain(draw(7, 6)), Config(1), seed=0, operator=Failing())
    layer.name = "encoder.fc1"
    with pytest.raises(OwnError) as raised:
        layer(draw(5, 6))
    assert raised.value.args == ((5, 6), "here")


# Dropout by rate


def test_masks_drop_at_the_rate_and_keep_the_mean(backend, draw):
    layer = make(draw, dropout=0.25)
    mask = backend.numpy(layer._dropout.mask_of(draw(400, 6)))
    assert set(np.unique(mask)) == {0.0, 1 / 0.75}
    assert abs(np.mean(mask == 0) - 0.25) < 0.03


def test_a_rate_draws_the_same_masks_on_every_backend(backend, draw, assert_close):
    layer, x = make(draw, dropout=0.5), draw(5, 6)
    layer.adapter = layer.adapter._replace(lora_b=draw(7, 2))  # with B = 0 a mask has no effect
    generator = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(1,)))
    for _ in range(2):
        kept = generator.random((5, 6), dtype=np.float32) >= 0.5
        mask = backend.asarray(np.where(kept, 2.0, 0.0))
        expected = make(draw)
        expected.weight, expected.bias, expected.adapter = layer.weight, layer.bias, layer.adapter
        assert_close(layer.forward(x), expected.forward(x, dropout_mask=mask), rtol=1e-14)
        assert_close(
            layer.backward(x @ layer.weight.T), expected.backward(x @ layer.weight.T), rtol=1e-14
        )


def test_dropout_is_on_in_training_alone_and_a_given_mask_counts_more(backend, draw, assert_close):
    layer, x = make(draw, dropout=0.5), draw(5, 6)
    layer.adapter = layer.adapter._replace(lora_b=draw(7, 2))
    ones = backend.asarray(np.ones((5, 6)))
    state = layer.state()["generator"]
    plain = layer.forward(x, dropout_mask=ones)
    layer.eval()
    assert_close(layer.forward(x), plain, rtol=1e-13)
    assert layer.state()["generator"] == state
    layer.train()
    assert layer.training
    dropped = layer.forward(x)
    assert np.max(np.abs(backend.numpy(dropped) - backend.numpy(plain))) > 0.1
    assert layer.state()["generator"] != state


@pytest.mark.once
def test_a_bad_rate_is_refused(draw):
    for rate, error in ((1.0, ValueError), (-0.1, ValueError), ("0.1", TypeError)):
        with pytest.raises(error, match="dropout must be"):
            make(draw, dropout=rate)


# Steps of an optimizer, and the state


class Descent:
    """The least optimizer: p − rate · g."""

    def __init__(self, rate=0.1):
        self.rate, self.seen = rate, []

    def step(self, params, grads):
        self.seen.append(params)
        return {name: p - self.rate * grads[name] for name, p in params.items()}


@pytest.mark.parametrize("train_base", [False, True])
def test_a_step_of_an_optimizer_replaces_the_parameters(backend, draw, train_base):
    one, other = (make(draw, train_base=train_base) for _ in range(2))
    other.load_state_dict(one.state_dict())
    other.weight, other.bias = one.weight, one.bias
    optimizer, x = Descent(), draw(5, 6)
    for _ in range(2):
        one.backward(one.forward(x))
        one.step(optimizer)
        other.backward(other.forward(x))
        other.update_parameters(0.1)
        assert one.gradients is None
    assert bits(backend, one) == bits(backend, other)
    with pytest.raises(RuntimeError, match="step needs gradients of the current parameters"):
        one.step(optimizer)
    assert len(optimizer.seen) == 2


@pytest.mark.parametrize("train_base", [False, True])
def test_an_optimizer_that_writes_into_the_arrays_trains_alike(backend, draw, train_base):
    """Its results are the old arrays, so that the layer cannot notice a change by itself."""
    one = make(draw, train_base=train_base)
    other = DoRALayer(one.base, Config(2), seed=0, train_base=train_base)
    base = {name: backend.numpy(getattr(one.base, name)).copy() for name in ("weight", "bias")}
    x, ys = draw(5, 6), []
    for layer, donate in ((one, False), (other, True)):
        optimizer = doraxp.AdamW(0.1, donate=donate)
        for _ in range(3):
            y = layer.forward(x)
            layer.backward(y)
            layer.step(optimizer)
        ys.append(backend.numpy(layer.forward(x)))
        for name, array in base.items():
            np.testing.assert_array_equal(backend.numpy(getattr(layer.base, name)), array)
    np.testing.assert_allclose(ys[0], ys[1], rtol=1e-13, atol=1e-13)


def test_a_loaded_state_continues_as_the_layer_does(backend, draw):
    layer, x = make(draw, dropout=0.5), draw(5, 6)
    layer.backward(layer.forward(x))
    layer.update_parameters(0.1)
    other = DoRALayer(layer.base, Config(2), seed=9, dropout=0.5)
    other.load_state(layer.state())
    ys = [backend.numpy(each.forward(x)).tobytes() for each in (layer, other)]
    assert ys[0] == ys[1]


def test_a_state_of_another_layer_names_the_rule_and_changes_nothing(backend, draw):
    layer = make(draw, dropout=0.5)
    step(layer, draw)
    state = layer.state()
    others = {
        "config.alpha": make(draw, Config(2, 4.0), dropout=0.5),
        "dropout": make(draw),
        "train_base": make(draw, dropout=0.5, train_base=True),
        "shape": DoRALayer(Linear(draw(7, 5)), Config(2), seed=0, dropout=0.5),
        "kind": DoRALayer(
            Plain(draw(6, 7)), Config(2), seed=0, dropout=0.5, weight_layout="in_out"
        ),
    }
    for name, other in others.items():
        before = bits(backend, other), other.state()["generator"]
        with pytest.raises(ValueError, match=f"{name} must be that of the state, .* got "):
            other.load_state(state)
        assert (bits(backend, other), other.state()["generator"]) == before
    with pytest.raises(ValueError, match="state must have the entry 'generator'"):
        layer.load_state({name: state[name] for name in ("settings", "parameters")})


def test_a_state_is_that_of_an_equal_operator_in_another_process(draw):
    """The addresses of the functions that an operator has differ there."""

    class Product:
        kind, channel_axis, whole = LayerKind("linear"), -1, doraxp.MatMul()
        apply, transpose, weight_gradient = whole.apply, whole.transpose, whole.weight_gradient

        def __init__(self, multiply):
            self.multiply = multiply

    def made(address):
        class Function:
            def __repr__(self):
                return f"<function multiply at {address}>"

        return DoRALayer(base, Config(2), seed=0, operator=Product(Function()))

    base = Plain(draw(7, 6))
    one, other = made("0x7fc42ab0df80"), made("0x7F061CFEDF80")
    other.load_state(one.state())
    assert one.settings()["operator"]["multiply"] == "<function multiply>"


# Operators


def operated(backend, draw, name, **options):
    """Return a layer with an operator, and its input."""
    rng = np.random.default_rng(1)
    if name == "embedding":
        base, operator = Plain(draw(9, 6)), doraxp.Embedding(scale=2.0)
        x = backend.asarray(rng.integers(9, size=(3, 4)))
    else:
        groups = {"conv": 1, "grouped": 2}[name]
        base, operator = Linear2(draw(4, 6 // groups, 3, 2), draw(4)), doraxp.Convolution(2, 1)
        x = draw(2, 6, 5, 4)
        options.setdefault("kind", LayerKind("conv", groups))
    return DoRALayer(base, Config(2), seed=0, operator=operator, **options), x


@pytest.mark.parametrize("train_base", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_layer_with_an_operator_equals_the_functions(
    backend, draw, assert_close, name, train_base
):
    layer, x = operated(backend, draw, name, train_base=train_base)
    given = {"kind": layer.kind, "operator": layer.operator}
    weight, bias, adapter = layer.base.weight, getattr(layer.base, "bias", None), layer.adapter
    for _ in range(2):
        y, cache = doraxp.forward(x, weight, adapter, layer.config, bias=bias, **given)
        dx, grads, dweight, dbias = doraxp.backward(y, cache, train_base=train_base)
        assert_close(layer(x), y, rtol=1e-13)
        if name == "embedding":
            assert layer.backward(y) is dx is None
        else:
            assert_close(layer.backward(y), dx, rtol=1e-13)
        layer.step(doraxp.SGD(0.01))
        adapter = Adapter(*(p - 0.01 * g for p, g in zip(adapter, grads, strict=True)))
        if train_base:
            weight = weight - 0.01 * dweight
            bias = None if bias is None else bias - 0.01 * dbias
        for leaf, expected in zip(layer.adapter, adapter, strict=True):
            assert_close(leaf, expected, rtol=1e-13)
        assert_close(layer.weight, weight, rtol=1e-13)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_layer_with_an_operator_is_merged_in_the_stored_shape(backend, draw, assert_close, name):
    layer, x = operated(backend, draw, name)
    layer.backward(layer(x))
    layer.update_parameters(0.01)
    merged = layer.merge_to_original_layer()
    assert tuple(merged.weight.shape) == tuple(layer.base.weight.shape) == layer.stored_shape
    y = layer.operator.apply(x, merged.weight)
    if name != "embedding":
        y = y + merged.bias[:, None, None]
    assert_close(layer(x), y, rtol=1e-13)
    assert layer.diagnostics().shapes["weight"] == layer.stored_shape
    other, _ = operated(backend, draw, name)
    other.load_state(layer.state())
    assert bits(backend, other) == bits(backend, layer)


def test_an_operator_without_a_kind_brings_its_own(backend, draw):
    base = Plain(draw(4, 3, 2))
    layer = DoRALayer(base, Config(1), seed=0, operator=doraxp.Convolution())
    assert layer.kind == LayerKind("conv")
    assert repr(layer) == (
        "<DoRALayer conv (4, 3, 2), Convolution(stride=1, padding=0, dilation=1), rank 1, "
        "scaling 1, dropout 0, 14 trained parameters>"
    )
    plain = DoRALayer(Plain(draw(4, 3)), Config(1), seed=0, operator=doraxp.MatMul())
    assert plain.operator is None
    other = DoRALayer(base, Config(1), seed=0, operator=doraxp.Convolution(stride=2))
    with pytest.raises(ValueError, match=r"operator must be that of the state, .*'stride': 2"):
        layer.load_state(other.state())


def test_a_forward_that_fails_draws_no_mask():
    weight, x = np.eye(4), np.ones((3, 4))
    layers = [DoRALayer(doraxp.Linear(weight), Config(2), seed=0, dropout=0.5) for _ in range(2)]
    for layer in layers:
        layer.adapter = layer.adapter._replace(lora_b=np.ones((4, 2)))
    with pytest.raises(ValueError, match="x must have shape"):
        layers[0](np.ones((3, 5)))
    np.testing.assert_array_equal(layers[0](x), layers[1](x))


@pytest.mark.once
def test_ids_take_no_dropout(draw):
    with pytest.raises(ValueError, match="dropout must be 0 for an embedding, whose input is"):
        DoRALayer(Plain(draw(9, 6)), Config(1), seed=0, operator=doraxp.Embedding(), dropout=0.1)


@pytest.mark.once
@pytest.mark.lanes("numpy", "torch", "strict")  # a device does not show its ids to the host
def test_ids_out_of_range_are_refused_with_the_name_of_the_layer(backend, draw):
    layer, _ = operated(backend, draw, "embedding")
    layer.name = "embed"
    with pytest.raises(ValueError, match=r"^embed: ids must be in 0 ≤ id < 9"):
        layer(backend.asarray(np.array([1, 9])))


def test_a_bias_has_a_number_for_each_output_of_a_convolution(draw):
    base = Linear2(draw(4, 3, 2), draw(3))
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\), .* of kind 'conv'.*\(3,\)"):
        DoRALayer(base, Config(1), seed=0, operator=doraxp.Convolution())


@pytest.mark.parametrize("derived", [False, True])
def test_a_forgotten_bias_in_a_slot_is_an_error(derived):
    class Slotted:
        __slots__ = ("kern", "off", "unset")

    class Derived(Slotted):
        __slots__ = "more"  # one name, and not four

    layer = (Derived if derived else Slotted)()
    layer.kern, layer.off = np.ones((3, 4)), np.ones(3)
    with pytest.raises(ValueError, match=r"has an array 'off' of shape .* pass bias='off'"):
        DoRALayer(layer, Config(rank=2), seed=0, weight="kern")
    with pytest.raises(TypeError, match="with the arrays 'kern', 'off': pass weight="):
        DoRALayer(layer, Config(rank=2), seed=0)
