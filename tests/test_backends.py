"""Every override equals its generic operation. The list of libraries. CuPy without a GPU."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.metadata
import subprocess
import sys
import types

import array_api_compat.numpy
import ml_dtypes
import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config, backends
from doraxp._base.types import AdamWStepped
from doraxp.backends import (
    Dense,
    Factored,
    Factors,
    Operations,
    _boundary,
    _numpy,
    _precision,
    transpose,
)
from doraxp.backends._cupy import operations as _cupy
from doraxp.backends._generic import least_sum
from doraxp.backends._numpy import NumpyOperations, Patched
from doraxp.backends._torch import TorchOperations

GENERIC = Operations(array_api_compat.numpy)
NUMPY = NumpyOperations(array_api_compat.numpy)
LOW = ("float16", ml_dtypes.bfloat16, "float32")
BLOCKS = [name for name in vars(_numpy) if name.endswith("_BLOCK")]


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.fixture(params=[1 << 20, 3 * 6], ids=["one-block", "many-blocks"])
def _blocks(request, monkeypatch):
    for name in BLOCKS:
        monkeypatch.setattr(f"doraxp.backends._numpy.{name}", request.param)


def make_factors(rng, stack, dtype, *, row_scale):
    return Factors(
        rng.standard_normal((*stack, 7, 6)).astype(dtype),
        rng.standard_normal((*stack, 2, 6)).astype("float32"),
        rng.standard_normal((*stack, 7, 2)).astype("float32"),
        rng.uniform(0.5, 2, (*stack, 7)).astype("float32") if row_scale else None,
    )


def assert_equal(actual, desired, rtol=1e-6):
    assert actual.dtype == desired.dtype
    assert actual.shape == desired.shape
    wide = desired.astype("float64")
    np.testing.assert_allclose(
        actual.astype("float64"), wide, rtol=0, atol=rtol * np.max(np.abs(wide))
    )


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("stack", [(), (2, 3)])
class TestNumpyOverrides:
    def test_products_and_sums(self, rng, stack, dtype):
        weight = rng.standard_normal((*stack, 7, 6)).astype(dtype)
        x = rng.standard_normal((*stack, 5, 6)).astype("float32")
        d = rng.standard_normal((*stack, 5, 7)).astype("float32")
        one = x[..., :1, :]  # one token takes blocks of another size
        for left, right in ((x, weight.mT), (one, weight.mT), (d, weight), (weight, x.mT)):
            assert_equal(NUMPY.product(left, right), GENERIC.product(left, right))
        squares = NUMPY.row_squares(weight, np.float32)
        assert_equal(squares, GENERIC.row_squares(weight, np.float32))

    @pytest.mark.parametrize("given", ["nothing", "update", "row_scale", "bias", "all"])
    def test_forward_epilogue(self, rng, stack, dtype, given):
        def draw(*shape, name):
            array = rng.standard_normal((*stack, *shape)).astype("float32")
            return array if given in (name, "all") else None

        z, gain = draw(5, 7, name=given), draw(7, name=given)
        low, scaled_b = draw(5, 2, name="update"), draw(7, 2, name="update")
        update = None if low is None else (low, scaled_b)
        rest = draw(7, name="row_scale"), update, gain, draw(7, name="bias")
        expected = GENERIC.forward_epilogue(z.copy(), *rest)
        for actual, desired in zip(NUMPY.forward_epilogue(z.copy(), *rest), expected, strict=True):
            assert_equal(actual, desired)
        left, right = draw(5, 2, name=given), draw(2, 7, name=given)
        assert_equal(NUMPY.accumulate(z.copy(), left, right), z + left @ right)

    def test_division_by_norms_that_may_be_zero(self, rng, stack, dtype):
        norm = rng.uniform(0.5, 2, (*stack, 7)).astype("float32")
        norm[..., 2], norm[..., 5] = 0, np.nan
        for shape in ((7,), (7, 2)):
            values = rng.standard_normal((*stack, *shape)).astype("float32")
            actual, expected = (ops.over_norm(values, norm) for ops in (NUMPY, GENERIC))
            np.testing.assert_array_equal(actual, expected)
            assert actual.dtype == expected.dtype
            rows = actual.reshape(*stack, 7, -1)
            assert np.all(rows[..., 2, :] == 0)
            assert np.all(np.isnan(rows[..., 5, :]))

    @pytest.mark.parametrize("exact", [False, True])
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_output_gradients(self, rng, stack, dtype, exact, with_bias):
        shapes = (5, 7), (5, 7), (7,), (7,), (7, 2)
        d, z, gain, norm, scaled_b = (rng.standard_normal((*stack, *shape)) for shape in shapes)
        norm = np.abs(norm)
        norm[..., 3] = 0
        before = d.copy()
        results = [
            ops.output_gradients(d, z, gain, norm, scaled_b, exact=exact, with_bias=with_bias)
            for ops in (NUMPY, GENERIC)
        ]
        for actual, desired in zip(*results, strict=True):
            assert (actual is None) == (desired is None)
            if desired is not None:
                assert_equal(actual, desired)
        assert (results[0].radial is None, results[0].bias is None) == (not exact, not with_bias)
        np.testing.assert_array_equal(d, before)

    def test_a_weight_that_lies_by_columns(self, rng, stack, dtype):
        weight = rng.standard_normal((*stack, 6, 7)).astype(dtype).mT
        x = rng.standard_normal((*stack, 5, 6)).astype("float32")
        d = rng.standard_normal((*stack, 5, 7)).astype("float32")
        assert_equal(NUMPY.row_squares(weight, np.float32), GENERIC.row_squares(weight, np.float32))
        for left, right in ((x, weight.mT), (d, weight), (weight, x.mT)):
            assert_equal(NUMPY.product(left, right), GENERIC.product(left, right))

    @pytest.mark.parametrize("row_scale", [False, True])
    def test_merge(self, rng, stack, dtype, row_scale):
        factors = make_factors(rng, stack, dtype, row_scale=row_scale)
        gain = rng.standard_normal((*stack, 7)).astype("float32")
        step = float(ml_dtypes.finfo(factors.weight.dtype).eps)
        for name, given in (("merge", Factored(factors)), ("merge_and_measure", factors)):
            actual, desired = (getattr(ops, name)(given, gain) for ops in (NUMPY, GENERIC))
            assert_equal(actual, desired, rtol=2 * step)

    @pytest.mark.parametrize("row_scale", [False, True])
    @pytest.mark.parametrize("suspects", [(), (2,), (0, 3, 6), tuple(range(7))])
    def test_guard(self, rng, stack, dtype, row_scale, suspects):
        """Stored rows of V replace the factored results of these rows, and of no others."""
        factors = make_factors(rng, stack, dtype, row_scale=row_scale)
        v = Factored(factors).dense(ops=GENERIC)
        trusted = np.ones((*stack, 7), bool)
        trusted[(0,) * len(stack)][list(suspects)] = False
        wrong = np.full((*stack, 7), 9.0, "float32")
        norm, direction = NUMPY._measure_on_v(trusted, wrong, factors, None)
        assert_equal(norm, np.where(trusted, np.float32(9), np.linalg.norm(v, axis=-1)))
        assert isinstance(direction, Patched if suspects else Factored)
        if not suspects:
            return
        spoilt = direction._replace(factors=factors._replace(weight=factors.weight.copy()))
        spoilt.factors.weight[~trusted] = 1e3  # the factored results for stored rows are not used
        x = rng.standard_normal((*stack, 5, 6)).astype("float32")
        low = x @ factors.lora_a.mT
        assert_equal(spoilt.transposed_product(x, low, ops=NUMPY), x @ v.mT)
        d = rng.standard_normal((*stack, 5, 7)).astype("float32")
        low = d @ factors.scaled_b
        dx, rest = spoilt.product(d.copy(), low, 3, np.float16, ops=NUMPY)
        assert_equal(dx, (d[..., :3, :] @ v).astype("float16"), rtol=2e-3)
        assert_equal(rest, d[..., 3:, :] @ v)
        for each in spoilt, Factored(factors), Dense(factors, v):
            given = d.copy(), d @ factors.scaled_b
            dx, _ = each.product(*given, 3, np.float16, round_later=True, ops=NUMPY)
            assert dx.dtype == np.float32
            assert_equal(dx, d[..., :3, :] @ v)
        wrong = np.full((*stack, 7, 2), 9.0, "float32")
        expected = np.where(trusted[..., None], wrong, v @ factors.lora_a.mT)
        assert_equal(spoilt.projection(wrong, ops=NUMPY), expected)
        assert_equal(direction.dense(ops=NUMPY), v)
        nothing = np.empty(0)
        assert direction.with_weight(nothing).factors.weight is nothing


@pytest.mark.parametrize("form", ["weight", "direction"])
def test_a_merge_that_measures_equals_a_merge_with_a_known_norm(rng, form):
    """There are a row of zeros, a row that cancels and a row whose squares overflow."""
    weight, a, b, m = (rng.standard_normal(shape) for shape in ((7, 6), (2, 6), (7, 2), (7,)))
    weight[0], b[0] = 0, 0
    weight[1] = -2 * b[1] @ a
    weight[2] *= 1e200
    given = weight, Adapter(a, b, m), Config(2, 4.0, form=form)
    measured = doraxp.merge(*given)
    known = doraxp.merge(*given, prepared=doraxp.prepare(*given))
    np.testing.assert_allclose(measured, known, rtol=1e-12)
    assert np.all(measured[0] == 0)


def test_the_guard_stores_no_rows_of_zeros():
    factors = Factors(np.zeros((7, 6)), np.ones((2, 6)), np.zeros((7, 2)), None)
    norm, direction = NUMPY._measure_on_v(np.zeros(7, bool), np.ones(7), factors, None)
    assert isinstance(direction, Factored)
    assert (norm == 0).all()


def test_the_guard_stores_a_row_only_if_its_norm_is_not_0(rng):
    weight, b = rng.standard_normal((7, 6)), rng.standard_normal((7, 2))
    weight[2], b[2] = 0, 0
    trusted = np.ones(7, bool)
    trusted[[2, 4]] = False
    factors = Factors(weight, rng.standard_normal((2, 6)), b, None)
    norm, direction = NUMPY._measure_on_v(trusted, np.ones(7), factors, None)
    (patch,) = direction.patches
    assert list(patch.rows) == [4]
    assert norm[2] == 0


def test_squares_that_underflow_are_not_trusted():
    """‖A_r‖² is 0 in float32, though B A is not small beside W: V must be measured."""
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((7, 64)).astype("float32")
    a = (3e-19 * rng.standard_normal((2, 64))).astype("float32")
    b = (3e18 * rng.standard_normal((7, 2))).astype("float32")
    b[3] = 0
    adapter = Adapter(a, b, np.ones(7, "float32"))
    prepared = doraxp.prepare(weight, adapter, Config(2))
    v = weight + b.astype("float64") @ a
    np.testing.assert_allclose(prepared.norm, np.linalg.norm(v, axis=1), rtol=1e-6)
    (patch,) = prepared.direction.patches
    assert list(patch.rows) == [0, 1, 2, 4, 5, 6]


def test_overflow_is_silent_on_numpy():
    huge = np.full((2, 3), 1e30, "float32")
    assert np.isinf(NUMPY.row_squares(huge, np.float32)).all()


def test_numpy_lets_the_host_read_values():
    assert NUMPY.can_read_values(np.ones(1))
    assert GENERIC.can_read_values(np.ones(1))


def test_available_lists_every_backend_in_order():
    statuses = backends.available()
    names = [status.name for status in statuses]
    assert names == ["numpy", "cupy", "torch", "jax", "dask", "array_api_strict"]
    assert statuses[0] == ("numpy", True, np.__version__)


def hide(monkeypatch, name, module):
    """Make the library `name` be `module`; missing if that is None, broken if it is an error."""
    spec = None if module is None else importlib.machinery.ModuleSpec(name, None)
    find_spec, import_module = importlib.util.find_spec, importlib.import_module

    def find(other, *rest):
        return spec if other == name else find_spec(other, *rest)

    def load(other, *rest):
        if other != name:
            return import_module(other, *rest)
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.setattr("importlib.util.find_spec", find)
    monkeypatch.setattr("importlib.import_module", load)


@pytest.mark.parametrize("name", ["cupy", "dask"])
def test_a_library_that_is_missing_or_broken_says_so(monkeypatch, name):
    loaded = "dask.array" if name == "dask" else name
    hide(monkeypatch, name, None)
    (status,) = (status for status in backends.available() if status.name == name)
    assert not status.usable
    assert status.detail.startswith("not installed: ")
    assert "pip install" in status.detail
    hide(monkeypatch, name, types.ModuleType(name))
    hide(monkeypatch, loaded, OSError("libcuda.so.1: no such file"))
    if name == "dask":
        hide(monkeypatch, name, types.ModuleType(name))
    (status,) = (status for status in backends.available() if status.name == name)
    assert status == (
        name,
        False,
        "installed, but the import failed: OSError: libcuda.so.1: no such file",
    )


@pytest.mark.parametrize(
    ("capability", "problem"),
    [
        (None, "installed, but no NVIDIA device was found"),
        ("75", "installed, but the device is of compute capability 7.5, and 8.0 is needed"),
        ("80", None),
        ("120", None),
    ],
)
def test_cupy_without_a_device_for_its_kernels_says_so(monkeypatch, capability, problem):
    cupy = types.ModuleType("cupy")
    cupy.__version__ = "14.2.0"
    cupy.cuda = types.SimpleNamespace(
        is_available=lambda: capability is not None,
        Device=lambda: types.SimpleNamespace(compute_capability=capability),
    )
    hide(monkeypatch, "cupy", cupy)
    (status,) = (status for status in backends.available() if status.name == "cupy")
    if problem is None:
        assert status == ("cupy", True, "14.2.0")
    else:
        assert not status.usable
        assert status.detail.startswith(problem)


def test_values_on_a_gpu_are_not_read(monkeypatch):
    """CuPy's operations never read a value: adapters are compared by identity."""
    ops = _cupy.CupyOperations(array_api_compat.numpy)
    assert not ops.can_read_values(np.ones(1))
    adapter = Adapter(np.ones(1), np.ones(1), np.ones(1))
    assert ops.snapshot(adapter) is None
    assert ops.unchanged(None, adapter, adapter._replace())
    assert not ops.unchanged(None, adapter, adapter._replace(magnitude=np.ones(1)))
    monkeypatch.setattr("array_api_compat.is_numpy_namespace", lambda xp: False)
    monkeypatch.setattr("array_api_compat.is_cupy_namespace", lambda xp: True)
    chosen = _boundary._operations_of.__wrapped__(np)
    assert isinstance(chosen, _cupy.CupyOperations)
    assert chosen.xp is np


class FakeTensor:
    """A tensor as the check of a call sees it."""

    def __init__(self, dtype="torch.float32", device="cpu"):
        self.dtype, self.device = dtype, device

    def detach(self):
        return "a leaf"


@pytest.fixture
def torch_operations(monkeypatch):
    """Return the operations for a PyTorch whose tensors are `FakeTensor`."""
    kinds = {"Tensor": FakeTensor, "nn": types.SimpleNamespace(Parameter=FakeTensor)}
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(**kinds))
    monkeypatch.setattr("array_api_compat.is_numpy_namespace", lambda xp: False)
    monkeypatch.setattr("array_api_compat.is_torch_namespace", lambda xp: True)
    monkeypatch.setattr(_boundary, "_TENSORS", set())
    return _boundary._operations_of.__wrapped__(np)


def test_tensors_are_taken_out_of_the_graph(torch_operations):
    assert torch_operations.detached(FakeTensor()) == "a leaf"


@pytest.mark.parametrize("others", [("torch.int32", "cpu"), ("torch.float32", "cuda:0")])
def test_plain_tensors_need_no_search_for_their_library(monkeypatch, torch_operations, others):
    """Only floating tensors on one device: all others are looked at one by one."""
    monkeypatch.setattr(_boundary, "_operations_of", lambda xp: torch_operations)
    namespace = types.ModuleType("array_api_compat.torch")
    importer = types.SimpleNamespace(import_module=lambda _: namespace)
    monkeypatch.setattr(_boundary, "importlib", importer)
    _boundary._torch_operations.cache_clear()
    found = _boundary.operations_of_plain([FakeTensor(), FakeTensor("torch.bfloat16")])
    _boundary._torch_operations.cache_clear()
    assert found is torch_operations
    assert _boundary.operations_of_plain([FakeTensor(), FakeTensor(*others)]) is None


def test_jaxs_operations_register_config_once(monkeypatch):
    registered = []

    def register_static(kind):
        if kind in registered:
            raise ValueError("Duplicate custom PyTreeDef type registration")
        registered.append(kind)

    tree_util = types.SimpleNamespace(register_static=register_static)
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(tree_util=tree_util))
    monkeypatch.setattr("array_api_compat.is_numpy_namespace", lambda xp: False)
    monkeypatch.setattr("array_api_compat.is_jax_namespace", lambda xp: True)
    for _ in range(2):
        assert type(_boundary._operations_of.__wrapped__(np)).__name__ == "JaxOperations"
    assert registered == [Config]


def test_dasks_arrays_have_operations_of_their_own(monkeypatch):
    monkeypatch.setattr("array_api_compat.is_numpy_namespace", lambda xp: False)
    monkeypatch.setattr("array_api_compat.is_dask_namespace", lambda xp: True)
    assert type(_boundary._operations_of.__wrapped__(np)).__name__ == "DaskOperations"


def test_a_block_of_precision_ends_also_by_an_error():
    for block, holds in (
        (backends.exact_products, _precision.is_exact),
        (backends.reduced_precision, _precision.is_reduced),
    ):
        with contextlib.suppress(RuntimeError), block():
            inside = holds()
            raise RuntimeError
        assert (inside, holds()) == (True, False)


def test_torch_accumulates_a_product_of_matrices_by_addmm():
    ops = TorchOperations(np)
    matrix = types.SimpleNamespace(ndim=2, addmm_=lambda left, right: (left, right))
    assert ops.accumulate(matrix, "left", "right") == ("left", "right")
    stack = np.ones((2, 3, 4))
    assert_equal(ops.accumulate(stack.copy(), stack[..., :1], stack[:, :1]), 2 * stack)


def test_values_that_are_lazy_or_on_a_device_are_not_read(monkeypatch):
    monkeypatch.setattr("array_api_compat.device", lambda array: "cuda:0")
    assert not GENERIC.can_read_values(np.ones(1))
    monkeypatch.undo()
    monkeypatch.setattr("array_api_compat.is_lazy_array", lambda array: True)
    assert not GENERIC.can_read_values(np.ones(1))


@pytest.mark.parametrize("row_scale", [False, True])
def test_the_generic_guard_stores_all_of_v_or_no_row_of_it(rng, row_scale):
    factors = make_factors(rng, (), "float32", row_scale=row_scale)
    v = Factored(factors).dense(ops=GENERIC)
    norm = np.linalg.norm(v, axis=-1)
    trusted = np.ones(7, bool)
    assert GENERIC._measure_on_v(trusted, norm, factors, None) == (norm, Factored(factors))
    trusted[3] = False
    measured, direction = GENERIC._measure_on_v(trusted, np.zeros(7, "float32"), factors, None)
    assert_equal(measured, norm)
    assert isinstance(direction, Dense)
    x, d = rng.standard_normal((5, 6)), rng.standard_normal((5, 7))
    low = "not used"
    np.testing.assert_allclose(direction.transposed_product(x, low, ops=GENERIC), x @ v.T)
    gain, bias = rng.standard_normal((2, 7))
    z, y = direction.outputs(x, low, gain, bias, ops=GENERIC)
    np.testing.assert_allclose(z, x @ v.T)
    np.testing.assert_allclose(y, gain * (x @ v.T) + bias)
    dx, rest = direction.product(d, low, 5, d.dtype, ops=GENERIC)
    np.testing.assert_allclose(dx, d @ v)
    assert rest.shape == (0, 6)
    nothing = np.empty(0)
    assert direction.with_weight(nothing) == (factors._replace(weight=nothing), direction.v)
    assert Factored(factors).with_weight(nothing).factors.weight is nothing


@pytest.mark.parametrize("scale", [1, 1e30])
def test_generic_row_norms_survive_overflow(scale):
    weight = np.array([[3 * scale, 4 * scale], [3, 4]], "float32")
    with np.errstate(over="ignore"):
        norms = GENERIC.row_norms(weight, GENERIC.row_squares(weight, np.float32))
    np.testing.assert_allclose(norms, [5 * scale, 5], rtol=1e-6)


def test_an_array_without_mt_is_transposed_by_its_library(monkeypatch):
    class NoMT:
        """As Dask's arrays."""

    xp = types.SimpleNamespace(matrix_transpose=lambda array: ("transposed", array))
    monkeypatch.setattr("doraxp.backends._dtypes.array_namespace", lambda array: xp)
    array = NoMT()
    assert transpose(array) == ("transposed", array)


def test_a_library_without_overrides_gets_the_generic_operations(monkeypatch):
    monkeypatch.setattr("array_api_compat.is_numpy_namespace", lambda xp: False)
    monkeypatch.setattr(_boundary, "_KNOWN", (lambda xp: xp is np,))
    assert type(_boundary._operations_of.__wrapped__(np)) is Operations


@pytest.mark.parametrize("ops", [GENERIC, NUMPY])
def test_an_adapter_is_compared_by_value(ops):
    adapter = Adapter(np.array([1.0, np.nan]), np.ones(2), np.ones(3))
    snapshot = ops.snapshot(adapter)
    assert ops.unchanged(snapshot, adapter, Adapter(*(leaf.copy() for leaf in adapter)))
    for name, value in (("lora_a", 1.0), ("lora_b", np.nan), ("magnitude", 2.0)):
        leaf = getattr(adapter, name).copy()
        leaf[-1] = value
        assert not ops.unchanged(snapshot, adapter, adapter._replace(**{name: leaf}))


@pytest.mark.parametrize("ops", [GENERIC, NUMPY])
def test_a_write_after_the_snapshot_is_noticed(ops):
    adapter = Adapter(np.ones(2), np.ones(3), np.ones(4))
    snapshot = ops.snapshot(adapter)
    adapter.lora_b[1] = 5.0
    assert not ops.unchanged(snapshot, adapter, adapter)


@pytest.mark.parametrize("ops", [GENERIC, NUMPY])
def test_equal_values_of_another_dtype_are_a_change(ops):
    then = Adapter(*(np.zeros(size, "float16") for size in (2, 3, 4)))
    snapshot = ops.snapshot(then)
    assert not ops.unchanged(snapshot, then, then._replace(lora_b=np.zeros(4, "float16")))
    for other in ("float32", ml_dtypes.bfloat16):
        assert not ops.unchanged(snapshot, then, then._replace(lora_b=np.zeros(3, other)))


def test_numpy_compares_with_a_snapshot_of_another_library():
    adapter = Adapter(np.ones(2), np.ones(3), np.ones(4))
    snapshot = GENERIC.snapshot(adapter)
    assert NUMPY.unchanged(snapshot, adapter, Adapter(*(leaf.copy() for leaf in adapter)))
    adapter.magnitude[1] = 5.0
    assert not NUMPY.unchanged(snapshot, adapter, adapter)


def test_the_bound_on_a_sum_of_squares_grows_with_its_terms():
    one, many = (least_sum(np.dtype("float32"), terms, xp=np) for terms in (1, 100))
    assert many == 100 * one


class Foreign(np.ndarray):
    """An array of another class than NumPy's own: its library is looked up."""


def foreign(size):
    return np.ones(size).view(Foreign)


def test_arrays_of_two_libraries_are_refused_by_name(monkeypatch):
    other = types.SimpleNamespace(__name__="array_api_compat.torch")
    xp = array_api_compat.numpy
    monkeypatch.setattr(_boundary, "_namespace", lambda name, *_: xp if name == "x" else other)
    message = "all arrays must be of one library: x is of numpy, weight of torch"
    with pytest.raises(TypeError, match=message):
        backends.operations(x=foreign(2), bias=None, weight=foreign(2))


def test_arrays_on_two_devices_are_refused_by_name(monkeypatch):
    x, weight, traced = foreign(1), foreign(2), foreign(3)
    devices = {1: "cuda:0", 2: "cuda:1", 3: None}
    monkeypatch.setattr("array_api_compat.device", lambda array: devices[array.size])
    message = "all arrays must be on one device: x is on cuda:0, weight on cuda:1"
    with pytest.raises(ValueError, match=message):
        backends.operations(x=x, weight=weight)
    backends.operations(x=x, weight=traced)
    backends.operations(x=traced, weight=weight)


def test_the_bare_package_imports_only_what_it_needs():
    """The core needs neither PyTorch nor matplotlib."""
    code = (
        "import sys; import array_api_compat.numpy; before = set(sys.modules); import doraxp; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    # NumPy imports some packages if they are installed. doraxp does not need them.
    owners = importlib.metadata.packages_distributions()
    packages = {owner.replace("_", "-") for name in modules for owner in owners.get(name, [])}
    assert packages <= {"doraxp", "numpy", "array-api-compat"}
    assert "doraxp" in modules


def test_a_backend_may_step_all_leaves_at_once(monkeypatch):
    """The step returns in each place the arrays that the operations return for it."""
    given = []

    class Fused(Operations):
        def adamw(self, leaves, rates, decays, numbers, *, donate):
            given.append((rates, decays, numbers, donate))
            new = zip((leaves.params, leaves.mu, leaves.nu), (1, 2, 3), strict=True)
            return AdamWStepped(*([array + by for array in column] for column, by in new))

    ops = Fused(array_api_compat.numpy)
    monkeypatch.setattr(_boundary, "_NUMPY", ops)
    params = {"q": Adapter(np.zeros((1, 2)), np.zeros((3, 1)), np.zeros(3))}
    state = doraxp.adamw_init(params)
    stepped, state = doraxp.adamw_step(params, params, state, learning_rate=0.5, weight_decay=0.25)
    assert [set(leaf.ravel()) for leaf in stepped["q"]] == [{1.0}] * 3
    assert {float(leaf[0].ravel()[0]) for leaf in (state.mu["q"], state.nu["q"])} == {2.0, 3.0}
    ((rates, decays, numbers, donate),) = given
    assert rates == [0.5] * 3
    assert decays == [0.25, 0.25, 0.0]  # for lora_a, lora_b and magnitude
    assert donate is False
    assert numbers == pytest.approx((0.9, 0.1, 0.999, 0.001, 1e-8, 0.1, 0.001))


@pytest.mark.parametrize(("dtype", "device"), [("float32", 0), ("int32", 0), ("float32", 1)])
def test_cupys_own_arrays_need_no_search_for_their_library(monkeypatch, dtype, device):
    """Only floating arrays on the current device: all others are looked at one by one."""

    class Array:
        def __init__(self):
            self.dtype, self.data = np.dtype(dtype), types.SimpleNamespace(device_id=device)

    namespace = types.ModuleType("array_api_compat.cupy")
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(ndarray=Array))
    importer = types.SimpleNamespace(import_module=lambda _: namespace)
    monkeypatch.setattr(_boundary, "importlib", importer)
    monkeypatch.setattr("doraxp.backends._cupy.device.Cuda.device", lambda _: 0)
    _boundary._cupy_operations.cache_clear()
    found = _boundary.operations_of_plain([Array(), Array()])
    _boundary._cupy_operations.cache_clear()
    if (dtype, device) == ("float32", 0):
        assert type(found).__name__ == "CupyOperations"
    else:
        assert found is None
