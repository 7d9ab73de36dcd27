"""Each library's operations equal the generic ones in float64, on every path of the code.

The length of a row is a multiple of 16 bytes or not. An array begins at a multiple of 16 bytes, or
one number later. There are more tokens than one chunk, more columns than one block, and stacks.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import array_api_compat.numpy
import cuda_host
import numpy as np
import pytest

import doraxp
from doraxp.backends import (
    Factored,
    Factors,
    Operations,
    as_dtype,
    exact_products,
    operations,
)
from doraxp.backends._cupy.signatures import Norms

GENERIC = Operations(array_api_compat.numpy)
SHAPES = {
    "odd": ((), 5, 7, 6),
    "full": ((), 70, 48, 64),
    "wide": ((), 3, 1048, 24),
    "long": ((), 3, 24, 1032),
    "stack": ((2, 3), 34, 16, 24),
    "token": ((2,), 1, 9, 520),
    "one": ((), 1, 1, 1),
}
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}


@pytest.fixture(autouse=True)
def no_cpu_multiplies_16_bits(monkeypatch):
    """PyTorch rounds on no CPU here. test_mixed_precision.py has the mixed precision."""
    monkeypatch.setattr("doraxp.backends._torch.multiplies", lambda kind, dtype: kind != "cpu")


@pytest.fixture(params=[0, 1], ids=["aligned", "misaligned"])
def put(request, backend):
    """Return a function that makes an array of the library, aligned to 16 bytes or not."""

    def array(values, dtype="float32"):
        offset = request.param
        flat = np.zeros(values.size + offset, np.float64)
        flat[offset:] = values.reshape(-1)
        stored = backend.asarray(flat.astype(backend_dtype(dtype)))[offset:]
        return backend.namespace().reshape(stored, values.shape)

    return array


def backend_dtype(name):
    if name != "bfloat16":
        return name
    import ml_dtypes

    return ml_dtypes.bfloat16


@pytest.fixture(params=SHAPES)
def drawn(request):
    stack, tokens, out, inner = SHAPES[request.param]
    rank = min({"full": 40}.get(request.param, 3), out, inner)
    rng = np.random.default_rng(len(request.param))
    shapes = {
        "weight": (out, inner), "x": (tokens, inner), "d": (tokens, out), "a": (rank, inner),
        "b": (out, rank), "low_rank": (tokens, rank), "pull": (rank, out), "gain": (out,),
        "bias": (out,), "z": (tokens, out),
    }  # fmt: skip
    values = {name: rng.standard_normal((*stack, *shape)) for name, shape in shapes.items()}
    return values


def rounded(array):
    """Return the stored numbers of an array in float64."""
    return None if array is None else np.asarray(array).astype("float64")


def assert_near(actual, desired, rtol):
    actual = np.asarray(actual).astype("float64")
    assert actual.shape == desired.shape
    np.testing.assert_allclose(actual, desired, rtol=0, atol=rtol * np.max(np.abs(desired)))


def inverse_lengths(weight):
    """Return 1 over the row norms, 0 for a row of zeros."""
    lengths = np.linalg.norm(weight, axis=-1)
    return np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def measured(ops, arrays, xp):
    """Return n, g, V Aᵀ / n and V."""
    weight, a, b, row_scale = (arrays[name] for name in ("weight", "a", "b", "row_scale"))
    squares = ops.row_squares(weight, arrays["gain"].dtype)
    return ops.norm_and_direction(
        weight, doraxp.Adapter(a, b, arrays["gain"]), 1.0, row_scale, squares
    )


@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
@pytest.mark.parametrize("form", ["weight", "direction"])
class TestOperations:
    @pytest.fixture
    def given(self, backend, drawn, put, dtype, form):
        """Return operations, arrays of the library, the same in float64, and a tolerance."""
        wide = "float64" if dtype == "float64" else "float32"
        stored = ("weight", "x", "d")
        arrays = {n: put(v, dtype if n in stored else wide) for n, v in drawn.items()}
        arrays["row_scale"] = None
        if form == "direction":
            arrays["row_scale"] = put(
                inverse_lengths(rounded(backend.numpy(arrays["weight"]))), wide
            )
        ops = operations(**{n: a for n, a in arrays.items() if a is not None})
        xp, compute = backend.namespace(), arrays["gain"].dtype
        for name in ("x", "d"):
            kind = ops.operand_dtype(arrays[name], arrays["weight"], compute)
            arrays[name] = as_dtype(arrays[name], kind, xp=xp)
        plain = {n: None if a is None else rounded(backend.numpy(a)) for n, a in arrays.items()}
        return ops, arrays, plain, 1e-13 if dtype == "float64" else 4e-6

    def factors(self, arrays):
        return Factors(*(arrays[name] for name in ("weight", "a", "b", "row_scale")))

    def change(self, backend, given, name, values):
        """Put other numbers in the place of an array, in its dtype."""
        _, arrays, plain, _ = given
        arrays[name] = backend.asarray(values.astype(backend.numpy(arrays[name]).dtype))
        plain[name] = rounded(backend.numpy(arrays[name]))
        if name == "weight" and arrays["row_scale"] is not None:
            self.change(backend, given, "row_scale", inverse_lengths(plain["weight"]))

    def test_forward(self, backend, given, dtype):
        ops, arrays, plain, rtol = given
        direction = measured(ops, arrays, backend.namespace()).direction
        arrays["low"] = ops.product(arrays["x"], backend.namespace().matrix_transpose(arrays["a"]))
        plain["low"] = plain["x"] @ plain["a"].mT
        names = ("x", "low", "gain", "bias")
        with exact_products():
            z, y = direction.outputs(*(arrays[name] for name in names), ops=ops)
        expected = Factored(self.factors(plain)).outputs(
            *(plain[name] for name in names), ops=GENERIC
        )
        assert_near(backend.numpy(z), expected[0], rtol)
        assert_near(backend.numpy(y), expected[1], rtol + EPS.get(str(dtype), 0))

    @pytest.mark.parametrize("exact", [False, True])
    def test_gradients(self, backend, given, dtype, exact):
        """With z in W's 16 bits, all gradients are as exact, except dx: dz has 16 bits too."""
        _, _, plain, _ = given
        alone = plain["weight"].shape[-2] == 1
        for name in "weight", "b":
            values = plain[name].copy()
            values[..., 0, :] *= alone  # a row of zeros
            self.change(backend, given, name, values)

        for found in self.compare_gradients(backend, given, dtype, exact):
            assert alone or not backend.numpy(found["magnitude"])[..., 0].any()

    def compare_gradients(self, backend, given, dtype, exact):
        """Compare the gradients with those in float64, and return them: for each dtype of z."""
        ops, arrays, plain, rtol = given
        xp, kind = backend.namespace(), arrays["gain"].dtype

        def made(ops, arrays, xp, z):
            found = ops.gradients(
                *(arrays[name] for name in ("d", "x", "low_rank")), z, measured(ops, arrays, xp),
                0.75, arrays["gain"].dtype, exact=exact, with_bias=True, round_later=False,
            )  # fmt: skip
            return found._asdict()

        stored, all_found = ops.operand_dtype(arrays["weight"], arrays["weight"], kind), []
        for z_dtype in {kind, stored}:
            z = as_dtype(arrays["z"], z_dtype, xp=xp)
            expected = made(GENERIC, plain, array_api_compat.numpy, rounded(backend.numpy(z)))
            found = made(ops, arrays, xp, z)
            for name, desired in expected.items():
                if desired is None:
                    assert found[name] is None
                    continue
                narrow = name == "x" and z_dtype != kind
                assert_near(
                    backend.numpy(found[name]), desired, 4 * rtol + narrow * EPS.get(dtype, 0)
                )
            all_found.append(found)
        return all_found

    def test_products_with_the_weight(self, backend, given):
        ops, arrays, plain, rtol = given
        xp, kind = backend.namespace(), arrays["gain"].dtype

        def made(ops, arrays, xp, kind):
            weight, x, d, a = (arrays[name] for name in ("weight", "x", "d", "a"))
            return (
                ops.product(x, xp.matrix_transpose(weight)), ops.product(d, weight),
                ops.product(weight, xp.matrix_transpose(a)), ops.row_squares(weight, kind),
            )  # fmt: skip

        expected = made(GENERIC, plain, array_api_compat.numpy, np.float64)
        for actual, desired in zip(made(ops, arrays, xp, kind), expected, strict=True):
            assert actual.dtype == kind
            assert_near(backend.numpy(actual), desired, rtol)

    def test_the_norm_of_an_adapter(self, backend, given):
        """One row of V cancels, and one is a row of zeros."""
        ops, arrays, plain, rtol = given
        xp, kind = backend.namespace(), arrays["gain"].dtype
        values = plain["weight"].copy()
        if values.shape[-2] > 4:
            b, lengths = plain["b"].copy(), np.linalg.norm(values, axis=-1, keepdims=True)
            unit = 1 if plain["row_scale"] is None else lengths
            values[..., 1, :] = -0.9 * (unit * b @ plain["a"])[..., 1, :]
            values[..., 3, :], b[..., 3, :] = 0, 0
            self.change(backend, given, "weight", values)
            self.change(backend, given, "b", b)

        def made(ops, arrays, xp, kind):
            return measured(ops, arrays, xp)[:3]

        expected = made(GENERIC, plain, array_api_compat.numpy, np.float64)
        for actual, desired in zip(made(ops, arrays, xp, kind), expected, strict=True):
            assert_near(backend.numpy(actual), desired, 4 * rtol)
        if values.shape[-2] > 4:
            norm, gain, unit = expected
            assert not norm[..., 3].any()
            assert not gain[..., 3].any()
            assert not unit[..., 3, :].any()

    def test_merge(self, backend, given, dtype):
        ops, arrays, plain, rtol = given
        merged = ops.merge(Factored(self.factors(arrays)), arrays["gain"])
        desired = GENERIC.merge(Factored(self.factors(plain)), plain["gain"])
        assert merged.dtype == arrays["weight"].dtype
        assert_near(backend.numpy(merged), desired, rtol + EPS.get(str(dtype), 0))

    @pytest.mark.parametrize("exact", [False, True])
    def test_the_guard(self, backend, given, dtype, exact):
        """Every second row cancels: it is computed from V, and the other rows from factors."""
        ops, arrays, plain, rtol = given
        xp, kind = backend.namespace(), arrays["gain"].dtype
        values = plain["weight"].copy()
        update = plain["b"] @ plain["a"]
        values[..., ::2, :] = -0.98 * update[..., ::2, :]
        if plain["row_scale"] is not None:  # W / ‖w‖ has length 1
            b = plain["b"].copy()
            b[..., ::2, :] /= 0.98 * np.linalg.norm(update, axis=-1)[..., ::2, None]
            self.change(backend, given, "b", b)
        self.change(backend, given, "weight", values)
        v = Factored(self.factors(plain)).dense(ops=GENERIC)
        norm, _, _, direction = measured(ops, arrays, xp)
        assert not isinstance(direction, Factored)
        assert_near(backend.numpy(norm), np.sqrt((v * v).sum(axis=-1)), 4 * rtol)
        x, z = as_dtype(arrays["x"], kind, xp=xp), plain["x"] @ v.mT
        update = plain["x"] @ plain["a"].mT @ plain["b"].mT
        gain, bias = (plain[name][..., None, :] for name in ("gain", "bias"))
        for dropped, expected in (None, z), (2 * x, z + update):
            low = ops.product(x if dropped is None else dropped, xp.matrix_transpose(arrays["a"]))
            found = direction.outputs(
                x, low, arrays["gain"], arrays["bias"], dropped=dropped, ops=ops
            )
            assert_near(backend.numpy(found[0]), expected, rtol)
            assert_near(backend.numpy(found[1]), gain * expected + bias, rtol)
        self.compare_gradients(backend, given, dtype, exact)


@pytest.mark.parametrize("which", ["reversed", "broadcast", "pieces"])
def test_x_may_have_any_strides(backend, which):
    values = np.random.default_rng(0).standard_normal((6, 8)).astype("float32")
    weight = backend.asarray(np.eye(4, 8, dtype="float32"))
    xp, x = backend.namespace(), backend.asarray(values)
    if which == "reversed":
        x, values = xp.flip(x, axis=0), values[::-1]
    elif which == "broadcast":
        x, values = xp.broadcast_to(x[0, :], (6, 8)), np.broadcast_to(values[0], (6, 8))
    else:
        weight = backend.asarray(np.eye(2, 4, dtype="float32"))
        x, values = x[:, ::2], values[:, ::2]
    config = doraxp.Config(1)
    adapter = doraxp.init(weight, config, seed=0)
    y, cache = doraxp.forward(x, weight, adapter, config)
    expected = values[:, : weight.shape[0]]
    np.testing.assert_array_equal(backend.numpy(y), expected)
    assert doraxp.backward(y, cache).x.shape == values.shape


@pytest.mark.lanes("cuda-host", "cupy")
def test_rows_of_zeros_are_measured_and_not_listed(backend):
    """Their gain is 0: the guard need not form them again. A weight of Llama-3.1 has 511."""
    weight = np.random.default_rng(0).standard_normal((2, 6, 5)).astype("float32")
    weight[:, ::2] = 0
    weight[1, 3, 2] = np.nan
    shapes = {"weight": (2, 6, 5), "a": (2, 1, 5), "b": (2, 6, 1), "gain": (2, 6)}
    arrays = {name: backend.asarray(np.zeros(shape, "float32")) for name, shape in shapes.items()}
    arrays |= {"weight": backend.asarray(weight), "row_scale": None}
    ops = operations(weight=arrays["weight"])
    norm, gain, unit, direction = measured(ops, arrays, backend.namespace())
    expected = np.sqrt((weight * weight).sum(axis=-1))
    np.testing.assert_allclose(backend.numpy(norm), expected, rtol=1e-6)
    np.testing.assert_array_equal(backend.numpy(direction.suspects.suspect), np.isnan(expected))
    assert backend.numpy(direction.suspects.any)[0] == 1
    for array in gain, unit:
        assert not backend.numpy(array)[:, ::2].any()


@pytest.mark.lanes("cuda-host")
@pytest.mark.dtypes("float16", "bfloat16")
def test_few_rows_in_float32_read_the_weight_once(backend, put, dtype):
    """Up to 256 rows take one launch. Up to 1024 take one product of all parts, more take three."""
    rng = np.random.default_rng(0)
    weight, a = put(rng.standard_normal((24, 16)), dtype), put(rng.standard_normal((3, 16)))
    ops = operations(weight=weight)
    for tokens in 1, 5, 1024:
        x, d = put(rng.standard_normal((tokens, 16))), put(rng.standard_normal((tokens, 24)))
        w, *of_w = rounded(weight), rounded(x), rounded(d), rounded(a)
        ops.cuda.launched.clear()
        made = ops.product(x, weight.mT), ops.product(d, weight), ops.product(weight, a.mT)
        few = ["split", "gemm", "sum_parts"]
        assert ops.cuda.launched == [*(few * 2 if tokens > 256 else ["project", "pull"]), "project"]
        for actual, desired in zip(made, (of_w[0] @ w.T, of_w[1] @ w, w @ of_w[2].T), strict=True):
            assert_near(backend.numpy(actual), desired, 1e-6)
    ops.cuda.launched.clear()
    ops.product(put(np.ones((1025, 24))), weight)
    assert ops.cuda.launched.count("gemm") == (3 if dtype == "bfloat16" else 1)
    d = put(rng.standard_normal((1025, 24)))
    assert_near(ops.product(d, weight), rounded(d) @ rounded(weight), 1e-6)


@pytest.mark.dtypes("float16", "bfloat16")
def test_columns_of_a_factor_that_differ_in_size_keep_their_digits(backend, dtype):
    """A product with float16 scales each column of the other factor. 300 are more than a rank."""
    rng, xp = np.random.default_rng(0), backend.namespace()
    sizes = 2.0 ** rng.integers(-60, 61, (300, 1))
    weight = backend.asarray(rng.standard_normal((24, 16)).astype(backend_dtype(dtype)))
    factor = backend.asarray((sizes * rng.standard_normal((300, 16))).astype("float32"))
    made = operations(weight=weight).product(weight, xp.matrix_transpose(factor))
    w, f = (rounded(backend.numpy(array)) for array in (weight, factor))
    error = np.abs(rounded(backend.numpy(made)) - w @ f.T)
    assert np.max(error / (np.abs(w) @ np.abs(f).T)) <= 1e-6


@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("lies", ["by rows", "by columns"])
@pytest.mark.parametrize(
    ("stack", "out", "inner", "rank"),
    [((), 70, 136, 19), ((), 136, 200, 33), ((2,), 66, 7, 3), ((), 1, 1, 1)],
)
def test_merge_of_a_weight_of_either_layout(
    backend, put, dtype, form, lies, stack, out, inner, rank
):
    """Shapes and ranks fill no tile of the tensor cores. W may lie by columns, as in GPT-2."""
    rng = np.random.default_rng(0)
    wide, xp = "float64" if dtype == "float64" else "float32", backend.namespace()
    if lies == "by rows":
        weight = put(rng.standard_normal((*stack, out, inner)), dtype)
    else:
        weight = xp.matrix_transpose(put(rng.standard_normal((*stack, inner, out)), dtype))
    shapes = (rank, inner), (out, rank), (out,)
    a, b, gain = (put(rng.standard_normal((*stack, *shape)), wide) for shape in shapes)
    row_scale = put(rng.uniform(0.5, 2, (*stack, out)), wide) if form == "direction" else None
    factors = Factors(weight, a, b, row_scale)
    merged = operations(weight=weight).merge(Factored(factors), gain)
    plain = [None if v is None else rounded(backend.numpy(v)) for v in (*factors, gain)]
    desired = GENERIC.merge(Factored(Factors(*plain[:4])), plain[4])
    assert merged.dtype == weight.dtype
    rtol = (1e-13 if dtype == "float64" else 1e-6) + EPS.get(dtype, 0) / 2
    assert_near(backend.numpy(merged), desired, rtol)


def exact_merge(plain, gain):
    """Return W' in float64, and g (ρ|W| + Σ|b||A|), the sizes of the terms that it is a sum of."""
    weight, a, b, row_scale = plain
    base = weight if row_scale is None else row_scale[..., None] * weight
    terms = np.abs(base) + np.abs(b) @ np.abs(a)
    return gain[..., None] * (base + b @ a), np.abs(gain)[..., None] * terms


def half_a_unit(values, dtype):
    """Return half a unit in the last place of numbers of 16 bits."""
    digits, least = {"float16": (10, -14), "bfloat16": (7, -126)}[dtype]
    _, exponent = np.frexp(values)
    return np.ldexp(0.5, np.maximum(exponent - 1, least) - digits)


@pytest.mark.lanes("cuda-host", "cupy")
@pytest.mark.dtypes("float16", "bfloat16", "float32")
@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("lies", ["by rows", "by columns"])
@pytest.mark.parametrize("rank", [3, 64])
def test_a_merge_loses_its_rounding_and_little_more(backend, put, dtype, form, lies, rank):
    """Beside its rounding, W' differs by 2^-20 of the terms that it is a sum of, or less.

    Rows of b differ by up to 2^160, and one is near the smallest numbers. Strips of 32 columns of
    A differ by up to 2^40, and columns of a strip by up to 2^10. One row cancels.
    """
    rng, xp = np.random.default_rng(rank), backend.namespace()
    b = rng.standard_normal((70, rank)) * 2.0 ** rng.integers(-80, 81, (70, 1))
    strips = np.repeat(rng.integers(-20, 21, 5), 32)[:136]
    a = rng.standard_normal((rank, 136)) * 2.0 ** (strips - rng.integers(0, 11, 136))
    a[:, :32] = 0
    b[3] = 0
    b[7] = 2.0**-115 * rng.standard_normal(rank)
    values = rng.standard_normal((70, 136))
    values[7] = 0
    gain = 1 / np.linalg.norm(values + b @ a, axis=1)
    b, a = put(b), put(a)
    values[5] = -rounded(backend.numpy(b))[5] @ rounded(backend.numpy(a))
    if dtype == "float16":
        values = np.clip(values, -60000, 60000)
    if lies == "by rows":
        weight = put(values, dtype)
    else:
        weight = xp.matrix_transpose(put(np.ascontiguousarray(values.T), dtype))
    row_scale = put(rng.uniform(0.5, 2, 70)) if form == "direction" else None
    factors, gain = Factors(weight, a, b, row_scale), put(gain)
    merged = operations(weight=weight).merge(Factored(factors), gain)
    plain = [None if v is None else rounded(backend.numpy(v)) for v in factors]
    exact, terms = exact_merge(plain, rounded(backend.numpy(gain)))
    allowed = 2.0**-20 * terms
    if dtype != "float32":
        allowed += half_a_unit(exact, dtype)
    error = np.abs(rounded(backend.numpy(merged)) - exact)
    assert (error <= allowed).all(), np.max(error / allowed)


def measured_to_merge(factors, magnitude, monkeypatch):
    """Return n and g as `measure_and_merge` finds them on V."""
    ops, seen = operations(weight=factors.weight), []
    launch = ops.cuda.launch

    def spy(arguments, *given, **named):
        seen.extend([arguments] if isinstance(arguments, Norms) else [])
        launch(arguments, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(ops.cuda, "launch", spy)
        ops.patches.measure_and_merge(factors, magnitude)
    (arguments,) = seen
    return arguments.norm, arguments.gain


@pytest.mark.lanes("cuda-host", "cupy")
@pytest.mark.dtypes("bfloat16", "float32")
def test_tensor_cores_lose_no_digits_of_a_large_rank(backend, put, monkeypatch, dtype):
    """They truncate their sums. If all terms have one sign, that error grows with the rank."""
    rng = np.random.default_rng(0)
    weight = put(np.zeros((20, 30)), dtype)
    a, b = (put(rng.uniform(0, 1, shape)) for shape in ((256, 30), (20, 256)))
    norm, _ = measured_to_merge(Factors(weight, a, b, None), put(np.ones(20)), monkeypatch)
    lengths = np.linalg.norm(rounded(backend.numpy(b)) @ rounded(backend.numpy(a)), axis=1)
    np.testing.assert_allclose(backend.numpy(norm), lengths, rtol=3e-7)


@pytest.mark.lanes("cuda-host")
@pytest.mark.dtypes("bfloat16", "float32", "float64")
@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("stack", [(), (2,)])
def test_a_weight_that_lies_by_columns_is_not_copied(backend, put, monkeypatch, dtype, form, stack):
    """The norm, its guard, the products and the merge read it; a merge in float64 copies it."""
    rng, config = np.random.default_rng(0), doraxp.Config(3, form=form)
    values = rng.standard_normal((*stack, 70, 48))
    values[..., 5, :] = 0
    values[..., 7, :] *= 1e-25
    stored = put(np.swapaxes(values, -1, -2).copy(), dtype)
    weight = np.swapaxes(stored, -1, -2)
    by_rows = backend.asarray(np.ascontiguousarray(weight))
    x, dy = (put(rng.standard_normal((*stack, 5, k)), dtype) for k in (48, 70))
    adapter = doraxp.init(by_rows, config, seed=0)
    b = 0.1 * rng.standard_normal((*stack, 70, 3))
    b[..., 7, :] = 0
    adapter = adapter._replace(lora_b=put(b, str(adapter.lora_a.dtype)))

    def work(weight):
        y, cache = doraxp.forward(x, weight, adapter, config)
        grads = doraxp.backward(dy, cache)
        prepared = cache.prepared
        arrays = prepared.norm, y, grads.x, *grads.adapter
        return *arrays, doraxp.merge(weight, adapter, config, prepared=prepared)

    expected, copied = work(by_rows), []
    asarray = array_api_compat.numpy.asarray

    def spy(array, **how):
        copied.append(np.size(array)) if how.get("copy") else None
        return asarray(array, **how)

    monkeypatch.setattr(array_api_compat.numpy, "asarray", spy)
    actual = work(weight)
    assert copied.count(values.size) == (dtype == "float64")
    for one, other in zip(actual, expected, strict=True):
        assert_near(one, rounded(other), {"bfloat16": 2.0**-7, "float32": 4e-6}.get(dtype, 1e-13))


@pytest.mark.lanes("cuda-host")
@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("kind", ["the weight's", "float32"])
def test_one_token_takes_two_launches(backend, put, dtype, form, kind):
    """One makes L, the other z and y. W is read once, with rows that cancel and rows of zeros."""
    rng, config = np.random.default_rng(0), doraxp.Config(3, form=form)
    x = put(rng.standard_normal((1, 66)), dtype if kind == "the weight's" else kind)
    values, b = rng.standard_normal((9, 66)), rng.standard_normal((9, 3))
    adapter = doraxp.init(put(values, dtype), config, seed=0)
    values[4] = -1.02 * (b[4] @ rounded(adapter.lora_a))
    if form == "direction":
        b[4] /= np.linalg.norm(values[4])
    values[5], b[5] = 0, 0
    weight, bias = put(values, dtype), put(rng.standard_normal((9,)))
    adapter = adapter._replace(lora_b=put(b, str(adapter.lora_a.dtype)))
    prepared = doraxp.prepare(weight, adapter, config)
    assert list(np.flatnonzero(prepared.direction.suspects.suspect)) == [4]
    launched = operations(weight=weight).cuda.launched
    launched.clear()
    rounded_z = doraxp.forward(x, weight, adapter, config, bias=bias, prepared=prepared)
    assert launched == ["token", "token"]
    three = np.repeat(x, 3, axis=0)
    with exact_products():
        y, cache = doraxp.forward(x, weight, adapter, config, bias=bias, prepared=prepared)
        expected, cached = doraxp.forward(
            three, weight, adapter, config, bias=bias, prepared=prepared
        )
    np.testing.assert_array_equal(rounded_z[0], y)  # y is made of z before z is rounded
    assert y.dtype == x.dtype
    assert y[0, 5] == as_dtype(bias, y.dtype, xp=np)[5]
    assert_near(y, rounded(expected[:1]), EPS.get(str(x.dtype), 1e-6))
    for name in "low_rank", "z":
        actual, desired = getattr(cache, name), getattr(cached, name)
        assert actual.dtype == desired.dtype
        assert_near(actual, rounded(desired[:1]), 1e-6)
    np.testing.assert_allclose(rounded(cache.z)[0, 4], rounded(cached.z)[0, 4], rtol=1e-6)


@pytest.mark.lanes("cuda-host")
@pytest.mark.parametrize("biased", [False, True])
def test_one_token_of_a_stack_whose_rank_is_over_a_warp(backend, put, biased):
    """Two rows cancel only in the second element. A warp has two rows, and out is odd."""
    rng, config = np.random.default_rng(0), doraxp.Config(33)
    values, b = rng.standard_normal((2, 41, 48)), rng.standard_normal((2, 41, 33))
    adapter = doraxp.init(put(values), config, seed=0)
    values[1, 4:6] = -1.02 * (b[1, 4:6] @ rounded(adapter.lora_a)[1])
    weight, adapter = put(values), adapter._replace(lora_b=put(b))
    bias = put(rng.standard_normal((2, 41))) if biased else None
    x = put(rng.standard_normal((2, 1, 48)))
    y, cache = doraxp.forward(x, weight, adapter, config, bias=bias)
    three = np.repeat(x, 3, axis=1)
    expected, cached = doraxp.forward(three, weight, adapter, config, bias=bias)
    assert_near(y, rounded(expected[:, :1]), 1e-6)
    np.testing.assert_allclose(rounded(cache.z)[1, 0, 4:6], rounded(cached.z)[1, 0, 4:6], rtol=1e-6)


@pytest.mark.lanes("cuda-host")
@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
@pytest.mark.parametrize("kind", ["the weight's", "float32"])
@pytest.mark.parametrize("inner", [4096, 5000, 5001])
def test_one_token_of_long_rows(backend, put, dtype, kind, inner):
    """A thread loads four packs at once, then the rest one by one. Rows may have ragged ends."""
    rng, config = np.random.default_rng(0), doraxp.Config(3)
    x = put(rng.standard_normal((1, inner)), dtype if kind == "the weight's" else kind)
    weight = put(rng.standard_normal((3, inner)), dtype)
    adapter = doraxp.init(weight, config, seed=0)
    adapter = adapter._replace(lora_b=put(rng.standard_normal((3, 3)), str(adapter.lora_a.dtype)))
    launched = operations(weight=weight).cuda.launched
    prepared = doraxp.prepare(weight, adapter, config)
    launched.clear()
    with exact_products():
        _, cache = doraxp.forward(x, weight, adapter, config, prepared=prepared)
    assert launched == ["token", "token"]
    low = rounded(x) @ rounded(adapter.lora_a).T
    assert_near(cache.low_rank, low, 1e-6)
    assert_near(cache.z, rounded(x) @ rounded(weight).T + low @ rounded(adapter.lora_b).T, 1e-6)


@pytest.mark.lanes("cupy", "cuda-host", "numpy", "numpy-readonly", "torch")
@pytest.mark.dtypes("float32", "float64")
@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("which", ["part", "every second", "transposed"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_weight_may_have_any_strides(backend, dtype, form, which, tokens):
    """One row cancels. The prepared norm belongs to the given array, not to a copy of it."""
    rng, xp = np.random.default_rng(0), backend.namespace()
    values, b = rng.standard_normal((24, 40)), rng.standard_normal((24, 3))
    a = rng.uniform(0.5, 1, (3, 40))
    values[4] = -1.02 * b[4] @ a
    if form == "direction":
        b[4] /= np.linalg.norm(values[4])
    a, b, m, x, dy, values = (
        backend.asarray(array.astype(dtype))
        for array in (
            a, b, rng.uniform(0.5, 1, 24), rng.standard_normal((tokens, 40)),
            rng.standard_normal((tokens, 24)), values,
        )
    )  # fmt: skip
    if which == "part":
        weight = xp.concat([values, values], axis=1)[:, :40]
    elif which == "every second":
        weight = xp.reshape(xp.stack([values, values], axis=-1), (24, 80))[:, ::2]
    else:
        weight = xp.asarray(xp.matrix_transpose(values), copy=True)
        weight = xp.matrix_transpose(xp.reshape(xp.reshape(weight, (-1,)), (40, 24)))
    config, adapter = doraxp.Config(3, form=form), doraxp.Adapter(a, b, m)

    def work(weight):
        prepared = doraxp.prepare(weight, adapter, config)
        assert prepared.weight is weight
        prepared = doraxp.prepare(weight, adapter, config, previous=prepared)
        y, cache = doraxp.forward(x, weight, adapter, config, prepared=prepared)
        grads = doraxp.backward(dy, cache)
        merged = doraxp.merge(weight, adapter, config, prepared=prepared)
        return y, *_leaves(grads), merged

    rtol = {"float32": 4e-6, "float64": 1e-13}[dtype]
    for one, other in zip(work(weight), work(values), strict=True):
        assert_near(backend.numpy(one), rounded(backend.numpy(other)), rtol)


@pytest.mark.lanes("cuda-host")
@pytest.mark.dtypes("bfloat16", "float32")
@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_leaves_may_have_any_strides(backend, put, dtype, form, tokens):
    """A and B lie by columns, m and the bias with gaps. A row of V cancels."""
    rng, config = np.random.default_rng(0), doraxp.Config(3, form=form)
    values, b = rng.standard_normal((24, 40)), rng.standard_normal((24, 3))
    a, m, bias = (rng.uniform(0.5, 1, shape) for shape in ((3, 40), (24,), (24,)))
    values[4] = -1.02 * b[4] @ a
    if form == "direction":
        b[4] /= np.linalg.norm(values[4])
    shapes = (tokens, 40), (tokens, 24)
    weight, x, dy = (put(v, dtype) for v in (values, *map(rng.standard_normal, shapes)))

    def work(turn, thin):
        adapter = doraxp.Adapter(turn(put(a)), turn(put(b)), thin(put(m)))
        y, cache = doraxp.forward(x, weight, adapter, config, bias=thin(put(bias)))
        grads = doraxp.backward(dy, cache)
        return y, grads.x, *grads.adapter, doraxp.merge(weight, adapter, config)

    expected = work(lambda v: v, lambda v: v)
    actual = work(
        lambda v: np.swapaxes(np.swapaxes(v, 0, 1).copy(), 0, 1), lambda v: np.repeat(v, 2)[::2]
    )
    for one, other in zip(actual, expected, strict=True):
        assert_near(one, rounded(other), 4e-6)  # dB of the row that cancels is a difference


@pytest.mark.lanes("cuda-host")
def test_a_suspect_row_is_formed_in_double(backend, put):
    rng = np.random.default_rng(0)
    a, b = put(rng.standard_normal((40, 24))), put(rng.standard_normal((6, 40)))
    weight = put(-(1 + 2.0**-12) * (rounded(b) @ rounded(a)))
    arrays = {"weight": weight, "a": a, "b": b, "row_scale": None, "gain": put(np.ones(6))}
    norm, *_ = measured(operations(weight=weight), arrays, backend.namespace())
    v = rounded(weight) + rounded(b) @ rounded(a)
    np.testing.assert_allclose(rounded(norm), np.linalg.norm(v, axis=1), rtol=1e-6)


@pytest.mark.dtypes("bfloat16", "float32", "float64")
def test_the_norm_of_an_adapter_whose_squares_underflow(backend, dtype):
    """A Aᵀ is 0, but B is so large that B A is not small beside W."""
    rng, wide = np.random.default_rng(0), "float64" if dtype == "float64" else "float32"
    small, large = (1e-165, 1e150) if dtype == "float64" else (1e-23, 1e18)
    arrays = {
        "weight": (small * large * rng.standard_normal((6, 24))).astype(backend_dtype(dtype)),
        "a": (small * rng.standard_normal((3, 24))).astype(wide),
        "b": (large * rng.standard_normal((6, 3))).astype(wide),
        "gain": np.ones(6, wide),
    }
    w, a, b, _ = map(rounded, arrays.values())
    expected = small * large * np.linalg.norm((w + b @ a) / (small * large), axis=1)
    arrays = {name: backend.asarray(array) for name, array in arrays.items()} | {"row_scale": None}
    norm, *_ = measured(operations(weight=arrays["weight"]), arrays, backend.namespace())
    rtol = 1e-13 if dtype == "float64" else 1e-6
    np.testing.assert_allclose(rounded(backend.numpy(norm)), expected, rtol=rtol)


@pytest.mark.lanes("cuda-host")
def test_an_adapter_of_zeros_has_no_suspect_rows(backend, put):
    weight, a, b = (
        put(np.full(shape, value)) for shape, value in (((6, 5), 1), ((2, 5), 0), ((6, 2), 0))
    )
    adapter = doraxp.Adapter(a, b, put(np.ones(6)))
    assert doraxp.prepare(weight, adapter, doraxp.Config(2)).direction.suspects.any[0] == 0


@pytest.mark.lanes("cuda-host", "cupy")
@pytest.mark.parametrize("form", ["weight", "direction"])
def test_dx_loses_only_its_rounding(backend, put, form):
    """x and dy of many tokens in bfloat16 give the gradients of the same numbers in float32.

    And those in float32 lose none of their digits.
    """
    rng, config = np.random.default_rng(0), doraxp.Config(3, form=form)
    weight, x, dy = (
        put(rng.standard_normal(shape), "bfloat16") for shape in ((24, 16), (1100, 16), (1100, 24))
    )
    adapter = doraxp.init(weight, config, seed=0)
    adapter = adapter._replace(lora_b=put(rng.standard_normal((24, 3))))
    wide = [put(rounded(backend.numpy(array))) for array in (x, dy)]
    made = []
    for x_, dy_ in (x, dy), wide:
        with exact_products():
            _, cache = doraxp.forward(x_, weight, adapter, config)
            made.append([backend.numpy(g) for g in _leaves(doraxp.backward(dy_, cache))])
    (dx, *grads), (dx_wide, *grads_wide) = made
    error = np.abs(rounded(dx) - rounded(dx_wide))
    np.testing.assert_array_less(error, 2.0**-8 * np.abs(dx_wide) + 2.0**-16 * np.max(dx_wide))
    for one, other in zip(grads, grads_wide, strict=True):
        assert_near(one, rounded(other), 2e-6)
    w, x, dy, *leaves = (rounded(backend.numpy(array)) for array in (weight, x, dy, *adapter))
    base = w / np.linalg.norm(w, axis=1, keepdims=True) if form == "direction" else w
    v = base + config.scaling * leaves[1] @ leaves[0]
    gain = leaves[2] / np.linalg.norm(v, axis=1)
    assert_near(dx_wide, gain * dy @ v, 2e-6)


def _leaves(gradients):
    return gradients.x, *gradients.adapter


@pytest.mark.lanes("cuda-host")
@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("rank", [3, 64, 65])
def test_merge_from_nothing_reads_the_weight_twice(backend, put, dtype, form, rank):
    """For n and for W', and once more for ρ or W Aᵀ. As precise as V, where it cancels too."""
    rng, config = np.random.default_rng(0), doraxp.Config(rank, form=form)
    values = rng.standard_normal((70, 80))
    weight, adapter = put(values, dtype), doraxp.init(put(values, dtype), config, seed=0)
    b = rng.standard_normal((70, rank))
    row = b[4] @ rounded(adapter.lora_a)
    values[4] = -1.02 * row
    weight = put(values, dtype)
    lengths = np.linalg.norm(rounded(weight), axis=1, keepdims=True)
    if form == "direction":
        b[4] /= lengths[4]
    adapter = adapter._replace(lora_b=put(b, str(adapter.lora_a.dtype)))
    ops = operations(weight=weight)
    ops.cuda.launched.clear()
    merged = doraxp.merge(weight, adapter, config)
    if dtype != "float64" and rank <= 64:  # float64 has no tensor cores of use
        before = ["squares", "sum_chunks", "norms"] if form == "direction" else []
        assert ops.cuda.launched == [*before, "tiles", "squares", "norms", "merge"]
    else:
        assert ops.cuda.launched.count("squares") == 1
    scaled = rounded(weight) / (lengths if form == "direction" else 1)
    v = scaled + rounded(adapter.lora_b) @ rounded(adapter.lora_a)
    expected = (rounded(adapter.magnitude) / np.linalg.norm(v, axis=1))[:, None] * v
    rtol = {"float32": 1e-5, "float64": 1e-13}.get(dtype, EPS.get(dtype))
    assert_near(merged, expected, rtol)


@pytest.mark.lanes("cuda-host")
@pytest.mark.dtypes("float16", "bfloat16", "float32")
@pytest.mark.parametrize("lies", ["by rows", "by columns"])
@pytest.mark.parametrize("stack", [(), (2,)])
def test_a_norm_and_its_gain_take_three_launches(backend, put, monkeypatch, dtype, lies, stack):
    """Rows whose squares overflow or underflow are measured on V; a row of zeros has no gain.

    The squares of one row keep only a few digits.
    """
    rng, tiny = np.random.default_rng(0), {"float16": 2.0**-24}.get(dtype, 1e-25)
    values, b = rng.standard_normal((*stack, 37, 72)), rng.standard_normal((*stack, 37, 3))
    values[..., 3, :], b[..., 3, :] = 0, 0
    values[..., 9, :] *= tiny
    b[..., 9, :] = 0
    values[..., 11, :] *= max(tiny, 1e-21)
    b[..., 11, :] = 0
    b[..., 20, :] *= 1e25
    values[..., 36, 5] = np.nan
    if lies == "by rows":
        weight = put(values, dtype)
    else:
        weight = np.swapaxes(put(np.swapaxes(values, -1, -2).copy(), dtype), -1, -2)
    a, b, m = (
        put(rng.standard_normal((*stack, 3, 72))),
        put(b),
        put(rng.uniform(1, 2, (*stack, 37))),
    )
    ops, factors = operations(weight=weight), Factors(weight, a, b, None)
    ops.cuda.launched.clear()
    norm, gain = measured_to_merge(factors, m, monkeypatch)
    assert ops.cuda.launched == ["tiles", "squares", "norms", "merge"]
    expected = np.linalg.norm(rounded(weight) + rounded(b) @ rounded(a), axis=-1)
    np.testing.assert_allclose(rounded(norm), expected, rtol=1e-6)
    zero = expected == 0
    assert zero.any()
    np.testing.assert_allclose(rounded(gain)[~zero], (rounded(m) / norm)[~zero], rtol=1e-6)
    assert not rounded(gain)[zero].any()
    plain = ops.row_norms(weight, ops.row_squares(weight, m.dtype))
    np.testing.assert_allclose(rounded(plain), np.linalg.norm(rounded(weight), axis=-1), rtol=1e-6)


@pytest.mark.lanes("cuda-host")
@pytest.mark.dtypes("bfloat16", "float32")
def test_the_second_pass_begins_at_the_end_of_a_weight_that_fits_the_cache(
    backend, put, monkeypatch, dtype
):
    rng, seen = np.random.default_rng(0), []
    weight, a, b, m = (
        put(rng.standard_normal(shape), kind)
        for shape, kind in (
            ((150, 300), dtype), ((3, 300), "float32"), ((150, 3), "float32"), ((150,), "float32"),
        )
    )  # fmt: skip
    ops = operations(weight=weight)
    launch = ops.cuda.launch

    def spy(arguments, *given, **named):
        seen.extend([arguments.reversed] if hasattr(arguments, "merged") else [])
        launch(arguments, *given, **named)

    monkeypatch.setattr(ops.cuda, "launch", spy)
    made = []
    for cache in weight.nbytes, weight.nbytes - 1:
        monkeypatch.setattr(ops.cuda, "cache", cache)
        made.append(ops.patches.measure_and_merge(Factors(weight, a, b, None), m))
    assert seen == [True, False]
    np.testing.assert_array_equal(*map(rounded, made))


@pytest.mark.lanes("cuda-host")
@pytest.mark.dtypes("float16", "bfloat16", "float32")
def test_a_merge_with_a_known_norm_takes_two_launches(backend, put, dtype):
    rng, config = np.random.default_rng(0), doraxp.Config(3)
    weight = put(rng.standard_normal((70, 80)), dtype)
    adapter = doraxp.init(weight, config, seed=0)
    prepared = doraxp.prepare(weight, adapter, config)
    launched = operations(weight=weight).cuda.launched
    launched.clear()
    doraxp.merge(weight, adapter, config, prepared=prepared)
    assert launched == ["tiles", "merge"]


@pytest.mark.lanes("cuda-host")
@pytest.mark.dtypes("bfloat16", "float32", "float64")
@pytest.mark.parametrize(
    "alone", ["weight", "x", "d", "a", "b", "low_rank", "gain", "bias", "z", "row_scale"]
)
def test_one_array_alone_may_begin_between_two_packs(backend, dtype, alone):
    """The emulated device stops at an access that is not aligned to its width."""
    rng, wide = np.random.default_rng(0), "float64" if dtype == "float64" else "float32"
    shapes = {
        "weight": (16, 24), "x": (3, 24), "d": (3, 16), "a": (4, 24), "b": (16, 4),
        "low_rank": (3, 4), "gain": (16,), "bias": (16,), "z": (3, 16), "row_scale": (16,),
    }  # fmt: skip
    values = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    values["row_scale"] = inverse_lengths(values["weight"])
    xp, made = backend.namespace(), []
    for misaligned in None, alone:
        arrays = {}
        for name, array in values.items():
            kind = backend_dtype(dtype if name in ("weight", "x", "d") else wide)
            memory = backend.asarray(np.zeros(array.size + 1, kind))[int(name == misaligned) :]
            arrays[name] = memory[: array.size].reshape(array.shape)
            arrays[name][...] = array
            assert (arrays[name].ctypes.data % 16 != 0) == (name == misaligned)
        ops = operations(weight=arrays["weight"])
        norm = measured(ops, arrays, xp)
        x, d, low, gain, bias = (arrays[n] for n in ("x", "d", "low_rank", "gain", "bias"))
        for context in contextlib.nullcontext, exact_products:
            with context():
                z, y = norm.direction.outputs(x, low, gain, bias, ops=ops)
                merged = ops.merge(norm.direction, gain)
            for given in arrays["z"], as_dtype(arrays["z"], z.dtype, xp=xp):
                found = ops.gradients(
                    d, x, low, given, norm, 1.0, gain.dtype, exact=True, with_bias=True,
                    round_later=False,
                )  # fmt: skip
                made.append([*norm[:3], z, y, merged, *(g for g in found if g is not None)])
    half = len(made) // 2
    for aligned, other in zip(made[:half], made[half:], strict=True):
        for one, desired in zip(other, aligned, strict=True):
            assert_near(one, rounded(desired), 4e-6 + EPS.get(str(one.dtype), 0))


def before_a_wall(values):
    """Return a copy of an array. Whoever reads behind its end ends the process."""
    size = -(-values.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    protect = ctypes.CDLL(None).mprotect
    assert protect(ctypes.c_void_p(wall), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    array = np.frombuffer(memory, np.uint8, values.nbytes, size - values.nbytes)
    array = array.view(values.dtype).reshape(values.shape)
    array[...] = values
    return array.view(type(values))


@pytest.mark.lanes("cuda-host")
@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
@pytest.mark.parametrize(("out", "inner", "rank"), [(37, 40, 4), (40, 41, 35)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_no_kernel_reads_behind_an_array(backend, monkeypatch, dtype, out, inner, rank, tokens):
    """No length fills its blocks. One row cancels."""
    rng, wide = np.random.default_rng(0), "float64" if dtype == "float64" else "float32"
    a, b = rng.standard_normal((rank, inner)), rng.standard_normal((out, rank))
    weight = rng.standard_normal((out, inner))
    weight[3] = -1.02 * b[3] @ a
    shapes = (tokens, inner), (tokens, out), (out,), (out,)
    x, dy, m, bias = (rng.standard_normal(shape) for shape in shapes)
    stored = [array.astype(backend_dtype(dtype)) for array in (weight, x, dy)]
    stored += [array.astype(wide) for array in (a, b, m, bias)]
    config, empty = doraxp.Config(rank), cuda_host.HostCuda.empty

    def work(put):
        weight, x, dy, a, b, m, bias = (put(backend.asarray(array)) for array in stored)
        adapter, made = doraxp.Adapter(a, b, m), []
        for context in contextlib.nullcontext, exact_products:
            with context():
                y, cache = doraxp.forward(x, weight, adapter, config, bias=bias)
                merged = doraxp.merge(weight, adapter, config)
            made += [y, merged, *_leaves(doraxp.backward(dy, cache))]
        return made

    expected = work(lambda array: array)
    monkeypatch.setattr(cuda_host.HostCuda, "empty", lambda *given: before_a_wall(empty(*given)))
    for one, desired in zip(work(before_a_wall), expected, strict=True):
        assert_near(one, rounded(desired), 4e-6 + EPS.get(str(one.dtype), 0))


@pytest.mark.lanes("cuda-host")
@pytest.mark.dtypes("bfloat16", "float32", "float64")
def test_factors_and_gains_may_lie_with_gaps(backend, dtype):
    rng, wide = np.random.default_rng(0), "float64" if dtype == "float64" else "float32"

    def gaps(*shape, kind=wide):
        values = rng.standard_normal((*shape, 2)).astype(backend_dtype(kind))
        return backend.asarray(values)[..., 0]

    weight, a, b, gain = gaps(24, 16, kind=dtype), gaps(3, 16), gaps(24, 3), gaps(24)
    ops = operations(weight=weight)
    merged = ops.merge(Factored(Factors(weight, a, b, None)), gain)
    plain = [rounded(array) for array in (weight, a, b)]
    desired = GENERIC.merge(Factored(Factors(*plain, None)), rounded(gain))
    assert_near(merged, desired, 1e-6 + EPS.get(dtype, 0))
    if dtype == "bfloat16":
        other = gaps(40, 16, kind=dtype), gaps(40, 3)
        found = ops.skinny.pull(b, weight, other[1], other[0])
        w, f = rounded(other[0]), rounded(other[1])
        assert_near(found, plain[2].T @ plain[0] + f.T @ w, 1e-6)
