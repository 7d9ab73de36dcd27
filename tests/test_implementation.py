"""The diagnosis of other implementations: no false alarm, every planted fault, no crash."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import faults
import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config
from doraxp.testing import Conventions, check_implementation

RIGHT = faults.planted(None)
NAMES = ("forward", "gradients", "merge")


def checked(conventions=None, **functions):
    return check_implementation(SimpleNamespace(**functions), conventions)


def own(config=None):
    """This package, as an implementation."""

    def parts(weight, lora_a, lora_b, magnitude, scaling):
        rank = lora_a.shape[-2]
        choices = {} if config is None else config
        return weight, Adapter(lora_a, lora_b, magnitude), Config(rank, scaling * rank, **choices)

    def forward(x, bias, dropout_mask=None, **layer):
        return doraxp.forward(x, *parts(**layer), bias=bias, dropout_mask=dropout_mask)[0]

    def gradients(dy, x, bias, dropout_mask=None, **layer):
        _, cache = doraxp.forward(x, *parts(**layer), bias=bias, dropout_mask=dropout_mask)
        grads = doraxp.backward(dy, cache, train_base=True)
        return {**grads.adapter._asdict(), "x": grads.x, "weight": grads.weight, "bias": grads.bias}

    return {
        "init": lambda weight: doraxp.init(weight, Config(1), seed=0).magnitude,
        "forward": forward,
        "gradients": gradients,
        "merge": lambda **layer: doraxp.merge(*parts(**layer)),
    }


def test_dense_numpy_is_right_but_in_extreme_cases():
    report = check_implementation(RIGHT, Conventions(dropout="input"))
    assert report.ok
    assert report.diagnoses == ()
    assert {one.case for one in report.findings} == {"zero row", "huge", "tiny"}
    assert str(report).startswith("right: ")


@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
def test_this_package_is_right_in_every_case(form, norm_gradient):
    choices = {"form": form, "norm_gradient": norm_gradient}
    dtypes = ("float16", "bfloat16", "float32", "float64")
    report = checked(Conventions(**choices, stacks=True, dtypes=dtypes), **own(choices))
    assert report.findings == ()
    assert report.checked > 400


@pytest.mark.parametrize("dropout", ["input", "low_rank"])
@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
def test_what_the_mask_touches_is_declared_or_named(form, norm_gradient, dropout):
    choices = {"form": form, "norm_gradient": norm_gradient}
    functions = own(choices | {"dropout": dropout})
    meant = Conventions(**choices, dropout=dropout, dtypes=("float16", "float64"), stacks=True)
    report = checked(meant, **functions)
    assert report.findings == ()
    names = {
        "low_rank": "the dropout mask touches the low-rank product alone",
        "input": "the dropout mask touches the whole correction",
    }
    other = "input" if dropout == "low_rank" else "low_rank"
    (diagnosis,) = checked(dataclasses.replace(meant, dropout=other), **functions).diagnoses
    assert diagnosis.functions == ("init", "forward", "gradients", "merge")
    assert diagnosis.deviations == (names[dropout],)


def test_what_takes_no_mask_is_given_none_and_told_so():
    report = check_implementation(RIGHT)
    assert {"dropout", "all dropped", "low-rank dropout"} <= set(report.left_out)
    assert "not run, as the conventions say: " in str(report)
    assert "; low-rank dropout; " in str(report)
    with_masks = check_implementation(RIGHT, Conventions(dropout="input"))
    assert "dropout" not in with_masks.left_out
    assert with_masks.checked > report.checked
    assert checked(step=RIGHT.step).left_out == ()


def test_autograd_of_the_formula_is_right(torch):
    def leaves(**arrays):
        return {
            name: None if array is None else torch.tensor(array, requires_grad=True)
            for name, array in arrays.items()
        }

    def output(x, weight, lora_a, lora_b, magnitude, bias, scaling):
        v = weight + scaling * lora_b @ lora_a
        y = x @ (magnitude / torch.linalg.vector_norm(v, dim=1))[:, None].mul(v).T
        return y if bias is None else y + bias

    def gradients(dy, scaling, **arrays):
        inputs = leaves(**arrays)
        output(**inputs, scaling=scaling).backward(torch.tensor(dy))
        return {name: None if leaf is None else leaf.grad.numpy() for name, leaf in inputs.items()}

    def forward(scaling, **arrays):
        return output(**leaves(**arrays), scaling=scaling).detach().numpy()

    assert checked(forward=forward, gradients=gradients).ok


def test_jax_grad_of_the_formula_is_right(jax):
    jnp = jax.numpy

    def output(arrays, scaling):
        v = arrays["weight"] + scaling * arrays["lora_b"] @ arrays["lora_a"]
        y = arrays["x"] @ (arrays["magnitude"] / jnp.linalg.norm(v, axis=1) * v.T)
        return y if arrays["bias"] is None else y + arrays["bias"]

    @jax.jit
    def forward(scaling, **arrays):
        return output(arrays, scaling)

    @jax.jit
    def gradients(dy, scaling, **arrays):
        return jax.grad(lambda given: jnp.vdot(dy, output(given, scaling)))(arrays)

    assert checked(forward=forward, gradients=gradients).ok


@pytest.fixture(scope="module")
def reports():
    return {fault: faults.check(fault) for fault in faults.FAULTS}


def test_every_planted_fault_is_caught_and_named(reports):
    for fault, report in reports.items():
        assert not report.ok, fault
        names = {name for one in report.diagnoses for name in one.deviations}
        assert fault.name in names if fault.name else not names, fault
        assert all(one.after <= 1 < one.before for one in report.diagnoses)


def test_the_page_has_the_table_of_faults(reports):
    rows = [faults.row(fault, report) for fault, report in reports.items()]
    assert faults.HEAD + "\n".join(rows) + faults.TAIL in faults.PAGE.read_text("utf-8")


def test_at_least_30_faults_are_caught_and_25_of_them_named(reports):
    assert sum(not report.ok for report in reports.values()) >= 30
    assert sum(fault.name is not None for fault in reports) >= 25


def test_two_deviations_at_once_are_named():
    def merge(weight, lora_a, lora_b, magnitude, scaling):
        gain = magnitude / np.sqrt((weight**2).sum(axis=1))
        return gain[:, None] * (weight + scaling**2 * lora_b @ lora_a)

    report = checked(merge=merge)
    (diagnosis,) = report.diagnoses
    assert set(diagnosis.deviations) == {
        "s is applied twice",
        "the norm is that of the base weight",
    }
    assert "merge: " in str(report)
    assert "merge, tall, float32, merged: is " in str(report)


def test_functions_that_are_wrong_in_ways_of_their_own_are_told_apart():
    def forward(bias, **others):
        return RIGHT.forward(bias=None, **others)

    def merge(scaling, **others):
        return RIGHT.merge(scaling=1.0, **others)

    found = {
        one.functions: one.deviations for one in checked(forward=forward, merge=merge).diagnoses
    }
    assert found[("forward",)] == ("the bias is left out",)
    assert found[("merge",)] == ("s is left out",)


def turned(function):
    """The same function on weights stored (in, out)."""

    def call(weight, lora_a, lora_b, **others):
        result = function(weight=weight.T, lora_a=lora_a.T, lora_b=lora_b.T, **others)
        if isinstance(result, dict):
            return {k: v.T if k in ("weight", "lora_a", "lora_b") else v for k, v in result.items()}
        return result.T if function is RIGHT.merge else result

    return call


def scaled_bias(bias, **others):
    _, norm = RIGHT.adapted(*(others[name] for name in ("weight", "lora_a", "lora_b", "scaling")))
    y = RIGHT.forward(bias=None, **others)
    return y if bias is None else y + others["magnitude"] / norm * bias


def eps_merge(weight, lora_a, lora_b, magnitude, scaling):
    v, norm = RIGHT.adapted(weight, lora_a, lora_b, scaling)
    return (magnitude / (norm + v.dtype.type(1e-3)))[:, None] * v


def input_axis_merge(weight, lora_a, lora_b, magnitude, scaling):
    v, _ = RIGHT.adapted(weight, lora_a, lora_b, scaling)
    return magnitude * v / np.sqrt((v * v).sum(axis=0))


def alpha_merge(scaling, **others):
    return RIGHT.merge(scaling=scaling / others["lora_a"].shape[0], **others)


@pytest.mark.parametrize(
    ("conventions", "functions"),
    [
        (Conventions(layout="in_out"), {name: turned(getattr(RIGHT, name)) for name in NAMES}),
        (Conventions(bias_scaled=True), {"forward": scaled_bias}),
        (Conventions(eps=1e-3), {"merge": eps_merge}),
        (Conventions(norm_axis="input"), {"merge": input_axis_merge}),
    ],
    ids=["layout", "bias", "eps", "axis"],
)
def test_what_is_declared_is_no_error(conventions, functions):
    assert checked(conventions, **functions).ok
    assert not checked(**functions).ok


def test_alpha_may_be_what_is_passed():
    findings = checked(Conventions(scaling="alpha"), merge=alpha_merge).findings
    assert {one.case for one in findings if not one.extreme} == {"rslora"}  # it has no √rank


def test_bad_manners_are_reported_and_end_nothing():
    def raises(**_):
        raise ZeroDivisionError("oh")

    def writes(x, **others):
        y = RIGHT.forward(x=x, **others)
        x *= 2
        return y

    problems = {
        "raises ZeroDivisionError: oh": raises,
        "was written to": writes,
        "has shape (), must have (4, 8)": lambda **_: np.float32(1),
        "has dtype int64, must have float32": lambda x, weight, **_: np.ones((4, 8), "int64"),
        "has dtype <U4, must have float32": lambda x, weight, **_: np.full((4, 8), "what"),
        "has 32 numbers that are not finite": lambda x, weight, **_: np.full(
            (4, 8), np.nan, "float32"
        ),
    }
    for problem, forward in problems.items():
        report = checked(Conventions(dtypes=("float32",)), forward=forward)
        first = report.findings[0]
        assert (first.case, first.problem) == ("tall", problem)
        assert report.diagnoses == ()


def test_gradients_under_names_that_are_none_are_reported():
    report = checked(gradients=lambda **_: {"lora_c": np.ones(1)})
    assert report.findings[0].problem == "raises KeyError: 'lora_c'"


def test_a_step_that_writes_to_its_parameters_is_reported():
    def step(params, grads, state, **numbers):
        params["magnitude"] *= 1
        stepped, state = RIGHT.step(params, grads, state, **numbers)
        params["magnitude"] += 1
        return stepped, state

    assert {one.problem for one in checked(step=step).findings} == {"was written to"}


def test_an_implementation_of_nothing_is_refused():
    with pytest.raises(ValueError, match="must offer init, forward, gradients, merge or step"):
        check_implementation(object())
