"""decompose, the values of prepare, and the change of magnitude and direction."""

from __future__ import annotations

import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config


@pytest.mark.parametrize(
    ("weight", "magnitude"),
    [
        ([[3.0, 4.0], [0.0, 5.0]], [5.0, 5.0]),
        ([[3.0, 4.0], [5.0, 12.0]], [5.0, 13.0]),
        ([[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0]),
    ],
)
def test_magnitudes_of_examples_with_integer_norms(backend, assert_close, weight, magnitude):
    weight = backend.asarray(np.array(weight))
    actual, _ = backend.run(doraxp.decompose, weight)
    assert_close(actual, np.array(magnitude), rtol=0)
    assert_close(doraxp.init(weight, Config(1), seed=0).magnitude, np.array(magnitude), rtol=0)


@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
@pytest.mark.parametrize("stack", [(), (2, 3)])
def test_magnitude_times_direction_is_the_weight(backend, draw, assert_close, dtype, stack):
    weight = draw(*stack, 7, 6, dtype=dtype)
    magnitude, direction = backend.run(doraxp.decompose, weight)
    compute = "float64" if dtype == "float64" else "float32"
    eps = float(np.finfo(compute).eps)
    wide = backend.numpy(weight).astype(compute)
    assert_close(magnitude, np.linalg.norm(wide, axis=-1), rtol=2 * eps)
    assert_close(magnitude[..., None] * direction, wide, rtol=2 * eps)
    lengths = backend.namespace().sum(direction * direction, axis=-1)
    assert_close(lengths, np.ones((*stack, 7), compute), rtol=4 * eps)


def test_prepared_values_are_the_norm_the_gain_and_the_projection(backend, draw, assert_close):
    weight, config = draw(7, 6), Config(3, 2.0)
    adapter = Adapter(draw(3, 6), draw(7, 3), draw(7))
    w, a, b, m = map(backend.numpy, (weight, *adapter))
    v = w + config.scaling * b @ a
    norm = np.linalg.norm(v, axis=1)
    prepared = backend.run(doraxp.prepare, weight, adapter, config)
    assert_close(prepared.norm, norm, rtol=1e-15)
    assert_close(prepared.gain, m / norm, rtol=1e-15)
    assert_close(prepared.unit_projection, v @ a.T / norm[:, None], rtol=1e-14)
    assert_close(prepared.weight_squares, np.sum(w * w, axis=1), rtol=1e-15)


def test_change_of_magnitude_and_direction(backend, draw, assert_close):
    before, after = draw(2, 7, 6), draw(2, 7, 6)
    change = backend.run(doraxp.magnitude_direction_change, before, after)
    w, v = backend.numpy(before), backend.numpy(after)
    m_before, m_after = np.linalg.norm(w, axis=-1), np.linalg.norm(v, axis=-1)
    magnitude = abs(m_after - m_before)
    direction = 1 - np.sum(w * v, axis=-1) / (m_before * m_after)
    assert_close(change.magnitude_rows, magnitude, rtol=1e-14)
    assert_close(change.direction_rows, direction, rtol=1e-14)
    assert_close(change.magnitude, magnitude.mean(axis=-1), rtol=1e-14)
    assert_close(change.direction, direction.mean(axis=-1), rtol=1e-14)


def test_a_small_turn_keeps_its_digits(backend, assert_close):
    angle = 1e-6  # 1 − cos is 5e-13, below the resolution of 1 in float32
    before = backend.asarray(np.array([[1.0, 0.0]], "float32"))
    after = backend.asarray(np.array([[np.cos(angle), np.sin(angle)]], "float32"))
    change = backend.run(doraxp.magnitude_direction_change, before, after)
    assert_close(change.direction, np.array(angle**2 / 2, "float32"), rtol=1e-6)


def test_rows_of_zeros_have_no_direction_to_change(backend, assert_close):
    zero, row = [0.0, 0.0], [3.0, 4.0]
    before = backend.asarray(np.array([zero, zero, row, row]))
    after = backend.asarray(np.array([zero, row, zero, row]))
    change = backend.run(doraxp.magnitude_direction_change, before, after)
    assert_close(change.direction_rows, np.array([0.0, 1.0, 1.0, 0.0]), rtol=1e-30)
    assert_close(change.magnitude_rows, np.array([0.0, 5.0, 5.0, 0.0]), rtol=0)


def test_scaling_the_magnitude_turns_nothing(backend, draw, assert_close):
    weight, config = draw(7, 6), Config(2)
    adapter = doraxp.init(weight, config, seed=0)
    doubled = doraxp.merge(weight, adapter._replace(magnitude=2 * adapter.magnitude), config)
    change = backend.run(doraxp.magnitude_direction_change, weight, doubled)
    assert_close(change.magnitude_rows, adapter.magnitude, rtol=1e-15)
    assert float(np.max(backend.numpy(change.direction_rows))) < 1e-30


@pytest.mark.uses("NaN")
def test_nan_in_a_row_stays_nan_in_both_forms(backend, draw):
    """A row with NaN must not pass for a row that is too short to have a direction."""
    weight = backend.numpy(draw(7, 6)).copy()
    weight[2, 3] = np.nan
    weight, config = backend.asarray(weight), Config(2, form="direction")
    adapter = doraxp.init(weight, config, seed=0)
    norm = backend.numpy(backend.run(doraxp.prepare, weight, adapter, config).norm)
    np.testing.assert_array_equal(np.isnan(norm), np.arange(7) == 2)


def test_every_leaf_of_the_adapter_widens_the_compute_dtype(backend, draw):
    weight, config = draw(7, 6, dtype="float32"), Config(2)
    adapter = doraxp.init(weight, config, seed=0)
    xp = backend.namespace()
    for name, leaf in adapter._asdict().items():
        wide = adapter._replace(**{name: xp.astype(leaf, xp.float64)})
        assert doraxp.prepare(weight, wide, config).norm.dtype == xp.float64
