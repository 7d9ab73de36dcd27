"""Optimizers on trees of plain dicts, such as the state of a layer, and numbers by name."""

from __future__ import annotations

import itertools
import pickle
import re
import tracemalloc

import numpy as np
import pytest

from doraxp import (
    Adapter,
    Config,
    DoRALayer,
    Linear,
    adamw_init,
    adamw_step,
    clip_by_global_norm,
    sgd_init,
    sgd_step,
)
from doraxp._base.types import AdamWLeaves, AdamWNumbers
from doraxp.backends import Operations, operations

RATES = {"lora_a": 0.03, "lora_b": 0.3, "magnitude": 0.01}
STEPS = {"sgd": (sgd_init, sgd_step), "adamw": (adamw_init, adamw_step)}
both = pytest.mark.parametrize(("init", "step"), STEPS.values(), ids=STEPS)


def random_layer(draw):
    return Adapter(draw(2, 5), draw(4, 2), draw(4))._asdict()


def flat(tree, path=""):
    """Return the leaves of a tree of dicts and NamedTuples by path."""
    entries = tree._asdict() if hasattr(tree, "_asdict") else tree
    if not isinstance(entries, dict):
        return {path: entries}
    parts = [flat(entry, f"{path}/{key}") for key, entry in entries.items()]
    return {name: leaf for part in parts for name, leaf in part.items()}


def assert_same(assert_close, actual, desired, rtol=0):
    assert list(flat(actual)) == list(flat(desired))
    for one, other in zip(flat(actual).values(), flat(desired).values(), strict=True):
        assert_close(one, other, rtol=rtol)


def stepped(backend, init, step, params, grads, **numbers):
    return backend.run(step, params, grads, backend.run(init, params), **numbers)


@both
def test_a_dict_of_arrays_is_stepped_as_a_named_tuple_of_them(
    backend, draw, assert_close, init, step
):
    params, grads = random_layer(draw), random_layer(draw)
    numbers = {"learning_rate": 0.1, "weight_decay": 0.2}
    actual, state = stepped(backend, init, step, params, grads, **numbers)
    assert type(actual) is dict
    desired, wanted = stepped(backend, init, step, Adapter(**params), Adapter(**grads), **numbers)
    assert_same(assert_close, actual, desired._asdict())
    assert_same(assert_close, state[-1], wanted[-1]._asdict())


@both
def test_dicts_and_named_tuples_mix_at_any_depth(backend, draw, assert_close, init, step):
    def tree():
        return {
            "scale": draw(),
            "blocks": {0: random_layer(draw), 1: Adapter(**random_layer(draw))},
            "head": {"deep": {"bias": draw(3)}, "none": {}},
        }

    params, grads = tree(), tree()
    numbers = {"learning_rate": 0.1, "weight_decay": 0.2}
    turned = dict(reversed(grads.items()))  # entries are matched by name
    actual, state = stepped(backend, init, step, params, turned, **numbers)
    assert actual["head"]["none"] == {}
    for path, leaf in flat(actual).items():
        name = path.rpartition("/")[2]
        alone = ({name: flat(each)[path]} for each in (params, grads))
        desired, _ = stepped(backend, init, step, *alone, **numbers)
        assert_close(leaf, desired[name], rtol=1e-15 if backend.fuses else 0)
    assert sorted(flat(state[-1])) == sorted(flat(params))  # JAX sorts keys


@both
@pytest.mark.parametrize("train_base", [False, True])
def test_the_state_of_a_layer_is_a_tree(backend, draw, assert_close, init, step, train_base):
    layer = DoRALayer(Linear(draw(4, 5), draw(4)), Config(2), seed=0, train_base=train_base)
    layer.forward(draw(3, 5))
    layer.backward(draw(3, 4))
    params, grads = layer.state_dict(), layer.gradients
    new, _ = step(params, grads, init(params), learning_rate=0.1)
    layer.load_state_dict(new)
    assert_same(assert_close, layer.state_dict(), new)
    assert ("weight" in new) == train_base
    for name in new:
        moved = np.any(backend.numpy(new[name]) != backend.numpy(params[name]))
        assert moved == (name != "lora_a" or step is adamw_step)  # its gradient is 0 at first


def test_clipping_takes_dicts(backend, draw, assert_close):
    grads = {"q": random_layer(draw), "v": random_layer(draw)}
    actual, norm = backend.run(clip_by_global_norm, grads, 0.5)
    wanted = {name: Adapter(**grads[name]) for name in grads}
    desired, other = backend.run(clip_by_global_norm, wanted, 0.5)
    assert_close(norm, other, rtol=0)
    assert_same(assert_close, actual, desired)


# Numbers


@both
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_numbers_by_name_serve_all_layers(backend, draw, assert_close, init, step, name):
    """As a dict and as a NamedTuple, for layers that are one or the other."""
    params, grads = (
        {"block": {0: random_layer(draw)}, "v": Adapter(**random_layer(draw))} for _ in range(2)
    )
    leaves, slopes = flat(params), flat(grads)
    for numbers in (
        RATES,
        Adapter(**RATES),
        {"block": RATES, "v": Adapter(**RATES)},
        {"block": {0: Adapter(**RATES)}, "v": RATES},
    ):
        given = {"learning_rate": 0.1, name: numbers}
        actual, _ = stepped(backend, init, step, params, grads, **given)
        for path, leaf in flat(actual).items():
            field = path.rpartition("/")[2]
            alone = {"leaf": leaves[path]}, {"leaf": slopes[path]}
            one = {"learning_rate": 0.1, name: {"leaf": RATES[field]}}
            if name == "learning_rate" and field == "magnitude":
                one["weight_decay"] = 0.0
            desired, _ = stepped(backend, init, step, *alone, **one)
            assert_close(leaf, desired["leaf"], rtol=1e-15 if backend.fuses else 0)


@both
def test_names_may_be_those_of_different_layers(backend, draw, assert_close, init, step):
    params, grads = (
        {"q": random_layer(draw), "head": {"weight": draw(2, 3), "bias": draw(2)}} for _ in range(2)
    )
    numbers = {**RATES, "weight": 0.5, "bias": 0.25}
    actual, _ = stepped(backend, init, step, params, grads, learning_rate=numbers)
    split = {"q": RATES, "head": {"bias": 0.25, "weight": 0.5}}
    desired, _ = stepped(backend, init, step, params, grads, learning_rate=split)
    assert_same(assert_close, actual, desired)


@both
def test_one_decay_of_a_dict_spares_the_magnitude(backend, draw, assert_close, init, step):
    params, grads = ({"q": random_layer(draw)} for _ in range(2))
    each = {"lora_a": 0.5, "lora_b": 0.5, "magnitude": 0.0}
    desired, _ = stepped(backend, init, step, params, grads, learning_rate=0.1, weight_decay=each)
    for one in (0.5, {"q": 0.5}):
        actual, _ = stepped(backend, init, step, params, grads, learning_rate=0.1, weight_decay=one)
        assert_same(assert_close, actual, desired)
    moved, _ = stepped(
        backend, init, step, params, grads, learning_rate=0.1, weight_decay={**each, "magnitude": 1}
    )
    assert np.any(
        backend.numpy(moved["q"]["magnitude"]) != backend.numpy(desired["q"]["magnitude"])
    )


@both
def test_lora_plus_multiplies_the_rate_of_b(backend, draw, assert_close, init, step):
    params, grads = (
        {"q": random_layer(draw), "v": Adapter(**random_layer(draw))} for _ in range(2)
    )
    by_layer = {"q": 0.25, "v": Adapter(1, 0.5, 2)}
    wanted = {"q": Adapter(0.25, 4.0, 0.25), "v": Adapter(1, 8, 2)}
    for rate, each in ((0.5, Adapter(0.5, 8.0, 0.5)), (by_layer, wanted)):
        actual, _ = stepped(backend, init, step, params, grads, learning_rate=rate, lora_plus=16)
        desired, _ = stepped(backend, init, step, params, grads, learning_rate=each)
        assert_same(assert_close, actual, desired)
    traced = backend.asarray(np.asarray(0.5))
    actual, _ = stepped(backend, init, step, params, grads, learning_rate=traced, lora_plus=2)
    each = Adapter(0.5, 1.0, 0.5)
    desired, _ = stepped(backend, init, step, params, grads, learning_rate=each)
    assert_same(assert_close, actual, desired, rtol=1e-15)


# States


@pytest.mark.lanes("numpy")
def test_a_state_of_dicts_is_pickled_and_saved_as_arrays(draw, tmp_path, backend, assert_close):
    params, grads = ({"q": random_layer(draw)} for _ in range(2))
    _, state = adamw_step(params, grads, adamw_init(params), learning_rate=0.1)
    np.savez(tmp_path / "state.npz", **flat(state))
    with np.load(tmp_path / "state.npz") as file:
        assert file["/step"] == 1
        assert_close(file["/mu/q/lora_a"], state.mu["q"]["lora_a"], rtol=0)
    again = pickle.loads(pickle.dumps(state))
    assert again.step == 1
    assert_same(assert_close, again.mu, state.mu)


def test_a_state_of_dicts_is_a_pytree(jax):
    params = {"q": {"lora_b": jax.numpy.ones((2, 1)), "lora_a": jax.numpy.ones((1, 2))}}
    state = adamw_init(params)
    leaves, tree = jax.tree_util.tree_flatten(state)
    assert len(leaves) == 5
    jitted = jax.jit(lambda p, s: adamw_step(p, p, s, learning_rate=0.1))
    _, after = jitted(params, state)
    assert jax.tree_util.tree_structure(after) == tree
    new, _ = adamw_step(params, params, after, learning_rate=0.1)
    assert new["q"]["lora_a"].shape == (1, 2)


# Errors


def whole(**leaves):
    return {"lora_a": np.ones((2, 5)), "lora_b": np.ones((4, 2)), "magnitude": np.ones(4), **leaves}


MISSING = "and params must have the same entries; missing:"


class Nothing(tuple):
    """A NamedTuple without fields."""

    _fields = ()


@pytest.mark.parametrize(
    ("params", "grads", "error", "message"),
    [
        (whole(), Adapter(**whole()), ValueError,
         f"grads {MISSING} grads['lora_a'], grads['lora_b'], grads['magnitude'], params.lora_a, "
         "params.lora_b, params.magnitude"),
        ({"q": whole()}, {"q": whole(lora_a=np.ones((2, 4)))}, ValueError,
         "grads['q']['lora_a'] must have the shape of params['q']['lora_a'], (2, 5), got (2, 4)"),
        (whole(), whole(lora_b=np.ones((4, 2), int)), TypeError,
         "grads['lora_b'] must be of dtype float16, bfloat16, float32, float64, got int64"),
        (whole(), whole(lora_b=[1.0]), TypeError,
         "grads['lora_b'] must be an array of a library that array-api-compat knows, got list: "
         "give numpy.asarray(grads['lora_b'])"),
        (whole(), whole(lora_b=Nothing()), TypeError,
         "grads['lora_b'] must be an array of a library that array-api-compat knows, got Nothing"),
        (whole(), None, TypeError,
         "grads must be a NamedTuple of arrays or a dict of arrays and such trees, got NoneType"),
        (np.ones(3), np.ones(3), TypeError,
         "params must be a NamedTuple of arrays or a dict of arrays and such trees, got ndarray"),
        ({"q": {}}, {"q": {}}, ValueError, "params must hold at least one array, got {'q': {}}"),
        (whole(), {}, ValueError,
         f"grads {MISSING} grads['lora_a'], grads['lora_b'], grads['magnitude']"),
    ],
    ids=range(9),
)  # fmt: skip
@both
def test_dicts_that_do_not_fit_are_refused(init, step, params, grads, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        step(params, grads, init({"q": whole()} if "q" in params else whole()), learning_rate=0.1)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({**RATES, "lora_b": -1}, ValueError,
         "['q']['lora_b'] must be at least 0 and finite, got -1.0"),
        ({"q": {**RATES, "lora_b": -1}}, ValueError,
         "['q']['lora_b'] must be at least 0 and finite, got -1.0"),
        ({"q": {**RATES, "lora_b": {}}}, TypeError,
         "['q']['lora_b'] must be a number or a 0-d array of the library of params, got {}"),
        ({"lora_a": 1}, ValueError, f" {MISSING} {{name}}['q'], params['lora_a']"),
        ({"q": {"lora_a": 1, "lora_b": 1}}, ValueError,
         f" {MISSING} {{name}}['q']['magnitude']"),
    ],
    ids=range(5),
)  # fmt: skip
@both
def test_numbers_by_name_that_do_not_fit_are_refused(init, step, name, value, error, message):
    params = {"q": whole()}
    message = name + message.replace("{name}", name)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        step(params, params, init(params), **{"learning_rate": 0.1, name: value})


@both
def test_a_factor_of_lora_plus_that_is_not_positive_is_refused(init, step):
    with pytest.raises(ValueError, match=r"^lora_plus must be above 0 and finite, got 0.0$"):
        step(whole(), whole(), init(whole()), learning_rate=0.1, lora_plus=0)


@both
def test_a_number_for_all_layers_has_the_place_of_the_first_in_an_error(init, step):
    params = {"q": whole(), "v": whole()}
    with pytest.raises(ValueError, match=r"^learning_rate\['q'\]\['lora_b'\] must be at least 0"):
        step(params, params, init(params), learning_rate={**RATES, "lora_b": -1})


# NumPy's blocks


@pytest.mark.lanes("numpy")
@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
def test_a_step_in_blocks_has_the_bits_of_the_formula(backend, draw, dtype):
    """Also where the gradient is of another dtype, and the step is a 0-d array."""
    wide = "float64" if dtype == "float64" else "float32"
    p, mu = draw(50, 4099, dtype=dtype), draw(50, 4099, dtype=wide)
    for kind, corrections in ((dtype, (0.1, 0.001)), ("float64", np.asarray([0.1, 0.001], wide))):
        g = draw(50, 4099, dtype=kind)
        leaves = AdamWLeaves([p, p[:0]], [g, g[:0]], [mu, mu[:0]], [mu * mu, mu[:0]])
        numbers = AdamWNumbers(0.9, 0.1, 0.999, 0.001, 1e-8, *corrections)
        actual, desired = (
            ops.adamw(leaves, [0.1, 0.2], [0.3, 0.4], numbers, donate=False)
            for ops in (operations(p=p, g=g), Operations(backend.namespace()))
        )
        pairs = [zip(*columns, strict=True) for columns in zip(actual, desired, strict=True)]
        for one, other in itertools.chain(*pairs):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@pytest.mark.lanes("numpy")
@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
@pytest.mark.parametrize("donate", [False, True])
def test_a_step_in_blocks_equals_the_same_step_of_rows(backend, draw, dtype, donate):
    """Each row alone is smaller than a block; one array is not in C order."""
    shapes = {"long": (50, 4099), "turned": (4099, 50)}

    def copied(tree):
        return {"long": tree["long"].copy(), "turned": tree["turned"].T.copy().T}

    def rows_of(tree):
        return {(name, k): row.copy() for name in shapes for k, row in enumerate(tree[name])}

    params, grads = (
        copied({name: draw(*shape, dtype=dtype) for name, shape in shapes.items()})
        for _ in range(2)
    )
    _, state = adamw_step(params, grads, adamw_init(params), learning_rate=0.1)
    trees = rows_of(params), rows_of(grads)
    rows = state._replace(mu=rows_of(state.mu), nu=rows_of(state.nu))
    wanted, _ = adamw_step(*trees, rows, learning_rate=0.1)
    own = state._replace(mu=copied(state.mu), nu=copied(state.nu))
    new, _ = adamw_step(copied(params), grads, own, learning_rate=0.1, donate=donate)
    for (name, k), row in wanted.items():
        np.testing.assert_array_equal(new[name][k], row)


@both
def test_arrays_without_numbers_and_scalars_are_stepped(backend, draw, init, step):
    params = {"empty": draw(0, 3), "scalar": draw()}
    new, _ = stepped(backend, init, step, params, params, learning_rate=0.1)
    assert [tuple(leaf.shape) for leaf in new.values()] == [(0, 3), ()]


@pytest.mark.lanes("numpy")
def test_a_step_of_donated_arrays_needs_less_than_a_mebibyte(backend):
    """Two matrices of 4 MiB each; the read-only lane cannot write into them."""
    if backend.name == "numpy":
        params, grads = ({name: np.ones((1024, 1024), "float32") for name in "kq"} for _ in "pg")
        state = adamw_init(params)
        tracemalloc.start()
        adamw_step(params, grads, state, learning_rate=0.1, donate=True)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**20
