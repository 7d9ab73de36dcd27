"""A layer whose weight is given by rows equals the layer whose weight is an array of those rows."""

from __future__ import annotations

import contextlib
import sys
import tracemalloc
from types import SimpleNamespace

import array_api_compat
import numpy as np
import pytest
import reference
from test_numerics import cancelling_layer, dense, dense_exact, error

import doraxp
from doraxp import Adapter, Config, DoRALayer, LayerKind, Linear, QuantisedWeight
from doraxp.backends import Operations, array_namespace
from doraxp.backends._cupy.operations import CupyOperations
from doraxp.backends._generic import LazyOperations
from doraxp.backends._numpy import NumpyOperations

FORMS = ("weight", "direction")
RTOL = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 4e-6, "float64": 1e-13}
OUT, IN, RANK, TOKENS = 23, 24, 3, 5
MIB = 2**20


class Rows:
    """A weight that writes NaN into the array it returned before, each time that it is asked."""

    def __init__(self, values):
        self.values, self.last, self.read = values, None, []
        self.shape, self.dtype = values.shape, values.dtype
        if (jax := sys.modules.get("jax")) is not None:
            with contextlib.suppress(ValueError):  # registered already
                jax.tree_util.register_pytree_node(
                    Rows, lambda weight: ((weight.values,), None), lambda _, values: Rows(*values)
                )

    def rows(self, rows):
        if self.last is not None and not array_api_compat.is_lazy_array(self.last):
            self.last[:, :] = float("nan")
        self.read.append((rows.start, rows.stop))
        self.last = array_namespace(self.values).asarray(self.values[rows, :], copy=True)
        return self.last


def nibbles(values, high_first=True):
    """Return the table of bytes of which each half stands for one of 16 values."""
    pair = np.repeat(values, 16), np.tile(values, 16)
    return np.stack(pair if high_first else pair[::-1], axis=1).astype("float32")


def packed_arrays(count=2, group=8, bias=False, shape=(OUT, IN), seed=0):
    """Return the arrays of a packed weight: codes, table, scale and a bias or None."""
    rng, (out, inner) = np.random.default_rng(seed), shape
    codes = rng.integers(0, 256, (out, inner // count), dtype=np.uint8)
    table = rng.standard_normal((256, count)).astype("float32")
    if isinstance(group, tuple):
        scales = -(-out // group[0]), -(-inner // group[1])
    else:
        scales = (-(-out * inner // group),)
    scale = rng.uniform(0.5, 2, scales).astype("float32")
    return codes, table, scale, rng.standard_normal(scales).astype("float32") if bias else None


def values_of(codes, table, scale, bias, group):
    """Return W, number by number, in float32."""
    count = table.shape[1]
    out, inner = codes.shape[0], codes.shape[1] * count
    w = np.empty((out, inner), "float32")
    for i in range(out):
        for j in range(inner):
            if isinstance(group, tuple):
                place = i // group[0], j // group[1]
            else:
                place = ((i * inner + j) // group,)
            value = np.float32(table[codes[i, j // count], j % count] * scale[place])
            w[i, j] = value if bias is None else np.float32(value + bias[place])
    return w


def quantised(backend, dtype="float32", **kwargs):
    """Return a packed weight of the library."""
    group = kwargs.get("group", 8)
    arrays = [each if each is None else backend.asarray(each) for each in packed_arrays(**kwargs)]
    kind = backend.asarray(np.zeros(1, backend_dtype(dtype))).dtype
    return QuantisedWeight(*arrays[:3], group=group, bias=arrays[3], dtype=kind)


def backend_dtype(name):
    if name != "bfloat16":
        return name
    import ml_dtypes

    return ml_dtypes.bfloat16


@pytest.fixture(params=["plain", "packed"])
def make(request, backend):
    """Return a function that makes a weight given by rows, and the array of its rows."""

    def pair(dtype="float32"):
        weight = quantised(backend, dtype)
        whole = weight.rows(slice(0, OUT))
        if request.param == "plain":
            weight = Rows(whole)
        return weight, whole

    return pair


@pytest.fixture(params=[8 * IN, 1000], ids=["blocks", "whole"])
def blocks(request, monkeypatch):
    """Make three blocks, or one."""
    for kind in (Operations, NumpyOperations, CupyOperations):
        if "block_size" in vars(kind):
            monkeypatch.setattr(kind, "block_size", lambda *_: request.param)


def drawn(draw, dtype="float32"):
    wide = "float64" if dtype == "float64" else "float32"
    adapter = Adapter(
        draw(RANK, IN, dtype=wide), draw(OUT, RANK, dtype=wide), draw(OUT, dtype=wide)
    )
    return (
        adapter,
        draw(TOKENS, IN, dtype=dtype),
        draw(OUT, dtype=wide),
        draw(TOKENS, OUT, dtype=dtype),
    )


def everything(backend, weight, adapter, config, x, bias, dy, mask=None):
    """Return all results of a layer by name, of calls as the lane makes them."""
    run = backend.run
    found = {}
    fresh = run(doraxp.init, weight, config, seed=1)
    found |= {f"fresh {name}": leaf for name, leaf in fresh._asdict().items()}
    found["m"], found["unit"] = run(doraxp.decompose, weight)
    prepared = run(doraxp.prepare, weight, adapter, config)
    for name in ("norm", "gain", "unit_projection", "weight_squares"):
        found[name] = getattr(prepared, name)
    y, cache = run(doraxp.forward, x, weight, adapter, config, bias=bias, dropout_mask=mask)
    grads = run(doraxp.backward, dy, cache)
    found |= {"y": y, "dx": grads.x, **grads.adapter._asdict()}
    found["merged"] = run(doraxp.merge, weight, adapter, config)
    return found


@pytest.mark.usefixtures("blocks")
@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
@pytest.mark.parametrize("form", FORMS)
def test_every_result_equals_that_of_the_array(
    backend, draw, assert_close, make, dtype, form, norm_gradient, monkeypatch
):
    """PyTorch computes an array in mixed precision where it can, and rows never: not here."""
    monkeypatch.setattr("doraxp.backends._torch.multiplies", lambda kind, dtype: False)
    config = Config(RANK, 5.0, form=form, norm_gradient=norm_gradient)
    weight, whole = make(dtype)
    adapter, x, bias, dy = drawn(draw, dtype)
    actual = everything(backend, weight, adapter, config, x, bias, dy)
    desired = everything(backend, whole, adapter, config, x, bias, dy)
    for name, array in desired.items():
        rounded = name in ("y", "dx", "merged")
        rtol = RTOL[dtype] if rounded else RTOL["float64" if dtype == "float64" else "float32"]
        assert_close(actual[name], array, rtol=10 * rtol if dtype == "bfloat16" else rtol)


@pytest.mark.lanes("numpy", "torch", "cupy", "cuda-host")
def test_a_class_as_dtype_is_the_dtype(backend):
    """NumPy's dtypes compare equal to classes, and have other names."""
    namespace, arrays = backend.namespace(), map(backend.asarray, packed_arrays()[:3])
    weight = QuantisedWeight(*arrays, group=8, dtype=namespace.float64)
    assert doraxp.init(weight, Config(RANK), seed=0).lora_a.dtype == namespace.float64
    plain = Rows(weight.rows(slice(0, OUT)))
    plain.dtype = namespace.float64
    assert doraxp.init(plain, Config(RANK), seed=0).lora_a.dtype == namespace.float64


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dropout", ["input", "low_rank"])
def test_dropout_equals_that_of_the_array(backend, draw, assert_close, make, dropout):
    config, (weight, whole) = Config(RANK, 5.0, dropout=dropout), make()
    adapter, x, bias, dy = drawn(draw)
    mask = backend.asarray((np.arange(TOKENS * IN).reshape(TOKENS, IN) % 4 > 0) / np.float32(0.75))
    actual = everything(backend, weight, adapter, config, x, bias, dy, mask)
    for name, array in everything(backend, whole, adapter, config, x, bias, dy, mask).items():
        assert_close(actual[name], array, rtol=RTOL["float32"])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("form", FORMS)
def test_a_known_norm_gives_the_same(backend, draw, assert_close, make, form, tokens):
    """With `prepared`, and with `previous` of another adapter."""
    config, (weight, whole) = Config(RANK, 5.0, form=form), make()
    adapter, x, bias, dy = drawn(draw)
    x, dy = x[:tokens, :], dy[:tokens, :]
    prepared = doraxp.prepare(weight, adapter, config)
    earlier = doraxp.prepare(weight, adapter._replace(lora_b=2 * adapter.lora_b), config)
    desired = everything(backend, whole, adapter, config, x, bias, dy)
    for known in ({"prepared": prepared}, {"previous": earlier}):
        y, cache = doraxp.forward(x, weight, adapter, config, bias=bias, **known)
        grads = doraxp.backward(dy, cache)
        actual = {"y": y, "dx": grads.x, **grads.adapter._asdict()}
        for name, array in actual.items():
            assert_close(array, desired[name], rtol=RTOL["float32"])
    merged = doraxp.merge(weight, adapter, config, prepared=prepared)
    assert_close(merged, desired["merged"], rtol=RTOL["float32"])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("ratio", [0.1, 1e-3])
@pytest.mark.parametrize("form", FORMS)
def test_cancelling_rows_lose_no_more_than_the_dense_way(backend, form, ratio):
    rng, config = np.random.default_rng(5), Config(3, 6.0, form=form)
    layer = cancelling_layer(ratio, slice(3, 9), config, rng, out=OUT, inner=IN)
    x, dy = (rng.standard_normal((TOKENS, n)).astype("float32") for n in (IN, OUT))
    exact, plain = (
        dense_exact(layer, x, dy),
        dense(layer, x, dy, backend.asarray, backend.namespace()),
    )
    weight, leaves = Rows(backend.asarray(layer.weight)), Adapter(*map(backend.asarray, layer[1:4]))
    y, cache = backend.run(doraxp.forward, backend.asarray(x), weight, leaves, config)
    grads = backend.run(doraxp.backward, backend.asarray(dy), cache)
    actual = {"norm": cache.prepared.norm, "y": y, "x": grads.x, **grads.adapter._asdict()}
    for name, array in actual.items():
        bound = 4 * error(backend.numpy(plain[name]), exact[name])
        assert error(backend.numpy(array), exact[name]) <= bound, name


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_zeros_and_rows_beyond_the_range_of_squares(backend, form):
    rng, config = np.random.default_rng(3), Config(2, form=form)
    values = rng.standard_normal((7, 6)).astype("float32")
    values[2] = 0
    values[3] *= np.float32(1e30)
    weight = Rows(backend.asarray(values))
    adapter = backend.run(doraxp.init, weight, config, seed=0)
    x, dy = np.eye(6, dtype="float32"), np.ones((6, 7), "float32")
    y, cache = backend.run(doraxp.forward, backend.asarray(x), weight, adapter, config)
    grads = backend.run(doraxp.backward, backend.asarray(dy), cache)
    layer = reference.Layer(values, *map(backend.numpy, adapter), 1.0, form)
    expected = reference.solve(layer, x, np.zeros(7), dy, "exact")
    np.testing.assert_allclose(backend.numpy(y), expected.y, rtol=4e-6)
    lengths = np.linalg.norm(values.astype("float64"), axis=1)
    np.testing.assert_allclose(backend.numpy(adapter.magnitude), lengths, rtol=4e-6)
    np.testing.assert_allclose(
        backend.numpy(grads.adapter.magnitude), expected.magnitude, rtol=1e-5
    )
    assert not backend.numpy(grads.adapter.lora_b)[2].any()


def test_v_of_blocks_is_v(backend, draw, assert_close, blocks):
    config, weight = Config(RANK), quantised(backend)
    adapter, *_ = drawn(draw)
    suspect = adapter._replace(lora_b=0 * adapter.lora_b, lora_a=weight.rows(slice(0, RANK)))
    leaf = np.zeros((OUT, RANK), "float32")
    leaf[0, 0] = -1  # the first row of V is 0
    suspect = suspect._replace(lora_b=backend.asarray(leaf))
    direction = doraxp.prepare(weight, suspect, config).direction
    ops = doraxp.backends.operations(weight=weight)
    v = np.array(backend.numpy(weight.rows(slice(0, OUT))))
    v[0] = 0
    assert_close(direction.with_weight(weight).dense(ops=ops), v, rtol=0)


@pytest.mark.usefixtures("blocks")
@pytest.mark.lanes("numpy")
@pytest.mark.parametrize("form", FORMS)
def test_a_library_whose_values_are_not_read_gives_the_same(
    backend, draw, assert_close, monkeypatch, make, form
):
    """NumPy computes here by the generic operations of a library that may be lazy."""
    config, (weight, whole) = Config(RANK, 5.0, form=form), make()
    adapter, x, bias, dy = drawn(draw)
    desired = everything(backend, whole, adapter, config, x, bias, dy)
    lazy = LazyOperations(array_api_compat.numpy)
    monkeypatch.setattr("doraxp.backends._boundary._NUMPY", lazy)
    if isinstance(weight, Rows):
        weight.rows = lambda rows: whole[rows]  # a lazy library overwrites no array
    actual = everything(backend, weight, adapter, config, x, bias, dy)
    for name, array in desired.items():
        assert_close(actual[name], array, rtol=RTOL["float32"])


@pytest.mark.lanes("numpy", "torch")
def test_a_step_with_a_known_norm_reads_the_weight_twice(draw, backend):
    """Once in the forward, which makes x Wᵀ and A Wᵀ at once, and once in the backward."""
    config, weight = Config(RANK), Rows(backend.asarray(np.eye(OUT, IN, dtype="float32")))
    adapter, x, _, dy = drawn(draw)
    earlier = doraxp.prepare(weight, adapter, config)
    weight.read.clear()
    _, cache = doraxp.forward(x, weight, adapter, config, previous=earlier)
    doraxp.backward(dy, cache)
    assert weight.read == [(0, 1), (0, OUT), (0, OUT)]  # a row tells the library


@pytest.mark.lanes("cuda-host")
@pytest.mark.dtypes("bfloat16", "float32")
def test_a_step_of_one_block_takes_the_launches_of_an_array_and_four_to_unpack(
    backend, draw, dtype
):
    """A row tells the library; the norm, the forward and the backward read the weight once each."""
    config, weight = Config(RANK), quantised(backend, dtype)
    adapter, x, bias, dy = drawn(draw, dtype)
    launched = []
    for each in (weight, weight.rows(slice(0, OUT))):
        earlier = doraxp.prepare(each, adapter, config)
        cuda = doraxp.backends.operations(x=x).cuda
        cuda.launched.clear()
        _, cache = doraxp.forward(x, each, adapter, config, bias=bias, previous=earlier)
        doraxp.backward(dy, cache)
        launched.append(list(cuda.launched))
    packed, plain = launched
    assert packed.count("unpack") == 4
    assert [name for name in packed if name != "unpack"] == plain


# The packed weight


KINDS = {
    "nf4": {"count": 2, "group": 8},
    "groups that cross rows": {"count": 2, "group": 18},
    "int8": {"count": 1, "group": (1, IN)},
    "fp8": {"count": 1, "group": (8, 16)},
    "one scale": {"count": 1, "group": (OUT, IN)},
    "a scale for each number": {"count": 4, "group": (1, 1)},
    "affine": {"count": 2, "group": (1, 8), "bias": True},
    "affine that crosses rows": {"count": 2, "group": 20, "bias": True},
}  # fmt: skip


@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_packed_weight_are_those_of_the_formula(
    backend, assert_close, monkeypatch, dtype, kind
):
    monkeypatch.setattr("doraxp.backends._numpy.CACHE_BLOCK", 3 * IN)
    weight = quantised(backend, dtype, **KINDS[kind])
    desired = values_of(*packed_arrays(**KINDS[kind]), KINDS[kind]["group"])
    assert weight.shape == (OUT, IN)
    generic = Operations(backend.namespace())
    for rows in (slice(0, OUT), slice(5, 13), slice(22, 23), slice(7, None)):
        rounded = desired[rows].astype(backend_dtype(dtype))
        assert_close(weight.rows(rows), rounded, rtol=0)
        inside = slice(*rows.indices(OUT)[:2])
        assert_close(generic.unpacked(weight.packed, inside), rounded, rtol=0)


@pytest.mark.parametrize("high_first", [True, False])
def test_the_table_says_which_half_of_a_byte_is_first(high_first):
    values = np.arange(16, dtype="float32")
    table, one = nibbles(values, high_first), np.ones((1, 1), "float32")
    weight = QuantisedWeight(np.array([[0x1E]], "uint8"), table, one, group=(1, 2))
    assert weight.rows(slice(0, 1)).tolist() == [[1, 14] if high_first else [14, 1]]


def test_jax_sees_the_arrays_of_a_packed_weight(monkeypatch):
    """With a stand-in for JAX, which is not needed."""
    found = []
    tree = SimpleNamespace(register_pytree_node=lambda *given: found.append(given))
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(tree_util=tree))
    weight = quantised(SimpleNamespace(asarray=np.asarray), bias=True)
    ((kind, arrays, made_of),) = found
    assert kind is QuantisedWeight
    leaves, rest = arrays(weight)
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    again = made_of(rest, [2 * leaf if leaf.dtype == "float32" else leaf for leaf in leaves])
    assert (again.shape, again.dtype) == (weight.shape, weight.dtype)
    monkeypatch.delitem(sys.modules, "jax")
    assert quantised(SimpleNamespace(asarray=np.asarray)).shape == (OUT, IN)


def test_codes_on_another_device_are_refused(monkeypatch):
    monkeypatch.setattr("doraxp._core.quantised.device", lambda array: array.dtype.name)
    with pytest.raises(ValueError, match="codes must be on float32, where table is"):
        quantised(SimpleNamespace(asarray=np.asarray))


def test_a_packed_weight_counts_its_bytes():
    weight = quantised(SimpleNamespace(asarray=np.asarray), group=8, bias=True)
    assert weight.nbytes == OUT * IN // 2 + 4 * (512 + 2 * OUT * IN // 8)
    assert repr(weight).startswith("QuantisedWeight(shape=(23, 24), dtype=")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"codes": np.ones((4, 4), "int8")}, TypeError, "codes must be uint8"),
        ({"codes": np.ones(4, "uint8")}, ValueError, r"codes must have shape \(out, in / 2\)"),
        ({"table": np.ones((256, 2))}, TypeError, "table must be of dtype float32, got float64"),
        ({"table": np.ones((16, 1), "f4")}, ValueError, r"table must have shape \(256, 1, 2 or 4"),
        ({"scale": np.ones((4, 3), "f4")}, ValueError, r"scale must have shape \(4, 2\)"),
        ({"bias": np.ones((4, 3), "f4")}, ValueError, r"bias must have shape \(4, 2\)"),
        ({"group": (0, 4)}, ValueError, "each number of group must be at least 1"),
        ({"group": 5}, ValueError, r"scale must have shape \(7,\)"),
        ({"dtype": np.int32}, TypeError, "dtype must be of dtype float16"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(changed, error, message):
    given = {
        "codes": np.ones((4, 4), "uint8"), "table": np.ones((256, 2), "f4"),
        "scale": np.ones((4, 2), "f4"), "group": (1, 4),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        QuantisedWeight(**{**given, **changed})


# Memory


def peak_of(step):
    """Return the most bytes that were in use at once during a call, beyond those before it."""
    tracemalloc.start()
    try:
        step()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_needs_32_mib_more_than_the_tokens(dtype):
    """4096×4096 in 4 bits. The step on the array needs the arrays of the tokens alone."""
    size, tokens, config = 4096, 64, Config(16)
    weight = quantised(
        SimpleNamespace(asarray=np.asarray), dtype, shape=(size, size), group=(1, 64)
    )
    assert weight.nbytes <= size * size * 0.5 * 1.13
    adapter = doraxp.init(weight, config, seed=0)
    x, dy = np.ones((tokens, size), "float32"), np.ones((tokens, size), "float32")
    known = {id(w): doraxp.prepare(w, adapter, config) for w in (weight,)}

    def step(w):
        _, cache = doraxp.forward(x, w, adapter, config, previous=known[id(w)])
        doraxp.backward(dy, cache)
        doraxp.prepare(w, adapter, config)

    of_tokens = 12 * tokens * size * 4
    assert peak_of(lambda: step(weight)) <= of_tokens + 32 * MIB


# Layers, and the arguments that are refused


def test_a_layer_trains_around_a_packed_weight(backend, draw, assert_close):
    config, weight = Config(RANK), quantised(backend)
    whole = weight.rows(slice(0, OUT))
    x, dy = draw(TOKENS, IN, dtype="float32"), draw(TOKENS, OUT, dtype="float32")
    ours, plain = (
        DoRALayer(SimpleNamespace(weight=w, bias=None), config, seed=0) for w in (weight, whole)
    )
    for layer in (ours, plain):
        for _ in range(2):
            layer.forward(x)
            layer.backward(dy)
            layer.update_parameters(1e-3)
    assert ours.weight is weight
    for name, array in plain.state_dict().items():
        assert_close(ours.state_dict()[name], array, rtol=1e-5)
    assert_close(ours.get_parameters(), plain.get_parameters(), rtol=1e-5)
    merged = ours.merge_to_original_layer().weight
    assert_close(merged, plain.merge_to_original_layer().weight, rtol=1e-5)
    change, desired = ours.diagnostics().change, plain.diagnostics().change
    assert_close(change.magnitude_rows, desired.magnitude_rows, rtol=1e-3)


def test_other_functions_take_the_weight(backend, draw, assert_close, make):
    config, (weight, whole) = Config(RANK), make()
    adapter, *_ = drawn(draw)
    assert_close(
        doraxp.convert_form(weight, adapter, config, "direction")[0].lora_b,
        doraxp.convert_form(whole, adapter, config, "direction")[0].lora_b,
        rtol=1e-6,
    )
    update = doraxp.UpdateAdapter(doraxp.LowRank(*adapter[:2]), adapter.magnitude)
    merged, desired = (doraxp.merge(w, update, config) for w in (weight, whole))
    assert_close(merged, desired, rtol=1e-6)
    layers = doraxp.adapt({"q.weight": weight}, "all-linear", config, seed=0)
    assert_close(layers["q"].adapter.magnitude, doraxp.decompose(whole)[0], rtol=1e-6)
    kind = LayerKind()
    assert_close(
        doraxp.merge(weight, adapter, config, kind=kind),
        doraxp.merge(whole, adapter, config),
        rtol=4e-6,
    )


class Wrong(Rows):
    """A weight whose rows have another shape or dtype than it says."""

    def __init__(self, values, **changed):
        super().__init__(values)
        vars(self).update(changed)


def test_arguments_that_do_not_fit_a_weight_given_by_rows_are_refused(draw):
    weight, config = quantised(SimpleNamespace(asarray=np.asarray)), Config(RANK)
    adapter = doraxp.init(weight, config, seed=0)
    x = np.ones((TOKENS, IN), "float32")
    y, cache = doraxp.forward(x, weight, adapter, config)
    with pytest.raises(ValueError, match="train_base must be False for a weight that is given by"):
        doraxp.backward(y, cache, train_base=True)
    with pytest.raises(ValueError, match="reduce must be None for a weight that is given by rows"):
        doraxp.prepare(weight, adapter, config, reduce=lambda array: array)
    base = SimpleNamespace(weight=weight)
    for choice in ({"train_base": True}, {"weight_layout": "in_out"}):
        with pytest.raises(ValueError, match="train_base must be False and weight_layout 'out_in'"):
            DoRALayer(base, config, seed=0, **choice)
    with pytest.raises(TypeError, match="weight must be an array"):
        Linear(weight)
    with pytest.raises(
        ValueError, match="given by rows must be of kind 'linear', got 'transposed'"
    ):
        doraxp.merge(weight, adapter, config, kind=LayerKind("transposed"))
    values = np.ones((4, 6), "float32")
    for wrong, message in (
        (Wrong(values, shape=(2, 4, 6)), r"weight must have shape \(out, in\)"),
        (Wrong(values, shape=(0, 6)), r"weight must have shape \(out, in\)"),
        (Wrong(values, shape=(4, 7)), r"weight.rows\(slice\(0, 1\)\) must have shape \(1, 7\)"),
        (Wrong(values, dtype=np.dtype("f8")), r"must have shape \(1, 6\) and dtype float64"),
    ):
        with pytest.raises(ValueError, match=message):
            doraxp.init(wrong, Config(1), seed=0)


def test_a_library_without_overrides_has_blocks_of_one_size():
    """NumPy and CuPy choose the size of a block themselves."""
    from doraxp.backends import _generic

    assert _generic.LazyOperations.block_size(None, None, 7) == _generic.ROW_BLOCK
