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

from doraxp.backends import operations
from doraxp.backends._cupy.skinny import Skinny

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
    "stack": ((2, 2), 40, 72, 6),
    "tall": ((), 600, 40, 4),
}
"""The stack, the rows and columns of the matrix, and the rank."""


@pytest.fixture(params=[0, 1], ids=["aligned", "misaligned"])
def put(request, backend):
    """Return a function that makes an array of the library, aligned to 16 bytes or not."""

    def array(values, dtype="float32"):
        offset = request.param
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

    def test_every_number_of_float16_is_multiplied_exactly(self, backend, skinny, put, dtype):
        if str(dtype) == "bfloat16":
            bits = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
            numbers = bits[(np.abs(bits) < 1e30) & (np.abs(bits) > 1e-30)].astype("float64")
        else:
            numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype("float64")
            numbers = numbers[np.isfinite(numbers)]
        result = skinny.project(put(numbers[:, None], dtype), put(np.ones((1, 1))))
        np.testing.assert_array_equal(np.asarray(backend.numpy(result))[:, 0], numbers)

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
