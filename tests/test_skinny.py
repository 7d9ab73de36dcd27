"""Products of a matrix of 16 bits with a float32 factor that has few rows or columns.

Each number of a result differs from the exact one by at most a bound relative to the sum of the
products' magnitudes. Tensor cores truncate once for each part in a step of 16 terms, which is 2^-23
of the step's sum at most, and a part that is left out is at most 2^-24 of a product. Each addition
of two float32 numbers rounds by at most 2^-24 of their sum.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from doraxp.backends import Factors, operations
from doraxp.backends._cupy.operations import NORMED
from doraxp.backends._cupy.skinny import Skinny, row_chunks, row_groups
from doraxp.backends._generic import CANCELLATION, least_sum

LANES = "cuda-host", "cupy"
LOW = "float16", "bfloat16"
ROUNDING = 2.0**-24
SHAPES = {
    "odd": ((), 5, 7, 3),
    "one": ((), 1, 1, 1),
    "full": ((), 70, 1096, 16),
    "wide": ((), 5, 1160, 8),
    "ranks": ((), 33, 136, 40),
    "ragged": ((2,), 37, 131, 19),
    "stack": ((2, 2), 40, 72, 5),
    "tall": ((), 600, 40, 4),
}
"""The stack, the rows and columns of the matrix, and the rank."""


@pytest.fixture(params=[0, 1], ids=["aligned", "misaligned"])
def put(request, backend):
    """Return a function that makes an array of the library, aligned to 16 bytes or not."""

    def array(values, dtype="float32", offset=request.param):
        flat = np.zeros(values.size + offset, np.float64)
        flat[offset:] = values.reshape(-1)
        stored = backend.asarray(flat.astype(as_numpy(dtype)))[offset:]
        return backend.namespace().reshape(stored, values.shape)

    return array


def as_numpy(name):
    if name != "bfloat16":
        return name
    import ml_dtypes

    return ml_dtypes.bfloat16


@pytest.fixture
def skinny(backend):
    ops = operations(x=backend.asarray(np.zeros(1, "float32")))
    return Skinny(ops.xp, ops.cuda)


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def additions(terms):
    """Return a bound of the rounded additions that a term passes through, in steps of 16 terms."""
    return 2 + 2 + 1 + terms // 16 + 1 + 2 * 8


def assert_exact(backend, actual, left, right, terms):
    """Compare with left right, where both are lists of the numbers as stored."""
    desired, size = 0, 0
    with np.errstate(all="ignore"):
        for each, other in zip(left, right, strict=True):
            each, other = (np.asarray(backend.numpy(a)).astype("float64") for a in (each, other))
            desired = desired + each @ other
            size = size + np.abs(each) @ np.abs(other)
        actual = np.asarray(backend.numpy(actual))
        assert actual.dtype == np.float32
        assert actual.shape == desired.shape
        finite = np.isfinite(desired)
        np.testing.assert_array_equal(np.isfinite(actual), finite)
        error = np.abs(actual - desired)[finite]
        assert (error <= additions(terms) * ROUNDING * size[finite] + 1e-38).all()


def transposed(array):
    return np.swapaxes(array, -1, -2)


@pytest.mark.lanes(*LANES)
@pytest.mark.dtypes(*LOW)
class TestProducts:
    @pytest.fixture
    def given(self, put, dtype, shape):
        """Return a matrix, a factor by rows and one by columns, for both products."""
        stack, rows, columns, rank = shape
        rng = np.random.default_rng(rows)
        matrix = put(rng.standard_normal((*stack, rows, columns)), dtype)
        return matrix, rng, stack, rows, columns, rank

    @pytest.mark.parametrize("turned", [False, True])
    def test_project(self, backend, skinny, given, put, turned):
        matrix, rng, stack, _, columns, rank = given
        sides = (columns, rank) if turned else (rank, columns)
        factor = put(rng.standard_normal((*stack, *sides)))
        result = skinny.project(matrix, factor, turned=turned)
        right = factor if turned else transposed(factor)
        assert_exact(backend, result, [matrix], [right], columns)

    @pytest.mark.parametrize("turned", [False, True])
    def test_project_of_a_matrix_by_columns(self, backend, skinny, given, put, dtype, turned):
        _, rng, stack, rows, columns, rank = given
        matrix = transposed(put(rng.standard_normal((*stack, columns, rows)), dtype))
        sides = (columns, rank) if turned else (rank, columns)
        factor = put(rng.standard_normal((*stack, *sides)))
        result = skinny.project(matrix, factor, turned=turned)
        right = factor if turned else transposed(factor)
        assert_exact(backend, result, [matrix], [right], columns)

    def test_pull(self, backend, skinny, given, put):
        matrix, rng, stack, rows, _, rank = given
        factor = put(rng.standard_normal((*stack, rows, rank)))
        result = skinny.pull(factor, matrix)
        assert_exact(backend, result, [transposed(factor)], [matrix], rows)

    @pytest.mark.parametrize("more", [1, 50])
    @pytest.mark.parametrize("by_columns", [False, True])
    def test_pull_of_two_matrices(self, backend, skinny, given, put, dtype, more, by_columns):
        matrix, rng, stack, rows, columns, rank = given
        sides = (columns, more) if by_columns else (more, columns)
        second = put(rng.standard_normal((*stack, *sides)), dtype)
        second = transposed(second) if by_columns else second
        factors = [put(rng.standard_normal((*stack, count, rank))) for count in (rows, more)]
        result = skinny.pull(factors[0], matrix, factors[1], second)
        left = [transposed(factor) for factor in factors]
        assert_exact(backend, result, left, [matrix, second], rows + more)

    @pytest.mark.parametrize("misaligned", range(4))
    def test_one_array_may_be_misaligned(self, backend, skinny, put, dtype, misaligned):
        rng = np.random.default_rng(0)
        shapes = (20, 8), (20, 72), (36, 8), (36, 72)
        arrays = [
            put(rng.standard_normal(shape), dtype if i % 2 else "float32", int(i == misaligned))
            for i, shape in enumerate(shapes)
        ]
        left = [transposed(array) for array in arrays[::2]]
        assert_exact(backend, skinny.pull(*arrays), left, arrays[1::2], 56)
        for turned in (False, True):
            sides = (72, 8) if turned else (8, 72)
            factor = put(rng.standard_normal(sides), "float32", int(misaligned == 0))
            result = skinny.project(arrays[1], factor, turned=turned)
            right = factor if turned else transposed(factor)
            assert_exact(backend, result, [arrays[1]], [right], 72)


@pytest.mark.lanes(*LANES)
@pytest.mark.dtypes(*LOW)
class TestRange:
    """Products of few terms, so that a part of a number that is forgotten shows."""

    @pytest.fixture
    def products(self, backend, skinny, put):
        """Return a function that checks both products of numbers, one by one."""

        def check(matrix, factor):
            count, columns = matrix.shape[0], factor.shape[-1]
            for turned in (False, True):
                given = transposed(factor).copy() if turned else factor
                result = skinny.project(matrix, put(given), turned=turned)
                assert_exact(backend, result, [matrix], [transposed(put(factor))], columns)
            wide = put(transposed(np.resize(factor, (factor.shape[0], count))))
            result = skinny.pull(wide, matrix)
            assert_exact(backend, result, [transposed(wide)], [matrix], 1)

        return check

    @pytest.mark.parametrize("exponent", [-99, -40, 0, 40, 99])
    def test_all_digits_of_the_factor_are_kept(self, products, put, dtype, exponent):
        """The last digits of the factor are ones, and so is each digit of the matrix."""
        digits = {"float16": 11, "bfloat16": 8}[str(dtype)]
        least, most = (-24, 15) if str(dtype) == "float16" else (-20, 20)
        matrix = np.array([[(2 - 2.0 ** (1 - digits)) * 2.0**e] for e in range(least, most + 1)])
        factor = np.array([[1 + 2.0**-23], [2 - 2.0**-23], [-1.0 - 2.0**-15], [4 / 3], [0.1]])
        products(put(matrix, dtype), factor * 2.0**exponent)

    def test_numbers_of_every_exponent_are_multiplied_exactly(self, backend, skinny, put, dtype):
        """The factor is −1. All last digits come up, and subnormal numbers of float16."""
        if str(dtype) == "bfloat16":
            bits = np.arange(0x0E00, 0x7100, 7, dtype=np.uint32) << 16  # 1e-30 .. 1e30
            numbers = bits.view(np.float32).astype("float64")
        else:
            numbers = np.arange(0, 0x7C00, 5, dtype=np.uint16).view(np.float16).astype("float64")
        result = skinny.project(put(numbers[:, None], dtype), put(-np.ones((1, 1))))
        np.testing.assert_array_equal(np.asarray(backend.numpy(result))[:, 0], -numbers)

    def test_a_long_sum_is_rounded_and_not_truncated(self, backend, skinny, put, dtype):
        """All terms are positive: a truncation at every step would add up to 2^-18 or more.

        A step loses 2^-23 of its own sum at most. The additions of 128 steps round to nearest.
        """
        rng = np.random.default_rng(0)
        long, short = (
            put(rng.uniform(1, 2, (1, 16384)), dtype),
            put(rng.uniform(1, 2, (6144, 8)), dtype),
        )
        factor, rows = put(rng.uniform(1, 2, (1, 16384))), put(rng.uniform(1, 2, (6144, 1)))
        for actual, left, right in (
            (skinny.project(long, factor), long, transposed(factor)),
            (skinny.pull(rows, short), transposed(rows), short),
        ):
            desired = in_float64(backend, left) @ in_float64(backend, right)
            np.testing.assert_allclose(in_float64(backend, actual), desired, rtol=2.0**-21)

    @pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
    @pytest.mark.parametrize("where", ["matrix", "factor"])
    def test_a_number_that_is_not_finite_reaches_its_sums_and_no_others(
        self, backend, skinny, put, dtype, bad, where
    ):
        rng = np.random.default_rng(0)
        for columns, rank in itertools.product((40, 43), (3, 20)):
            arrays = {
                "matrix": rng.standard_normal((35, columns)),
                "factor": rng.standard_normal((rank, columns)),
                "rows": rng.standard_normal((35, rank)),
            }
            arrays[where][1, columns - 1] = bad
            if where == "factor":
                arrays["rows"][34, 1] = bad
            matrix, factor, rows = (
                put(array, dtype if name == "matrix" else "float32")
                for name, array in arrays.items()
            )
            assert_exact(
                backend, skinny.project(matrix, factor), [matrix], [transposed(factor)], columns
            )
            assert_exact(backend, skinny.pull(rows, matrix), [transposed(rows)], [matrix], 35)


@pytest.mark.once
@pytest.mark.lanes(*LANES)
class TestWithoutNumbers:
    @pytest.mark.parametrize("rows", [0, 3])
    @pytest.mark.parametrize("columns", [0, 5])
    def test_empty_sums_are_zero(self, backend, skinny, rows, columns):
        matrix = backend.asarray(np.ones((rows, columns), "float16"))
        factor = backend.asarray(np.ones((2, columns), "float32"))
        result = backend.numpy(skinny.project(matrix, factor))
        assert result.shape == (rows, 2)
        np.testing.assert_array_equal(result, columns)
        result = backend.numpy(skinny.pull(backend.asarray(np.ones((rows, 2), "float32")), matrix))
        assert result.shape == (2, columns)
        np.testing.assert_array_equal(result, rows)


ALL = "float16", "bfloat16", "float32", "float64"


def wide_of(dtype):
    return "float64" if str(dtype) == "float64" else "float32"


def in_float64(backend, array):
    return np.asarray(backend.numpy(array)).astype("float64")


@pytest.mark.lanes(*LANES)
@pytest.mark.dtypes(*ALL)
class TestPrepare:
    @pytest.mark.parametrize(
        ("stack", "out", "inner", "rank"),
        [((), 7, 9, 3), ((2,), 40, 1032, 16), ((), 5, 24, 19), ((), 130, 40, 1)],
    )
    @pytest.mark.parametrize("other", [None, "float16", "float32"])
    def test_the_adapters_own_arrays(
        self, backend, skinny, put, dtype, other, stack, out, inner, rank
    ):
        """A and B may have different dtypes."""
        wide = wide_of(dtype)
        rng = np.random.default_rng(rank)
        a = put(rng.standard_normal((*stack, rank, inner)), dtype)
        b = put(rng.standard_normal((*stack, out, rank)), other or dtype)
        found = skinny.prepare(a, b, 1.5, wide)
        exact_a, exact_b = in_float64(backend, a), in_float64(backend, b)
        np.testing.assert_array_equal(in_float64(backend, found.lora_a), exact_a)
        np.testing.assert_array_equal(
            in_float64(backend, found.scaled_b), (exact_b.astype(wide) * np.asarray(1.5, wide))
        )
        gram = in_float64(backend, found.gram)
        np.testing.assert_array_equal(gram, transposed(gram))
        size = np.abs(exact_a) @ transposed(np.abs(exact_a))
        # A lane adds inner / 1024 packs of numbers, each of 8 at most; then 7 + 4 sums are added.
        bound = (8 * (inner // 512 + 1) + 11) * np.finfo(wide).eps / 2
        assert (np.abs(gram - exact_a @ transposed(exact_a)) <= bound * size).all()
        for each in (found.lora_a, found.scaled_b, found.gram):
            assert each.dtype == np.dtype(wide)
        assert backend.numpy(found.any_suspect).tolist() == [0]

    def test_the_product_of_a_with_itself_is_made_on_request(self, backend, skinny, put, dtype):
        a, b = put(np.ones((NORMED + 1, 8)), dtype), put(np.ones((3, NORMED + 1)), dtype)
        found = skinny.prepare(a, b, 0.5, wide_of(dtype), gram=False)
        assert found.gram is None
        assert (in_float64(backend, found.scaled_b) == 0.5).all()
        assert (in_float64(backend, found.lora_a) == 1).all()


@pytest.mark.lanes(*LANES)
@pytest.mark.dtypes(*ALL)
@pytest.mark.parametrize("form", ["weight", "direction"])
class TestNorm:
    """n, g, V Aᵀ / n and g⊙b, also for rows that cancel, overflow, underflow or are zeros."""

    CANCELLED, ZERO, HUGE, TINY = 1, 3, 34, 6

    @pytest.fixture(params=["small", "tall", "ranks", "stack"])
    def given(self, request, backend, put, dtype, form):
        stack, out, inner, rank = {
            "small": ((), 7, 9, 3),
            "tall": ((), 70, 520, 16),
            "ranks": ((), 37, 72, 20),
            "stack": ((2,), 36, 40, 5),
        }[request.param]
        rng = np.random.default_rng(out)
        weight, a = (rng.standard_normal((*stack, n, inner)) for n in (out, rank))
        b = 0.3 * rng.standard_normal((*stack, out, rank))
        update = (b @ a)[..., self.CANCELLED, :]
        length = np.linalg.norm(update, axis=-1, keepdims=True)
        weight[..., self.CANCELLED, :] = -update / length
        b[..., self.CANCELLED, :] *= 0.9 / length
        weight[..., self.ZERO, :], b[..., self.ZERO, :] = 0, 0
        power = 600 if str(dtype) == "float64" else 66
        b[..., self.TINY, :] *= 2.0**-power
        weight[..., self.TINY, :] = 0
        if out > self.HUGE:
            b[..., self.HUGE, :] *= 2.0**power
        wide, stored = wide_of(dtype), put(weight, dtype)
        scale = None
        if form == "direction":  # ρ = 1 / ‖w‖, as the norm takes ρ²‖w‖² to be 1
            lengths = np.linalg.norm(in_float64(backend, stored), axis=-1)
            safe = np.where(lengths == 0, 1, lengths)
            scale = put(np.where(lengths == 0, 0, 1 / safe), wide)
        factors = Factors(stored, put(a, wide), put(b, wide), scale)
        return factors, put(rng.standard_normal((*stack, out)), wide)

    @pytest.mark.dtypes(*LOW)
    def test_all_rows_are_measured_by_one_launch(self, backend, skinny, put, dtype, form, given):
        factors, magnitude = given
        assert skinny.makes_u(factors.weight, magnitude.dtype, factors.lora_a.shape[-2])
        self.check_all_rows(backend, skinny, put, form, given, "fused")

    @pytest.mark.parametrize("way", ["expanded", "by columns"])
    def test_all_rows_are_measured(self, backend, skinny, put, dtype, form, given, way):
        self.check_all_rows(backend, skinny, put, form, given, way)

    def check_all_rows(self, backend, skinny, put, form, given, way):
        factors, magnitude = given
        kind, xp = magnitude.dtype, skinny.xp
        weight, a, b, scale = (
            None if array is None else in_float64(backend, array) for array in factors
        )
        inner = a.shape[-1]
        v = (weight if scale is None else scale[..., None] * weight) + b @ a
        peak = np.max(np.abs(v), axis=-1, keepdims=True)
        peak[peak == 0] = 1
        n = peak[..., 0] * np.linalg.norm(v / peak, axis=-1)
        squares, gram = (weight**2).sum(-1), a @ transposed(a)
        extra = {}
        if way != "fused":
            extra = {"u": put(weight @ transposed(a), kind)}
        if way == "by columns":
            stored = transposed(factors.weight).copy()
            factors = factors._replace(weight=transposed(stored))
            extra["bg"] = put(b @ gram, kind)
        flag = backend.asarray(np.zeros(1, "int32"))
        least = least_sum(kind, inner, xp=xp)
        found = skinny.measure(
            factors, put(gram, kind), None if form == "direction" else put(squares, kind),
            magnitude, flag, least, CANCELLATION, **extra,
        )  # fmt: skip
        norm, gain, unit, gained = (in_float64(backend, array) for array in found[:4])
        suspect = np.asarray(backend.numpy(found.suspect))
        for each in found[:4]:
            assert each.dtype == kind

        # A trusted n² is at least half of its terms, so its error is at most twice theirs, and n's
        # is half of it. Each is a sum of fewer than inner + rank² rounded terms, or much better.
        rtol = 64 * float(np.finfo(kind).eps)
        m = in_float64(backend, magnitude)
        safe = np.where(n == 0, 1, n)
        g = np.where(n == 0, 0, m / safe)
        np.testing.assert_allclose(norm, n, rtol=rtol)
        np.testing.assert_allclose(gain, g, rtol=2 * rtol)
        lengths = np.linalg.norm(a, axis=-1)[..., None, :]
        exact = np.where(n[..., None] == 0, 0, v @ transposed(a) / safe[..., None])
        assert (np.abs(unit - exact) <= rtol * lengths).all()
        assert not unit[..., self.ZERO, :].any()

        rows = np.zeros(n.shape, bool)
        rows[..., [row for row in (self.CANCELLED, self.TINY, self.HUGE) if row < n.shape[-1]]] = (
            True
        )
        assert suspect[rows].all()
        assert not suspect[..., self.ZERO].any()
        assert suspect.mean() < 0.6
        np.testing.assert_allclose(
            gained, np.where(suspect[..., None], 0, g[..., None] * b), rtol=2 * rtol
        )
        assert backend.numpy(flag).tolist() == [1]

    def test_without_suspect_rows_the_flag_stays(self, backend, skinny, put, dtype, form):
        weight, a, kind = np.eye(5, 16), np.eye(2, 16), wide_of(dtype)
        factors = Factors(put(weight, dtype), put(a, kind), put(np.zeros((5, 2)), kind), None)
        if form == "direction":
            factors = factors._replace(row_scale=put(np.ones(5), kind))
        flag = backend.asarray(np.zeros(1, "int32"))
        u = None if skinny.makes_u(factors.weight, kind, 2) else put(weight @ a.T, kind)
        found = skinny.measure(
            factors, put(np.eye(2), kind), put(np.ones(5), kind), put(np.ones(5), kind), flag,
            1e-30, CANCELLATION, u=u,
        )  # fmt: skip
        assert not backend.numpy(found.suspect).any()
        assert backend.numpy(flag).tolist() == [0]
        np.testing.assert_array_equal(in_float64(backend, found.norm), 1)

    def test_a_square_that_cancels_or_overflows_is_not_trusted(
        self, backend, skinny, put, dtype, form
    ):
        """Row 0 of b A cancels, as the rows of A are nearly dependent; n² of row 1 overflows."""
        kind, inner = wide_of(dtype), 24
        rng = np.random.default_rng(0)
        a = rng.standard_normal((2, inner))
        a[1] = a[0] + 2.0**-9 * a[1]
        large = {"float64": 2.0**511.4, "float16": 1}.get(str(dtype), 2.0**63.4)
        length = np.linalg.norm(a[0])
        b = np.array([[1, -1], [large / length, 0]])
        weight = np.stack([2.0**-9 * rng.standard_normal(inner), large * a[0] / length])
        stored, a, b = put(weight, dtype), put(a, kind), put(b, kind)
        v, exact_a = in_float64(backend, stored), in_float64(backend, a)
        squares = put((v**2).sum(-1), kind)
        scale = None
        if form == "direction":
            scale = put(1 / np.linalg.norm(v, axis=-1), kind)
            v = v * in_float64(backend, scale)[:, None]
            b = put(in_float64(backend, b) * [[2.0**9], [1]], kind)
        v = v + in_float64(backend, b) @ exact_a
        extra = {}
        if not skinny.makes_u(stored, kind, 2):
            extra["u"] = put(in_float64(backend, stored) @ exact_a.T, kind)
        flag = backend.asarray(np.zeros(1, "int32"))
        found = skinny.measure(
            Factors(stored, a, b, scale), put(exact_a @ exact_a.T, kind), squares,
            put(np.ones(2), kind), flag, 1e-30, CANCELLATION, **extra,
        )  # fmt: skip
        peak = np.max(np.abs(v), axis=-1)
        n = peak * np.linalg.norm(v / peak[:, None], axis=-1)
        # V is formed in double, and its terms are 2^9 times as large as their sum.
        rtol = 16 * float(np.finfo(kind).eps) + 2.0**-41
        np.testing.assert_allclose(in_float64(backend, found.norm), n, rtol=rtol)
        suspect = backend.numpy(found.suspect).tolist()
        assert suspect[0]
        if form == "weight" and str(dtype) != "float16":
            assert suspect[1]

    def test_a_number_that_is_not_finite_is_marked(self, backend, skinny, put, dtype, form):
        """A has a 0 in its column, and their product is NaN."""
        weight, a, kind = np.eye(5, 16), np.eye(2, 16), wide_of(dtype)
        weight[1, 3], weight[2, 4] = np.inf, np.nan
        with np.errstate(invalid="ignore"):
            u, squares = weight @ a.T, (weight**2).sum(-1)
        scale = put(1 / np.sqrt(squares), kind) if form == "direction" else None
        factors = Factors(put(weight, dtype), put(a, kind), put(np.ones((5, 2)), kind), scale)
        flag = backend.asarray(np.zeros(1, "int32"))
        extra = {} if skinny.makes_u(factors.weight, kind, 2) else {"u": put(u, kind)}
        found = skinny.measure(
            factors, put(np.eye(2), kind), put(squares, kind), put(np.ones(5), kind), flag, 1e-30,
            CANCELLATION, **extra,
        )  # fmt: skip
        expected = [False, True, True, False, False]
        assert backend.numpy(found.suspect).tolist() == expected
        assert np.isnan(in_float64(backend, found.norm)).tolist() == expected
        assert backend.numpy(flag).tolist() == [1]


@pytest.mark.once
@pytest.mark.lanes(*LANES)
class TestGrids:
    """How the work is shared out depends on the shapes alone."""

    SIZES = 1, 40, 512, 4096, 8192, 28672, 100_000

    @pytest.mark.parametrize("rows", SIZES)
    def test_rows_share_a_part_of_the_factor_only_where_the_gpu_stays_full(self, backend, rows):
        for others in (1, 2, 4, 64):
            groups = row_groups(rows, others)
            assert groups in (1, 2, 4, 8)
            across = -(-rows // (32 * groups)) * others
            assert groups == 1 or across >= 120
            assert groups == 8 or -(-rows // (64 * groups)) * others < 120

    @pytest.mark.parametrize("rows", SIZES)
    def test_the_chunks_of_pull_hold_all_rows_and_their_sums_are_small(self, backend, rows):
        for more, others in itertools.product((0, 1, 4096), (1, 32, 86, 300)):
            chunks, each = row_chunks(rows, more, others)
            steps = -(-rows // 16) + -(-more // 16)
            assert (chunks - 1) * each < steps <= chunks * each
            assert chunks == 1 or chunks * others * 16 * 128 * 4 < 2.2e6
