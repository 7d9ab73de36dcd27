"""The laws of DoRA, on layers that hypothesis generates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import doraxp
from doraxp import Adapter, Config

# The backend fixture is the same for every example, so hypothesis may share it.
examples = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SHAPES = [(1, 1), (1, 5), (5, 1), (4, 3), (6, 7)]


@st.composite
def layers(draw, *, trained=True):
    """A float64 layer of one of a few shapes (each shape is compiled once on JAX)."""
    out, inner = draw(st.sampled_from(SHAPES))
    rank = draw(st.sampled_from(sorted({1, min(out, inner)})))
    config = Config(
        rank,
        draw(st.sampled_from([None, 0.5, 16.0])),
        rslora=draw(st.booleans()),
        form=draw(st.sampled_from(["weight", "direction"])),
        norm_gradient=draw(st.sampled_from(["exact", "detached"])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = st.sampled_from([1e-6, 1e-2, 1.0, 1e3])
    weight = draw(sizes) * rng.standard_normal((out, inner))
    zero = draw(st.lists(st.integers(0, out - 1), max_size=1))
    weight[zero] = 0
    adapter = Adapter(
        rng.standard_normal((rank, inner)),
        draw(sizes) * rng.standard_normal((out, rank)) if trained else np.zeros((out, rank)),
        rng.standard_normal(out) if trained else np.linalg.norm(weight, axis=1),
    )
    x = rng.standard_normal((draw(st.sampled_from([0, 3])), inner))
    return weight, adapter, config, x


def on(backend, layer):
    weight, adapter, config, x = layer
    adapter = Adapter(*map(backend.asarray, adapter))
    return backend.asarray(weight), adapter, config, backend.asarray(x)


@pytest.fixture
def forward(backend):
    def call(weight, adapter, config, x):
        return backend.numpy(backend.run(doraxp.forward, x, weight, adapter, config)[0])

    return call


@examples
@given(layer=layers())
def test_merge_equals_forward(backend, forward, layer):
    weight, adapter, config, x = on(backend, layer)
    merged = backend.numpy(backend.run(doraxp.merge, weight, adapter, config))
    y = forward(weight, adapter, config, x)
    size = np.linalg.norm(layer[3], axis=1)[:, None] * np.abs(layer[1].magnitude)
    # A row of one number may cancel almost to 0: then its relative rounding error is large.
    assert np.all(np.abs(y - layer[3] @ merged.T) <= 1e-9 * size)


@examples
@given(layer=layers())
def test_rows_of_the_merged_weight_have_the_magnitudes(backend, layer):
    weight, adapter, config, _ = on(backend, layer)
    prepared = doraxp.prepare(weight, adapter, config)
    merged = backend.numpy(backend.run(doraxp.merge, weight, adapter, config))
    alive = backend.numpy(prepared.norm) > 0
    expected = np.where(alive, np.abs(layer[1].magnitude), 0)
    np.testing.assert_allclose(np.linalg.norm(merged, axis=1), expected, rtol=1e-9)


@examples
@given(layer=layers(trained=False))
def test_identity_at_init(backend, layer):
    weight, _, config, _ = on(backend, layer)
    fresh = backend.run(doraxp.init, weight, config, seed=0)
    rtol = 0 if config.form == "weight" else 1e-15
    merged = backend.numpy(backend.run(doraxp.merge, weight, fresh, config))
    np.testing.assert_allclose(merged, layer[0], rtol=4 * rtol, atol=0)


@examples
@given(layer=layers())
def test_decompose_round_trip(backend, layer):
    weight, *_ = on(backend, layer)
    magnitude, direction = backend.run(doraxp.decompose, weight)
    product = backend.numpy(magnitude)[:, None] * backend.numpy(direction)
    np.testing.assert_allclose(product, layer[0], rtol=1e-15, atol=0)


@examples
@given(layer=layers())
def test_form_conversion_keeps_the_weight(backend, layer):
    weight, adapter, config, _ = on(backend, layer)
    target = "direction" if config.form == "weight" else "weight"
    converted = doraxp.convert_form(weight, adapter, config, target)
    before = backend.numpy(doraxp.merge(weight, adapter, config))
    after = backend.numpy(doraxp.merge(weight, *converted))
    size = np.abs(layer[1].magnitude)[:, None]
    assert np.all(np.abs(after - before) <= 1e-9 * size)


@examples
@given(layer=layers(), factor=st.sampled_from([-2.0, 0.5, 4.0]))
def test_scaling_the_magnitude_scales_the_output(backend, forward, layer, factor):
    weight, adapter, config, x = on(backend, layer)
    scaled = adapter._replace(magnitude=factor * adapter.magnitude)
    y, y_scaled = (forward(weight, a, config, x) for a in (adapter, scaled))
    np.testing.assert_array_equal(y_scaled, factor * y)  # powers of two


@examples
@given(layer=layers(), seed=st.integers(0, 9))
def test_permuting_rows_permutes_outputs(backend, forward, layer, seed):
    weight, adapter, config, x = layer
    order = np.random.default_rng(seed).permutation(len(weight))
    permuted = adapter._replace(lora_b=adapter.lora_b[order], magnitude=adapter.magnitude[order])
    y = forward(*on(backend, layer))
    y_permuted = forward(*on(backend, (weight[order], permuted, config, x)))
    size = np.linalg.norm(x, axis=1)[:, None] * np.abs(adapter.magnitude[order])
    assert np.all(np.abs(y_permuted - y[:, order]) <= 1e-9 * size)


@examples
@given(layer=layers())
def test_the_detached_gradient_of_the_magnitude_is_the_exact_one(backend, layer):
    weight, adapter, config, x = on(backend, layer)
    grads = []
    for norm_gradient in ("exact", "detached"):
        other = Config(config.rank, config.alpha, form=config.form, norm_gradient=norm_gradient)
        y, cache = doraxp.forward(x, weight, adapter, other)
        grads.append(doraxp.backward(y, cache))
    exact, detached = grads
    np.testing.assert_array_equal(
        *map(backend.numpy, (exact.adapter.magnitude, detached.adapter.magnitude))
    )
    # dx is the same sum in both, but BLAS may add in another order.
    gain = np.abs(backend.numpy(cache.prepared.gain))
    w, a, b = (np.abs(backend.numpy(array)) for array in (weight, *adapter[:2]))
    if config.form == "direction":
        w = w / np.where(w.any(axis=1), np.linalg.norm(w, axis=1), 1.0)[:, None]
    terms = (gain * np.abs(backend.numpy(y))) @ (w + abs(config.scaling) * b @ a)
    difference = np.abs(backend.numpy(exact.x) - backend.numpy(detached.x))
    assert np.all(difference <= 1e-14 * terms)
