"""`reduced_precision`: TF32 for float32 layers on CuPy. Its errors, and that its block ends."""

from __future__ import annotations

import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config
from doraxp.backends import reduced_precision

ROUNDOFF = 2.0**-11
"""Of TF32, which has 10 bits after the leading one."""


def results(backend, config, layer):
    """Return y and all gradients."""

    def step(x, weight, adapter, dy):
        y, cache = doraxp.forward(x, weight, adapter, config, bias=adapter.magnitude)
        gradients = doraxp.backward(dy, cache, train_base=True)
        return y, gradients.x, *gradients.adapter, gradients.weight, gradients.bias

    return backend.run(step, *layer)


@pytest.fixture
def layer(draw):
    """Function that draws x, W, the adapter and dy."""

    def draw_layer(dtype):
        shapes = (5, 6), (7, 6), (3, 6), (7, 3), (7,), (5, 7)
        x, weight, *adapter, dy = (draw(*shape, dtype=dtype) for shape in shapes)
        return x, weight, Adapter(*adapter), dy

    return draw_layer


@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("cancels", [False, True])
def test_errors_are_as_small_as_if_each_factor_were_rounded_once(
    backend, layer, assert_close, form, cancels
):
    """At most eight rounded factors are on the way to a number: four by z or dz, and four by n."""
    # For a row that cancels, the exact dB is a small difference with a large relative error.
    config = Config(3, form=form, norm_gradient="detached" if cancels else "exact")
    x, weight, adapter, dy = layer("float32")
    if cancels:  # one row of V is a few hundredths of its terms
        a, values = (backend.numpy(array).astype("float64") for array in (adapter.lora_a, weight))
        b = backend.numpy(adapter.lora_b).copy()
        row = b[2].astype("float64") @ a
        values[2] = -0.97 * row
        if form == "direction":
            b[2] /= np.linalg.norm(values[2])
        weight = backend.asarray(values.astype(backend.numpy(weight).dtype))
        m = backend.numpy(adapter.magnitude).copy()
        m[2] = 0.03  # as after training: its gain is about 1
        adapter = adapter._replace(lora_b=backend.asarray(b), magnitude=backend.asarray(m))

    drawn = x, weight, adapter, dy
    expected = results(backend, config, drawn)
    with reduced_precision():
        actual = results(backend, config, drawn)
    again = results(backend, config, drawn)
    for one, other, third in zip(actual, expected, again, strict=True):
        assert_close(one, other, rtol=8 * ROUNDOFF)
        assert_close(third, other, rtol=0)


@pytest.mark.lanes("cuda-host", "cupy")
def test_it_rounds_the_factors_of_a_float32_layer(backend, layer):
    drawn = layer("float32")
    exact = results(backend, Config(3), drawn)
    with reduced_precision():
        rounded = results(backend, Config(3), drawn)
    *others, (dbias, same) = zip(rounded, exact, strict=True)
    assert all(np.any(backend.numpy(one) != backend.numpy(other)) for one, other in others)
    assert np.all(backend.numpy(dbias) == backend.numpy(same))  # a sum without products


@pytest.mark.dtypes("float64")
def test_it_does_not_change_a_float64_layer(backend, layer, assert_close, dtype):
    drawn = layer(dtype)
    exact = results(backend, Config(3), drawn)
    with reduced_precision():
        for one, other in zip(results(backend, Config(3), drawn), exact, strict=True):
            assert_close(one, other, rtol=0)


@pytest.mark.lanes("numpy", "strict", "torch", "jax", "dask")
def test_it_does_not_change_other_libraries(backend, layer, assert_close):
    drawn = layer("float32")
    exact = results(backend, Config(3), drawn)
    with reduced_precision():
        for one, other in zip(results(backend, Config(3), drawn), exact, strict=True):
            assert_close(one, other, rtol=0)
