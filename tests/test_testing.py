"""The yardstick: its reference against the oracle, its bounds and its error messages."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import types

import mixed
import numpy as np
import pytest
import reference

import doraxp
from doraxp import Config
from doraxp.testing import (
    VERSION,
    catalogue,
    check_usable,
    compare_backends,
    expected,
    expected_steps,
    operator_catalogue,
    optimizer_catalogue,
    sum_catalogue,
    update_catalogue,
)
from doraxp.testing._formulas import QUANTITIES
from doraxp.testing._libraries import Library, as_numpy
from doraxp.testing._reference import bounded, in_the_dtype
from doraxp.testing._rounding import UNIT_ROUNDOFF, Rounded

PLAIN = [case for case in catalogue() if case.arrays["weight"].ndim == 2]
RUNS = [(case, dtype) for case in (*catalogue(), *optimizer_catalogue()) for dtype in case.dtypes]


STEPPED = [case for case in optimizer_catalogue() if case.optimizer in ("adamw", "loraplus")]


def wanted(case, dtype):
    return (expected if hasattr(case, "config") else expected_steps)(case, dtype)


@pytest.mark.once
def test_every_number_is_within_its_bound(backend):
    with backend.library():
        comparison = compare_backends([backend.backend])
    assert [figure for figure in comparison.figures if not figure.ok] == []
    assert comparison.ok


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_the_reference_equals_the_oracle(case):
    dtype = case.dtypes[-1]
    arrays = {name: np.asarray(array, float) for name, array in case.stored(dtype).items()}
    out, inner = arrays["weight"].shape
    leaves = (arrays[name] for name in ("weight", "lora_a", "lora_b", "magnitude"))
    exact = reference.solve(
        reference.Layer(*leaves, case.config.scaling, case.config.form),
        arrays["x"].reshape(-1, inner),
        arrays.get("bias", np.zeros(out)),
        arrays["dy"].reshape(-1, out),
        case.config.norm_gradient,
        case.arrays["dropout_mask"].reshape(-1, inner) if "dropout_mask" in case.arrays else None,
        case.config.dropout,
    )
    theirs = dict(zip(QUANTITIES, exact, strict=True))
    for name, want in expected(case, dtype).items():
        # The oracle has rounding errors in float64 too.
        assert want.share(theirs[name].reshape(want.value.shape)) <= 1, name


@pytest.mark.parametrize(
    ("case", "dtype"), RUNS, ids=lambda value: getattr(value, "name", str(value))
)
def test_the_dense_formulas_are_within_the_bound(case, dtype):
    found = in_the_dtype(case, dtype)
    for name, want in wanted(case, dtype).items():
        assert want.share(found[name]) <= 1, name


OUT_OF_RANGE = {"huge", "tiny", "rows of all sizes"}  # of float16
RUNS_16 = [
    (case, dtype)
    for case in catalogue()
    for dtype in ("float16", "bfloat16")
    if dtype == "bfloat16" or case.name not in OUT_OF_RANGE
]


@pytest.mark.parametrize(
    ("case", "dtype"), RUNS_16, ids=lambda value: getattr(value, "name", str(value))
)
def test_a_model_of_mixed_precision_is_within_the_bound(case, dtype):
    with np.errstate(over="ignore"):
        found = mixed.step(mixed.with_tokens(case, dtype), case.config, dtype)
    for name, want in expected(case, dtype, precision="mixed").items():
        assert want.share(found[name].reshape(want.value.shape)) <= 1, name


LAYERS = [
    (Config(4, 8.0, form=form, norm_gradient=norm_gradient), stack)
    for form in ("weight", "direction")
    for norm_gradient in ("exact", "detached")
    for stack in ((), (2,))
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("config", "stack"), LAYERS)
def test_the_bounds_of_mixed_precision_are_no_wider_than_its_roundings(config, stack, dtype):
    """A model of the roundings comes near the bounds of what is rounded once, y and dx."""
    case = mixed.layer(config, stack=stack)
    found = mixed.step(mixed.with_tokens(case, dtype), config, dtype)
    shares = {
        name: want.share(found[name])
        for name, want in expected(case, dtype, precision="mixed").items()
    }
    assert max(shares.values()) <= 1
    assert min(shares["y"], shares["dx"]) > 0.3
    assert min(shares["dm"], shares["merged"]) > 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize(
    ("also", "norm_gradient", "quantity"),
    [
        ("L", "detached", "db"),
        ("low", "detached", "da"),
        ("dz", "detached", "da"),
        ("dz", "detached", "db"),
        ("R", "exact", "da"),
        ("p", "exact", "db"),
        ("U", "exact", "db"),
    ],
)
def test_one_more_rounding_is_outside_the_bounds(form, dtype, also, norm_gradient, quantity):
    config = Config(4, 8.0, form=form, norm_gradient=norm_gradient)
    case = mixed.layer(config, dy=1.0, update=2.0)
    arrays = mixed.with_tokens(case, dtype)
    right, wrong = (mixed.step(arrays, config, dtype, rounds) for rounds in ((), (also,)))
    bounds = [mixed.expected_from(right["z"], case, dtype)]
    if norm_gradient == "detached":  # else the rounding of z may change dA and dB by more
        bounds.append(expected(case, dtype, precision="mixed"))
    for wanted in bounds:
        assert wanted[quantity].share(right[quantity]) <= 1
        assert wanted[quantity].share(wrong[quantity]) > 1


@pytest.mark.parametrize("case", catalogue()[:20], ids=lambda case: case.name)
def test_mixed_precision_has_the_same_values_and_no_narrower_bounds(case):
    exact = expected(case, "bfloat16")
    for name, want in expected(case, "bfloat16", precision="mixed").items():
        assert np.all(np.abs(want.value - exact[name].value) <= 1e-7 * exact[name].bound), name
        assert want.dtype == exact[name].dtype
        assert np.all(want.bound >= 0.999 * exact[name].bound), name


def test_mixed_precision_is_refused_where_there_is_none():
    case = catalogue()[0]
    with pytest.raises(ValueError, match=r"dtype must be float16 or bfloat16 .*, got 'float32'"):
        expected(case, "float32", precision="mixed")
    with pytest.raises(ValueError, match=r"changes must be None in mixed precision, got y"):
        expected(case, "float16", {"y": lambda d: d.product}, precision="mixed")


@pytest.mark.parametrize("name", ["one token", "no tokens"])
@pytest.mark.parametrize("axes", [None, (1,), (1, 1)])
def test_an_array_of_another_shape_is_refused(name, axes):
    (case,) = (case for case in catalogue() if case.name == name)
    want = expected(case, "float64")["y"]
    actual = None if axes is None else want.value.reshape(*axes, *want.value.shape)
    message = re.escape(f"actual must have shape {want.value.shape}, got {np.shape(actual)}")
    with pytest.raises(ValueError, match=message):
        want.share(actual)


U = 2.0**-24


def chain(terms):
    """Add float32 numbers up one by one, which the bound of a sum allows."""
    total = np.float32(0)
    for term in terms:
        total = np.float32(total + np.float32(term))
    return total


def one_and_halves(scale, terms=32):
    """A chain loses every number after the first, a half of the distance to the next float32."""
    return np.array([[1.0] + [scale] * (terms - 1)])


STEPS = {  # inputs, the formula on numbers with bounds, and the same in float32
    "times": ([[1 + 2.0**-12]], lambda a: a * a, lambda a: a * a),
    "plus": ([[1.0], [U]], lambda a, b: a + b, lambda a, b: a + b),
    "over": ([[1.0], [1 - U]], lambda a, b: a.over(b), lambda a, b: a / b),
    "sqrt": ([[1 + 2 * U]], lambda a: a.sqrt(), np.sqrt),
    "sum": ([one_and_halves(U)], lambda a: a.sum(-1), lambda a: chain(a[0])),
    "product": (
        [one_and_halves(U), np.ones((32, 1))], lambda a, b: a @ b, lambda a, b: chain(a[0])
    ),
    "norms": (
        [one_and_halves(2.0**-12)], lambda a: a.norms(), lambda a: np.sqrt(chain(a[0] * a[0]))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_an_error_of_one_step_may_come_near_its_bound(name):
    """Half of the bound would refuse results that are right."""
    inputs, formula, in_float32 = STEPS[name]
    exact = formula(*(Rounded.exact(np.asarray(array)) for array in inputs))
    want = bounded("dm", exact, exact.value.shape, "float32")
    found = np.reshape(in_float32(*(np.asarray(a, np.float32) for a in inputs)), want.value.shape)
    assert 0.85 < want.share(found) <= 1


@pytest.mark.parametrize("moved", ["gram", "numbers"])
def test_an_error_before_a_division_by_a_gram_matrix_may_come_near_its_bound(moved):
    """The errors of G and of C count: 2⁻⁴ of a number is more than all roundings."""
    gram, numbers, size = np.array([[2.0]]), np.array([[3.0]]), 2.0**20
    none, error = np.zeros((1, 1)), np.array([[size]])
    c = Rounded(numbers, error if moved == "numbers" else none)
    found = c.divided_by(Rounded(gram, error if moved == "gram" else none), 0.5)
    want = bounded("dm", found, (1, 1), "float32")
    if moved == "gram":
        actual = numbers / (gram - U * size + 0.5)
    else:
        actual = (numbers + U * size) / (gram + 0.5)
    assert 0.95 < want.share(actual) <= 1.05  # the bound is of the first order


@pytest.mark.parametrize("seed", range(5))
def test_a_division_by_a_gram_matrix_in_float32_is_within_a_narrow_bound(seed):
    rng = np.random.default_rng(seed)
    a, c = rng.standard_normal((3, 8)), rng.standard_normal((3, 5))
    gram, c = ((a @ a.T).astype("f4"), c.astype("f4"))
    want = Rounded.exact(c).divided_by(Rounded.exact(gram), 0.05)
    want = bounded("dm", want, (3, 5), "float32")
    damped = gram + np.float32(0.05) * np.eye(3, dtype="f4")
    inverse = np.linalg.inv(damped)
    assert want.share(np.linalg.solve(damped, c)) <= 1
    assert want.share(inverse @ c) <= 1
    assert np.max(want.bound) < 1e-3 * np.max(np.abs(want.value))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_error_of_a_stored_number_may_come_near_its_bound(dtype):
    """1 + uₛ is stored as 1."""
    roundoff = UNIT_ROUNDOFF[dtype]
    number = Rounded.exact(np.array([1 + roundoff]))
    narrowed = number.narrowed(roundoff, 0.0, U)
    stored = bounded("y", number, (1,), dtype), bounded("y", narrowed, (1,), dtype, "mixed")
    for want in stored:
        assert 0.95 < want.share(np.array([1.0])) <= 1


@pytest.mark.parametrize("case", STEPPED, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_step_may_decay_the_parameter_before_it_moves_it(case, dtype):
    """PyTorch computes p (1 − ηλ) first, which rounds p."""
    made = np.dtype(dtype).type
    numbers = case.numbers
    rate, beta1, beta2 = (numbers[name] for name in ("learning_rate", "beta1", "beta2"))
    params = {name: values.astype(dtype) for name, values in case.params.items()}
    moments = {name: (0 * p, 0 * p) for name, p in params.items()}
    for t, grads in enumerate(case.grads, start=1):
        for name, p in params.items():
            g, (mu, nu) = grads[name].astype(dtype), moments[name]
            mu, nu = (
                made(beta1) * mu + made(1 - beta1) * g,
                made(beta2) * nu + made(1 - beta2) * g * g,
            )
            moments[name] = mu, nu
            own = rate * (numbers.get("ratio", 1.0) if name == "lora_b" else 1.0)
            if name != "magnitude":
                p = p * made(1 - own * numbers["weight_decay"])
            divisor = np.sqrt(nu) / made((1 - beta2**t) ** 0.5) + made(numbers["eps"])
            params[name] = p - made(own / (1 - beta1**t)) * (mu / divisor)
            want = expected_steps(case, dtype)[f"{name} {t}"]
            assert want.share(params[name]) <= 1, (name, t)


def test_bounds_are_narrow():
    """A sum of six numbers in float32 may be wrong in the sixth digit, but not in the third."""
    (case,) = (case for case in catalogue() if case.name == "tall")
    for name, want in expected(case, "float32").items():
        assert np.max(want.bound) < 1e-4 * np.max(np.abs(want.value)), name


EVERY_CASE = (
    *catalogue(), *operator_catalogue(), *update_catalogue(), *sum_catalogue(),
    *optimizer_catalogue(),
)  # fmt: skip


def test_every_case_has_a_different_name_and_reason():
    assert len({case.name for case in EVERY_CASE}) == len(EVERY_CASE)
    of_layers = (*catalogue(), *optimizer_catalogue())
    assert len({case.reason for case in of_layers}) == len(of_layers)


def numbers_of(case):
    arrays = [case.params, *case.grads] if hasattr(case, "grads") else [case.arrays]
    return [number for one in arrays for array in one.values() for number in array.ravel()]


def test_the_numbers_of_a_version_do_not_change():
    """Who adds a case or changes a number raises VERSION, and the sums here."""
    sums = {
        since: math.fsum(number for case in EVERY_CASE if case.since == since
                         for number in numbers_of(case))
        for since in sorted({case.since for case in EVERY_CASE})
    }  # fmt: skip
    assert VERSION == 4
    assert sums == {
        1: 4.611434936523438e25,
        2: 555.3353602291991,
        3: 477.77262473106384,
        4: 254.53158602201418,
    }


def test_every_mask_drops_and_keeps_and_is_exact_in_every_dtype():
    masks = {case.name: case for case in catalogue() if "dropout_mask" in case.arrays}
    assert {case.config.dropout for case in masks.values()} == {"input", "low_rank"}
    for case in masks.values():
        mask = case.arrays["dropout_mask"]
        assert mask.shape == case.arrays["x"].shape
        assert set(np.unique(mask)) == ({0.0} if case.name == "all dropped" else {0.0, 1.25})
        for dtype in ("float16", "bfloat16", "float32"):
            np.testing.assert_array_equal(case.stored(dtype)["dropout_mask"], mask)


@pytest.mark.parametrize(
    ("name", "change", "quantity"),
    [
        ("merge", lambda merged: merged * 1.001, "merged"),
        ("merge", lambda merged: merged[:-1], "merged"),
        ("merge", lambda merged: merged.astype("float16"), "merged"),
        ("merge", lambda merged: merged * np.nan, "merged"),
        ("forward", lambda pair: (pair[0] + 1, pair[1]), "y"),
        ("adamw_step", lambda pair: (pair[0]._replace(magnitude=0 * pair[0][2]), pair[1]), None),
    ],
)
def test_a_wrong_number_shape_or_dtype_is_found(monkeypatch, name, change, quantity):
    right = getattr(doraxp, name)
    monkeypatch.setattr(doraxp, name, lambda *args, **kwargs: change(right(*args, **kwargs)))
    comparison = compare_backends(["numpy"])
    wrong = {figure.quantity for figure in comparison.figures if not figure.ok}
    assert not comparison.ok
    assert wrong == ({quantity} if quantity else {f"magnitude {t}" for t in (1, 2, 3)})


def test_an_exception_is_reported_with_its_case(monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(doraxp, "merge", broken)
    figures = compare_backends(["numpy"]).figures
    failures = {figure.failure for figure in figures if not figure.ok}
    assert failures == {"raises OSError: the disk is full"}
    layers = sum(len(case.dtypes) for case in catalogue())
    assert sum(figure.quantity == "all" for figure in figures) == layers


def two_libraries(monkeypatch, change=lambda array: array):
    """Make a second NumPy under the name of array-api-strict, whose arrays `change` replaces."""
    both = [doraxp.backends.Status(name, True, "") for name in ("numpy", "array_api_strict")]
    monkeypatch.setattr("doraxp.backends.available", lambda: both)
    modules = {"numpy": np, "array_api_strict": types.SimpleNamespace(**vars(np))}
    monkeypatch.setattr("importlib.import_module", _import_from(modules))
    monkeypatch.setattr(modules["array_api_strict"], "asarray", lambda array: change(array))


def test_two_backends_with_the_same_bits_agree(monkeypatch):
    two_libraries(monkeypatch)
    (pair,) = compare_backends(["numpy", "array_api_strict"]).agreements
    assert pair == (("numpy", "array_api_strict"), 0.0)


@pytest.mark.parametrize("change", [lambda array: 1.01 * array, lambda array: np.nan * array])
def test_two_backends_that_differ_disagree(monkeypatch, change):
    two_libraries(monkeypatch, change)
    comparison = compare_backends(["numpy", "array_api_strict"])
    assert comparison.agreements[0].share > 1
    assert not comparison.ok


def test_a_backend_that_raises_does_not_agree_with_another(monkeypatch):
    two_libraries(monkeypatch, lambda array: [][0])
    assert compare_backends(["numpy", "array_api_strict"]).agreements[0].share == np.inf


def test_a_backend_that_is_missing_is_named_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="jax cannot run here: not installed: pip install jax"):
        compare_backends(["jax"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["abacus"], "each name must be one of numpy, .*, got 'abacus'"),
        ([], "at least one of numpy, "),
        ("numpy", r"names must be a list of names, got 'numpy'"),
    ],
)
def test_names_that_are_not_those_of_backends_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        compare_backends(names)


def test_a_comparison_prints_its_worst_and_its_wrong_figures(monkeypatch):
    right = compare_backends(["numpy"])
    worst = max(right.figures, key=lambda figure: figure.share)
    assert str(right) == (
        f"right: {len(right.figures)} figures on numpy, the worst at {100 * worst.share:.0f} % of "
        f"its bound: {worst.case}, {worst.dtype}, {worst.quantity}"
    )
    merge = doraxp.merge
    monkeypatch.setattr(doraxp, "merge", lambda *args, **rest: 1.01 * merge(*args, **rest))
    first, second, *_ = str(compare_backends(["numpy"])).splitlines()
    assert first.startswith("wrong: ")
    assert re.fullmatch(r"  numpy, tall, float32, merged: is .* times its bound off", second)


def test_two_backends_that_disagree_are_printed(monkeypatch):
    two_libraries(monkeypatch, lambda array: 1.01 * array)
    last = str(compare_backends(["numpy", "array_api_strict"])).splitlines()[-1]
    assert re.fullmatch(r"  numpy and array_api_strict disagree: .* times two bounds apart", last)


def test_a_case_does_not_print_its_arrays():
    assert "array(" not in repr(catalogue()[0]) + repr(optimizer_catalogue()[0])


def test_an_unknown_library_or_dtype_is_refused():
    with pytest.raises(ValueError, match=r"name must be one of numpy, .*, got 'abacus'"):
        Library("abacus")
    for case in (catalogue()[0], optimizer_catalogue()[0]):
        with pytest.raises(ValueError, match=r"dtype must be one of .*float64, got 'int8'"):
            wanted(case, "int8")


def test_a_dtype_that_a_library_lacks_is_listed_as_left_out(monkeypatch):
    modules = {"numpy": np}
    monkeypatch.setattr("doraxp.testing._libraries.importlib.import_module", _import_from(modules))
    assert compare_backends(["numpy"]).left_out == (("numpy", "bfloat16"),)


def test_dask_has_float16_without_a_name_for_it(monkeypatch):
    monkeypatch.setattr("importlib.import_module", {"dask.array": types.ModuleType("da")}.get)
    library = Library("dask")
    assert (library.dtype("float16"), library.dtype("bfloat16")) == (np.float16, None)


def test_jax_computes_with_float64_enabled_and_without_tf32(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def enter(name, value):
        entered.append((name, value))
        yield
        entered.append(name)

    jax = types.SimpleNamespace(
        enable_x64=functools.partial(enter, "x64"),
        default_matmul_precision=functools.partial(enter, "products"),
    )
    monkeypatch.setattr("importlib.import_module", {"jax": jax, "jax.numpy": np}.__getitem__)
    with Library("jax").active():
        assert entered == [("x64", True), ("products", "highest")]
    assert entered[2:] == ["products", "x64"]


# Devices


def devices(monkeypatch, *, cuda=(), usable=("numpy", "cupy", "torch", "jax", "dask")):
    """Make these libraries usable, and those of `cuda` able to compute on a CUDA device."""

    def find(platform):
        if platform == "cpu" or "jax" in cuda:
            return [f"{platform}:0"]
        raise RuntimeError("Unknown backend cuda")

    known = ("numpy", "cupy", "torch", "jax", "dask", "array_api_strict")
    listed = [
        doraxp.backends.Status(name, name in usable, "" if name in usable else "not installed")
        for name in known
    ]
    monkeypatch.setattr("doraxp.backends.available", lambda: listed)
    matmul = types.SimpleNamespace(fp32_precision="tf32")
    backends = types.SimpleNamespace(cuda=types.SimpleNamespace(matmul=matmul))
    torch = types.SimpleNamespace(
        cuda=types.SimpleNamespace(is_available=lambda: "torch" in cuda), backends=backends
    )
    made = {
        "torch": torch,
        "jax": types.SimpleNamespace(devices=find),
        "jax.numpy": types.SimpleNamespace(),
        **dict.fromkeys(("numpy", "cupy", "dask.array", "array_api_strict"), np),
    }
    monkeypatch.setattr("importlib.import_module", made.__getitem__)
    return matmul


@pytest.mark.once
def test_every_number_is_within_its_bound_on_a_device_that_is_named(backend, monkeypatch):
    some = tuple(case for case in catalogue() if case.name in ("tall", "half storage", "no tokens"))
    monkeypatch.setattr("doraxp.testing._compare.catalogue", lambda: some)
    with backend.library():
        comparison = compare_backends([backend.backend], device="cpu")
    assert comparison.ok, str(comparison)
    assert {one.backend for one in comparison.figures} == {f"{backend.backend} on cpu"}


@pytest.mark.once
@pytest.mark.lanes("torch", "jax")
def test_arrays_are_made_on_the_device_that_is_named(backend):
    library = Library(backend.backend, "cpu")
    with library.active():
        array = library.asarray(np.ones(2), "float64")
        assert "cpu" in str(array.device).lower()
        assert getattr(array, "committed", True)  # JAX moves no array that is committed
        assert as_numpy(array).dtype == np.float64


@pytest.mark.parametrize(
    ("name", "device", "own"),
    [
        ("torch", "cpu", {"device": "cpu"}),
        ("torch", "cuda", {"device": "cuda"}),
        ("torch", None, {}),
        ("jax", "cpu", {"device": "cpu:0"}),
        ("jax", "cuda", {"device": "cuda:0"}),
        ("jax", None, {}),
        ("cupy", "cuda", {}),
        ("numpy", "cpu", {}),
    ],
)
def test_a_library_gets_the_name_of_a_device_in_its_own_way(monkeypatch, name, device, own):
    devices(monkeypatch, cuda=("cupy", "torch", "jax"))
    check_usable([name], device=device)
    library = Library(name, device)
    assert library.label == (f"{name} on {device}" if device else name)
    made = []

    def asarray(array, **where):
        made.append(where)
        return array

    library.module = types.SimpleNamespace(asarray=asarray, float64=np.float64)
    assert library.asarray([1], "float64").tolist() == [1]
    assert made == [own]


@pytest.mark.parametrize(
    ("name", "device", "error", "message"),
    [
        ("torch", "meta", ValueError, "device must be one of cpu, cuda, got 'meta'"),
        ("jax", "", ValueError, "device must be one of cpu, cuda, got ''"),
        ("numpy", "cuda", ValueError, "device must be cpu for numpy, got 'cuda'"),
        ("dask", "cuda", ValueError, "device must be cpu for dask, got 'cuda'"),
        ("cupy", "cpu", ValueError, "device must be cuda for cupy, got 'cpu'"),
        ("torch", "cuda", RuntimeError, "torch cannot run on cuda here: it finds no device: "),
        (
            "jax",
            "cuda",
            RuntimeError,
            "jax cannot run on cuda here: it finds no device: install",
        ),
        (
            "array_api_strict",
            "cpu",
            RuntimeError,
            "array_api_strict cannot run here: not installed",
        ),
    ],
)
def test_a_device_that_a_library_cannot_use_is_refused(monkeypatch, name, device, error, message):
    devices(monkeypatch)
    with pytest.raises(error, match=message):
        compare_backends([name], device=device)


def test_products_of_torch_on_cuda_do_not_use_tf32(monkeypatch):
    matmul = devices(monkeypatch, cuda=("torch",))
    with Library("torch", "cuda").active():
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == "tf32"
    with Library("torch", "cpu").active():
        assert matmul.fp32_precision == "tf32"


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "mixed"), ("float32", "exact")])
def test_the_precision_on_cuda_is_that_of_an_array_there(torch, monkeypatch, dtype, precision):
    """A fake tensor needs no device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with torch._subclasses.FakeTensorMode():
        assert Library("torch", "cuda").precision(dtype) == precision


def test_the_precision_of_jax_is_asked_with_float64_enabled(jax):
    with jax.enable_x64(False):  # JAX would warn that it makes float32
        assert Library("jax").precision("float64") == "exact"


def test_arrays_on_a_gpu_are_copied_to_the_host():
    class OnDevice(np.ndarray):
        def get(self):
            return np.asarray(self) + 1

    assert as_numpy(np.zeros(2).view(OnDevice)).tolist() == [1, 1]
    OnDevice.cpu = OnDevice.get  # PyTorch's name for it
    del OnDevice.get
    assert as_numpy(np.zeros(2).view(OnDevice)).tolist() == [1, 1]


def _import_from(modules):
    def load(name):
        if name not in modules:
            raise ImportError(name)
        return modules[name]

    return load
