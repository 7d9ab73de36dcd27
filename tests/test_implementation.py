"""The check of implementations: it finds every planted fault, and nothing in right code."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from types import SimpleNamespace

import faults
import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config
from doraxp._base.words import counted
from doraxp.testing import (
    Conventions,
    Finding,
    catalogue,
    check_implementation,
    expected,
    grouped,
)
from doraxp.testing._parts import parts

RIGHT = faults.planted(None)
PARTS = faults.planted(None, "naive_parts")
NAMES = ("forward", "gradients", "merge")


def checked(conventions=None, **functions):
    return check_implementation(SimpleNamespace(**functions), conventions)


def own(config=None):
    """Return the functions of this package as an implementation."""

    def layer_of(weight, lora_a, lora_b, magnitude, scaling):
        rank = lora_a.shape[-2]
        choices = {} if config is None else config
        return weight, Adapter(lora_a, lora_b, magnitude), Config(rank, scaling * rank, **choices)

    def forward(x, bias, dropout_mask=None, **layer):
        return doraxp.forward(x, *layer_of(**layer), bias=bias, dropout_mask=dropout_mask)[0]

    def gradients(dy, x, bias, dropout_mask=None, **layer):
        _, cache = doraxp.forward(x, *layer_of(**layer), bias=bias, dropout_mask=dropout_mask)
        grads = doraxp.backward(dy, cache, train_base=True)
        return {**grads.adapter._asdict(), "x": grads.x, "weight": grads.weight, "bias": grads.bias}

    return {
        "init": lambda weight: doraxp.init(weight, Config(1), seed=0).magnitude,
        "forward": forward,
        "gradients": gradients,
        "merge": lambda **layer: doraxp.merge(*layer_of(**layer)),
    }


def test_dense_numpy_is_right_except_in_extreme_cases():
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
def test_the_kind_of_dropout_is_declared_or_named(form, norm_gradient, dropout):
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
    assert diagnosis.functions == ("forward", "gradients")
    assert diagnosis.deviations == (names[dropout],)


def test_without_declared_dropout_the_cases_with_a_mask_are_left_out():
    report = check_implementation(RIGHT)
    assert {"dropout", "all dropped", "low-rank dropout"} <= set(report.left_out)
    assert "  not run: " in str(report)
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


def of(fault):
    return f"{fault.source}: {fault.old} to {fault.new} eps {fault.eps:g} {fault.name}"


@pytest.mark.parametrize("fault", faults.FAULTS, ids=of)
def test_a_planted_fault_is_caught_and_named(fault):
    report = faults.check(fault)
    assert not report.ok
    assert faults.is_named(fault) or not fault.names
    assert all(one.after <= 1 < one.before for one in report.diagnoses)


def test_the_page_has_the_table_of_faults():
    rows = "\n".join(map(faults.row, faults.FAULTS))
    assert faults.HEAD + rows + faults.TAIL in faults.PAGE.read_text("utf-8")


def test_95_percent_of_at_least_120_faults_are_named():
    assert len(set(faults.FAULTS)) == len(faults.FAULTS) >= 120
    named = sum(map(faults.is_named, faults.FAULTS))
    assert named >= 0.95 * len(faults.FAULTS)
    page = (faults.PAGE.parents[1] / "howto/testing.md").read_text("utf-8")
    assert f"lists {len(faults.FAULTS)} faults " in page
    assert f"and {named} of them are named" in page


def test_each_deviation_is_named_where_it_is_planted():
    """So a stranger can break any formula of a deviation, and a test falls."""
    known = {name for part in parts() for name in part.known}
    assert known - {name for fault in faults.FAULTS for name in fault.names} == set()


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


def test_each_function_can_be_wrong_in_another_way():
    def forward(bias, **others):
        return RIGHT.forward(bias=None, **others)

    def merge(scaling, **others):
        return RIGHT.merge(scaling=1.0, **others)

    found = {
        one.functions: one.deviations for one in checked(forward=forward, merge=merge).diagnoses
    }
    assert found[("forward",)] == ("the bias is left out",)
    assert found[("merge",)] == ("s is left out",)


HAND = "the gradients keep the right formulas"


S_LEFT_OUT = ("delta = scaling * (", "delta = (")
ROOT, EPS = "np.sqrt((v * v).sum(axis=1))", "1e-06 is added to the norm"


@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        (S_LEFT_OUT, None, {"s is left out"}),
        (S_LEFT_OUT, ("db = scaling * dv", "db = dv"), {"s is left out", "dB lacks s"}),
        (S_LEFT_OUT, (ROOT, f"{ROOT} + 1e-6"), {"s is left out", EPS}),
        (
            (ROOT, "np.sqrt((delta * delta).sum(axis=1) + 1e-6)"),
            None,
            {"the norm is that of the update", "1e-06 is added under the root of the norm"},
        ),
        # Each of these two changes what the other one makes.
        (
            (ROOT, f"{ROOT} + 1e-6"),
            ('found["bias"] = ds.', 'found["bias"] = dz.'),
            {EPS, "dbias is scaled by m/n"},
        ),
    ],
)
def test_a_mistake_in_v_is_named_where_the_gradients_are_written_by_hand(one, other, names):
    report = faults.check(faults.Fault(*one, None, also=other))
    assert report.unexplained == ()
    (one,) = [one for one in report.diagnoses if "gradients" in one.functions]
    assert one.deviations[-1] == HAND
    assert set(one.deviations) == names | {HAND}


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("dx = (dz @ v)", "dx = (ds @ weight)", {"dx lacks m/n", "dx lacks the update"}),
        ("scaling * dv @", "(ds.T @ xs + q[:, None] * v) @", {"dB lacks s", "dB lacks m/n"}),
        ("scaling * dv @", "plain @", {"dB lacks s", "dB lacks the gradient through the norm"}),
        ("dm = e / norm", "dm = -e", {"dm has the wrong sign", "dm is not divided by n"}),
        (
            "dm = e / norm",
            "dm = -e / norm / max(1, len(ds))",
            {"dm has the wrong sign", "dm is a mean over the tokens"},
        ),
        (
            "ds.sum(axis=0)",
            "dz.sum(axis=0) / max(1, len(dz))",
            {"dbias is scaled by m/n", "dbias is a mean over the tokens"},
        ),
    ],
)
def test_two_mistakes_in_one_formula_are_named(old, new, names):
    report = faults.check(faults.Fault(old, new, None))
    (one,) = report.diagnoses
    assert set(one.deviations) == names


def test_a_mistake_in_each_of_several_gradients_is_named():
    code = {"da = scaling * ": "da = ", "db = scaling *": "db = -", "dx = (dz": "dx = (ds"}
    (one,) = check_implementation(changed(code), faults.USUAL).diagnoses
    assert one.functions == ("gradients",)
    assert one.deviations == (
        "dx lacks m/n",
        "dA lacks s",
        "dB lacks s",
        "dB has the wrong sign",
    )


def changed(code: dict[str, str]) -> types.ModuleType:
    """Return `naive` with other code in several places."""
    text = (faults.HERE / "naive.py").read_text("utf-8")
    for old, new in code.items():
        assert old in text
        text = text.replace(old, new)
    module = types.ModuleType("naive")
    exec(compile(text, "naive.py", "exec"), vars(module))
    return module


def test_two_deviations_that_replace_the_same_term_are_not_a_pair():
    """Each has its own gradient through the norm, and the second would hide the first."""
    code = {"q = -magnitude * e / norm**3": "q = -e / norm", "dm = e / norm": "dm = -e / norm"}
    report = check_implementation(changed(code), faults.USUAL)
    assert report.diagnoses == ()
    assert report.unexplained == ("gradients",)


@pytest.mark.parametrize("dg", ["-magnitude * e / norm**3", "-gain * e / norm**2"])
def test_gradients_by_hand_may_take_the_gain_for_m_over_n(dg):
    """q is −(m/n) dg / n² or −g dg / n², which differ where the forward squares the gain."""
    square = ("gain = magnitude / norm", "gain = (magnitude / norm) ** 2")
    fault = faults.Fault("q = -magnitude * e / norm**3", f"q = {dg}", None, also=square)
    (one,) = faults.check(fault).diagnoses
    assert one.functions == ("forward", "gradients", "merge")
    assert one.deviations == ("m/n is applied twice", HAND)


@pytest.mark.parametrize("eps", [1e-6, 3e-6])
@pytest.mark.parametrize("dropout", [None, "input"])
def test_gradients_by_hand_that_divide_by_a_declared_eps_too_have_one_name(eps, dropout):
    """The derivative of ‖V‖ + ε is V/‖V‖. No mask is left out, and this ε was declared."""
    meant = faults.declared(eps=eps, dropout=dropout)
    report = faults.check(faults.Fault(ROOT, f"{ROOT} + {eps}", None, meant))
    (one,) = report.diagnoses
    assert one.functions == ("gradients",)
    assert one.deviations == ("the gradient through the norm has V/n where V/‖V‖ belongs",)


def test_a_mean_over_the_tokens_says_nothing_of_a_gradient_that_is_never_returned():
    def gradients(dy, **others):
        tokens = max(1, dy[..., 0].size)
        found = RIGHT.gradients(dy=dy, **others)
        return {key: found[key] / tokens for key in ("lora_a", "lora_b", "magnitude")}

    names = {one.deviations for one in checked(gradients=gradients).diagnoses}
    assert ("dA, dB and dm are means over the tokens",) in names


def test_two_functions_that_are_wrong_in_one_way_each_are_named_together():
    def forward(bias, **others):
        return RIGHT.forward(bias=None, **others)

    def gradients(scaling, **others):
        found = RIGHT.gradients(scaling=scaling, **others)
        return {**found, "lora_a": found["lora_a"] / found["lora_a"].dtype.type(scaling)}

    (one,) = checked(forward=forward, gradients=gradients).diagnoses
    assert one.functions == ("forward", "gradients")
    assert set(one.deviations) == {"the bias is left out", "dA lacks s"}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_number_that_is_off_by_more_than_its_bound_is_a_finding(dtype):
    (case,) = (case for case in catalogue() if case.name == "tall")
    want = expected(case, dtype)["merged"]

    def merge(weight, **_):
        if not np.array_equal(weight, case.stored(dtype)["weight"]):
            raise NotImplementedError
        found = want.value.copy()
        found[2, 1] += 1.2 * want.bound[2, 1]
        return found.astype(dtype)

    (found,) = checked(Conventions(dtypes=(dtype,)), merge=merge).findings
    assert found.case == "tall"
    assert found.problem.startswith("is 1.")


def test_weights_with_leading_axes_run_where_they_are_declared():
    def merge(weight, **others):
        if weight.ndim == 2:
            raise NotImplementedError
        return np.stack([
            RIGHT.merge(w, a, b, m, others["scaling"])
            for w, a, b, m in zip(weight.reshape(-1, *weight.shape[-2:]),
                                  *(others[name].reshape(-1, *others[name].shape[weight.ndim - 2:])
                                    for name in ("lora_a", "lora_b", "magnitude")), strict=True)
        ]).reshape(weight.shape)  # fmt: skip

    report = checked(Conventions(stacks=True), merge=merge)
    assert report.checked > 0
    assert all(one.extreme for one in report.findings)


def test_results_may_be_written_to_by_the_next_call():
    buffer = np.zeros(10_000)

    def merge(weight, scaling, **others):
        found = buffer[: weight.size].reshape(weight.shape)
        found[...] = RIGHT.merge(weight=weight, scaling=1.0, **others)
        return found

    (one,) = checked(Conventions(dtypes=("float64",)), merge=merge).diagnoses
    assert one.deviations == ("s is left out",)


def turned(function, matrices=("weight", "lora_a", "lora_b")):
    """Return the same function for matrices that are stored the other way round."""

    def call(**arrays):
        def turn(given):
            return {name: array.T if name in matrices else array for name, array in given.items()}

        result = function(**turn(arrays))
        if isinstance(result, dict):
            return turn(result)
        return result.T if function is RIGHT.merge else result

    return call


def weight_turned():
    """Return right functions for a weight (in, out), and A and B as doraxp keeps them."""
    return {name: turned(getattr(RIGHT, name), ["weight"]) for name in ("init", *NAMES)}


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
        (Conventions(layout="weight_in_out"), weight_turned()),
        (Conventions(bias_scaled=True), {"forward": scaled_bias}),
        (Conventions(eps=1e-3), {"merge": eps_merge}),
        (Conventions(norm_axis="input"), {"merge": input_axis_merge}),
    ],
    ids=["layout", "weight alone", "bias", "eps", "axis"],
)
def test_a_declared_convention_is_not_an_error(conventions, functions):
    assert checked(conventions, **functions).ok
    assert not checked(**functions).ok


@pytest.mark.parametrize(
    ("conventions", "name"),
    [
        (Conventions(bias_scaled=True), "the bias is not scaled"),
        (Conventions(eps=1e-3), "no number is added to the norm"),
    ],
)
def test_a_convention_that_is_declared_and_not_kept_is_named(conventions, name):
    report = checked(conventions, forward=RIGHT.forward)
    assert [one.deviations for one in report.diagnoses] == [(name,)]


def test_alpha_may_be_passed_as_scaling():
    findings = checked(Conventions(scaling="alpha"), merge=alpha_merge).findings
    assert {one.case for one in findings if not one.extreme} == {
        "rslora"
    }  # alpha does not tell √rank


def test_a_function_that_raises_or_writes_or_returns_other_arrays_is_reported():
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


def test_the_same_fault_in_every_case_is_printed_once():
    """An argument with another name, for example, fails in every case."""
    report = checked(merge=lambda w, a, b, m, s: w)
    lines = str(report).splitlines()
    (line,) = (line for line in lines if "unexpected keyword argument 'weight'" in line)
    assert line.startswith("  merge, tall, float32, all: raises TypeError: ")
    extreme = sum(one.extreme for one in report.findings)
    more = len(report.findings) - extreme - 1
    assert f" (and {more} more: wide; square; one row; and " in line
    assert f"  extreme merge: {counted(extreme, 'finding')} in zero row; huge; tiny" in lines
    first = "  merge raises in every call; the first one was given weight (8, 5), lora_a (3, 5), "
    assert lines[1].startswith(first)
    assert len(lines) == 6  # the last two are about the cases that are left out


def test_a_printed_report_has_a_line_for_each_group_and_the_findings_have_all():
    """Two mistakes in three functions are a screen, and not a line for each case."""

    def forward(bias, **others):
        return RIGHT.forward(bias=None, **others)

    def merge(scaling, **others):
        return RIGHT.merge(scaling=1.0, **others)

    report = checked(forward=forward, merge=merge, gradients=RIGHT.gradients)
    lines = str(report).splitlines()
    assert len(lines) < 12
    usual = [one for one in report.findings if not one.extreme]
    shown = [line.strip() for line in lines if line.strip() in grouped(report.findings)]
    assert shown == [*grouped(report.findings)]
    counts = [int(n) for line in grouped(usual) for n in re.findall(r"and (\d+) more: ", line)]
    assert sum(counts) + len(grouped(usual)) == len(usual) > 50
    assert grouped(usual)[0].startswith("forward, tall, float32, y: is ")
    assert grouped(usual + [one for one in report.findings if one.extreme]) == grouped(
        report.findings
    )


def test_findings_are_grouped_where_their_numbers_case_and_dtype_differ_alone():
    def found(problem, case="tall", dtype="float32", function="merge", *, extreme=False):
        return Finding(function, case, dtype, "merged", problem, extreme)

    assert grouped([]) == ()
    alike = [
        found("is 3 times its bound off, relative error 1e-05"),
        found("is 1e+300 times its bound off, relative error inf", "wide"),
        found("is inf times its bound off, relative error 1", "square"),
        found("is 7.5 times its bound off", "tall", "float64"),
    ]
    (line,) = grouped(alike)
    assert line == (
        "merge, tall, float32, merged: is 3 times its bound off, relative error 1e-05 "
        "(and 3 more: wide; square)"
    )
    assert grouped([*alike, found("raises A"), found("raises B"), found("raises A", "wide")]) == (
        line,
        "merge, tall, float32, merged: raises A (and 1 more: wide)",
        "merge, tall, float32, merged: raises B",
    )
    same = [found("raises A", dtype=dtype) for dtype in ("float32", "float16", "float64")]
    said = "merge, tall, float32, merged: raises A (and 2 more: tall in float16, float64)"
    assert grouped(same) == (said,)
    many = [found("raises A", case) for case in "abcdef"]
    assert grouped(many)[0].endswith(" (and 5 more: b; c; d; and 2 other cases)")
    extreme = [found("raises A", case, extreme=True) for case in ("huge", "huge", "tiny")]
    (line,) = grouped([*extreme, found("raises B", "tiny", function="init", extreme=True)])[:1]
    assert line == "extreme merge: 3 findings in huge; tiny"


class MuteError(Exception):
    def __str__(self):
        raise RuntimeError("no message either")


@pytest.mark.parametrize(
    ("error", "said"),
    [(SystemExit(2), "SystemExit: 2"), (MuteError(), "MuteError: its message raises RuntimeError")],
)
def test_an_exit_does_not_end_the_check(error, said):
    def raises(*_, **__):
        raise error

    returned = type("Returned", (), {"__array__": raises})()
    assert problems(forward=raises)[0] == ("tall", "all", f"raises {said}")
    taken = problems(forward=lambda **_: returned)[0]
    rule = "must be an array that numpy.asarray can read, got Returned: "
    assert taken == ("tall", "y", f"{rule}{said}")


def test_a_merge_in_16_bits_says_how_much_of_the_update_it_keeps():
    def merge(weight, **others):  # the update is rounded away
        return weight

    (found,) = (
        one for one in problems(Conventions(dtypes=("float16",)), merge=merge)
        if one[0] == "half storage, small update"
    )  # fmt: skip
    assert found[2].endswith(", keeps 0.00 of the update")


def test_a_half_of_the_update_is_said_to_be_one():
    def merge(weight, **others):
        wide = weight.astype("float32")
        return (wide + 0.5 * (RIGHT.merge(weight=wide, **others) - wide)).astype("float16")

    (found,) = (
        one for one in problems(Conventions(dtypes=("float16",)), merge=merge)
        if one[0] == "half storage"
    )  # fmt: skip
    assert found[2].endswith(", keeps 0.50 of the update")


def test_a_report_counts_the_findings_of_extreme_cases_apart():
    report = checked(merge=lambda weight, **_: np.full_like(weight, np.nan))
    extreme = sum(one.extreme for one in report.findings)
    assert 0 < extreme < len(report.findings)
    said = f"{len(report.findings) - extreme} findings, and {extreme} in extreme cases"
    assert str(report).splitlines()[0] == f"wrong: {report.checked} arrays, {said}"


def test_a_keyboard_interrupt_ends_the_check():
    def interrupted(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        problems(forward=interrupted)


HALF_AND_FULL = "('float16', 'bfloat16', 'float32', 'float64')"


def problems(conventions=None, **functions):
    found = checked(conventions or Conventions(dtypes=("float64",)), **functions).findings
    return [(one.case, one.quantity, one.problem) for one in found]


def test_the_largest_float_is_reported():
    largest = np.finfo("float64").max
    found = problems(merge=lambda weight, **_: np.full_like(weight, largest))
    assert found[0][:2] == ("tall", "merged")
    assert any(problem.endswith("relative error inf") for _, _, problem in found)


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (None, ("all", "must return a dict of gradients, got None")),
        ([1.0], ("all", "must return a dict of gradients, got list")),
        ({}, ("all", "returns no gradient")),
        ({"x": None}, ("all", "returns no gradient")),
        (
            {"lora_c": np.ones(1)},
            ("lora_c", "is not one of x, lora_a, lora_b, magnitude, weight, bias"),
        ),
    ],
)
def test_gradients_that_are_not_a_dict_of_gradients_are_reported(returned, problem):
    assert problems(gradients=lambda **_: returned)[0] == ("tall", *problem)


def test_a_gradient_of_a_missing_bias_is_reported():
    def gradients(dy, **layer):
        found = RIGHT.gradients(dy=dy, **layer)
        return {**found, "bias": dy.reshape(-1, dy.shape[-1]).sum(axis=0)}

    (found,) = (one for one in problems(gradients=gradients) if one[0] == "no bias")
    assert found == ("no bias", "dbias", "must be None where there is no bias")


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (None, "must return (params, state), got None"),
        ({}, "must return (params, state), got dict"),
        ([1, 2, 3], "must return (params, state), got list of 3 items"),
        (([1], None), "must return params with lora_a, lora_b, magnitude, got list"),
        ((None, None), "must return params with lora_a, lora_b, magnitude, got None"),
        (({}, None), "must return params with lora_a, lora_b, magnitude, got dict with no keys"),
        (
            ({"lora_a": np.ones(1), 3: 3}, None),
            "must return params with lora_a, lora_b, magnitude, got dict with lora_a, 3",
        ),
    ],
)
def test_a_step_that_returns_something_else_is_reported(returned, problem):
    assert problems(step=lambda **_: returned)[0] == ("adamw", "all", problem)


def test_a_step_without_arrays_ends_its_case():
    def step(params, **others):
        return {**params, "lora_b": [[1.0], [1.0, 2.0]]}, None

    found = {
        quantity: problem for case, quantity, problem in problems(step=step) if case == "adamw"
    }
    rule = "must be an array that numpy.asarray can read, got list: ValueError: "
    assert found["lora_b 1"].startswith(rule)
    assert all(quantity.endswith(" 1") for quantity in found)


def test_a_step_may_return_lists():
    def step(params, **others):
        assert all(type(p) is np.ndarray for p in params.values())
        stepped, state = RIGHT.step(params=params, **others)
        return {name: p.tolist() for name, p in stepped.items()}, state

    assert problems(step=step) == []


def test_a_step_that_replaces_its_parameters_is_reported():
    def step(params, **others):
        returned = RIGHT.step(params=dict(params), **others)
        params["lora_a"] = [1.0]
        return returned

    assert set(problems(step=step)) >= {("adamw", "params", "was written to")}


@pytest.mark.parametrize("returned", [1.0, np.ones(3), np.ones((3, 2))])
@pytest.mark.parametrize(
    ("layout", "shape"), [("out_in", (8, 5)), ("in_out", (5, 8)), ("weight_in_out", (5, 8))]
)
def test_a_wrong_shape_is_reported_in_the_declared_layout(layout, shape, returned):
    conventions = Conventions(layout=layout, dtypes=("float64",))
    first = problems(conventions, merge=lambda **_: returned)[0]
    assert first == ("tall", "merged", f"has shape {np.shape(returned)}, must have {shape}")


def test_gradients_have_the_shapes_of_their_arrays_in_each_layout():
    """A (rank, in) and B (out, rank) beside a weight (in, out), also of a stack."""
    wanted = {
        "out_in": {"weight": (8, 5), "lora_a": (3, 5), "lora_b": (8, 3)},
        "in_out": {"weight": (5, 8), "lora_a": (5, 3), "lora_b": (3, 8)},
        "weight_in_out": {"weight": (5, 8), "lora_a": (3, 5), "lora_b": (8, 3)},
    }
    for layout, shapes in wanted.items():
        given = []

        def gradients(given=given, **arrays):
            given.append({name: arrays[name].shape for name in ("weight", "lora_a", "lora_b")})
            return {name: np.zeros(1) for name in ("weight", "lora_a", "lora_b")}

        conventions = Conventions(layout=layout, dtypes=("float64",), stacks=True)
        found = checked(conventions, gradients=gradients).findings
        assert given[0] == shapes
        stack = next(one for one in given if len(one["weight"]) == 3)  # (2, 7, 6), rank 3
        turned = {name: shape != wanted["out_in"][name] for name, shape in shapes.items()}
        for name, shape in {"weight": (7, 6), "lora_a": (3, 6), "lora_b": (7, 3)}.items():
            assert stack[name] == (2, *(shape[::-1] if turned[name] else shape))
        problems = {one.quantity: one.problem for one in found if one.case == "tall"}
        for name, quantity in {"weight": "dw", "lora_a": "da", "lora_b": "db"}.items():
            assert problems[quantity] == f"has shape (1,), must have {shapes[name]}"


LAYOUT = (
    "if your weight, A and B have other shapes, declare their layout with --layout or "
    "Conventions(layout=...), which is one of out_in, in_out, weight_in_out"
)
ARGUMENTS = "help(doraxp.testing.check_implementation) lists the arguments"


def test_a_function_that_raises_in_every_call_has_a_line_with_the_shapes():
    """The layout of all three matrices is declared, and A and B are as doraxp keeps them."""
    functions = weight_turned()
    report = checked(Conventions(layout="in_out"), **functions, step=RIGHT.step)
    assert [one.function for one in report.raised] == [*NAMES]
    first = report.raised[0]
    shapes = {"x": (4, 5), "weight": (5, 8), "lora_a": (5, 3), "lora_b": (3, 8)}
    assert first.shapes == {**shapes, "magnitude": (8,), "bias": (8,)}
    assert not first.square_works
    said = (
        "forward raises in every call; the first one was given x (4, 5), weight (5, 8), lora_a "
        f"(5, 3), lora_b (3, 8), magnitude (8,), bias (8,): {LAYOUT}; {ARGUMENTS}"
    )
    assert str(first) == said
    assert str(report).splitlines()[1] == f"  {said}"


def test_a_function_that_works_on_square_weights_alone_has_that_line_too():
    report = checked(**weight_turned())
    assert [one.function for one in report.raised] == [*NAMES]  # init returns another shape
    assert str(report.raised[0]).startswith(
        "forward raises, or returns other shapes, wherever the weight is not square; the first "
        "call was given x (4, 5), weight (8, 5), lora_a (3, 5), lora_b (8, 3), magnitude (8,), "
    )
    assert set(NAMES) <= set(report.unexplained)
    assert "forward: no known mistake" not in str(report)


def test_a_function_of_a_part_or_a_step_that_raises_in_every_call():
    """A layout is for layers: the others have the names of the arguments."""

    def raises(**_):
        raise ValueError("no")

    part = SimpleNamespace(merge=raises)
    report = checked(step=raises, embedding=part, sums=part)
    lines = {one.function: str(one) for one in report.raised}
    assert [*lines] == ["step", "embedding.merge", "sums.merge"]
    assert lines["step"].startswith("step raises in every call; the first one was given params.")
    assert all(line.endswith(f": {ARGUMENTS}") for line in lines.values())
    assert "adapters[0].lora_a (" in lines["sums.merge"]
    assert "weight (" in lines["embedding.merge"]


def test_a_function_that_raises_in_some_calls_has_no_such_line():
    def merge(weight, **others):
        if len(weight) == 1:
            raise ValueError("one row")
        return RIGHT.merge(weight=weight, **others)

    def refuses(weight):
        raise NotImplementedError

    report = checked(merge=merge, init=refuses)
    assert not report.ok
    assert report.raised == ()
    assert check_implementation(RIGHT).raised == ()


def test_a_result_that_numpy_cannot_read_is_reported():
    case, quantity, problem = problems(forward=lambda **_: [[1.0], [1.0, 2.0]])[0]
    assert (case, quantity) == ("tall", "y")
    rule = "must be an array that numpy.asarray can read, got list: ValueError: "
    assert problem.startswith(rule)


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (None, "None"),
        ("what", "str"),
        (b"what", "bytes"),
        ({"y": 1.0}, "dict"),
        ({1.0}, "set"),
        (max, "builtin_function_or_method"),
        (np.asarray(None), "None"),
    ],
)
def test_a_result_that_is_not_an_array_is_named(returned, got):
    said = f"must be an array of numbers, got {got}"
    taken = {"forward": "y", "merge": "merged", "init": "initial"}
    for name, quantity in taken.items():
        report = checked(**{name: lambda **_: returned})
        assert (report.findings[0].quantity, report.findings[0].problem) == (quantity, said)
        # It is one mistake, whatever shapes the cases have.
        assert len(grouped(one for one in report.findings if not one.extreme)) == 1
    parts = {"loha": "merge", "lokr": "merge", "sums": "merge", "embedding": "init"}
    parts = {part: SimpleNamespace(**{name: lambda **_: returned}) for part, name in parts.items()}
    assert {problem for _, _, problem in problems(**parts)} == {said}


def test_a_gradient_or_a_parameter_that_is_not_an_array_is_named():
    def gradients(**given):
        return {**RIGHT.gradients(**given), "lora_a": "what"}

    def step(params, **others):
        return {**params, "lora_b": None}, None

    found = {one[1:] for one in problems(gradients=gradients, step=step)}
    assert ("da", "must be an array of numbers, got str") in found
    assert ("lora_b 1", "must be an array of numbers, got None") in found


def test_a_tensor_that_requires_grad_is_named_with_the_words_of_torch(torch):
    def merge(weight, **_):
        return torch.tensor(weight, requires_grad=True)

    _, quantity, problem = problems(merge=merge)[0]
    assert quantity == "merged"
    rule = "must be an array that numpy.asarray can read, got Tensor: RuntimeError: "
    assert problem.startswith(rule)
    assert "detach()" in problem


def only(gradients, *keys):
    """Return gradients that have these keys alone."""

    def some(**given):
        found = gradients(**given)
        return {key: found[key] for key in keys if key in found}

    return some


def test_gradients_that_no_case_returned_are_said_and_are_not_a_finding():
    assert check_implementation(RIGHT).never_returned == ()
    report = checked(gradients=only(RIGHT.gradients, "x"), forward=RIGHT.forward)
    assert report.ok
    (one,) = report.never_returned
    assert one == ("gradients", ("lora_a", "lora_b", "magnitude", "weight", "bias"))
    said = "gradients never returned lora_a, lora_b, magnitude, weight, bias: not checked"
    assert str(one) == said
    assert f"  {said}" in str(report).splitlines()
    without = only(RIGHT.gradients, "x", "lora_a", "lora_b", "weight", "bias")
    assert [*checked(gradients=without).never_returned] == [("gradients", ("magnitude",))]
    none = checked(gradients=lambda **given: {**RIGHT.gradients(**given), "weight": None})
    assert [*none.never_returned] == [("gradients", ("weight",))]


def test_gradients_of_a_part_that_no_case_returned_are_said():
    parts = {
        name: SimpleNamespace(gradients=only(getattr(PARTS, name).gradients, "lora_a", "lora_b"))
        for name in ("convolution", "embedding")
    }
    report = checked(gradients=only(RIGHT.gradients, "x"), **parts)
    assert report.ok
    assert [*report.never_returned] == [
        ("gradients", ("lora_a", "lora_b", "magnitude", "weight", "bias")),
        ("convolution.gradients", ("x", "magnitude", "weight", "bias")),
        ("embedding.gradients", ("magnitude", "weight")),  # ids have no gradient, nor is there bias
    ]


def test_only_gradients_that_a_case_may_have_are_said_to_be_missing():
    def gradients(bias, **given):
        if bias is not None:
            raise NotImplementedError
        return {"x": RIGHT.gradients(bias=bias, **given)["x"]}

    (one,) = checked(gradients=gradients).never_returned
    assert "bias" not in one.keys
    assert "lora_a" in one.keys


@pytest.mark.parametrize("function", ["raises", "returns a list", "returns nothing"])
def test_cases_without_any_gradient_do_not_count_as_cases_without_one(function):
    """They have a finding already."""

    def gradients(weight, **given):
        if len(weight) != 1:
            return RIGHT.gradients(weight=weight, **given)
        if function == "raises":
            raise ValueError
        return [] if function == "returns a list" else {}

    report = checked(Conventions(dtypes=("float64",)), gradients=gradients)
    assert report.never_returned == ()
    (found,) = (one for one in report.findings if not one.extreme)
    assert (found.case, found.quantity) == ("one row", "all")
    always = checked(gradients=lambda **_: gradients(weight=[1]))
    assert always.never_returned == ()


@pytest.mark.parametrize("absent", [{}, {"magnitude": None}])
def test_a_gradient_that_some_cases_return_is_a_finding_in_the_others(absent):
    def gradients(weight, **given):
        found = RIGHT.gradients(weight=weight, **given)
        if len(weight) == 1:
            del found["magnitude"]
            found |= absent
        return found

    report = checked(gradients=gradients)
    assert not report.ok
    assert report.never_returned == ()
    found = [one for one in report.findings if one.case == "one row"]
    said = "must be returned here as in other cases, got no array for the key magnitude"
    assert found == [
        Finding("gradients", "one row", dtype, "dm", said, False)
        for dtype in ("float32", "float64")
    ]
    order = [(one.function, one.case) for one in report.runs]
    places = [order.index((one.function, one.case)) for one in report.findings]
    assert places == sorted(places)  # the findings are in the order of the calls
    assert report.unexplained == ()


def test_a_function_that_is_not_implemented_is_said_beside_one_that_is():
    """The case ran, so it is not left out, and the function has no run."""

    def merge(**_):
        raise NotImplementedError

    report = checked(forward=RIGHT.forward, merge=merge)
    assert report.ok
    assert {one.function for one in report.runs} == {"forward"}
    assert "tall" not in report.left_out
    calls = {(one.case, one.dtype) for one in report.runs}
    assert {(one.case, one.dtype) for one in report.refused} == calls
    assert {one.function for one in report.refused} == {"merge"}
    (said,) = report.refusals()
    assert said.startswith("merge raises NotImplementedError in 24 cases: tall; wide; square; and ")
    assert f"  {said}" in str(report).splitlines()
    assert check_implementation(RIGHT).refused == ()


def test_a_case_that_is_not_implemented_in_a_dtype_is_said_with_the_dtype():
    def merge(weight, **others):
        if weight.dtype == "float64" and len(weight) == 1:
            raise NotImplementedError
        return RIGHT.merge(weight=weight, **others)

    def init(weight, groups):
        if groups > 1:
            raise NotImplementedError
        return PARTS.convolution.init(weight, groups)

    report = checked(merge=merge, convolution=SimpleNamespace(init=init))
    assert report.refusals() == (
        "merge raises NotImplementedError in 1 case: one row in float64",
        "convolution.init raises NotImplementedError in 1 case: grouped convolution",
    )
    assert report.refused[0] == ("merge", "one row", "float64")
    assert "one row" not in report.left_out


def test_a_gradient_that_is_missing_in_extreme_cases_or_in_a_dtype():
    def gradients(bias, **given):
        found = RIGHT.gradients(bias=bias, **given)
        if np.abs(given["weight"]).max() > 1e20 or given["x"].dtype == "float64":
            found.pop("bias", None)
        return found

    said = "must be returned here as in other cases, got no array for the key bias"
    found = [one for one in checked(gradients=gradients).findings if one.problem == said]
    assert {one.quantity for one in found} == {"dbias"}
    assert {one.dtype for one in found if not one.extreme} == {"float64"}
    assert ("huge", "float32", True) in {(one.case, one.dtype, one.extreme) for one in found}
    assert "no bias" not in {one.case for one in found}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"layout": "in-out"},
            "layout must be one of ('out_in', 'in_out', 'weight_in_out'), got 'in-out'",
        ),
        ({"form": "weights"}, "form must be one of ('weight', 'direction'), got 'weights'"),
        ({"norm_gradient": 1}, "norm_gradient must be one of ('exact', 'detached'), got 1"),
        ({"norm_axis": "row"}, "norm_axis must be one of ('output', 'input'), got 'row'"),
        ({"scaling": "S"}, "scaling must be one of ('s', 'alpha'), got 'S'"),
        ({"dropout": "x"}, "dropout must be one of ('input', 'low_rank', None), got 'x'"),
        ({"bias_scaled": "no"}, "bias_scaled must be True or False, got 'no'"),
        ({"stacks": 1}, "stacks must be True or False, got 1"),
        ({"eps": -1.0}, "eps must be at least 0 and finite, got -1.0"),
        ({"dtypes": ()}, f"dtypes must be some of {HALF_AND_FULL}, got ()"),
        ({"dtypes": ("f4",)}, f"dtypes must be some of {HALF_AND_FULL}, got ('f4',)"),
        ({"dtypes": "float32"}, f"dtypes must be some of {HALF_AND_FULL}, got 'float32'"),
    ],
)
def test_wrong_conventions_are_refused(choice, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        Conventions(**choice)


def test_a_dtype_that_numpy_lacks_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(RuntimeError, match="bfloat16 cannot be made here: pip install ml_dtypes"):
        checked(Conventions(dtypes=("bfloat16",)), merge=RIGHT.merge)


def test_conventions_of_another_type_are_refused():
    with pytest.raises(TypeError, match="conventions must be of type Conventions, got str"):
        checked("weight", merge=RIGHT.merge)


def test_a_step_that_writes_to_its_parameters_is_reported():
    def step(params, grads, state, **numbers):
        params["magnitude"] *= 1
        stepped, state = RIGHT.step(params, grads, state, **numbers)
        params["magnitude"] += 1
        return stepped, state

    assert {one.problem for one in checked(step=step).findings} == {"was written to"}


def test_an_object_without_a_function_is_refused():
    with pytest.raises(
        ValueError, match="init, forward, gradients, merge or step, or one of a part, got object"
    ):
        check_implementation(object())
