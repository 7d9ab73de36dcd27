"""`adapt_layers` and `AdaptedModel`: adapters around the layers of a model, trained as one."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

import doraxp
from doraxp import AdaptedModel, Config, DoRALayer, LayerKind, Linear, adapt_layers
from doraxp.backends import array_namespace

SHAPES = {"encoder.fc1": (8, 6), "encoder.fc2": (6, 8), "head": (3, 6)}


class Relu:
    """A layer without a weight."""


class Block:
    """A part of a network whose layers are attributes."""

    def __init__(self, fc1, fc2):
        self.fc1, self.fc2, self.act = fc1, fc2, Relu()


def walk(blocks):
    """Yield path, layer and setter of each layer of some blocks."""
    for name, block in blocks.items():
        for attribute in ("fc1", "fc2", "act"):

            def put(layer, block=block, attribute=attribute):
                setattr(block, attribute, layer)

            yield f"{name}.{attribute}", getattr(block, attribute), put


class Descent:
    """p − rate · g, with the gradients clipped to a global norm of 1."""

    def __init__(self, rate=0.1, largest=1.0):
        self.rate, self.largest, self.calls = rate, largest, 0

    def step(self, params, grads):
        self.calls += 1
        squares = [
            float(array_namespace(g).sum(g * g)) for one in grads.values() for g in one.values()
        ]
        factor = min(1.0, self.largest / sum(squares) ** 0.5)
        return {
            path: {name: p - self.rate * factor * grads[path][name] for name, p in arrays.items()}
            for path, arrays in params.items()
        }


@pytest.fixture
def layers(draw):
    return {
        "encoder.fc1": Linear(draw(8, 6), draw(8)),
        "encoder.relu": Relu(),
        "encoder.fc2": Linear(draw(6, 8), draw(6)),
        "head": Linear(draw(3, 6)),
    }


@pytest.fixture
def model(layers):
    return adapt_layers(layers, ["fc1", "fc2"], Config(2), seed=3)


def run(model, draw):
    x = draw(5, 6)
    h = model["encoder.fc1"](x)
    y = model["encoder.fc2"](h)
    model["encoder.fc1"].backward(model["encoder.fc2"].backward(y))


def bits(backend, model):
    return [
        backend.numpy(array).tobytes()
        for arrays in model.parameters.values()
        for array in arrays.values()
    ]


def test_the_targets_are_adapted_and_the_others_stay(layers, model, draw, assert_close):
    assert list(model) == list(layers)
    assert len(model) == 4
    assert [*reversed(model.values())] == [*model.values()][::-1]
    assert list(model.adapted) == ["encoder.fc1", "encoder.fc2"]
    for path, layer in model.items():
        assert isinstance(layer, DoRALayer) if path in model.adapted else layer is layers[path]
    for number, (path, layer) in enumerate(model.adapted.items()):
        alone = DoRALayer(layers[path], Config(2), seed=3 + number)
        assert_close(layer.adapter.lora_a, alone.adapter.lora_a, rtol=0)
    x = draw(5, 6)
    assert_close(model["head"].forward(x), layers["head"].forward(x), rtol=0)


def test_patterns_choose_the_ranks_and_alphas(layers):
    model = adapt_layers(
        layers, ["fc1", "fc2", "head"], Config(2), seed=0,
        rank_pattern={"fc1": 3}, alpha_pattern={"head": 8.0},
    )  # fmt: skip
    configs = {path: layer.config for path, layer in model.adapted.items()}
    assert configs == {
        "encoder.fc1": Config(3), "encoder.fc2": Config(2), "head": Config(2, 8.0)
    }  # fmt: skip


def test_exclusions_win_over_targets_and_all_linear_leaves_the_head(layers):
    chosen = {
        "all": adapt_layers(layers, "all-linear", Config(2), seed=0),
        "one": adapt_layers(layers, ".*", Config(2), seed=0, exclude_modules=["fc2", "head"]),
    }
    assert {name: [*model.adapted] for name, model in chosen.items()} == {
        "all": ["encoder.fc1", "encoder.fc2"], "one": ["encoder.fc1"],
    }  # fmt: skip
    with pytest.raises(ValueError, match="exclude_modules 'fc3' must match one of"):
        adapt_layers(layers, ".*", Config(2), seed=0, exclude_modules=["fc3"])


@pytest.mark.once
def test_options_reach_every_layer(draw):
    class Named:
        def __init__(self, kernel):
            self.kernel, self.b = kernel, None

    layers = {"a": Named(draw(6, 8)), "b": Named(draw(2, 6, 8))}
    model = adapt_layers(
        layers, ["a", "b"], Config(2), seed=0, kinds={"b": LayerKind("experts")}, dropout=0.5,
        train_base=True, weight="kernel", bias="b", weight_layout="in_out", method="gaussian",
    )  # fmt: skip
    for path, layer in model.adapted.items():
        assert layer.dropout == 0.5
        assert layer.train_base
        assert layer.kind.is_transposed
        expected = doraxp.init(layer.weight, Config(2), seed="ab".index(path), method="gaussian")
        np.testing.assert_array_equal(expected.lora_a, layer.adapter.lora_a)
    assert model.merge()["b"].kernel.shape == (2, 6, 8)


def test_the_trees_have_the_arrays_of_the_layers(backend, model, draw, assert_close):
    assert model.gradients == {}
    run(model, draw)
    for path, layer in model.adapted.items():
        for name, array in layer.state_dict().items():
            assert_close(model.parameters[path][name], array, rtol=0)
            assert_close(model.gradients[path][name], layer.gradients[name], rtol=0)
    twice = {
        path: {name: 2 * array for name, array in arrays.items()}
        for path, arrays in model.parameters.items()
    }
    model.parameters = twice
    assert model.gradients == {}
    for path, layer in model.adapted.items():
        for name, array in layer.state_dict().items():
            assert_close(array, twice[path][name], rtol=0)


def test_a_tree_that_does_not_fit_is_refused_and_nothing_changes(backend, model):
    before, tree = bits(backend, model), model.parameters
    with pytest.raises(ValueError, match=r"must have the adapted layers: missing encoder\.fc2; un"):
        model.parameters = {"encoder.fc1": tree["encoder.fc1"], "head": {}}
    bad = {path: {name: 3 * array for name, array in one.items()} for path, one in tree.items()}
    bad["encoder.fc2"]["lora_a"] = bad["encoder.fc1"]["lora_a"]
    with pytest.raises(ValueError, match=r"^encoder\.fc2: state must fit the layer: lora_a must"):
        model.parameters = bad
    assert bits(backend, model) == before


def test_one_step_is_for_all_layers_together(backend, layers, model, draw, assert_close):
    optimizer = Descent(largest=1e-3)
    run(model, draw)
    before, gradients = model.parameters, model.gradients
    model.step(optimizer)
    assert optimizer.calls == 1
    norm = math.sqrt(
        sum(np.sum(backend.numpy(g) ** 2) for one in gradients.values() for g in one.values())
    )
    for path, arrays in model.parameters.items():
        for name, array in arrays.items():
            old, g = backend.numpy(before[path][name]), backend.numpy(gradients[path][name])
            assert_close(array, old - 0.1 * 1e-3 / norm * g, rtol=1e-13)
    assert model.gradients == {}


@pytest.mark.once
@pytest.mark.parametrize("wrong", [0.01, None, "adamw"])
def test_a_step_needs_an_optimizer(model, draw, wrong):
    message = rf"^optimizer must have a step, such as doraxp\.AdamW\(0\.01\), got {wrong!r}$"
    with pytest.raises(TypeError, match=message):
        model.step(wrong)
    run(model, draw)
    for one in (model, model["encoder.fc1"]):
        with pytest.raises(TypeError, match=message):
            one.step(wrong)
    assert len(model.gradients) == 2


def test_a_step_names_the_layers_without_gradients(backend, model, draw):
    model["encoder.fc1"].backward(model["encoder.fc1"](draw(5, 6)))
    before = bits(backend, model)
    with pytest.raises(RuntimeError, match=r"step needs gradients of all layers, but encoder\.fc2"):
        model.step(Descent())
    assert bits(backend, model) == before
    run(model, draw)
    model.clear_gradients()
    assert model.gradients == {}


def test_train_and_eval_are_for_all_layers(model):
    for mode, wanted in ((model.eval, False), (model.train, True)):
        mode()
        assert [layer.training for layer in model.adapted.values()] == [wanted, wanted]


def test_the_counts_are_those_of_peft(layers, model):
    trained = 2 * (8 + 6) + 8 + 2 * (6 + 8) + 6
    base = 8 * 6 + 8 + 6 * 8 + 6 + 3 * 6
    assert (model.trained_parameters, model.all_parameters) == (trained, base + trained)
    line = "trainable params: 70 || all params: 198 || trainable%: 35.3535"
    assert model.summary() == line
    assert repr(model) == f"<AdaptedModel 2 of 4 layers adapted, {line}>"
    trained_base = adapt_layers(layers, ["head"], Config(1), seed=0, train_base=True)
    assert trained_base.trained_parameters == 6 + 3 + 3 + 18
    assert trained_base.all_parameters == base + 12


def test_a_merged_model_has_plain_layers(layers, model, draw, assert_close):
    run(model, draw)
    model.step(Descent())
    plain, x = model.merge(), draw(5, 6)
    assert list(plain) == list(layers)
    assert plain["head"] is layers["head"]
    assert type(plain["encoder.fc1"]) is Linear
    assert_close(plain["encoder.fc1"].forward(x), model["encoder.fc1"](x), rtol=1e-13)


def test_an_accessor_puts_the_layers_in_their_places(draw, assert_close):
    blocks = {name: Block(Linear(draw(6, 6)), Linear(draw(6, 6))) for name in ("0", "1")}
    given = blocks["1"].fc2
    model = adapt_layers(blocks, ["fc2"], Config(2), seed=0, accessor=walk)
    assert blocks["1"].fc2 is model["1.fc2"]
    assert type(blocks["1"].fc1) is Linear
    assert model["0.act"] is blocks["0"].act
    x = draw(5, 6)
    y = blocks["1"].fc2(x)
    model.merge()
    assert type(blocks["1"].fc2) is Linear
    assert blocks["1"].fc2 is not given
    assert_close(blocks["1"].fc2.forward(x), y, rtol=1e-13)


@pytest.mark.once
def test_bad_choices_name_the_layer_and_replace_nothing(draw):
    layers = {"a.fc": Linear(draw(6, 6)), "b.fc": Linear(draw(1, 6)), "act": Relu()}

    def adapt(targets, config=None, source=layers, **options):
        return adapt_layers(source, targets, config or Config(2), seed=0, **options)

    with pytest.raises(ValueError, match=r"^b\.fc: rank must be in 1\.\.1"):
        adapt(["fc"])
    with pytest.raises(ValueError, match="target_modules 'act' must match one of 2 modules"):
        adapt(["act"])
    for name in ("kinds", "operators", "rank_pattern", "alpha_pattern"):
        with pytest.raises(ValueError, match=f"{name} 'gate' must match one of"):
            adapt(["a.fc"], **{name: {"gate": None}})
    with pytest.raises(TypeError, match="layers must be a mapping of paths to layers, got Relu: p"):
        adapt(["a.fc"], source=Relu())
    with pytest.raises(ValueError, match="layers must hold at least one DoRALayer"):
        AdaptedModel(layers)
    with pytest.raises(ValueError, match="must have a layer with a kernel, got layers with "):
        adapt(["a.fc"], weight="kernel")
    with pytest.raises(
        ValueError,
        match=r"a weight, got arrays: wrap each in doraxp\.Linear, or use doraxp\.adapt$",
    ):
        adapt(["a.fc"], source={"a.fc": draw(6, 6), "act": Relu()})
    with pytest.raises(ValueError, match=r"target_modules must select a layer, got \[\]"):
        adapt([])
    with pytest.raises(ValueError, match=r"the nearest are a\.fc, b\.fc$"):
        adapt(["a.fb"])
    for wrong in ("conv", doraxp.Convolution):
        with pytest.raises(TypeError, match=r"^a\.fc: operator must"):
            adapt(["a.fc"], operators={"a.fc": wrong})
    with pytest.raises(TypeError, match=r"^a\.fc: base must be a layer without an adapter"):
        adapt(["a.fc"], source=adapt(["a.fc"]))

    def twice(source):
        yield "a", source["a.fc"], print
        yield "a", source["b.fc"], print

    with pytest.raises(ValueError, match="accessor must yield each path once, got 'a' twice"):
        adapt(["a"], accessor=twice)
    blocks = {"0": Block(Linear(draw(6, 6)), Linear(draw(1, 6)))}
    kept = blocks["0"].fc1
    with pytest.raises(ValueError, match=r"^0\.fc2: rank must be"):
        adapt(["fc1", "fc2"], source=blocks, accessor=walk)
    assert blocks["0"].fc1 is kept


@pytest.mark.once
def test_a_rank_that_is_too_large_names_the_pattern():
    weights = {"a.fc": np.eye(6), "a.out": np.ones((3, 6))}
    layers = {path: Linear(weight) for path, weight in weights.items()}
    message = (
        r"^a\.out: rank must be in 1\.\.3 = .*, got 4: give this layer another rank, with "
        r"rank_pattern=\{'a\.out': 3\}$"
    )
    for adapt, given in ((adapt_layers, layers), (doraxp.adapt, weights)):
        with pytest.raises(ValueError, match=message):
            adapt(given, ["fc", "out"], Config(4), seed=0)
        adapt(given, ["fc", "out"], Config(4), seed=0, rank_pattern={"a.out": 3})


class Dense:
    """A layer with other names, and perhaps without an offset."""

    def __init__(self, kernel, **others):
        self.kernel = kernel
        vars(self).update(others)


@pytest.mark.once
def test_some_layers_of_a_model_may_lack_a_bias():
    def adapt(**options):
        return adapt_layers(layers, [*layers], Config(2), seed=0, weight="kernel", **options)

    layers = {"a": Dense(np.eye(4), offset=np.ones(4)), "b": Dense(np.eye(4))}
    model = adapt(bias="offset")
    assert [layer.bias is None for layer in model.values()] == [False, True]
    assert not hasattr(model.merge()["b"], "offset")
    with pytest.raises(ValueError, match=r"^a: base must be a layer with an ofset, got Dense with"):
        adapt(bias="ofset")
    layers["b"] = Dense(np.eye(4), shift=np.ones(4))
    with pytest.raises(ValueError, match=r"^b: .* an array 'shift' of shape \(4,\) that nothing"):
        adapt(bias="offset")
    with pytest.raises(ValueError, match=r"^a: .* an array 'offset' of shape \(4,\) that nothing"):
        adapt()
    model = adapt(bias=None)
    assert model.all_parameters == 2 * (16 + 2 * 8 + 4)
    with pytest.raises(
        ValueError, match="got layers with the arrays 'kernel', 'offset', 'shift': pass weight= for"
    ):
        adapt_layers(layers, ["a"], Config(2), seed=0, weight="kernal")
    with pytest.raises(ValueError, match=r"with a weight: pass weight= for an attribute of"):
        adapt_layers({"a": object()}, ["a"], Config(2), seed=0)


def test_errors_in_a_call_name_the_layer(model, draw):
    with pytest.raises(ValueError, match=r"^encoder\.fc1: x must have shape"):
        model["encoder.fc1"](draw(5, 7))
    with pytest.raises(RuntimeError, match=r"^encoder\.fc2: backward needs a forward"):
        model["encoder.fc2"].backward(draw(5, 6))


def test_a_base_that_cannot_be_merged_is_named_and_no_layer_is_put(draw):
    class Uncopied:
        def __init__(self, weight):
            self.weight = weight

        def __deepcopy__(self, memo):
            return self

    blocks = {"0": Block(Linear(draw(6, 6)), Uncopied(draw(6, 6)))}
    model = adapt_layers(blocks, ["fc1", "fc2"], Config(2), seed=0, accessor=walk)
    with pytest.raises(TypeError, match=r"^0\.fc2: merge_to_original_layer needs a base"):
        model.merge()
    assert blocks["0"].fc1 is model["0.fc1"]


def test_a_state_makes_the_same_model_and_goes_on_as_it_did(backend, layers, draw):
    options = {"dropout": 0.5, "train_base": True}
    one, other = (
        adapt_layers(layers, ["fc1", "fc2"], Config(2), seed=seed, **options) for seed in (0, 7)
    )
    run(one, draw)
    one.step(Descent())
    other.load_state(one.state())
    x = draw(5, 6)
    for model in (one, other):
        h = model["encoder.fc1"](x)
        model["encoder.fc1"].backward(model["encoder.fc2"].backward(model["encoder.fc2"](h)))
        model.step(Descent())
    assert bits(backend, one) == bits(backend, other)


def test_a_state_of_another_model_is_refused_and_nothing_changes(backend, layers, model):
    other = adapt_layers(layers, ["fc1", "fc2"], Config(2), seed=9, rank_pattern={"fc2": 1})
    before = bits(backend, other)
    with pytest.raises(ValueError, match=r"^encoder\.fc2: config\.rank must be that of the state,"):
        other.load_state(model.state())
    with pytest.raises(ValueError, match="state must have the adapted layers: missing encoder"):
        other.load_state({})
    broken = model.state()
    broken["encoder.fc2"]["generator"] = {"bit_generator": "MT19937"}
    same = adapt_layers(layers, ["fc1", "fc2"], Config(2), seed=9)
    kept = bits(backend, same)
    with pytest.raises(ValueError, match=r"^encoder\.fc2: state must be for a PCG64"):
        same.load_state(broken)
    assert (bits(backend, other), bits(backend, same)) == (before, kept)


def test_operators_reach_their_layers_and_give_them_a_kind(backend, draw, assert_close):
    layers = {
        "tokens": SimpleNamespace(weight=draw(9, 6)),
        "conv": SimpleNamespace(weight=draw(4, 3, 3), bias=draw(4)),
    }
    operators = {"tokens": doraxp.Embedding(), "conv": doraxp.Convolution(padding=1)}
    model = adapt_layers(
        layers, ["tokens", "conv"], Config(2), seed=0, operators=operators,
        kinds={"conv": LayerKind("conv", groups=2)},
    )  # fmt: skip
    assert [layer.kind for layer in model.adapted.values()] == [
        LayerKind("embedding"), LayerKind("conv", groups=2),
    ]  # fmt: skip
    x = draw(2, 6, 5)
    expected = operators["conv"].apply(x, layers["conv"].weight) + layers["conv"].bias[:, None]
    assert_close(model["conv"](x), expected, rtol=1e-13)
    ids = backend.asarray(np.array([3, 0]))
    assert_close(model["tokens"](ids), backend.numpy(layers["tokens"].weight)[[3, 0]], rtol=1e-13)


def test_an_unknown_path_has_the_nearest_paths(draw):
    layers = {f"block.{n}.{name}": Linear(draw(6, 6)) for n in range(2) for name in ("up", "down")}
    model = adapt_layers(layers, ["up"], Config(2), seed=0)
    rule = "path must be one of 4 layers, got {!r}; the nearest {}"
    for wrong, near in {
        "block.0.ub": "are block.0.up, block.",
        "up": "are block.0.up, block.1.up",  # the end of two paths
        "nope": "are block.0.up, block.0.down, block.1.up, block.1.down",
        0: "are block.0.up, block.0.down, block.1.up, block.1.down",
    }.items():
        with pytest.raises(KeyError) as caught:
            model[wrong]
        assert caught.value.args[0].startswith(rule.format(wrong, near))
        assert wrong not in model
        assert model.get(wrong, 7) == 7
    assert "block.0.up" in model
