"""How many launches each public call takes on a GPU, and how many bytes of arrays these are given.

A launch costs a few microseconds on the host and on the device. Large arrays cost their bytes.
"""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config, backends
from doraxp.backends import operations

pytestmark = pytest.mark.lanes("cuda-host")
OUT, INNER, TOKENS = 96, 160, 80
STEP, NORM, MERGE, TOKEN = 14, 3, 2, 2
PAGE = Path(__file__).parents[1] / "docs" / "howto" / "backends" / "cupy-kernels.md"


@pytest.fixture
def layer(backend, dtype):
    rng = np.random.default_rng(0)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype

    def made(rank, form, tokens=TOKENS):
        wide = "float64" if dtype == "float64" else "float32"
        weight, x, dy = (
            backend.asarray(rng.standard_normal(shape).astype(kind))
            for shape in ((OUT, INNER), (tokens, INNER), (tokens, OUT))
        )
        shapes = (rank, INNER), (OUT, rank), (OUT,)
        leaves = (0.1 * rng.standard_normal(shape) for shape in shapes)
        adapter = Adapter(*(backend.asarray(leaf.astype(wide)) for leaf in leaves))
        return weight, adapter, Config(rank, form=form), x, dy

    return made


@pytest.fixture
def counted(backend):
    """Return a function that calls another and returns its launches and their bytes."""

    def count(function, *args, **kwargs):
        cuda = operations(weight=backend.asarray(np.ones((1, 1), "float32"))).cuda
        cuda.launched.clear()
        cuda.moved.clear()
        backend.run(function, *args, **kwargs)
        return list(cuda.launched), sum(cuda.moved)

    return count


def step(x, dy, weight, adapter, config, previous):
    _, cache = doraxp.forward(x, weight, adapter, config, previous=previous)
    return doraxp.backward(dy, cache)


@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("rank", [3, 40])
class TestLaunches:
    def test_step(self, layer, counted, form, rank):
        weight, adapter, config, x, dy = layer(rank, form)
        previous = doraxp.prepare(weight, adapter, config)
        launched, _ = counted(step, x, dy, weight, adapter, config, previous)
        assert len(launched) <= STEP, launched

    def test_norm(self, layer, counted, form, rank):
        weight, adapter, config, *_ = layer(rank, form)
        previous = doraxp.prepare(weight, adapter, config)
        launched, _ = counted(doraxp.prepare, weight, adapter, config, previous=previous)
        assert len(launched) <= NORM, launched

    def test_merge(self, layer, counted, form, rank):
        weight, adapter, config, *_ = layer(rank, form)
        prepared = doraxp.prepare(weight, adapter, config)
        launched, _ = counted(doraxp.merge, weight, adapter, config, prepared=prepared)
        assert len(launched) <= MERGE, launched

    def test_one_token(self, layer, counted, form, rank):
        weight, adapter, config, x, _ = layer(rank, form, tokens=1)
        prepared = doraxp.prepare(weight, adapter, config)
        launched, _ = counted(doraxp.forward, x, weight, adapter, config, prepared=prepared)
        assert len(launched) <= TOKEN, launched


def rows_of_the_page(pattern):
    return re.findall(pattern, PAGE.read_text("utf-8"), re.MULTILINE)


@pytest.mark.dtypes("float16", "bfloat16")
@pytest.mark.parametrize("form", ["weight", "direction"])
def test_a_step_has_the_launches_of_the_page_in_their_order(layer, counted, form):
    weight, adapter, config, x, dy = layer(16, form)
    previous = doraxp.prepare(weight, adapter, config)
    launched, _ = counted(step, x, dy, weight, adapter, config, previous)
    listed = rows_of_the_page(r"^\| \d+ \| `?(\w+)`? \|")
    assert launched == [name.replace("product", "gemm") for name in listed]


STEPS = {
    "step, 16 bits, rank ≤ 32 / ≤ 64 / above": [("bfloat16", rank) for rank in (32, 64, 65)],
    "step, float32, rank ≤ 64 / above": [("float32", rank) for rank in (64, 65)],
}


@pytest.mark.dtypes("bfloat16", "float32")
@pytest.mark.parametrize("row", STEPS)
def test_a_step_takes_as_many_launches_as_the_page_says(layer, counted, dtype, row):
    (said,) = rows_of_the_page(rf"^\| {row} \| ([\d /]+) \|$")
    for (kind, rank), count in zip(STEPS[row], said.split(" / "), strict=True):
        if kind == dtype:
            weight, adapter, config, x, dy = layer(rank, "weight")
            previous = doraxp.prepare(weight, adapter, config)
            launched, _ = counted(step, x, dy, weight, adapter, config, previous)
            assert len(launched) == int(count), launched


@pytest.mark.dtypes("bfloat16", "float32")
def test_other_calls_take_as_many_launches_as_the_page_says(layer, counted, dtype):
    def said(call):
        (row,) = rows_of_the_page(rf"^\| {call} \| ([\d /]+) \|$")
        return [int(count) for count in row.split(" / ")]

    def launches(function, *args, **kwargs):
        return len(counted(function, *args, **kwargs)[0])

    low = dtype == "bfloat16"
    weight, adapter, config, x, dy = layer(16, "weight")
    known = doraxp.prepare(weight, adapter, config)
    _, cache = doraxp.forward(x, weight, adapter, config, prepared=known)
    norms = said("norm, ‖w‖² known, 16 bits and rank ≤ 32 / else, rank ≤ 64")
    assert launches(doraxp.backward, dy, cache) == said("backward, 16 bits / float32")[not low]
    assert launches(doraxp.prepare, weight, adapter, config, previous=known) == norms[not low]
    layers = [layer(16, form)[:3] for form in ("weight", "direction")]
    squares = [
        launches(doraxp.prepare, *each)
        - launches(doraxp.prepare, *each, previous=doraxp.prepare(*each))
        for each in layers
    ]
    assert squares == said("‖w‖², if it is not known: weight form / direction form")
    merges = (
        launches(doraxp.merge, weight, adapter, config, prepared=known),
        launches(doraxp.merge, weight, adapter, config),
    )
    assert [*merges] == said("merge, n known / from nothing, weight form, rank ≤ 64")
    assert [launches(doraxp.forward, x, weight, adapter, config, prepared=known)] == said(
        "forward with `prepared`"
    )
    if low:
        with backends.exact_products():
            exact = launches(step, x, dy, weight, adapter, config, known)
        assert [exact] == said("step, 16 bits, within `exact_products`, rank 16")


@pytest.mark.dtypes("bfloat16")
def test_a_step_of_adamw_takes_one_launch(layer, counted):
    _, adapter, *_ = layer(3, "weight")
    params = {str(number): adapter for number in range(8)}
    state = doraxp.adamw_init(params)
    launched, _ = counted(doraxp.adamw_step, params, params, state, learning_rate=0.1)
    assert launched == ["adamw"]


@pytest.mark.dtypes("float16", "bfloat16")
@pytest.mark.parametrize("rank", [3, 40])
class TestBytes:
    """The bytes of the 16-bit arrays that each launch is given. All others are as narrow as a rank.

    An array counts once for each launch that takes it, however often the launch reads it, and twice
    if a product is added to it. So this is what memory moves only where a launch reads an array
    once, or finds it in the cache the other times.
    """

    def test_step(self, layer, counted, rank):
        weight, adapter, config, x, dy = layer(rank, "weight")
        previous = doraxp.prepare(weight, adapter, config)
        _, moved = counted(step, x, dy, weight, adapter, config, previous)
        # W    the norm, two large products, dA
        # x    L, its product, dA; and dx: written as C, added to, which reads and writes it
        # z    as C, added to, the pass to y, the pass from dy; y; dy; dz: written, multiplied
        assert moved == 4 * weight.nbytes + 6 * x.nbytes + 9 * dy.nbytes

    def test_norm_and_merge(self, layer, counted, rank):
        weight, adapter, config, *_ = layer(rank, "weight")
        previous = doraxp.prepare(weight, adapter, config)
        _, moved = counted(doraxp.prepare, weight, adapter, config, previous=previous)
        assert moved == weight.nbytes
        _, moved = counted(doraxp.merge, weight, adapter, config, prepared=previous)
        assert moved == 2 * weight.nbytes  # W and W'
        _, moved = counted(doraxp.merge, weight, adapter, config)
        assert moved == 3 * weight.nbytes  # W for n, W, and W'

    def test_one_token(self, layer, counted, rank):
        weight, adapter, config, x, dy = layer(rank, "weight", tokens=1)
        prepared = doraxp.prepare(weight, adapter, config)
        _, moved = counted(doraxp.forward, x, weight, adapter, config, prepared=prepared)
        assert moved == weight.nbytes + 2 * x.nbytes + 2 * dy.nbytes  # x for L and for z; z and y
