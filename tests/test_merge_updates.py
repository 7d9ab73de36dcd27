"""Updates of other kinds in the core: their rows, and their merge into a weight of any kind."""

from __future__ import annotations

import re

import numpy as np
import pytest

import doraxp
from doraxp import (
    Adapter,
    Config,
    Difference,
    Hadamard,
    Kronecker,
    LayerKind,
    LowRank,
    UpdateAdapter,
)

OUT, IN = 12, 10
S = 1.5
CONFIG = Config(2, 3.0)
KINDS = {
    "linear": (LayerKind(), (OUT, IN)),
    "transposed": (LayerKind("transposed"), (OUT, IN)),
    "columns": (LayerKind("columns"), (OUT, IN)),
    "conv": (LayerKind("conv"), (OUT, 5, 2)),
    "grouped": (LayerKind("conv", groups=3), (OUT, 5, 2)),
    "columns of a convolution": (LayerKind("columns"), (OUT, 5, 2, 1)),
}
"""Weights of OUT · IN numbers, as they are stored."""


def low_rank(draw, rank=2, out=OUT, inner=IN):
    a, b = draw(rank, inner), draw(out, rank)
    return LowRank(a, b)


UPDATES = {
    "LowRank": low_rank,
    "Hadamard": lambda draw: Hadamard(low_rank(draw), low_rank(draw, 3)),
    "Kronecker": lambda draw: Kronecker(draw(4, 5), low_rank(draw, 1, 3, 2)),
    "Kronecker of a whole side": lambda draw: Kronecker(draw(2, 1), Difference(draw(6, 10))),
    "Difference": lambda draw: Difference(draw(OUT, IN)),
}


def whole(update, numpy):
    """ΔW by the dense formula."""
    if isinstance(update, LowRank):
        return numpy(update.lora_b) @ numpy(update.lora_a)
    if isinstance(update, Hadamard):
        return whole(update.first, numpy) * whole(update.second, numpy)
    if isinstance(update, Kronecker):
        return np.kron(numpy(update.left), whole(update.right, numpy))
    return numpy(update.difference)


@pytest.fixture(params=UPDATES)
def update(request, draw):
    return UPDATES[request.param](draw)


@pytest.mark.parametrize("rows", [(0, OUT), (0, 1), (2, 7), (5, 6), (7, OUT)])
def test_rows_are_those_of_the_whole_update(backend, assert_close, update, rows):
    assert tuple(update.shape) == (OUT, IN)
    desired = whole(update, backend.numpy)[slice(*rows)]
    assert_close(update.rows(slice(*rows)), desired, rtol=1e-15)


def test_a_factor_scales_every_row(backend, assert_close, update):
    desired = -2.5 * whole(update, backend.numpy)
    assert_close(update.scaled(-2.5).rows(slice(0, OUT)), desired, rtol=1e-15)


def test_mapped_takes_every_array_once(backend, assert_close, update):
    seen = []
    halved = update.mapped(lambda array: seen.append(array) or 0.5 * array)
    powers = {2: 2, 4: 4, 3: 3, 1: 1}[len(seen)]  # ΔW is a product of all arrays
    assert_close(halved.rows(slice(0, OUT)), 0.5**powers * whole(update, backend.numpy), rtol=1e-14)


@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("name", KINDS)
def test_merge_is_the_dense_formula(backend, draw, assert_close, update, name, form):
    kind, shape = KINDS[name]
    weight, config = draw(*shape), Config(2, 3.0, form=form)
    rows = kind.matrix_shape(shape)[:-1]
    m = draw(*rows)
    w, delta = backend.numpy(weight), whole(update, backend.numpy).reshape(shape)
    axes = {"conv": (1, 2), "linear": (1,)}.get(kind.name, (0, *range(2, len(shape))))
    if form == "direction":
        w = w / np.sqrt(np.sum(w * w, axis=axes, keepdims=True))
    v = w + S * delta
    norm = np.sqrt(np.sum(v * v, axis=axes, keepdims=True))
    desired = backend.numpy(m).reshape(norm.shape) * v / norm
    merged = doraxp.merge(weight, UpdateAdapter(update, m), config, kind=kind)
    assert_close(merged, desired, rtol=1e-13)


@pytest.mark.parametrize("name", KINDS)
def test_without_a_magnitude_the_update_is_added(backend, draw, assert_close, update, name):
    kind, shape = KINDS[name]
    weight = draw(*shape)
    desired = backend.numpy(weight) + S * whole(update, backend.numpy).reshape(shape)
    merged = doraxp.merge(weight, UpdateAdapter(update), CONFIG, kind=kind)
    assert_close(merged, desired, rtol=1e-14)


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_of_a_kind_is_that_of_its_matrix(backend, draw, assert_close, name):
    kind, shape = KINDS[name]
    weight = draw(*shape)
    *stack, out, inner = kind.matrix_shape(shape)
    adapter = Adapter(draw(*stack, 2, inner), draw(*stack, out, 2), draw(*stack, out))
    desired = doraxp.merge(kind.matrix(weight), adapter, CONFIG)
    merged = doraxp.merge(weight, adapter, CONFIG, kind=kind)
    assert_close(merged, kind.restore(desired, shape), rtol=0)
    magnitude, direction = doraxp.decompose(weight, kind=kind)
    m, unit = doraxp.decompose(kind.matrix(weight))
    assert_close(magnitude, m, rtol=0)
    assert_close(direction, kind.restore(unit, shape), rtol=0)


@pytest.mark.dtypes("float16", "bfloat16", "float32")
def test_a_narrow_weight_is_merged_in_float32(backend, draw, assert_close, dtype):
    weight, update = draw(OUT, IN, dtype=dtype), low_rank(draw)
    narrow = update.mapped(lambda array: backend.asarray(backend.numpy(array).astype("float32")))
    merged = doraxp.merge(weight, UpdateAdapter(narrow), CONFIG)
    assert merged.dtype == weight.dtype
    wide = backend.numpy(weight).astype("float32") + np.float32(S) * whole(narrow, backend.numpy)
    rounded = wide.astype(backend.numpy(weight).dtype)
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-22}[dtype]
    assert_close(merged, rounded, rtol=eps)


def test_a_row_whose_norm_is_0_is_merged_to_0(backend, draw, assert_close):
    delta = backend.numpy(draw(OUT, IN)).copy()
    weight = -S * delta
    weight[1:] += 1
    update = UpdateAdapter(Difference(backend.asarray(delta)), draw(OUT))
    merged = doraxp.merge(backend.asarray(weight), update, CONFIG)
    assert_close(merged[:1, :], np.zeros((1, IN)), rtol=0)


@pytest.mark.parametrize(
    ("shape", "m", "form", "message"),
    [
        ((OUT, IN + 1), OUT, "weight", "must have shape (12, 11), got (12, 10)"),
        ((IN, OUT), IN, "weight", "must have shape (10, 12), got (12, 10)"),
        ((OUT, IN), OUT - 1, "weight", "a number for each of 12 rows, got shape (11,)"),
        ((OUT, IN), None, "direction", "of the direction form must have a magnitude, got None"),
    ],
)
def test_an_update_or_a_magnitude_that_does_not_fit_is_refused(shape, m, form, message):
    update = Difference(np.ones((OUT, IN)))
    adapter = UpdateAdapter(update, None if m is None else np.ones(m))
    with pytest.raises(ValueError, match=re.escape(message)):
        doraxp.merge(np.ones(shape), adapter, Config(2, form=form))
