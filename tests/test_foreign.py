"""Libraries without overrides that only these tests know, and the refusal of all that are wrong."""

from __future__ import annotations

import importlib
import re
import sys
import types
import warnings
from pathlib import Path

import array_api_compat.numpy
import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config
from doraxp.backends import Dense, _boundary, _namespaces, array_namespace, device, operations
from doraxp.backends._conformance import FUNCTIONS, check_conformance
from doraxp.backends._generic import LazyOperations
from doraxp.testing import write_vectors

SRC = Path(doraxp.__file__).parent
ROOT = Path(__file__).parents[1]
PACKAGES = ROOT / "packages" / "vectors"
RTOL = {"float32": 4e-6, "float64": 1e-14}


@pytest.fixture(params=["weight-float32", "direction-float64"])
def layer(request):
    """W, adapter, x, mask, bias and dy as arrays of NumPy, and the config."""
    form, dtype = request.param.split("-")
    rng = np.random.default_rng(3)
    shapes = (7, 6), (2, 6), (7, 2), (7,), (5, 6), (5, 6), (7,), (5, 7)
    weight, a, b, m, x, mask, bias, dy = (rng.standard_normal(s).astype(dtype) for s in shapes)
    weight[2] = b[2] = 0  # a row without a direction
    dropout = "input" if form == "weight" else "low_rank"
    return weight, Adapter(a, b, m), x, mask, bias, dy, Config(2, 3.0, form=form, dropout=dropout)


def arrays_of(layer):
    weight, adapter, *others, _ = layer
    return [weight, *adapter, *others]


def as_layer(arrays, config):
    weight, a, b, m, *others = arrays
    return weight, Adapter(a, b, m), *others, config


def plainly(function, *args, **kwargs):
    return function(*args, **kwargs)


def step(layer, run=plainly, asarray=np.array):
    """Return the results of the public functions of a layer and of a step of its adapter."""
    weight, adapter, x, mask, bias, dy, config = layer
    weight, x, mask, bias, dy = map(asarray, (weight, x, mask, bias, dy))
    adapter = Adapter(*map(asarray, adapter))
    fresh = run(doraxp.init, weight, config, seed=0)
    y, cache = run(doraxp.forward, x, weight, adapter, config, bias=bias, dropout_mask=mask)
    gradients = run(doraxp.backward, dy, cache, train_base=True)
    state = run(doraxp.adamw_init, adapter)
    stepped, _ = run(doraxp.adamw_step, adapter, gradients.adapter, state, learning_rate=0.1)
    again, _ = run(doraxp.forward, x, weight, stepped, config, previous=cache.prepared)
    merged = run(doraxp.merge, weight, adapter, config)
    parts = run(doraxp.decompose, weight)
    return [
        *fresh, y, gradients.x, *gradients.adapter, gradients.weight, gradients.bias, *stepped,
        again, merged, *parts,
    ]  # fmt: skip


@pytest.mark.lanes("mlx", "sparse", "cubed")
def test_a_layer_and_its_step_equal_those_of_numpy(backend, layer, assert_close):
    dtype = layer[0].dtype.name
    actual = step(layer, backend.run, backend.asarray)
    for one, desired in zip(actual, step(layer), strict=True):
        assert backend.numpy(one).dtype.name == dtype
        assert_close(one, desired, rtol=RTOL[dtype])


@pytest.mark.lanes("ndonnx")
def test_a_graph_of_ndonnx_computes_a_layer_and_its_step(backend, layer):
    """The graph is built of arguments without values; ONNX Runtime computes it."""
    import ndonnx
    import onnxruntime

    *_, config = layer
    given = dict(zip("wabmxdcy", arrays_of(layer), strict=True))
    symbols = {
        name: ndonnx.argument(shape=array.shape, dtype=getattr(ndonnx, array.dtype.name))
        for name, array in given.items()
    }
    results = step(as_layer(symbols.values(), config), asarray=lambda array: array)
    model = ndonnx.build(symbols, {f"result{i}": array for i, array in enumerate(results)})
    outputs = onnxruntime.InferenceSession(model.SerializeToString()).run(None, given)
    for actual, desired in zip(outputs, step(layer), strict=True):
        assert actual.dtype == desired.dtype
        bound = RTOL[desired.dtype.name] * np.max(np.abs(desired))
        np.testing.assert_allclose(actual, desired, rtol=0, atol=bound)


@pytest.mark.lanes("ndonnx")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_graph_beside_the_golden_vectors_is_within_their_bounds(
    backend, dtype, tmp_path, monkeypatch
):
    """ONNX's own evaluator and ONNX Runtime compute it; an importer need not know `If`."""
    import onnx
    import onnx.reference
    import onnxruntime

    for folder in (PACKAGES, PACKAGES / "python"):
        monkeypatch.syspath_prepend(folder)
    graphs, reader = map(importlib.import_module, ("graphs", "doraxp_vectors"))
    write_vectors(tmp_path / "vectors")
    cases = reader.cases(dtype, ["layer"], folder=tmp_path / "vectors")
    (case,) = (case for case in cases if case.entry["name"] == graphs.CASE)
    written = graphs.layer(dtype)
    model = onnx.load_from_string(written)
    onnx.checker.check_model(model, full_check=True)
    assert "If" not in {node.op_type for node in model.graph.node}
    assert [value.name for value in model.graph.input] == list(case.inputs)
    outputs = [value.name for value in model.graph.output]
    assert outputs == ["y", "dx", "da", "db", "dm", "dw", "dbias"]
    page = (ROOT / "docs" / "reference" / "vectors.md").read_text("utf-8")
    section = page.partition("a graph of ONNX\n")[2]
    for name, array in (case.inputs | {name: case.expected[name] for name in outputs}).items():
        row = next(line for line in section.splitlines() if f"`{name}`" in line)
        assert str(array.shape) in row
    evaluator = onnx.reference.ReferenceEvaluator(model)
    session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
    for program in (evaluator, session):
        found = dict(zip(outputs, program.run(None, case.inputs), strict=True))
        assert {array.dtype.name for array in found.values()} == {dtype}
        assert case.wrong(found) == []


@pytest.mark.lanes("mlx")
class TestMlx:
    def test_a_compiled_layer_has_the_same_outputs(self, backend, layer, assert_close):
        """`mlx.core.compile` forbids to read a value."""
        import mlx.core as mx

        *_, config = layer

        def output(arrays):
            weight, adapter, x, *_ = as_layer(arrays, config)
            return doraxp.forward(x, weight, adapter, config)[0]

        arrays = arrays_of(layer)
        y = mx.compile(output)([backend.asarray(array) for array in arrays])
        desired = output(arrays)
        assert_close(y, desired, rtol=RTOL[desired.dtype.name])

    def test_no_argument_is_written_to(self, backend, layer):
        """In MLX, `b = a; b += 1` changes `a` too."""
        *_, config = layer
        given = [backend.asarray(array) for array in arrays_of(layer)]
        step(as_layer(given, config), asarray=lambda array: array)
        for one, desired in zip(given, arrays_of(layer), strict=True):
            np.testing.assert_array_equal(backend.numpy(one), desired)

    def test_float64_of_numpy_is_not_narrowed(self, backend):
        weight = backend.asarray(np.eye(5))
        a = backend.numpy(doraxp.init(weight, Config(2), seed=0).lora_a)
        np.testing.assert_array_equal(a, doraxp.init(np.eye(5), Config(2), seed=0).lora_a)

    def test_a_cast_without_a_copy_returns_the_same_array(self, backend):
        array, xp = backend.asarray(np.ones(2)), backend.namespace()
        assert xp.astype(array, xp.float64, copy=False) is array
        assert xp.astype(array, xp.float64) is not array
        assert xp.astype(array, xp.float32, copy=False).dtype == xp.float32

    def test_arrays_of_numpy_beside_those_of_mlx_are_refused(self, backend):
        message = "all arrays must be of one library: x is of numpy, weight of mlx"
        with pytest.raises(TypeError, match=message):
            operations(x=np.ones(2), weight=backend.asarray(np.ones(2)))


def test_an_array_of_mlx_has_our_namespace_and_no_device(monkeypatch):
    namespace = types.ModuleType("doraxp.backends._mlx")
    monkeypatch.setitem(sys.modules, namespace.__name__, namespace)
    array = type("array", (), {"__module__": "mlx.core"})()
    _namespaces._mlx.cache_clear()
    assert array_namespace(array) is namespace
    _namespaces._mlx.cache_clear()
    assert device(array) is None


def test_blosc2_is_refused(blosc2):
    """Some of its functions return arrays of another shape or other values."""
    weight = blosc2.asarray(np.ones((6, 8)))
    with pytest.raises(TypeError, match=r"and blosc2 does not: .* Convert the arrays to NumPy"):
        doraxp.decompose(weight)


class Array(np.lib.mixins.NDArrayOperatorsMixin):
    """An array of a library that nobody knows. Its values are not to be read by Python."""

    device = "somewhere"

    def __init__(self, values, library):
        self.values, self.library = np.asarray(values), library

    def __array_namespace__(self, *, api_version=None):
        return self.library

    def __array__(self, dtype=None, copy=None):
        return self.values

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        result = getattr(ufunc, method)(*plain(inputs), **options)
        if out is None:
            return Array(result, self.library)
        self.values = result
        return self

    def __getitem__(self, key):
        return Array(self.values[key], self.library)

    @property
    def dtype(self):
        return self.values.dtype

    @property
    def shape(self):
        return self.values.shape

    @property
    def ndim(self):
        return self.values.ndim

    def __bool__(self):
        raise AssertionError("a value was read")


class Library:
    """NumPy's functions for `Array`, and `changes` of them by name."""

    __name__ = "almost"

    def __init__(self, **changes):
        self.changes = changes

    def __getattr__(self, name):
        found = self.changes.get(name, getattr(array_api_compat.numpy, name))
        if isinstance(found, type) and name != "finfo":
            return found  # a dtype

        def call(*args, **kwargs):
            kwargs.pop("device", None)
            result = found(*plain(args), **kwargs)
            is_array = isinstance(result, np.ndarray | np.generic)
            return Array(result, self) if is_array else result

        return call


def plain(value):
    """Return arrays of NumPy for those of `Library`, in lists and tuples too."""
    if isinstance(value, tuple | list):
        return type(value)(map(plain, value))
    return value.values if isinstance(value, Array) else value


def one_more(name):
    """Return NumPy's function with results that are 1 larger."""
    return lambda *args, **kwargs: getattr(array_api_compat.numpy, name)(*args, **kwargs) + 1


def refusal(rule, reason):
    message = f"almost does not: {re.escape(rule)}: {reason}"
    return pytest.raises(TypeError, match=f"the array API standard says, and {message}")


ARRAY_FUNCTIONS = [
    name for name in FUNCTIONS if hasattr(np, name) and name not in ("all", "finfo", "isdtype")
]


def test_a_library_that_conforms_computes_and_no_value_is_read(layer):
    actual = step(layer, asarray=Library().asarray)
    for one, desired in zip(actual, step(layer), strict=True):
        assert type(one) is Array
        np.testing.assert_allclose(one.values, desired, rtol=0, atol=4e-6 * np.max(np.abs(desired)))


def test_a_library_is_checked_once(monkeypatch):
    library, calls = Library(), []
    monkeypatch.setattr(_boundary, "check_conformance", lambda *given: calls.append(given))
    for _ in range(2):
        operations(x=library.asarray(np.ones(2)))
    assert calls == [(library, "almost")]


@pytest.mark.parametrize("name", ARRAY_FUNCTIONS)
def test_a_function_with_wrong_values_is_named(name):
    weight = Library(**{name: one_more(name)}).asarray(np.ones((2, 3)))
    with refusal(name, r".* instead of .*\. Convert the arrays to NumPy first"):
        doraxp.decompose(weight)


@pytest.mark.parametrize(
    ("name", "function", "reason"),
    [
        ("all", lambda x: np.asarray(False), "False instead of True"),
        ("sum", lambda x, axis: np.sum(x, axis=axis, keepdims=True), r"shape \(2, 1, 4\) instead"),
        (
            "vecdot",
            lambda x, y: np.vecdot(x, y).astype("float64"),
            "dtype float64 instead of float3",
        ),
        ("isdtype", lambda dtype, kind: None, "None instead of True"),
        ("finfo", lambda dtype: np.finfo("float64"), "2.2.*e-16 instead of 1.1.*e-07"),
        ("expm1", None, "TypeError: 'NoneType' object is not callable"),
    ],
)
def test_a_difference_is_described(name, function, reason):
    with refusal(name, reason):
        check_conformance(Library(**{name: function}), "almost")


def other_product(self, other):
    return Array(np.matmul(*plain((self, other)))[..., :1], self.library)


def other_division(self, other):
    """Divide by a number, and ignore an array."""
    return self if isinstance(other, Array) else Array(self.values / other, self.library)


def other_item(self, key):
    return Array(self.values[..., 0] if None in key else self.values[key], self.library)


@pytest.mark.parametrize(
    ("method", "function", "rule"),
    [
        ("__matmul__", other_product, "x @ y"),
        ("__iadd__", lambda self, other: self, "x += y"),
        ("__and__", lambda self, other: self, "comparisons"),
        ("__rsub__", lambda self, other: self, "arithmetic"),
        ("__getitem__", other_item, "x[..., None]"),
        ("__truediv__", other_division, "arithmetic"),
        ("ndim", property(lambda self: 2), "x.dtype, x.shape and x.ndim"),
    ],
)
def test_a_wrong_operator_is_named(monkeypatch, method, function, rule):
    monkeypatch.setattr(Array, method, function, raising=False)
    with refusal(rule, ".* instead of "):
        check_conformance(Library(), "almost")


@pytest.mark.parametrize(
    ("owner", "method", "rule"),
    [
        (LazyOperations, "row_norms", "row_norms"),
        (LazyOperations, "norm_and_direction", "norm_and_direction"),
        (Dense, "outputs", "outputs"),
        (LazyOperations, "gradients", "gradients"),
        (LazyOperations, "merge", "merge"),
        (LazyOperations, "adamw", "adamw"),
    ],
)
def test_an_operation_that_fails_is_named(monkeypatch, owner, method, rule):
    """Each function may be right on a plain array, and fail on the result of another one."""
    right = getattr(owner, method)

    def fail_there(self, *args, **kwargs):
        if isinstance(kwargs.get("ops", self).xp, Library):
            raise ValueError("two\nlines")
        return right(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, fail_there)
    with refusal(rule, "ValueError: two lines"):
        check_conformance(Library(), "almost")


def test_only_shapes_and_dtypes_of_arrays_without_values_are_compared(monkeypatch):
    def refuse(self, dtype=None, copy=None):
        raise TypeError("no values yet")

    monkeypatch.setattr(Array, "__array__", refuse)
    check_conformance(Library(sum=one_more("sum")), "almost")
    with refusal("sum", "shape"):
        check_conformance(Library(sum=lambda x, axis: np.sum(x)), "almost")


def test_a_library_that_warns_is_not_refused():
    def warn(x):
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        return np.abs(x)

    check_conformance(Library(abs=warn), "almost")


def test_every_function_that_the_package_calls_is_checked():
    files = [
        path for room in ("_base", "_core", "optim", "layers") for path in SRC.glob(f"{room}/*")
    ]
    files += [
        SRC / "backends" / f"{name}.py"
        for name in ("_generic", "_direction", "_dtypes", "_layers", "_windows")
    ]
    text = "".join(path.read_text("utf-8") for path in files if path.suffix == ".py")
    called = set(re.findall(r"\bxp\.(\w+)\(", text))
    assert called - set(FUNCTIONS) == set()
    assert len(called) > 15
