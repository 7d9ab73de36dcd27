"""Mixed precision: what 16-bit layers promise, and how `exact_products` turns it off."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace

import mixed
import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config, backends
from doraxp.testing import Library, expected

pytestmark = pytest.mark.lanes("cuda-host", "cupy", "torch")
CUDA = pytest.mark.lanes("cuda-host", "cupy")
"""For tests with rows that cancel: PyTorch stores V and z in float32 there."""

GRADIENTS = ("dx", "da", "db", "dm", "dw", "dbias")
BETTER = [("detached", 0.02, 100), ("detached", 1.0, 100), ("exact", 0.02, 10), ("exact", 1.0, 3)]
"""How many times smaller than PEFT's the errors of dA and dB are, at least.

The norm's gradient, ‖s B A‖ / ‖W‖, and the factor. With a detached norm no rounding of 16 bits
reaches dA and dB. With an exact one the rounding of z does, in proportion to V Aᵀ / n, and that
grows with the update.
"""


@pytest.fixture(autouse=True)
def every_cpu_multiplies_16_bits(monkeypatch):
    """PyTorch rounds on CPUs that multiply 16-bit numbers: test that on all of them."""
    monkeypatch.setattr("doraxp.backends._torch.multiplies", lambda kind, dtype: True)


def run(backend, case, dtype, wide=(), reduce=None):
    """Return the results of a layer, by the names of `expected`, and z.

    The arrays have the values of `dtype`; the adapter and those named `wide` are of float32.
    """
    kind = mixed.KINDS.get(dtype, dtype)
    arrays = {
        name: array.astype(np.float32 if name in (*Adapter._fields, *wide) else kind)
        for name, array in case.stored(dtype).items()
    }
    arrays = {name: backend.asarray(array) for name, array in arrays.items()}
    adapter = Adapter(*(arrays[name] for name in Adapter._fields))
    mask = arrays.get("dropout_mask")

    def step(x, weight, adapter, dy, bias, mask):
        prepared = doraxp.prepare(weight, adapter, case.config, reduce=reduce)
        y, cache = doraxp.forward(
            x, weight, adapter, case.config, bias=bias, prepared=prepared, dropout_mask=mask,
            reduce=reduce,
        )  # fmt: skip
        found = doraxp.backward(dy, cache, train_base=True)
        return {
            "norm": prepared.norm,
            "merged": doraxp.merge(weight, adapter, case.config, prepared=prepared),
            "y": y,
            "dx": found.x,
            "da": found.adapter.lora_a,
            "db": found.adapter.lora_b,
            "dm": found.adapter.magnitude,
            "dw": found.weight,
            "dbias": found.bias,
            "z": cache.z,
        }

    found = backend.run(
        step, arrays["x"], arrays["weight"], adapter, arrays["dy"], arrays["bias"], mask
    )
    return {name: backend.numpy(array) for name, array in found.items()}


def shares(found, wanted):
    """Return the largest error of each result in units of its bound."""
    return {name: want.share(found[name]) for name, want in wanted.items()}


def is_mixed(found):
    """Whether z is stored in 16 bits."""
    return found["z"].dtype.itemsize == 2


def bits(found):
    return {name: array.tobytes() for name, array in found.items()}


CONFIGS = [
    Config(4, 8.0, form=form, norm_gradient=norm_gradient)
    for form in ("weight", "direction")
    for norm_gradient in ("exact", "detached")
]


def named(config):
    return f"{config.form}-{config.norm_gradient}"


@pytest.fixture(params=CONFIGS, ids=named)
def config(request):
    return request.param


# The default


@pytest.mark.dtypes("float16", "bfloat16")
@pytest.mark.parametrize("stack", [(), (2, 1)], ids=["one", "stack"])
@pytest.mark.parametrize("dropout", [None, "input", "low_rank"])
def test_all_results_are_within_the_bounds(backend, dtype, config, dropout, stack):
    if dropout is not None:
        config = Config(
            4, 8.0, form=config.form, norm_gradient=config.norm_gradient, dropout=dropout
        )
    case = mixed.layer(config, stack=stack, mask=dropout is not None)
    found = run(backend, case, dtype)
    assert is_mixed(found)
    assert max(shares(found, expected(case, dtype, precision="mixed")).values()) <= 1


@pytest.mark.dtypes("float16", "bfloat16")
@pytest.mark.parametrize("stack", [(), (2, 1)], ids=["one", "stack"])
def test_a_dy_of_more_bits_is_not_rounded(backend, dtype, config, stack):
    case = mixed.layer(config, stack=stack)
    found = run(backend, case, dtype, wide=("dy",))
    assert is_mixed(found)
    assert max(shares(found, expected(case, dtype, precision="mixed")).values()) <= 1


@pytest.mark.dtypes("float16", "bfloat16")
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_only_the_rounding_of_z_reaches_the_adapter(backend, dtype, config, tokens):
    """Given the stored z, dA, dB, dm and dW have float32's errors."""
    case = mixed.layer(config, tokens=tokens, update=2.0)
    found = run(backend, case, dtype)
    assert is_mixed(found)
    assert max(shares(found, mixed.expected_from(found["z"], case, dtype)).values()) <= 1


def cancelling(config, dtype, every=8, **shape):
    """Return a layer in which W and s B A cancel in one row of `every` few."""
    case = mixed.layer(config, update=1.0, **{"out": 40, **shape})
    arrays = case.stored(dtype)
    length = np.linalg.norm(arrays["weight"], axis=-1, keepdims=True)
    rho = 1 / length if config.form == "direction" else 1.0
    update = config.scaling * arrays["lora_b"] @ arrays["lora_a"] / rho
    weight = case.arrays["weight"].copy()
    weight[::every] = 0.01 * weight[::every] - update[::every]
    b = arrays["lora_b"].astype(float)
    if config.form == "direction":
        b[::every] *= length[::every] / np.linalg.norm(weight[::every], axis=-1, keepdims=True)
    return mixed.changed(case, weight=weight, lora_b=b)


@CUDA
@pytest.mark.dtypes("float16", "bfloat16")
def test_rows_that_cancel_are_made_from_v(backend, dtype, config):
    """The bounds of such rows have no terms of the size of W and B A, which cancel."""
    case = cancelling(config, dtype)
    found = run(backend, case, dtype)
    assert is_mixed(found)
    assert max(shares(found, expected(case, dtype, precision="mixed")).values()) <= 1


@pytest.mark.dtypes("float16", "bfloat16", "float32")
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("block", [backends.exact_products, contextlib.nullcontext])
def test_an_adapter_may_fill_a_row_of_zeros(backend, dtype, config, tokens, block):
    """In the direction form such a row has ρ = 0, and V is s B A there."""
    case = mixed.layer(config, tokens=tokens)
    weight = case.arrays["weight"].copy()
    weight[3:5] = 0
    case = mixed.changed(case, weight=weight)
    with block():
        found = run(backend, case, dtype)
    precision = "mixed" if is_mixed(found) else "exact"
    assert max(shares(found, expected(case, dtype, precision=precision)).values()) <= 1


@CUDA
@pytest.mark.dtypes("float16", "bfloat16")
@pytest.mark.parametrize("wide", [("x",), ("dy",), ("x", "dy")], ids="-".join)
def test_rows_that_cancel_are_made_from_an_x_and_a_dy_of_two_dtypes(backend, dtype, config, wide):
    case = cancelling(config, dtype)
    found = run(backend, case, dtype, wide)
    precision = "exact" if "x" in wide else "mixed"
    wanted = expected(case, dtype, precision=precision)
    assert is_mixed(found) == (precision == "mixed")
    assert max(shares(found, wanted).values()) <= 1


@CUDA
@pytest.mark.dtypes("float16", "bfloat16")
@pytest.mark.parametrize(("form", "rank"), [("weight", 40), ("direction", 70)])
def test_ends_of_blocks_and_of_ranks_are_within_the_bounds(backend, dtype, form, rank):
    """No length fills the last block, and two rows cancel."""
    config = Config(rank, float(rank), form=form)
    case = cancelling(config, dtype, every=200, out=301, inner=141, tokens=37)
    found = run(backend, case, dtype)
    assert is_mixed(found)
    assert max(shares(found, expected(case, dtype, precision="mixed")).values()) <= 1


@pytest.mark.dtypes("bfloat16")
@pytest.mark.parametrize("form", ["weight", "direction"])
def test_a_block_that_takes_its_rows_in_two_steps_adds_both_up(backend, dtype, form):
    """More than 2048 rows: a block of the norm's gradient takes 256 of them, 128 at once."""
    case = mixed.layer(Config(4, 8.0, form=form), out=2100, inner=9, tokens=3, update=2.0)
    found = run(backend, case, dtype)
    given_z = mixed.expected_from(found["z"], case, dtype)
    assert given_z["da"].share(found["da"]) <= 1


@pytest.mark.dtypes("bfloat16", "float32")
@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
def test_the_gradients_of_a_tiny_row_are_finite(backend, dtype, norm_gradient):
    """p / n of the row is above the range of float32, but p b / n is not."""
    case = mixed.layer(Config(4, 8.0, norm_gradient=norm_gradient), update=1.0)
    weight, b = case.arrays["weight"].copy(), case.arrays["lora_b"].copy()
    weight[5] *= 1e-22
    b[5] *= 1e-22
    case = mixed.changed(case, weight=weight, lora_b=b)
    found = run(backend, case, dtype)
    precision = "mixed" if dtype != "float32" else "exact"
    assert max(shares(found, expected(case, dtype, precision=precision)).values()) <= 1


@pytest.mark.dtypes("float16", "bfloat16", "float32")
@pytest.mark.parametrize("dropout", [None, "input", "low_rank"])
def test_a_layer_whose_input_axis_is_split_is_computed_exactly(backend, dtype, config, dropout):
    """V is stored, and no number is rounded beside the results."""
    config = replace(config, dropout=dropout or "input")
    case = mixed.layer(config, mask=dropout is not None)
    found = run(backend, case, dtype, reduce=lambda array: array)
    assert max(shares(found, expected(case, dtype)).values()) <= 1


@pytest.mark.dtypes("float16", "bfloat16")
@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=["one axis", "two"])
def test_no_tokens_give_zeros(backend, dtype, config, shape):
    case = mixed.layer(config)
    case = mixed.changed(case, x=np.zeros((*shape, 40)), dy=np.zeros((*shape, 24)))
    found = run(backend, case, dtype)
    assert found["y"].shape == (*shape, 24)
    assert found["dx"].shape == (*shape, 40)
    for name in ("da", "db", "dm", "dw", "dbias"):
        assert found[name].size > 0
        assert not found[name].any()


@pytest.mark.dtypes("float16", "bfloat16")
@pytest.mark.parametrize(("norm_gradient", "update", "factor"), BETTER)
def test_gradients_of_a_and_b_are_better_than_pefts(backend, dtype, norm_gradient, update, factor):
    detached = Config(4, 8.0, norm_gradient="detached")
    case = mixed.layer(
        Config(4, 8.0, norm_gradient=norm_gradient), out=96, inner=128, tokens=64, update=update
    )
    ours = run(backend, case, dtype)
    theirs = mixed.peft_step(mixed.with_tokens(case, dtype), detached, dtype)
    right, without = (
        expected(each, dtype) for each in (case, mixed.changed(case, config=detached))
    )
    for name in ("da", "db"):
        error = mixed.distance(ours[name], right[name].value)
        assert mixed.distance(theirs[name], without[name].value) > factor * error, name


# The range of float16


@pytest.mark.dtypes("float16")
@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-4, 1e-2, 1.0, 100.0, 5e3])
def test_gradients_of_any_size_are_finite_and_within_the_bounds(backend, dtype, config, size):
    case = mixed.layer(config, out=32, inner=64, tokens=96, dy=size)
    found = run(backend, case, dtype)
    wanted = expected(case, dtype, precision="mixed")
    for name in GRADIENTS:
        assert np.all(np.isfinite(found[name])), name
        assert wanted[name].share(found[name]) <= 1, name
    given_z = mixed.expected_from(found["z"], case, dtype)
    assert max(shares(found, given_z).values()) <= 1


@pytest.mark.dtypes("float16")
def test_sums_over_many_tokens_do_not_overflow(backend, dtype, config):
    """Each sum over the tokens is far above the range of float16."""
    case = mixed.layer(config, out=32, inner=64, tokens=512)
    signs = np.sign(case.arrays["x"] @ np.swapaxes(case.arrays["weight"], -1, -2))
    case = mixed.changed(case, dy=302.0 * signs)
    found = run(backend, case, dtype)
    wanted = expected(case, dtype, precision="mixed")
    assert np.max(np.abs(wanted["dm"].value * wanted["norm"].value)) > 65504  # e
    for name in GRADIENTS:
        assert np.all(np.isfinite(found[name])), name
        assert wanted[name].share(found[name]) <= 1, name


# Where the default is not mixed precision


@pytest.mark.dtypes("float16", "bfloat16")
@pytest.mark.parametrize("dropout", [None, "input", "low_rank"])
def test_exact_products_round_only_results(backend, dtype, config, dropout):
    if dropout is not None:
        config = Config(
            4, 8.0, form=config.form, norm_gradient=config.norm_gradient, dropout=dropout
        )
    case = mixed.layer(config, mask=dropout is not None)
    with backends.exact_products():
        found = run(backend, case, dtype)
    assert not is_mixed(found)
    assert max(shares(found, expected(case, dtype)).values()) <= 1


@pytest.mark.dtypes("float16", "bfloat16")
@pytest.mark.parametrize("dropout", [None, "input", "low_rank"])
@pytest.mark.parametrize("block", [backends.exact_products, contextlib.nullcontext])
def test_a_backward_is_as_exact_as_its_forward(backend, dtype, dropout, block):
    config = Config(4, 8.0, dropout=dropout or "input")
    case = mixed.layer(config, mask=dropout is not None)
    arrays = {
        name: backend.asarray(
            array.astype(np.float32 if name in Adapter._fields else mixed.KINDS[dtype])
        )
        for name, array in case.stored(dtype).items()
    }
    adapter = Adapter(*(arrays[name] for name in Adapter._fields))
    with block():
        _, cache = backend.run(
            doraxp.forward, arrays["x"], arrays["weight"], adapter, config,
            dropout_mask=arrays.get("dropout_mask"),
        )  # fmt: skip
        same = backend.run(doraxp.backward, arrays["dy"], cache)
    for other in (backends.exact_products, contextlib.nullcontext):
        with other():
            found = backend.run(doraxp.backward, arrays["dy"], cache)
        for one, wanted in zip((found.x, *found.adapter), (same.x, *same.adapter), strict=True):
            np.testing.assert_array_equal(backend.numpy(one), backend.numpy(wanted))


@pytest.mark.dtypes("bfloat16")
def test_exact_products_end_with_their_block_and_nest(backend, dtype):
    case = mixed.layer(Config(4, 8.0))
    before = bits(run(backend, case, dtype))
    with backends.exact_products():
        outer = bits(run(backend, case, dtype))
        with backends.exact_products():
            inner = bits(run(backend, case, dtype))
        between = bits(run(backend, case, dtype))
    with pytest.raises(RuntimeError, match="inside"), backends.exact_products():
        raise RuntimeError("inside")
    assert outer == inner == between != before
    assert bits(run(backend, case, dtype)) == before


@pytest.mark.dtypes("bfloat16")
def test_exact_products_of_one_thread_do_not_reach_another(backend, dtype):
    case = mixed.layer(Config(4, 8.0))
    found = []
    with backends.exact_products():
        other = threading.Thread(target=lambda: found.append(run(backend, case, dtype)))
        other.start()
        other.join()
    assert is_mixed(found[0])


@pytest.mark.dtypes("bfloat16")
def test_the_library_reports_the_precision(backend, dtype):
    library = Library(backend.backend)
    with backend.library():
        assert library.precision(dtype) == library.precision("float16") == "mixed"
        assert library.precision("float32") == library.precision("float64") == "exact"
        with backends.exact_products():
            assert library.precision(dtype) == "exact"


@pytest.mark.dtypes("float16", "bfloat16")
def test_reduced_precision_does_not_change_a_layer_of_16_bits(backend, dtype, config):
    case = mixed.layer(config)
    default = bits(run(backend, case, dtype))
    with backends.reduced_precision():
        assert bits(run(backend, case, dtype)) == default


@pytest.mark.dtypes("float16", "bfloat16")
def test_exact_products_win_over_reduced_precision(backend, dtype):
    case = mixed.layer(Config(4, 8.0))
    with backends.exact_products():
        exact = bits(run(backend, case, dtype))
        with backends.reduced_precision():
            assert bits(run(backend, case, dtype)) == exact


@pytest.mark.dtypes("float32", "float64")
def test_exact_products_do_not_change_a_layer_of_more_bits(backend, dtype):
    case = mixed.layer(Config(4, 8.0))
    default = bits(run(backend, case, dtype))
    with backends.exact_products():
        assert bits(run(backend, case, dtype)) == default


@pytest.mark.dtypes("float16", "bfloat16", "float32")
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("block", [backends.exact_products, contextlib.nullcontext])
def test_a_merge_keeps_the_digits_of_numbers_that_cancel(backend, dtype, block, rank):
    """Rows do not cancel as a whole, so that W' is a sum of W and the product of the factors."""
    case = mixed.layer(Config(rank, rank), out=40, inner=80)
    arrays = case.stored(dtype)
    weight = -arrays["lora_b"].astype(float) @ arrays["lora_a"]
    weight[..., 0] += 5
    case = mixed.changed(case, weight=weight)
    with block():
        found = run(backend, case, dtype)
    default = block is contextlib.nullcontext and dtype != "float32"
    precision = "mixed" if default else "exact"
    assert expected(case, dtype, precision=precision)["merged"].share(found["merged"]) <= 1


@pytest.mark.dtypes("float16", "bfloat16")
def test_a_float32_x_beside_a_weight_of_16_bits_is_computed_exactly(backend, dtype, config):
    case = mixed.layer(config)
    stored = case.stored(dtype) | {"x": case.arrays["x"].astype(np.float32)}
    kinds = {"weight": mixed.KINDS[dtype], "dy": mixed.KINDS[dtype]}
    arrays = {name: backend.asarray(a.astype(kinds.get(name, "f4"))) for name, a in stored.items()}
    adapter = Adapter(*(arrays[name] for name in Adapter._fields))

    def step(x, weight, adapter, dy, bias):
        y, cache = doraxp.forward(x, weight, adapter, case.config, bias=bias)
        found = doraxp.backward(dy, cache)
        return {
            "y": y,
            "dx": found.x,
            "da": found.adapter.lora_a,
            "db": found.adapter.lora_b,
            "dm": found.adapter.magnitude,
        }

    given = (arrays[name] for name in ("x", "weight"))
    found = backend.run(step, *given, adapter, arrays["dy"], arrays["bias"])
    found = {name: backend.numpy(array) for name, array in found.items()}
    wanted = expected(mixed.changed(case, **stored), "float32", names=found)
    assert max(shares(found, wanted).values()) <= 1
