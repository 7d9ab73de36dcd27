"""Layers split over ranks: the results of a rank are its part of the whole layer's results."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ranks import Ranks

import doraxp
from doraxp import Adapter, Config

RULES = [(form, norm) for form in ("weight", "direction") for norm in ("exact", "detached")]
SIZE = 2
INNER = 10
CUTS = (slice(0, 6), slice(6, INNER))  # of two sizes: a mix-up of the parts fails


def draw_layer(draw, *stack, dtype="float64"):
    return {
        "x": draw(*stack, 5, INNER, dtype=dtype),
        "weight": draw(*stack, 7, INNER, dtype=dtype),
        "adapter": Adapter(
            draw(*stack, 3, INNER, dtype=dtype),
            draw(*stack, 7, 3, dtype=dtype),
            draw(*stack, 7, dtype=dtype),
        ),
        "bias": draw(*stack, 7, dtype=dtype),
    }


def step(layer, dy, config, reduce=None):
    """Return the results of a step by name: those all ranks have, and those they have a part of."""
    x, weight, adapter, bias = (layer[name] for name in ("x", "weight", "adapter", "bias"))
    y, cache = doraxp.forward(
        x, weight, adapter, config, bias=bias, reduce=reduce, dropout_mask=layer.get("mask")
    )
    merged = doraxp.merge(weight, adapter, config, prepared=cache.prepared)
    dx, (da, db, dm), dw, dbias = doraxp.backward(dy, cache, train_base=True)
    replicated = {"y": y, "norm": cache.prepared.norm, "b": db, "m": dm, "bias": dbias}
    return replicated, {"x": dx, "a": da, "weight": dw, "merged": merged}


def cut(layer, rank):
    """Return one rank's part of a layer whose input axis is split."""
    a, b, m = layer["adapter"]
    part = {name: layer[name][..., CUTS[rank]] for name in ("x", "weight", "mask") if name in layer}
    return {**part, "adapter": Adapter(a[..., CUTS[rank]], b, m), "bias": layer["bias"]}


def split_step(layer, dy, config):
    ranks = Ranks(SIZE)
    return ranks.run(lambda rank, reduce: step(cut(layer, rank), dy, config, reduce))


@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize(("form", "norm_gradient"), RULES)
def test_a_split_input_axis_gives_the_parts_of_the_whole(
    backend, draw, assert_close, form, norm_gradient, stack
):
    config = Config(3, 2.0, form=form, norm_gradient=norm_gradient)
    layer, dy = draw_layer(draw, *stack), draw(*stack, 5, 7)
    whole, wholes = backend.run(step, layer, dy, config)
    for rank, (replicated, parts) in enumerate(backend.run(split_step, layer, dy, config)):
        for name, array in replicated.items():
            assert_close(array, whole[name], rtol=1e-13)
        for name, array in parts.items():
            assert_close(array, wholes[name][..., CUTS[rank]], rtol=1e-13)


@pytest.mark.parametrize("formed", [False, True])
@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("dropout", ["input", "low_rank"])
def test_each_rank_has_its_part_of_the_mask(backend, draw, assert_close, dropout, form, formed):
    config = Config(3, 2.0, form=form, dropout=dropout)
    layer, dy = draw_layer(draw), draw(5, 7)
    layer["mask"] = backend.asarray(np.where(backend.numpy(draw(5, INNER)) > -0.5, 4 / 3, 0.0))
    if formed:  # V's row 0 is a hundredth of W's, in both forms
        a, b = (backend.numpy(leaf) for leaf in layer["adapter"][:2])
        b = b / np.linalg.norm(config.scaling * b @ a, axis=1, keepdims=True)
        weight = backend.numpy(layer["weight"]).copy()
        weight[0] = -config.scaling * b[0] @ a * (1 + 0.01 * np.arange(INNER))
        layer["weight"] = backend.asarray(weight)
        layer["adapter"] = layer["adapter"]._replace(lora_b=backend.asarray(b))
    whole, wholes = backend.run(step, layer, dy, config)
    for rank, (replicated, parts) in enumerate(backend.run(split_step, layer, dy, config)):
        for name, array in replicated.items():
            assert_close(array, whole[name], rtol=1e-13)
        for name, array in parts.items():
            assert_close(array, wholes[name][..., CUTS[rank]], rtol=1e-13)


def draw_awkward_layer(backend, draw, config):
    """Return a layer with rows of V that cancel or are 0, on all ranks or on one, or overflow."""
    layer = draw_layer(draw)
    weight = backend.numpy(layer["weight"]).copy()
    a, b, m = (backend.numpy(leaf).copy() for leaf in layer["adapter"])
    if config.form == "direction":  # W/‖W‖ has length 1, so an update of length 1 cancels it
        b /= np.linalg.norm(config.scaling * b @ a, axis=1, keepdims=True)
    update = config.scaling * b @ a
    weight[0] = -update[0] * (1 + 1e-5 * np.arange(INNER))
    weight[1] = -update[1]
    weight[1, CUTS[1]] *= 1 + 1e-6
    weight[2], b[2] = 0, 0
    weight[3, CUTS[0]], b[3] = 0, 0
    weight[4] *= 1e200
    weight[5], b[5] = weight[5] * 1e-200, 0
    adapter = Adapter(*map(backend.asarray, (a, b, m)))
    return layer | {"weight": backend.asarray(weight), "adapter": adapter}


@pytest.mark.filterwarnings(
    "ignore:overflow:RuntimeWarning"
)  # from Dask; the guard measures these rows again
@pytest.mark.parametrize("form", ["weight", "direction"])
def test_rows_that_the_guard_forms_are_summed_too(backend, draw, form):
    """Errors are relative to the size of the row, because the sizes of rows are far apart.

    1e-6 of a row is left where it cancels, so y has 8 digits. The size is that of the whole row: on
    one rank, its part may be all rounding errors.
    """
    config = Config(3, 2.0, form=form)
    layer, dy = draw_awkward_layer(backend, draw, config), draw(5, 7)

    def assert_close_by_rows(got, whole, axis, columns=slice(None)):
        got, whole = backend.numpy(got), backend.numpy(whole)
        bound = 1e-8 * np.max(np.abs(whole), axis=axis, keepdims=True)
        assert np.all(np.isfinite(whole))
        assert np.all(np.abs(got - whole[..., columns]) <= bound)

    whole, wholes = backend.run(step, layer, dy, config)
    for rank, (replicated, parts) in enumerate(backend.run(split_step, layer, dy, config)):
        for name in ("norm", "m"):
            assert_close_by_rows(replicated[name], whole[name], ())
        assert_close_by_rows(replicated["y"], whole["y"], 0)
        assert_close_by_rows(replicated["b"], whole["b"], 1)
        for name, axis in {"merged": 1, "x": None, "a": None, "weight": 1}.items():
            assert_close_by_rows(parts[name], wholes[name], axis, CUTS[rank])


def test_the_error_of_cancelling_rows_at_most_doubles_over_ranks(backend, draw):
    """V is a thousandth of W. The float32 error is at most twice that of the whole layer."""
    config, size = Config(3, 2.0), 64
    x, dy = draw(5, size, dtype="float32"), draw(5, 48, dtype="float32")
    a, b, m, rest = (
        backend.numpy(draw(*shape)).astype(np.float32)
        for shape in ((3, size), (48, 3), (48,), (48, size))
    )
    weight = (-config.scaling * b.astype(np.float64) @ a + 1e-3 * rest).astype(np.float32)

    def gradient(dtype, columns, reduce):
        part = x[:, columns], backend.asarray(weight[:, columns])
        adapter = Adapter(*map(backend.asarray, (a[:, columns], b, m)))
        arrays = (*part, *adapter, dy)
        if dtype == "float64":
            arrays = [backend.asarray(backend.numpy(array).astype(dtype)) for array in arrays]
        x_, weight_, *leaves, dy_ = arrays
        _, cache = doraxp.forward(x_, weight_, Adapter(*leaves), config, reduce=reduce)
        return doraxp.backward(dy_, cache).adapter.lora_b

    def error(db):
        return np.max(np.abs(backend.numpy(db) - want)) / np.max(np.abs(want))

    cuts = (slice(0, 40), slice(40, size))
    want = backend.numpy(gradient("float64", slice(None), None))
    whole = error(gradient("float32", slice(None), None))
    for db in Ranks(SIZE).run(lambda rank, reduce: gradient("float32", cuts[rank], reduce)):
        assert error(db) <= 2 * whole


@pytest.mark.parametrize("form", ["weight", "direction"])
def test_ranks_agree_on_the_suspect_rows(backend, draw, form):
    """‖s(BA)ᵢ‖² cancels: the rows of A are nearly dependent, and on one rank they are 0."""
    layer, config = draw_layer(draw), Config(3, 2.0, form=form)
    a, b, m = (backend.numpy(leaf).copy() for leaf in layer["adapter"])
    a[2] = a[1] * (1 + 1e-7)
    a[:, CUTS[0]] = 0
    b[:3] = [0.1, 1e6, -1e6]
    layer |= {"adapter": Adapter(*map(backend.asarray, (a, b, m)))}
    dy = draw(5, 7)
    whole, _ = backend.run(step, layer, dy, config)
    for replicated, _ in backend.run(split_step, layer, dy, config):
        got, want = (backend.numpy(side["norm"]) for side in (replicated, whole))
        np.testing.assert_allclose(got, want, rtol=1e-8)


def test_a_fresh_adapter_whose_magnitude_is_the_summed_norm_changes_nothing(
    backend, draw, assert_close
):
    layer, config = draw_layer(draw), Config(3)
    adapter = doraxp.init(layer["weight"], config, seed=0)

    def gain(rank, reduce):
        part = cut(layer | {"adapter": adapter}, rank)
        norm = doraxp.prepare(part["weight"], part["adapter"], config, reduce=reduce).norm
        fresh = part["adapter"]._replace(magnitude=norm)
        return doraxp.prepare(part["weight"], fresh, config, reduce=reduce).gain

    for got in backend.run(lambda: Ranks(SIZE).run(gain)):
        assert_close(got, np.ones(7), rtol=0)


@pytest.mark.parametrize(("form", "norm_gradient"), RULES)
def test_a_split_output_axis_needs_sums_of_dx_and_da_only(
    backend, draw, assert_close, form, norm_gradient
):
    """Each rank has its part of y, dB, dm, dbias and dW. dx and dA are sums over the ranks."""
    config = Config(3, 2.0, form=form, norm_gradient=norm_gradient)
    layer, dy = draw_layer(draw), draw(5, 7)
    (a, b, m), weight = layer["adapter"], layer["weight"]
    whole, wholes = backend.run(step, layer, dy, config)
    sums = {"x": 0.0, "a": 0.0}
    for rows in (slice(0, 4), slice(4, 7)):
        part = layer | {"weight": weight[rows, :], "bias": layer["bias"][rows]}
        part |= {"adapter": Adapter(a, b[rows, :], m[rows])}
        results, parts = backend.run(step, part, dy[:, rows], config)
        assert_close(results["y"], whole["y"][:, rows], rtol=1e-14)
        assert_close(parts["merged"], wholes["merged"][rows, :], rtol=1e-14)
        assert_close(parts["weight"], wholes["weight"][rows, :], rtol=1e-13)
        assert_close(results["b"], whole["b"][rows, :], rtol=1e-13)
        for name in ("m", "bias"):
            assert_close(results[name], whole[name][rows], rtol=1e-13)
        sums = {name: parts[name] + total for name, total in sums.items()}
    for name, total in sums.items():
        assert_close(total, wholes[name], rtol=1e-13)


def make(form="weight"):
    rng = np.random.default_rng(1)
    layer = draw_layer(lambda *shape, dtype: rng.standard_normal(shape).astype(dtype))
    a, b, m = layer["adapter"]
    layer["adapter"] = Adapter(a, 0.01 * b, m)  # so small that no row is suspect
    return layer, Config(3, form=form)


@pytest.mark.parametrize("form", ["weight", "direction"])
def test_the_norm_and_the_forward_take_one_sum_each_and_the_backward_zero(form):
    layer, config = make(form)
    x, weight, adapter, _ = layer.values()
    calls = []

    def reduce(part):
        calls.append(part.shape)
        return part + 0

    def sums_of(function, *args, **kwargs):
        calls.clear()
        return function(*args, **kwargs), len(calls)

    prepared, count = sums_of(doraxp.prepare, weight, adapter, config, reduce=reduce)
    assert count == 1
    (y, cache), count = sums_of(doraxp.forward, x, weight, adapter, config, prepared=prepared)
    assert count == 1
    assert sums_of(doraxp.backward, y, cache)[1] == 0
    assert sums_of(doraxp.backward, y, cache, train_base=True)[1] == (form == "direction")
    moved = adapter._replace(lora_b=adapter.lora_b + 1)
    _, count = sums_of(doraxp.forward, x, weight, moved, config, previous=prepared)
    assert count == 2


@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize(("out", "rank"), [(7, 3), (6, 1), (5, 5)])
def test_each_sum_has_as_many_numbers_as_docs_parallel_says(backend, draw, form, out, rank):
    config, tokens, sizes = Config(rank, form=form), 4, []
    x, weight, short = draw(tokens, INNER), draw(out, INNER), 1e-200 * draw(out, INNER)
    fresh, of_short = (doraxp.init(each, config, seed=0) for each in (weight, short))
    opposite = backend.numpy(fresh.lora_b).copy()
    row = backend.numpy(fresh.lora_a)[0]
    opposite[:, 0] = -0.999 if form == "weight" else -0.999 / np.linalg.norm(row)
    near = backend.asarray(np.tile(row, (out, 1)))  # each row of V is a thousandth of it
    cancelling = fresh._replace(lora_b=backend.asarray(opposite))

    def reduce(part):
        sizes.append(math.prod(part.shape))
        return part + 0

    def summed(function, *args, **kwargs):
        sizes.clear()
        return function(*args, config, **kwargs), [*sizes]

    norm, forward = out * (rank + 1) + rank**2, tokens * (out + rank)
    of_scale = [out, out] if form == "direction" else []
    of_formed = [out, out, out * rank]
    prepared, found = summed(doraxp.prepare, weight, fresh, reduce=reduce)
    reads = len(found) == 1  # where values cannot be read, every row is treated as suspect
    scale, formed = ([], []) if reads else (of_scale, of_formed)
    assert found == [norm, *scale, *formed]
    _, found = summed(doraxp.forward, x, weight, fresh, reduce=reduce)
    assert found == [norm, *scale, *formed, forward]
    _, found = summed(doraxp.forward, x, weight, fresh, previous=prepared)
    assert found == [norm - out, *formed, forward]
    _, found = summed(doraxp.prepare, near, cancelling, reduce=reduce)
    assert found == [norm, *scale, *of_formed]
    _, found = summed(doraxp.prepare, short, of_short, reduce=reduce)
    assert found == [norm, *of_scale, *(of_formed if form == "weight" else formed)]


@pytest.mark.parametrize("form", ["weight", "direction"])
def test_the_squares_of_an_earlier_norm_are_sums_already(form):
    layer, config = make(form)
    moved = layer["adapter"]._replace(lora_b=layer["adapter"].lora_b + 1)
    want, _ = doraxp.forward(layer["x"], layer["weight"], moved, config)

    def again(rank, reduce):
        x, weight, adapter, _ = cut(layer, rank).values()
        earlier = doraxp.prepare(weight, adapter, config, reduce=reduce)
        moved = adapter._replace(lora_b=adapter.lora_b + 1)
        return doraxp.forward(x, weight, moved, config, previous=earlier)[0]

    for y in Ranks(SIZE).run(again):
        np.testing.assert_allclose(y, want, rtol=1e-12)


def double(part):
    return 2 * part


@pytest.mark.parametrize("name", ["prepared", "previous"])
def test_a_norm_of_another_reduce_is_refused(name):
    layer, config = make()
    x, weight, adapter, _ = layer.values()
    for made, asked in ((None, double), (double, lambda part: part)):
        known = doraxp.prepare(weight, adapter, config, reduce=made)
        with pytest.raises(ValueError, match=f"{name} must be of the same reduce"):
            doraxp.forward(x, weight, adapter, config, reduce=asked, **{name: known})


@pytest.mark.parametrize("function", ["forward", "prepare"])
def test_a_reduce_that_is_not_callable_is_refused(function):
    layer, config = make()
    x = [layer["x"]] if function == "forward" else []
    with pytest.raises(TypeError, match="reduce must be a callable or None, got 3"):
        getattr(doraxp, function)(*x, layer["weight"], layer["adapter"], config, reduce=3)


@pytest.mark.parametrize(
    "result", [lambda part: None, lambda part: part[1:], lambda part: part.astype("float32")]
)
def test_a_reduce_that_returns_another_kind_of_array_is_an_error(result):
    layer, config = make()
    with pytest.raises(ValueError, match="reduce must return an array of shape"):
        doraxp.prepare(layer["weight"], layer["adapter"], config, reduce=result)


def test_a_bound_method_is_the_same_reduce_each_time():
    """Python makes another object at each look at a method."""

    class OneRank:
        def total(self, part):
            return part + 0

    rng, rank, config = np.random.default_rng(0), OneRank(), Config(2)
    weight, x = rng.standard_normal((7, 6)), rng.standard_normal((5, 6))
    adapter = doraxp.init(weight, config, seed=0)
    prepared = doraxp.prepare(weight, adapter, config, reduce=rank.total)
    y, _ = doraxp.forward(x, weight, adapter, config, prepared=prepared, reduce=rank.total)
    np.testing.assert_allclose(y, x @ weight.T, rtol=1e-12)
