"""Every bad input is refused with its message, and nothing has changed after an error."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config, LayerKind
from doraxp.backends import array_namespace, operations


@pytest.fixture
def layer(draw):
    weight, config = draw(7, 6), Config(2)
    return weight, Adapter(draw(2, 6), draw(7, 2), draw(7)), config


BAD_SHAPES = {
    "lora_a": ((6, 2), r"lora_a must have shape \(\*stack, rank, in\) = \(2, 6\) .* got \(6, 2\)"),
    "lora_b": ((7, 3), r"lora_b must have shape \(\*stack, out, rank\) = \(7, 2\) .* got \(7, 3\)"),
    "magnitude": ((7, 1), r"magnitude must have shape \(\*stack, out\) = \(7,\) .* got \(7, 1\)"),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_an_adapter_that_does_not_fit_is_refused(draw, layer, name):
    weight, adapter, config = layer
    shape, message = BAD_SHAPES[name]
    broken = adapter._replace(**{name: draw(*shape)})
    calls = [
        lambda: doraxp.forward(draw(5, 6), weight, broken, config),
        lambda: doraxp.prepare(weight, broken, config),
        lambda: doraxp.merge(weight, broken, config),
        lambda: doraxp.convert_form(weight, broken, config, "direction"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_an_input_that_does_not_fit_is_refused(draw, layer):
    weight, adapter, config = layer
    message = r"x must have shape \(\.\.\., in\) for a matrix with out = 7 and in = 6, got \(5, 7\)"
    with pytest.raises(ValueError, match=message):
        doraxp.forward(draw(5, 7), weight, adapter, config)
    message = r"bias must have shape \(\*stack, out\) = \(7,\) .* got \(6,\)"
    with pytest.raises(ValueError, match=message):
        doraxp.forward(draw(5, 6), weight, adapter, config, bias=draw(6))
    y, cache = doraxp.forward(draw(5, 6), weight, adapter, config)
    with pytest.raises(ValueError, match=r"dy must have the shape of y, \(5, 7\), got \(7,\)"):
        doraxp.backward(y[0, :], cache)
    with pytest.raises(TypeError, match=r"dy must be of dtype .* got .*int32"):
        doraxp.backward(draw(5, 7, dtype="int32"), cache)


def test_an_input_without_the_stack_of_the_weight_is_refused(draw):
    config, weight = Config(2), draw(3, 7, 6)
    adapter = doraxp.init(weight, config, seed=0)
    for shape in ((5, 6), (2, 5, 6), (6,), ()):
        with pytest.raises(ValueError, match=r"x must have shape \(\*stack, \.\.\., in\)"):
            doraxp.forward(draw(*shape), weight, adapter, config)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., in\) .* got \(\)"):
        doraxp.forward(draw(), draw(7, 6), Adapter(draw(2, 6), draw(7, 2), draw(7)), config)
    with pytest.raises(TypeError, match="bias must be of dtype"):
        doraxp.forward(draw(3, 6), weight, adapter, config, bias=draw(3, 7, dtype="int64"))
    for shape in ((3, 6), (7,)):
        with pytest.raises(ValueError, match=r"bias must have shape .* = \(3, 7\) .* got"):
            doraxp.forward(draw(3, 6), weight, adapter, config, bias=draw(*shape))


@pytest.mark.parametrize("shape", [(6,), (0, 6), (7, 0)])
def test_a_weight_with_one_axis_or_an_empty_one_is_refused(draw, shape):
    weight = draw(*shape)
    for call in (doraxp.decompose, lambda w: doraxp.init(w, Config(1), seed=0)):
        with pytest.raises(ValueError, match=r"weight must have shape \(\*stack, out, in\) with"):
            call(weight)


def test_a_rank_above_that_of_the_weight_is_refused(draw):
    message = r"rank must be in 1\.\.6 = 1\.\.min\(out, in\) for a matrix with out = 7 and in = 6"
    with pytest.raises(ValueError, match=message):
        doraxp.init(draw(7, 6), Config(7), seed=0)
    message = r"for a stack \(3,\) of matrices with out = 7 and in = 6, got 7$"
    with pytest.raises(ValueError, match=message):
        doraxp.init(draw(3, 7, 6), Config(7), seed=0)


@pytest.mark.parametrize("kind", [LayerKind("transposed"), LayerKind("transposed_experts")])
def test_an_error_names_out_and_in_whatever_the_layout_is(draw, kind):
    """A shape (7, 6) would be the one that the caller does not have."""
    stack = (3,) if kind.is_stack else ()
    weight, config = draw(*stack, 6, 7), Config(2)
    x, adapter = draw(*stack, 5, 6), doraxp.init(weight, config, seed=0, kind=kind)
    calls = [
        lambda: doraxp.init(weight, Config(7), seed=0, kind=kind),
        lambda: doraxp.merge(weight, adapter._replace(lora_a=draw(2, 7)), config, kind=kind),
        lambda: doraxp.forward(draw(*stack, 5, 7), weight, adapter, config, kind=kind),
        lambda: doraxp.forward(x, weight, adapter, config, kind=kind, bias=draw(6)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="with out = 7 and in = 6, got ") as error:
            call()
        assert "(7, 6)" not in str(error.value)


def test_a_weight_of_one_axis_gets_the_rule_of_its_layout(draw):
    base = SimpleNamespace(weight=draw(6))
    for layout, rule in {"in_out": "in, out", "out_in": "out, in"}.items():
        with pytest.raises(ValueError, match=rf"^weight must have shape \(\*stack, {rule}\) with"):
            doraxp.DoRALayer(base, Config(1), seed=0, weight_layout=layout)


def test_only_a_convolution_is_told_of_groups():
    with pytest.raises(
        ValueError, match=r"shape \(in, out\) with no axis of length 0, got \(6,\)$"
    ):
        LayerKind("transposed").matrix(np.ones(6))
    message = r"no axis of length 0 and out a multiple of groups = 2, got \(5, 6, 3\)$"
    with pytest.raises(ValueError, match=message):
        LayerKind("conv", groups=2).matrix(np.ones((5, 6, 3)))


def test_unknown_choices_are_refused(draw, layer):
    with pytest.raises(ValueError, match=r"method must be one of .*gaussian.* got 'zeros'"):
        doraxp.init(layer[0], Config(2), seed=0, method="zeros")
    with pytest.raises(ValueError, match=r"form must be one of .*direction.* got 'rows'"):
        doraxp.convert_form(*layer, "rows")


def test_weights_of_two_shapes_are_not_compared(draw):
    message = r"weight_before and weight_after must have one shape, got \(7, 6\) and \(6, 7\)"
    with pytest.raises(ValueError, match=message):
        doraxp.magnitude_direction_change(draw(7, 6), draw(6, 7))


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64"])
def test_dtypes_that_are_not_real_floating_are_refused(backend, draw, layer, dtype):
    weight, adapter, config = layer
    bad = backend.asarray(np.zeros((7, 6), dtype))
    message = f"must be of dtype float16, bfloat16, float32, float64, got .*{dtype}"
    for call in (
        lambda: doraxp.decompose(bad),
        lambda: doraxp.init(bad, config, seed=0),
        lambda: doraxp.forward(draw(5, 6), bad, adapter, config),
        lambda: doraxp.merge(bad, adapter, config),
    ):
        with pytest.raises(TypeError, match=f"weight {message}"):
            call()
    with pytest.raises(TypeError, match=f"x {message}"):
        doraxp.forward(bad, weight, adapter, config)


TAKE_A_WEIGHT = [
    lambda w, _, config: doraxp.init(w.weight, config, seed=0),
    lambda w, _, config: doraxp.init(w.weight, config, seed=0, kind=LayerKind("linear")),
    lambda w, a, config: doraxp.merge(w.weight, a, config, kind=LayerKind("transposed")),
    lambda w, a, config: doraxp.prepare(w.weight, a, config, kind=LayerKind("linear")),
    lambda w, _, config: doraxp.DoRALayer(w, config, seed=0),
    lambda w, _, config: doraxp.Linear(w.weight),
    lambda w, _, config: doraxp.adapt({"q": w.weight}, ["q"], config, seed=0),
    lambda w, _, config: doraxp.adapt({"q": w.weight}, "all-linear", config, seed=0),
    lambda w, _, config: doraxp.adapt_layers({"q": w}, ["q"], config, seed=0),
    lambda w, _, config: doraxp.adapt_layers({"q": w}, "all-linear", config, seed=0),
]
"""Calls that take a layer, an adapter and a config."""


@pytest.mark.parametrize("value", [[[1.0, 2.0]], 1.0, ((1, 2),)])
@pytest.mark.parametrize("call", TAKE_A_WEIGHT)
@pytest.mark.once
def test_a_list_of_numbers_is_refused_with_the_function_that_makes_it_an_array(value, call):
    adapter = Adapter(np.ones((1, 2)), np.ones((1, 1)), np.ones(1))
    message = (
        rf"^(q: )?weight must be an array of a library that array-api-compat knows, got "
        rf"{type(value).__name__}: give numpy\.asarray\(weight\)$"
    )
    with pytest.raises(TypeError, match=message):
        call(SimpleNamespace(weight=value), adapter, Config(1))


@pytest.mark.once
def test_an_object_that_numpy_can_read_gets_the_function_too():
    class Frame:
        def __array__(self):
            raise NotImplementedError

    with pytest.raises(TypeError, match=r"got Frame: give numpy\.asarray\(weight\)$"):
        doraxp.init(Frame(), Config(1), seed=0)
    with pytest.raises(TypeError, match=r"got object$"):
        doraxp.init(object(), Config(1), seed=0)


def test_the_function_is_that_of_the_library_of_the_other_arrays(draw, layer):
    weight, adapter, config = layer
    library = str(array_namespace(weight).__name__).removeprefix("array_api_compat.")
    make = re.escape("mlx.core.array" if library.endswith("mlx") else f"{library}.asarray")
    lists = {"lora_a": [[1.0] * 6] * 2, "magnitude": [1.0] * 7}
    _, cache = doraxp.forward(draw(5, 6), weight, adapter, config)
    calls = {
        "x": lambda: doraxp.forward([[1.0] * 6], weight, adapter, config),
        "bias": lambda: doraxp.forward(draw(5, 6), weight, adapter, config, bias=[1.0] * 7),
        "dy": lambda: doraxp.backward([[1.0] * 7] * 5, cache),
        "lora_a": lambda: doraxp.merge(weight, adapter._replace(lora_a=lists["lora_a"]), config),
        "magnitude": lambda: doraxp.forward(
            draw(5, 6), weight, adapter._replace(magnitude=lists["magnitude"]), config
        ),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"^{name} must .* got list: give {make}\({name}\)$"):
            call()
    with pytest.raises(
        TypeError, match=r"weight must be .* got float: give numpy\.asarray\(weight\)$"
    ):
        doraxp.decompose(1.0)
    with pytest.raises(TypeError, match=r"x must be an array .* got NoneType$"):
        doraxp.forward(None, weight, adapter, config)


def test_an_adapter_of_lists_that_a_layer_is_given_is_refused(draw, layer):
    weight, adapter, config = layer
    adapted = doraxp.DoRALayer(doraxp.Linear(weight), config, seed=0)
    x = draw(5, 6)
    for is_used in (False, True):
        if is_used:
            adapted(x)
        good, adapted.adapter = adapted.adapter, Adapter([[1.0] * 6] * 2, *adapter[1:])
        with pytest.raises(TypeError, match=r"^lora_a must be an array of a library .* got list"):
            adapted(x)
        adapted.adapter = [*adapter]
        with pytest.raises(TypeError, match="adapter must be of type Adapter, got list"):
            adapted(x)
        adapted.adapter = good


class TestPrepared:
    """A prepared norm is refused with another weight, adapter or config."""

    def test_another_weight(self, draw, layer):
        weight, adapter, config = layer
        prepared = doraxp.prepare(weight, adapter, config)
        other = draw(7, 6)
        message = "but the weight is another object: call prepare again"
        with pytest.raises(ValueError, match=message):
            doraxp.forward(draw(5, 6), other, adapter, config, prepared=prepared)
        with pytest.raises(ValueError, match="previous must be of the same weight object"):
            doraxp.prepare(other, adapter, config, previous=prepared)
        with pytest.raises(ValueError, match="previous must be of the same weight object"):
            doraxp.forward(draw(5, 6), other, adapter, config, previous=prepared)

    def test_another_adapter(self, draw, layer):
        weight, adapter, config = layer
        prepared = doraxp.prepare(weight, adapter, config)
        for name in Adapter._fields:
            changed = adapter._replace(**{name: getattr(adapter, name) * 2})
            with pytest.raises(ValueError, match="but the adapter has changed"):
                doraxp.forward(draw(5, 6), weight, changed, config, prepared=prepared)
            with pytest.raises(ValueError, match="but the adapter has changed"):
                doraxp.merge(weight, changed, config, prepared=prepared)

    def test_an_equal_config_is_accepted(self, draw, layer):
        weight, adapter, config = layer
        prepared = doraxp.prepare(weight, adapter, config)
        doraxp.forward(draw(5, 6), weight, adapter, replace(config), prepared=prepared)

    def test_another_config(self, draw, layer):
        weight, adapter, config = layer
        prepared = doraxp.prepare(weight, adapter, config)
        for other in (Config(2, 1.0), Config(2, form="direction")):
            with pytest.raises(ValueError, match=r"but the config was Config\(.*is Config\("):
                doraxp.forward(draw(5, 6), weight, adapter, other, prepared=prepared)


@pytest.mark.once
@pytest.mark.lanes("numpy", "torch", "strict", "dask")
@pytest.mark.parametrize("name", Adapter._fields)
def test_a_write_into_the_adapter_is_noticed(backend, draw, name):
    """JAX's arrays cannot be written to. On a GPU, a write is not noticed."""
    weight, config, x = draw(7, 6), Config(2), draw(5, 6)
    shapes = {"lora_a": (2, 6), "lora_b": (7, 2), "magnitude": (7,)}
    adapter = Adapter(*(backend.asarray(np.ones(shape)) for shape in shapes.values()))
    prepared = doraxp.prepare(weight, adapter, config)
    y, cache = doraxp.forward(x, weight, adapter, config, prepared=prepared)
    base = SimpleNamespace(weight=weight, bias=None)
    layer = doraxp.DoRALayer(base, config, seed=0)
    layer.adapter = adapter
    layer.forward(x)
    getattr(adapter, name)[...] = 2.0
    with pytest.raises(ValueError, match="but the adapter has changed"):
        doraxp.forward(x, weight, adapter, config, prepared=prepared)
    with pytest.raises(ValueError, match="but the adapter has changed"):
        doraxp.merge(weight, adapter, config, prepared=prepared)
    with pytest.raises(ValueError, match="but the adapter has changed"):
        doraxp.backward(y, cache)
    with pytest.raises(RuntimeError, match="call forward first, and again after the parameters"):
        layer.backward(y)
    fresh, _ = doraxp.forward(x, weight, adapter, config)
    np.testing.assert_array_equal(backend.numpy(layer.forward(x)), backend.numpy(fresh))


def test_nan_in_an_adapter_equals_itself():
    weight, config = np.eye(3), Config(1)
    adapter = doraxp.init(weight, config, seed=0)
    adapter = adapter._replace(magnitude=np.array([1.0, np.nan, 1.0]))
    prepared = doraxp.prepare(weight, adapter, config)
    y, _ = doraxp.forward(np.eye(3), weight, adapter, config, prepared=prepared)
    assert np.isnan(y[:, 1]).all()


def test_an_adapter_of_another_shape_or_dtype_is_a_change():
    weight, config = np.eye(3), Config(1)
    adapter = doraxp.init(weight, config, seed=0)
    prepared = doraxp.prepare(weight, adapter, config)
    narrow = adapter._replace(lora_b=adapter.lora_b.astype("float32"))
    with pytest.raises(ValueError, match="but the adapter has changed"):
        doraxp.forward(np.eye(3), weight, narrow, config, prepared=prepared)


def numpy_calls():
    """Return each public function with its arrays by name; all sizes allow an `np.matrix`."""
    rng, config = np.random.default_rng(0), Config(1)
    shapes = {"weight": (1, 6), "lora_a": (1, 6), "lora_b": (1, 1), "magnitude": (1,)}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    x, dy, bias = rng.standard_normal((5, 6)), rng.standard_normal((5, 1)), np.ones(1)
    weight, *leaves = arrays.values()
    adapter = Adapter(*leaves)
    _, cache = doraxp.forward(x, weight, adapter, config)
    layer = doraxp.DoRALayer(SimpleNamespace(weight=weight), config, seed=0)
    adamw, sgd = doraxp.adamw_init(adapter), doraxp.sgd_init(adapter)

    def of_layer(function, *more, **rest):
        def call(weight, lora_a, lora_b, magnitude, **others):
            leaves = Adapter(lora_a, lora_b, magnitude)
            return function(*others.values(), weight, leaves, config, *more, **rest)

        return call

    def of_leaves(function):
        return lambda **leaves: function(Adapter(**leaves))

    trees = adapter._asdict()
    return {
        "init": (lambda weight: doraxp.init(weight, config, seed=0), {"weight": weight}),
        "decompose": (doraxp.decompose, {"weight": weight}),
        "prepare": (of_layer(doraxp.prepare), arrays),
        "merge": (of_layer(doraxp.merge), arrays),
        "convert_form": (of_layer(doraxp.convert_form, "direction"), arrays),
        "forward": (of_layer(doraxp.forward), {**arrays, "x": x}),
        "bias": (
            lambda bias: doraxp.forward(x, weight, adapter, config, bias=bias),
            {"bias": bias},
        ),
        "mask": (
            lambda dropout_mask: doraxp.forward(
                x, weight, adapter, config, dropout_mask=dropout_mask
            ),
            {"dropout_mask": np.ones_like(x)},
        ),
        "backward": (lambda dy: doraxp.backward(dy, cache), {"dy": dy}),
        "change": (
            doraxp.magnitude_direction_change,
            {"weight_before": weight, "weight_after": weight},
        ),
        "layer": (
            lambda weight: doraxp.DoRALayer(SimpleNamespace(weight=weight), config, seed=0),
            {"weight": weight},
        ),
        "load": (lambda **state: layer.load_state_dict(state), trees),
        "vector": (lambda vector: layer.set_parameters(vector), {"vector": np.ones(8)}),
        "clip": (of_leaves(lambda grads: doraxp.clip_by_global_norm(grads, 1.0)), trees),
        "adamw_init": (of_leaves(doraxp.adamw_init), trees),
        "sgd_init": (of_leaves(doraxp.sgd_init), trees),
        "adamw": (
            of_leaves(lambda grads: doraxp.adamw_step(grads, adapter, adamw, learning_rate=1.0)),
            trees,
        ),
        "sgd": (
            of_leaves(lambda grads: doraxp.sgd_step(grads, adapter, sgd, learning_rate=1.0)),
            trees,
        ),
    }


@pytest.mark.parametrize("name", numpy_calls())
def test_masked_arrays_and_matrices_are_refused_by_name(name):
    call, arrays = numpy_calls()[name]
    call(**arrays)
    for argument, array in arrays.items():
        masked = np.ma.MaskedArray(array)
        message = rf"{argument} must be a plain array, got a masked array: .*{argument}\.filled\("
        with pytest.raises(TypeError, match=message):
            call(**{**arrays, argument: masked})
        message = rf"{argument} must be a plain array, got an np\.matrix: give np\.asarray\(.*\)"
        with pytest.warns(PendingDeprecationWarning):
            matrix = np.asmatrix(array)
        with pytest.raises(TypeError, match=message):
            call(**{**arrays, argument: matrix})


def test_arrays_of_two_libraries_are_refused(torch):
    message = "all arrays must be of one library: x is of numpy, weight of torch"
    with pytest.raises(TypeError, match=message):
        operations(x=np.ones(2), weight=torch.ones(2))


def test_a_gradient_of_another_library_than_x_is_refused(torch):
    weight, config = np.eye(3), Config(1)
    y, cache = doraxp.forward(np.eye(3), weight, doraxp.init(weight, config, seed=0), config)
    with pytest.raises(TypeError, match="all arrays must be of one library: dy is of torch, x of"):
        doraxp.backward(torch.tensor(y), cache)


def test_arrays_on_two_devices_are_refused(torch):
    message = "all arrays must be on one device: x is on cpu, weight on meta"
    with pytest.raises(ValueError, match=message):
        operations(x=torch.ones(2), weight=torch.ones(2, device="meta"))


def test_arguments_of_another_type_are_refused(draw, layer):
    weight, adapter, config = layer
    x = draw(5, 6)
    y, cache = doraxp.forward(x, weight, adapter, config)
    prepared, pair = cache.prepared, (y, cache)
    calls = {
        "adapter must be of type Adapter, got tuple": [
            lambda: doraxp.forward(x, weight, tuple(adapter), config),
            lambda: doraxp.prepare(weight, tuple(adapter), config),
            lambda: doraxp.merge(weight, tuple(adapter), config),
            lambda: doraxp.convert_form(weight, tuple(adapter), config, "weight"),
        ],
        "config must be of type Config, got int": [
            lambda: doraxp.init(weight, 2, seed=0),
            lambda: doraxp.forward(x, weight, adapter, 2),
        ],
        "prepared must be of type Prepared, got Adapter": [
            lambda: doraxp.forward(x, weight, adapter, config, prepared=adapter),
            lambda: doraxp.merge(weight, adapter, config, prepared=adapter),
        ],
        "previous must be of type Prepared, got bool": [
            lambda: doraxp.prepare(weight, adapter, config, previous=True)
        ],
        "cache must be of type Cache, got tuple": [lambda: doraxp.backward(y, pair)],
        "cache must be of type Cache, got Prepared": [lambda: doraxp.backward(y, prepared)],
        "train_base must be True or False, got 'no'": [
            lambda: doraxp.backward(y, cache, train_base="no")
        ],
    }
    for message, failing in calls.items():
        for call in failing:
            with pytest.raises(TypeError, match=message):
                call()


def test_none_is_refused_except_for_the_bias(draw, layer):
    weight, adapter, config = layer
    x = draw(5, 6)
    _, cache = doraxp.forward(x, weight, adapter, config, bias=None)
    calls = {
        "x": lambda: doraxp.forward(None, weight, adapter, config),
        "weight": lambda: doraxp.init(None, config, seed=0),
        "lora_b": lambda: doraxp.merge(weight, adapter._replace(lora_b=None), config),
        "dy": lambda: doraxp.backward(None, cache),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"{name} must be an array of a .* got NoneType"):
            call()


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (None, TypeError, "seed must be an integer, got None"),
        (1.0, TypeError, "seed must be an integer, got 1.0"),
        (-1, ValueError, "seed must be at least 0, got -1"),
    ],
)
def test_a_seed_that_is_not_an_integer_or_is_negative_is_refused(draw, seed, error, message):
    with pytest.raises(error, match=message):
        doraxp.init(draw(7, 6), Config(2), seed=seed)


class Foreign(np.ndarray):
    """An array of another class than NumPy's own: its library is looked up."""


def test_arrays_that_are_sharded_over_the_same_devices_are_accepted(monkeypatch):
    """JAX's arrays have different shardings, over the same set of devices."""

    class Sharding:
        def __init__(self, *devices):
            self.device_set = set(devices)

    shardings = {1.0: Sharding("a", "b"), 2.0: Sharding("b", "a"), 3.0: Sharding("a")}
    monkeypatch.setattr(
        "array_api_compat.device", lambda array: shardings[float(array[0])], raising=True
    )
    one, two, three = (np.array([value]).view(Foreign) for value in shardings)
    operations(x=one, weight=two)
    with pytest.raises(ValueError, match="all arrays must be on one device"):
        operations(x=one, weight=three)
