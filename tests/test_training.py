"""`save_training` and `load_training`: a resumed run equals the one that was not interrupted."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import doraxp
from doraxp import Config, DoRALayer, Linear, adapt_layers
from doraxp.backends._numpy import NumpyOperations
from doraxp.checkpoint import CheckpointError, Training, load_training, save_training

ROOT = Path(__file__).parents[1]


def run(*arguments):
    """Return the JSON that tests/kills.py prints, from a process of its own: it forks."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kills.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def make(draw, optimizer=None, **options):
    layers = {"up": Linear(draw(8, 6), draw(8)), "down": Linear(draw(6, 8))}
    choices = {"seed": 0, "dropout": 0.25, "train_base": True, **options}
    config = choices.pop("config", Config(2, 4.0, dropout="low_rank"))
    return adapt_layers(layers, ["up", "down"], config, **choices)


def take(arrays, *shape):
    """Return the next of some arrays."""
    return arrays.pop(0)


def adamw():
    schedule = doraxp.cosine_schedule(0.05, total_steps=9, warmup_steps=2)
    return doraxp.AdamW(schedule, max_norm=1.0, lora_plus=4)


def sgd():
    return doraxp.SGD(0.01, momentum=0.5)


def train(model, optimizer, batches):
    for x in batches:
        y = model["down"](model["up"](x))
        model["up"].backward(model["down"].backward(y - x))
        model.step(optimizer)


def same(backend, one, other):
    pairs = zip(leaves(one), leaves(other), strict=True)
    return all(backend.numpy(a).tobytes() == backend.numpy(b).tobytes() for a, b in pairs)


def assert_same_run(backend, one, other):
    """Compare bits on NumPy; elsewhere, as Dask, a resumed array may be summed in another order."""
    if backend.backend == "numpy":
        assert same(backend, one, other)
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_allclose(backend.numpy(a), backend.numpy(b), rtol=1e-9, atol=1e-12)


def leaves(tree):
    """Return the arrays of a tree in order."""
    if isinstance(tree, dict | tuple):
        entries = tree.values() if isinstance(tree, dict) else tree
        return [leaf for each in entries for leaf in leaves(each)]
    return [tree] if hasattr(tree, "shape") else []


@pytest.mark.parametrize("optimizer", [adamw, sgd])
def test_a_resumed_run_equals_the_whole_one(backend, draw, tmp_path, optimizer):
    batches, rng = [draw(5, 6) for _ in range(8)], np.random.default_rng(5)
    weights = [draw(8, 6), draw(8), draw(6, 8)]
    whole, half, other = (make(functools.partial(take, [*weights])) for _ in range(3))
    one, two = optimizer(), optimizer()
    train(whole, one, batches)
    train(half, two, batches[:4])
    rng.random(3)
    save_training(tmp_path / "run", half, two, generator=rng, extra={"loss": [0.5, None]})
    training = load_training(tmp_path / "run")
    three = training.resume(other)
    assert isinstance(training, Training)
    assert (training.step, training.extra) == (4, {"loss": [0.5, None]})
    assert training.generator.bit_generator.state == rng.bit_generator.state
    assert (three.settings(), three.steps) == (two.settings(), 4)
    train(other, three, batches[4:])
    assert_same_run(backend, whole.parameters, other.parameters)
    assert_same_run(backend, one.state, three.state)
    assert [layer.state()["generator"] for layer in whole.adapted.values()] == [
        layer.state()["generator"] for layer in other.adapted.values()
    ]


@pytest.mark.lanes("numpy")
@pytest.mark.parametrize("train_base", [False, True])
@pytest.mark.parametrize("start", [0, 3])
def test_a_resumed_run_has_the_same_bits_where_a_product_rounds_by_its_shape(
    draw, tmp_path, monkeypatch, start, train_base
):
    """Kernels of BLAS do. An evaluation before the save makes W Aᵀ beside another x."""
    exact = NumpyOperations.product_with_transposed

    def by_shape(ops, left, right):
        return exact(ops, left, right) * (1 + 2.0**-52 * left.shape[-2])

    monkeypatch.setattr(NumpyOperations, "product_with_transposed", by_shape)
    weights = [draw(8, 6), draw(8), draw(6, 8)]
    half, other = (
        make(functools.partial(take, [*weights]), train_base=train_base) for _ in range(2)
    )
    one, batches = adamw(), [draw(5, 6) for _ in range(6)]
    train(half, one, batches[:start])
    half.eval()
    half["up"](draw(9, 6))
    half.train()
    save_training(tmp_path / "run", half, one)
    two = load_training(tmp_path / "run").resume(other)
    for model, optimizer in ((half, one), (other, two)):
        train(model, optimizer, batches[3:])
    for ours, theirs in zip(leaves(half.parameters), leaves(other.parameters), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.once
def test_a_save_between_a_forward_and_a_backward_loses_no_gradient(draw, tmp_path):
    layer, x = DoRALayer(Linear(draw(7, 6)), Config(2), seed=0), draw(5, 6)
    for _ in range(2):
        y = layer.forward(x)
        save_training(tmp_path / "run", layer)
        layer.backward(y)
        save_training(tmp_path / "run", layer)
    twice = layer.gradients["magnitude"]
    layer.clear_gradients()
    layer.backward(layer.forward(x))
    np.testing.assert_allclose(twice, 2 * layer.gradients["magnitude"], rtol=1e-12)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks the processes that it kills")
def test_runs_and_saves_that_are_killed_lose_nothing(tmp_path):
    """200 steps with 20 kills at random moments; a kill before each file operation of a save."""
    result = run(tmp_path, 20)
    assert len(result["resumed"]) == 20
    assert result["resumed"] == sorted(result["resumed"])
    assert result["resumed"][-1] > 100
    assert result["equal"]
    assert result["moments"] >= 6
    assert result["complete"]
    assert len(result["files"]) == 2


def test_a_single_layer_and_a_mapping_are_models_too(backend, draw, tmp_path):
    base = Linear(draw(7, 6))
    layer, other = (DoRALayer(base, Config(2), seed=seed) for seed in (0, 1))
    optimizer = doraxp.SGD(0.1)
    layer.backward(layer.forward(draw(5, 6)))
    layer.step(optimizer)
    for one, two in ((layer, other), ({"fc": layer}, {"fc": other})):
        save_training(tmp_path / "run", one, optimizer)
        assert load_training(tmp_path / "run").resume(two).steps == 1
        assert same(backend, layer.state_dict(), other.state_dict())
        other.adapter = doraxp.init(other.weight, other.config, seed=1)


def test_arrays_in_any_order_of_memory_come_back(tmp_path):
    layer = DoRALayer(Linear(np.eye(6)), Config(2), seed=0)
    a = np.arange(12.0).reshape(2, 6)
    layer.adapter = layer.adapter._replace(lora_a=np.asfortranarray(a), lora_b=a[::-1].T)
    save_training(tmp_path / "run", layer)
    other = DoRALayer(Linear(np.eye(6)), Config(2), seed=1)
    load_training(tmp_path / "run").resume(other)
    np.testing.assert_array_equal(other.adapter.lora_a, a)
    np.testing.assert_array_equal(other.adapter.lora_b, a[::-1].T)


@pytest.mark.once
def test_a_given_optimizer_gets_the_state(draw, tmp_path):
    """So a run goes on with another rate, or with a schedule that cannot be saved."""
    model, optimizer = make(draw), adamw()
    train(model, optimizer, [draw(5, 6)])
    save_training(tmp_path / "run", model, optimizer)
    given = doraxp.AdamW(lambda step: 0.1 / (step + 1))
    assert load_training(tmp_path / "run").resume(model, given) is given
    assert (given.steps, given.state.step) == (1, 1)
    with pytest.raises(TypeError, match="learning_rate must be a number, numbers by names, or"):
        save_training(tmp_path / "run", model, given)
    assert load_training(tmp_path / "run").resume(model).learning_rate == optimizer.learning_rate


@pytest.mark.once
def test_a_state_without_an_optimizer_keeps_the_given_step(draw, tmp_path):
    save_training(tmp_path / "run", make(draw), step=3)
    training = load_training(tmp_path / "run")
    assert (training.step, training.generator, training.extra) == (3, None, None)
    assert training.resume(make(draw)) is None
    with pytest.raises(TypeError, match="step must be an integer, got 'three'"):
        save_training(tmp_path / "run", make(draw), step="three")


@pytest.mark.dtypes("float16", "bfloat16")
def test_trained_weights_of_half_precision_come_back(backend, dtype, draw, tmp_path):
    def cast(*shape):
        return draw(*shape, dtype=dtype)

    model, other = make(cast), make(cast)
    save_training(tmp_path / "run", model)
    load_training(tmp_path / "run").resume(other)
    assert same(backend, model.parameters, other.parameters)
    assert other["up"].weight.dtype == model["up"].weight.dtype


@pytest.mark.parametrize("name", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_every_generator_of_numpy_goes_on_as_it_would(tmp_path, name):
    layer = DoRALayer(Linear(np.eye(4)), Config(1), seed=0)
    rng = np.random.Generator(getattr(np.random, name)(3))
    rng.random(5, dtype=np.float32)
    save_training(tmp_path / "run", layer, generator=rng)
    again = load_training(tmp_path / "run").generator
    np.testing.assert_array_equal(
        again.random(7, dtype=np.float32), rng.random(7, dtype=np.float32)
    )


def test_a_state_of_one_library_is_resumed_in_another(torch, tmp_path):
    weight = np.random.default_rng(0).standard_normal((7, 6))
    layer = DoRALayer(Linear(weight), Config(2), seed=0)
    optimizer = doraxp.AdamW(0.1)
    layer.backward(layer.forward(np.ones((5, 6))))
    layer.step(optimizer)
    save_training(tmp_path / "run", layer, optimizer)
    other = DoRALayer(torch.nn.Linear(6, 7, bias=False, dtype=torch.float64), Config(2), seed=1)
    state = load_training(tmp_path / "run").resume(other).state
    assert isinstance(state.mu["lora_a"], torch.Tensor)
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name].numpy(), array)


def test_arrays_that_record_gradients_are_saved(torch, tmp_path):
    layer = DoRALayer(torch.nn.Linear(6, 7), Config(2), seed=0)
    layer.adapter = doraxp.Adapter(*(torch.nn.Parameter(leaf) for leaf in layer.adapter))
    save_training(tmp_path / "run", layer)
    load_training(tmp_path / "run").resume(layer)


@pytest.mark.once
def test_a_state_of_another_model_names_the_layer_and_changes_nothing(backend, draw, tmp_path):
    model, optimizer = make(draw), adamw()
    train(model, optimizer, [draw(5, 6)])
    save_training(tmp_path / "run", model, optimizer)
    training = load_training(tmp_path / "run")
    others = {
        r"^up: config\.alpha must be that of the state, 4\.0, got 8\.0: make the layer": make(
            draw, config=Config(2, 8.0, dropout="low_rank")
        ),
        r"^down: config\.rank must be that of the state, 2, got 1": make(
            draw, rank_pattern={"down": 1}
        ),
        r"^up: dropout must be that of the state, 0\.25, got 0\.0": make(draw, dropout=0.0),
        "missing layer; unexpected up; unexpected down": DoRALayer(
            Linear(draw(8, 6)), Config(2), seed=0
        ),
    }
    for message, other in others.items():
        before, given = other.state(), adamw()
        with pytest.raises(ValueError, match=message):
            training.resume(other, given)
        assert same(backend, before, other.state())
        assert given.state is None


@pytest.mark.once
def test_an_optimizer_of_another_class_is_refused_and_nothing_changes(backend, draw, tmp_path):
    model, optimizer = make(draw), adamw()
    train(model, optimizer, [draw(5, 6)])
    save_training(tmp_path / "run", model, optimizer)
    training, other = load_training(tmp_path / "run"), make(draw)
    before, given = other.state(), sgd()
    with pytest.raises(TypeError, match=r"optimizer must go on from the state of AdamW, got SGD: "):
        training.resume(other, given)
    assert same(backend, before, other.state())
    assert (given.state, given.steps) == (None, 0)
    for call in (training.resume, lambda *given: save_training(tmp_path / "other", *given)):
        with pytest.raises(TypeError, match=r"optimizer must have state, .* got str"):
            call(other, "adamw")
    assert not (tmp_path / "other").exists()


@pytest.mark.once
def test_a_folder_with_other_files_is_refused(draw, tmp_path):
    model = make(draw)
    folder = tmp_path / "run"
    save_training(folder, model, step=1)
    with pytest.raises(FileExistsError, match="already has a state; overwrite=True replaces it"):
        save_training(folder, model, overwrite=False)
    save_training(folder, model, step=2)
    assert len(list(folder.iterdir())) == 2
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"and no others, got notes\.txt: choose another"):
        save_training(folder, model)
    assert load_training(folder).step == 2
    with pytest.raises(FileExistsError, match="must be a folder, or not exist"):
        save_training(folder / "notes.txt", model)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        save_training(tmp_path / "none" / "run", model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"training\.json: no such file"):
        load_training(tmp_path / "empty")
    save_training(tmp_path / "empty", model)


class Own:
    """An optimizer of a user, with a state that doraxp does not know."""

    state, steps = object(), 0

    def settings(self):
        return {}


@pytest.mark.once
def test_parts_that_cannot_be_saved_are_named_and_nothing_is_written(draw, tmp_path):
    model = make(draw)
    with pytest.raises(TypeError, match=r"extra must have values of JSON: .*set"):
        save_training(tmp_path / "run", model, extra={1, 2})
    with pytest.raises(TypeError, match="generator must be of type Generator, got RandomState"):
        save_training(tmp_path / "run", model, generator=np.random.RandomState(0))
    with pytest.raises(TypeError, match="model must be of type Mapping, got Linear"):
        save_training(tmp_path / "run", Linear(draw(3, 3)))
    with pytest.raises(TypeError, match=r"optimizer must be an array, a number, .* got object"):
        save_training(tmp_path / "run", model, Own())

    class Bits(np.random.PCG64):
        @property
        def state(self):
            return {"bit_generator": "Mine"}

    with pytest.raises(TypeError, match=r"generator must be of one of .* to be saved, got Mine"):
        save_training(tmp_path / "run", model, generator=np.random.Generator(Bits()))
    dollar = Own()
    dollar.state = {"$array": 1.0}
    with pytest.raises(TypeError, match=r"optimizer must have keys of type str that do not begin"):
        save_training(tmp_path / "run", model, dollar)
    assert not (tmp_path / "run").exists()


def test_a_broken_state_is_refused(tmp_path):
    layer, folder = DoRALayer(Linear(np.eye(4)), Config(1), seed=0), tmp_path / "run"
    save_training(folder, layer, generator=np.random.default_rng(0))
    path, good = folder / "training.json", json.loads((folder / "training.json").read_text())
    for change in ({"version": 2}, {"arrays": "../x.safetensors"}):
        path.write_text(json.dumps(good | change))
        with pytest.raises(CheckpointError, match=r"must be version 1 of a table of save_training"):
            load_training(folder)
    path.write_text(json.dumps({name: good[name] for name in good if name != "layers"}))
    with pytest.raises(CheckpointError, match=r"without \['layers'\]"):
        load_training(folder)
    path.write_text(json.dumps(good | {"id": "other"}))
    with pytest.raises(CheckpointError, match=r"belongs to another save than training\.json"):
        load_training(folder)
    for generator in (
        {"$array": "absent"},
        {"bit_generator": "system"},
        {"bit_generator": "PCG64"},
    ):
        path.write_text(json.dumps(good | {"generator": generator}))
        with pytest.raises(CheckpointError, match=r"training\.json: "):
            load_training(folder)


def test_bfloat16_of_numpy_is_that_of_ml_dtypes(tmp_path):
    weight = np.ones((4, 4), ml_dtypes.bfloat16)
    layer = DoRALayer(Linear(weight), Config(1), seed=0, train_base=True)
    save_training(tmp_path / "run", layer)
    training = load_training(tmp_path / "run")
    training.resume(layer)
    assert layer.weight.dtype == ml_dtypes.bfloat16
