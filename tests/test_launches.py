"""How many launches each public call takes on a GPU, and how many bytes of arrays these are given.

A launch costs a few microseconds on the host and on the device. Large arrays cost their bytes.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config
from doraxp.backends import operations

pytestmark = pytest.mark.lanes("cuda-host")
OUT, INNER, TOKENS = 96, 160, 80
STEP, NORM, MERGE, TOKEN = 14, 3, 2, 2


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
