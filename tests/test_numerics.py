"""Rows and dtypes that break other implementations: cancelling, zero, tiny, huge, few."""

from __future__ import annotations

import numpy as np
import pytest
import reference

import doraxp
from doraxp import Adapter, Config
from doraxp.backends._generic import CANCELLATION, in_range

FORMS = ("weight", "direction")


def dense(layer, x, dy, asarray, xp):
    """Return the results of DoRA with V stored, as in PEFT, but with exact gradients."""
    w, a, b, m, x, dy = (asarray(array) for array in (*layer[:4], x, dy))
    s = layer.scaling
    if layer.form == "direction":
        w = w / xp.sqrt(xp.sum(w * w, axis=1))[..., None]
    v = w + s * (b @ a)
    n = xp.sqrt(xp.sum(v * v, axis=1))
    z = x @ xp.matrix_transpose(v)
    g = m / n
    dz = g * dy
    dm = xp.sum(dy * z, axis=0) / n
    dv = xp.matrix_transpose(dz) @ x - (g * dm / n)[..., None] * v
    return {
        "norm": n,
        "y": g * z,
        "x": dz @ v,
        "lora_a": s * (xp.matrix_transpose(b) @ dv),
        "lora_b": s * (dv @ xp.matrix_transpose(a)),
        "magnitude": dm,
    }


def dense_exact(layer, x, dy):
    return dense(layer, x, dy, lambda array: np.asarray(array, "float64"), np)


def cancelling_layer(ratio, rows, config, rng, *, out=96, inner=128):
    """A float32 layer where ‖V‖/‖W‖ is about `ratio` in `rows`, and about 1 in the other rows."""
    a = (rng.standard_normal((config.rank, inner)) / np.sqrt(inner)).astype("float32")
    b = rng.standard_normal((out, config.rank)).astype("float32")
    update = config.scaling * b.astype("float64") @ a
    rest = rng.standard_normal((out, inner))
    rest *= np.linalg.norm(update, axis=1, keepdims=True) / np.linalg.norm(
        rest, axis=1, keepdims=True
    )
    weight = rest.copy()
    weight[rows] = ratio * rest[rows] - update[rows]
    if config.form == "direction":
        lengths = np.linalg.norm(weight, axis=1, keepdims=True)
        b /= lengths.astype("float32")  # V is (W + s B A) / ‖W‖: the same rows cancel
    weight = weight.astype("float32")
    magnitude = np.linalg.norm(weight, axis=1).astype("float32")
    return reference.Layer(weight, a, b, magnitude, config.scaling, config.form)


def error(actual, exact):
    return float(np.max(np.abs(np.asarray(actual, "float64") - exact)) / np.max(np.abs(exact)))


@pytest.mark.parametrize(
    "rows", [slice(None), slice(3, 4), slice(0, 96, 2)], ids=["all", "one", "half"]
)
@pytest.mark.parametrize("ratio", [1.0, 0.3, 0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("form", FORMS)
def test_cancelling_rows_lose_no_more_than_the_dense_way(backend, form, ratio, rows):
    """For ‖V‖/‖W‖ down to 1e-3, no error is above 4 times that of the dense float32 way."""
    rng = np.random.default_rng(5)
    config = Config(6, 12.0, form=form)
    layer = cancelling_layer(ratio, rows, config, rng)
    x = rng.standard_normal((5, 128)).astype("float32")
    dy = rng.standard_normal((5, 96)).astype("float32")
    exact = dense_exact(layer, x, dy)
    plain = dense(layer, x, dy, backend.asarray, backend.namespace())

    weight, *leaves = map(backend.asarray, layer[:4])
    prepared = backend.run(doraxp.prepare, weight, Adapter(*leaves), config)
    y, cache = backend.run(doraxp.forward, backend.asarray(x), weight, Adapter(*leaves), config)
    grads = backend.run(doraxp.backward, backend.asarray(dy), cache)
    actual = {"norm": prepared.norm, "y": y, "x": grads.x, **grads.adapter._asdict()}
    for name, array in actual.items():
        bound = 4 * error(backend.numpy(plain[name]), exact[name])
        assert error(backend.numpy(array), exact[name]) <= bound, name


def test_the_dense_way_in_float64_equals_the_oracle():
    rng = np.random.default_rng(5)
    layer = cancelling_layer(0.1, slice(0, 2), Config(2), rng, out=4, inner=5)
    x, dy = rng.standard_normal((3, 5)), rng.standard_normal((3, 4))
    expected = reference.solve(layer, x, np.zeros(4), dy, "exact")
    for name, array in dense_exact(layer, x, dy).items():
        np.testing.assert_allclose(array, getattr(expected, name), rtol=1e-12)


def test_nearly_dependent_rows_of_a_are_noticed(backend):
    """B A itself cancels if the rows of A are nearly equal and the entries of B opposite."""
    rng = np.random.default_rng(7)
    row = rng.standard_normal(64)
    a = np.stack([row, row + 1e-4 * rng.standard_normal(64)]).astype("float32")
    b = (100 * np.array([[1.0, -1.0]] * 8) * rng.uniform(0.5, 2, (8, 1))).astype("float32")
    weight = (1e-2 * rng.standard_normal((8, 64))).astype("float32")
    layer = reference.Layer(weight, a, b, np.ones(8, "float32"), 1.0, "weight")
    x, dy = (rng.standard_normal(shape).astype("float32") for shape in ((3, 64), (3, 8)))
    exact = dense_exact(layer, x, dy)
    plain = dense(layer, x, dy, backend.asarray, backend.namespace())
    adapter = Adapter(*map(backend.asarray, layer[1:4]))
    prepared = backend.run(doraxp.prepare, backend.asarray(weight), adapter, Config(2))
    bound = 4 * error(backend.numpy(plain["norm"]), exact["norm"])
    assert error(backend.numpy(prepared.norm), exact["norm"]) <= bound


def nearly_dependent_layer(rank, share, rng, *, out=256, inner=320):
    """V = W + A_0 − A_1 with A_1 near A_0, ‖A_0‖ = share ‖w‖, and other rows of A far shorter."""
    a = 1e-3 * rng.standard_normal((rank, inner))
    a[0] = share * rng.standard_normal(inner)
    a[1] = a[0] + 1e-2 * rng.standard_normal(inner)
    b = np.zeros((out, rank))
    b[:, 0], b[:, 1] = 1, -1
    weight = rng.standard_normal((out, inner))
    arrays = (array.astype("float32") for array in (weight, a, b, np.ones(out)))
    return reference.Layer(*arrays, 1.0, "weight")


@pytest.mark.parametrize(("rank", "times"), [(2, 0.75), (8, 0.45), (64, 0.3), (256, 0.3)])
def test_two_nearly_dependent_rows_of_a_lose_as_little_at_every_rank(backend, rank, times):
    """They are `times` √rank as long as a row of W. No error is above 4 times the dense one."""
    rng = np.random.default_rng(1)
    layer = nearly_dependent_layer(rank, times * rank**0.5, rng)
    x, dy = (rng.standard_normal((8, size)).astype("float32") for size in (320, 256))
    exact = dense_exact(layer, x, dy)
    plain = dense(layer, x, dy, backend.asarray, backend.namespace())
    adapter = Adapter(*map(backend.asarray, layer[1:4]))
    weight, config = backend.asarray(layer.weight), Config(rank)
    y, cache = backend.run(doraxp.forward, backend.asarray(x), weight, adapter, config)
    grads = backend.run(doraxp.backward, backend.asarray(dy), cache)
    actual = {"norm": cache.prepared.norm, "y": y, "x": grads.x, **grads.adapter._asdict()}
    for name, array in actual.items():
        bound = 4 * error(backend.numpy(plain[name]), exact[name])
        assert error(backend.numpy(array), exact[name]) <= bound, name


@pytest.mark.parametrize(
    ("tokens", "out", "block"), [(100_001, 2, 2**18), (100_001, 2, 8), (4133, 64, 2**18)]
)
def test_sums_over_tokens_lose_no_more_than_the_dense_way(backend, monkeypatch, tokens, out, block):
    """The dense way has dm from dyᵀ x. A chain of 100,000 numbers would lose 100 times as much."""
    monkeypatch.setattr("doraxp.backends._numpy.CACHE_BLOCK", block)
    rng = np.random.default_rng(0)
    weight, x = (rng.standard_normal((size, 8)).astype("float32") for size in (out, tokens))
    bias, config = np.zeros(out, "float32"), Config(1)
    put = backend.asarray
    adapter = backend.run(doraxp.init, put(weight), config, seed=0)
    y, cache = backend.run(doraxp.forward, put(x), put(weight), adapter, config, bias=put(bias))
    dy = np.abs(backend.numpy(y))
    grads = backend.run(doraxp.backward, put(dy), cache, train_base=True)

    def dense(dtype):
        w, x_, d = (array.astype(dtype) for array in (weight, x, dy))
        return np.sum((d.T @ x_) * (w / np.linalg.norm(w, axis=1, keepdims=True)), axis=1)

    bound = 4 * error(dense("float32"), dense("float64"))
    assert error(backend.numpy(grads.adapter.magnitude), dense("float64")) <= bound
    exact = np.sum(dy, axis=0, dtype="float64")
    assert error(backend.numpy(grads.bias), exact) <= 8 * 2.0**-24


@pytest.mark.parametrize("inner", [3, 300])
def test_a_row_is_measured_if_its_squares_may_have_lost_digits(inner):
    """Each square may lose the least normal number, so the bound grows with their number."""
    info, config = np.finfo("float32"), Config(1)
    least = inner * info.smallest_normal / info.eps
    lengths = np.sqrt(np.array([0.9, 2.2]) * least / inner)
    weight = np.repeat(lengths[:, None], inner, axis=1).astype("float32")
    squares = np.sum(weight * weight, axis=1)
    assert in_range(squares, inner, xp=np).tolist() == [False, True]
    (patch,) = doraxp.prepare(weight, doraxp.init(weight, config, seed=0), config).direction.patches
    assert patch.rows.tolist() == [0]


def test_only_suspect_rows_are_stored():
    """On NumPy the guard stores the rows of V that cancel, and no others."""
    rng = np.random.default_rng(5)
    config = Config(6, 12.0)
    for rows, expected in ([], []), ([3, 90], [3, 90]):
        layer = cancelling_layer(1e-2, rows, config, rng)
        prepared = doraxp.prepare(layer.weight, Adapter(*layer[1:4]), config)
        patches = getattr(prepared.direction, "patches", ())
        assert [row for patch in patches for row in patch.rows] == expected
    assert 0 < CANCELLATION < 1


@pytest.mark.dtypes("float32", "float64")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_zero_row_gives_its_bias_and_no_gradient(
    backend, draw, assert_close, form, norm_gradient, trained, dtype
):
    config = Config(2, form=form, norm_gradient=norm_gradient)
    values = backend.numpy(draw(7, 6, dtype=dtype)).copy()
    values[2] = 0
    weight, x, bias, dy = (
        backend.asarray(values),
        *(draw(*shape, dtype=dtype) for shape in ((5, 6), (7,), (5, 7))),
    )
    adapter = doraxp.init(weight, config, seed=0)
    if trained:
        b = backend.numpy(draw(7, 2, dtype=dtype)).copy()
        b[2] = 0
        adapter = adapter._replace(lora_b=backend.asarray(b))
    y, cache = backend.run(doraxp.forward, x, weight, adapter, config, bias=bias)
    grads = backend.run(doraxp.backward, dy, cache, train_base=True)
    merged = backend.run(doraxp.merge, weight, adapter, config)
    assert_close(y[:, 2], np.full(5, backend.numpy(bias)[2]), rtol=0)
    for array in (merged, grads.adapter.lora_b, grads.weight):
        assert_close(array[2, ...], np.zeros(array.shape[1], dtype), rtol=0)
    assert float(grads.adapter.magnitude[2]) == 0
    for array in (y, merged, grads.x, *grads.adapter, grads.weight, grads.bias):
        assert np.all(np.isfinite(backend.numpy(array)))


def test_a_row_that_cancels_to_zero_gives_its_bias(backend, assert_close):
    """V = 0, although W and B A are not 0."""
    row = np.array([3.0, 4.0, 0.0, 0.0])
    weight = backend.asarray(np.stack([row, np.arange(4.0)]))
    b, m = np.array([[-1.0], [0.0]]), np.array([5.0, 1.0])
    adapter = Adapter(*map(backend.asarray, (row[None, :], b, m)))
    x, dy = backend.asarray(np.ones((3, 4))), backend.asarray(np.ones((3, 2)))
    y, cache = backend.run(doraxp.forward, x, weight, adapter, Config(1))
    grads = backend.run(doraxp.backward, dy, cache)
    assert float(cache.prepared.norm[0]) == 0
    assert_close(y[:, 0], np.zeros(3), rtol=0)
    assert float(grads.adapter.lora_b[0, 0]) == float(grads.adapter.magnitude[0]) == 0
    assert np.all(np.isfinite(backend.numpy(grads.x)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_rows_beyond_the_range_of_squares(backend, form, size):
    """Squares overflow or underflow float32 here. Norms, outputs and gradients do not."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((7, 6)).astype("float32")
    rows[::2] *= np.float32(size)
    rows[1] /= np.float32(size)
    weight, config = backend.asarray(rows), Config(2, form=form)
    adapter = backend.run(doraxp.init, weight, config, seed=0)
    x, dy = np.eye(6, dtype="float32"), np.ones((6, 7), "float32")
    y, cache = backend.run(doraxp.forward, backend.asarray(x), weight, adapter, config)
    grads = backend.run(doraxp.backward, backend.asarray(dy), cache)
    layer = reference.Layer(rows, *map(backend.numpy, adapter), 1.0, form)
    expected = reference.solve(layer, x, np.zeros(7), dy, "exact")
    # The exact gradient of B is a difference, of which the detached gradient is one term.
    parts = reference.solve(layer, x, np.zeros(7), dy, "detached").lora_b
    actual = (adapter.magnitude, y, grads.adapter.lora_b)
    magnitude, y, db = (backend.numpy(array).astype("float64") for array in actual)
    lengths = [reference.length(row) for row in rows]
    np.testing.assert_allclose(magnitude, lengths, rtol=4e-7)
    for i in range(7):  # each row alone: their sizes differ by thirty orders of magnitude
        assert error(y[:, i], expected.y[:, i]) <= 1e-6
        assert np.max(abs(db[i] - expected.lora_b[i])) <= 1e-6 * np.max(abs(parts[i]))


@pytest.mark.parametrize("form", FORMS)
def test_a_denormal_row_is_the_base_product_or_zero_and_never_nan(backend, form):
    """NumPy keeps numbers below 1.2e-38, XLA flushes them to zero, and 1/‖w‖ overflows."""
    rows = np.random.default_rng(3).standard_normal((7, 6)).astype("float32")
    rows[::2] *= np.float32(1e-42)
    weight, config = backend.asarray(rows), Config(2, form=form)
    adapter = backend.run(doraxp.init, weight, config, seed=0)
    x = backend.asarray(np.eye(6, dtype="float32"))
    y, cache = backend.run(doraxp.forward, x, weight, adapter, config)
    grads = backend.run(doraxp.backward, y, cache, train_base=True)
    values = backend.numpy(y)
    assert np.max(abs(values[:, ::2] - rows[::2].T)) <= np.max(abs(rows[::2]))
    np.testing.assert_allclose(values[:, 1::2], rows[1::2].T, rtol=1e-6)
    for array in (grads.x, *grads.adapter, grads.weight):
        assert np.all(np.isfinite(backend.numpy(array)))


def test_a_denormal_row_keeps_its_digits_on_numpy():
    rows = np.random.default_rng(3).standard_normal((7, 6)).astype("float32") * np.float32(1e-42)
    config = Config(2)
    adapter = doraxp.init(rows, config, seed=0)
    y, _ = doraxp.forward(np.eye(6, dtype="float32"), rows, adapter, config)
    np.testing.assert_array_equal(y, rows.T)
    assert np.all(adapter.magnitude > 0)


@pytest.mark.dtypes("float16")
def test_float16_norms_beyond_its_range(backend, assert_close, dtype):
    """‖w‖ overflows float16 (65504) and W does not. Magnitudes are float32."""
    weight = backend.asarray(np.full((3, 400), 60000.0, dtype))
    adapter = backend.run(doraxp.init, weight, Config(2), seed=0)
    assert_close(adapter.magnitude, np.full(3, 1.2e6, "float32"), rtol=1e-6)
    assert_close(backend.run(doraxp.merge, weight, adapter, Config(2)), weight, rtol=0)


def test_a_gram_matrix_that_underflows_is_noticed(backend):
    """A Aᵀ is 0 in float32, though B A is as large as W. The stack has an ordinary layer too."""
    rng = np.random.default_rng(5)
    layers = [
        [
            (scale * rng.standard_normal(shape)).astype("float32")
            for scale, shape in zip(scales, ((7, 6), (2, 6), (7, 2), (7,)), strict=True)
        ]
        for scales in ((1e-10, 1e-23, 1e13, 1), (1, 1, 1, 1))
    ]
    arrays = [np.stack(pair) for pair in zip(*layers, strict=True)]
    weight, *leaves = map(backend.asarray, arrays)
    prepared = backend.run(doraxp.prepare, weight, Adapter(*leaves), Config(2))
    for (w, a, b, _), norm in zip(layers, backend.numpy(prepared.norm), strict=True):
        v = w.astype("float64") + b.astype("float64") @ a.astype("float64")
        np.testing.assert_allclose(norm, [reference.length(row) for row in v], rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_nan_is_passed_on(backend, draw, form):
    """A NaN in a row of W is in that row of the results and in every sum over rows, never a 0."""
    config = Config(2, form=form)
    rows = backend.numpy(draw(7, 6)).copy()
    rows[3, 2] = np.nan
    weight, adapter = backend.asarray(rows), Adapter(draw(2, 6), draw(7, 2), draw(7))
    y, cache = backend.run(doraxp.forward, draw(5, 6), weight, adapter, config)
    grads = backend.run(doraxp.backward, draw(5, 7), cache)
    change = backend.run(doraxp.magnitude_direction_change, weight, weight)
    by_rows = (
        backend.numpy(y).T,
        grads.adapter.lora_b,
        grads.adapter.magnitude,
        cache.prepared.norm,
        cache.prepared.gain,
        backend.run(doraxp.merge, weight, adapter, config),
        backend.run(doraxp.decompose, weight)[1],
        change.magnitude_rows,
        change.direction_rows,
    )
    for array in by_rows:
        values = array if isinstance(array, np.ndarray) else backend.numpy(array)
        assert np.all(np.isnan(values[3]))
        assert np.all(np.isfinite(np.delete(values, 3, axis=0)))
    for array in (grads.x, grads.adapter.lora_a, change.direction):
        assert np.all(np.isnan(backend.numpy(array)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("out", "inner"), [(4, 7), (7, 4), (1, 5), (5, 1), (1, 1)])
def test_smallest_and_largest_rank(backend, draw, assert_close, form, out, inner):
    for rank in {1, min(out, inner)}:
        config = Config(rank, form=form)
        layer = (draw(out, inner), draw(rank, inner), draw(out, rank), draw(out))
        x, dy, bias = draw(3, inner), draw(3, out), draw(out)
        weight, adapter = layer[0], Adapter(*layer[1:])
        y, cache = backend.run(doraxp.forward, x, weight, adapter, config, bias=bias)
        grads = backend.run(doraxp.backward, dy, cache)
        expected = reference.solve(
            reference.Layer(*map(backend.numpy, layer), config.scaling, form),
            *map(backend.numpy, (x, bias, dy)),
            "exact",
        )
        assert_close(y, expected.y, rtol=1e-13)
        # An exact gradient through a norm of one number is 0: compare with the size of its terms.
        size = max(1.0, float(np.max(abs(backend.numpy(cache.prepared.gain)))))
        for name, leaf in {"x": grads.x, **grads.adapter._asdict()}.items():
            atol = 1e-12 * max(size, float(np.max(abs(getattr(expected, name)))))
            np.testing.assert_allclose(
                backend.numpy(leaf), getattr(expected, name), rtol=0, atol=atol
            )


@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize("form", FORMS)
def test_zero_tokens_give_empty_outputs_and_zero_gradients(
    backend, draw, assert_close, form, stack
):
    config = Config(2, form=form)
    weight = draw(*stack, 7, 6)
    adapter = Adapter(draw(*stack, 2, 6), draw(*stack, 7, 2), draw(*stack, 7))
    x, dy = draw(*stack, 0, 6), draw(*stack, 0, 7)
    y, cache = backend.run(doraxp.forward, x, weight, adapter, config, bias=draw(*stack, 7))
    grads = backend.run(doraxp.backward, dy, cache, train_base=True)
    assert y.shape == (*stack, 0, 7)
    assert grads.x.shape == (*stack, 0, 6)
    leaves = (*grads.adapter, grads.weight, grads.bias)
    shapes = ((2, 6), (7, 2), (7,), (7, 6), (7,))
    for leaf, shape in zip(leaves, shapes, strict=True):
        assert_close(leaf, np.zeros((*stack, *shape)), rtol=0)


@pytest.mark.dtypes("float16", "bfloat16")
def test_blocks_of_rows_give_the_results_of_the_whole(
    backend, draw, assert_close, dtype, monkeypatch
):
    """There are more rows than NumPy casts at once, and the last block is not full."""
    monkeypatch.setattr("doraxp.backends._numpy.PRODUCT_BLOCK", 4 * 6)
    config = Config(3)
    for stack in (), (2,):
        weight = draw(*stack, 11, 6, dtype=dtype)
        adapter = Adapter(*(draw(*stack, *s, dtype="float32") for s in ((3, 6), (11, 3), (11,))))
        x, dy = draw(*stack, 5, 6, dtype="float32"), draw(*stack, 5, 11, dtype="float32")
        wide = backend.namespace().astype(weight, x.dtype)
        results = []
        for w in (weight, wide):
            y, cache = backend.run(doraxp.forward, x, w, adapter, config)
            results.append((y, backend.run(doraxp.backward, dy, cache).x, cache.prepared.norm))
        for low, high in zip(*results, strict=True):
            assert_close(low, high, rtol=1e-6)
        merged = doraxp.merge(weight, adapter, config)
        expected = backend.namespace().astype(doraxp.merge(wide, adapter, config), weight.dtype)
        assert_close(merged, expected, rtol={"float16": 1e-3, "bfloat16": 8e-3}[dtype])


@pytest.mark.filterwarnings("ignore:overflow")  # NumPy's: to silence it takes 3 µs of each call
def test_a_norm_whose_square_overflows_only_in_the_sum(backend):
    values = ([[1.1e19, 0]], [[1, 0]], [[1.1e19]], [1])
    weight, *leaves = (backend.asarray(np.array(v, "float32")) for v in values)
    prepared = backend.run(doraxp.prepare, weight, Adapter(*leaves), Config(1))
    np.testing.assert_allclose(backend.numpy(prepared.norm), [2.2e19], rtol=1e-6)
