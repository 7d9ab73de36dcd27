"""The parts of an implementation beside a layer: operators, other updates, sums, optimizers."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from types import SimpleNamespace

import faults
import numpy as np
import pytest

import doraxp
from doraxp import (
    Adapter,
    Config,
    Convolution,
    Difference,
    Embedding,
    Hadamard,
    Kronecker,
    LayerKind,
    LowRank,
    UpdateAdapter,
)
from doraxp.testing import (
    Conventions,
    check_implementation,
    expected_of_sum,
    expected_of_update,
    operator_catalogue,
    sum_catalogue,
    update_catalogue,
)
from doraxp.testing._deviations import FORWARD, LOW_RANK
from doraxp.testing._part_deviations import CONVOLUTION, EMBEDDING
from doraxp.testing._parts import parts, results_of

PARTS = faults.planted(None, "naive_parts")
SUMS, UPDATES = sum_catalogue(), update_catalogue()


def checked(conventions=None, since=1, **parts):
    return check_implementation(SimpleNamespace(**parts), conventions, since=since)


def one(**functions):
    return SimpleNamespace(**functions)


def problems(report):
    return {(each.function, each.case, each.quantity, each.problem) for each in report.findings}


class Own:
    """The functions of this package for convolutions or embeddings."""

    def __init__(self, choices, kind, operator):
        self.choices, self.kind, self.operator = choices, kind, operator

    def layer(self, weight, lora_a, lora_b, magnitude, scaling):
        rank = lora_a.shape[-2]
        adapter = Adapter(lora_a, lora_b, magnitude)
        return weight, adapter, Config(rank, scaling * rank, **self.choices)

    def run(self, x, weight, lora_a, lora_b, magnitude, scaling, bias=None, dropout_mask=None,
            **numbers):  # fmt: skip
        layer = self.layer(weight, lora_a, lora_b, magnitude, scaling)
        return doraxp.forward(
            x, *layer, bias=bias, dropout_mask=dropout_mask, kind=self.kind(**numbers),
            operator=self.operator(**numbers),
        )  # fmt: skip

    def forward(self, **arguments):
        return self.run(**arguments)[0]

    def gradients(self, dy, **arguments):
        grads = doraxp.backward(dy, self.run(**arguments)[1], train_base=True)
        found = {**grads.adapter._asdict(), "weight": grads.weight, "x": grads.x}
        if "bias" not in arguments:
            del found["x"]  # ids have no gradient
        elif arguments["bias"] is not None:
            found["bias"] = grads.bias
        return found

    def merge(self, groups=1, **arguments):
        return doraxp.merge(*self.layer(**arguments), kind=self.kind(groups=groups))

    def init(self, weight, groups=1):
        kind = self.kind(groups=groups)
        return doraxp.init(weight, Config(1), seed=0, kind=kind).magnitude


def merged(weight, update, magnitude, scaling, choices):
    return doraxp.merge(weight, UpdateAdapter(update, magnitude), Config(1, scaling, **choices))


def own(choices):
    def loha(weight, first_a, first_b, second_a, second_b, magnitude, scaling):
        update = Hadamard(LowRank(first_a, first_b), LowRank(second_a, second_b))
        return merged(weight, update, magnitude, scaling, choices)

    def lokr(weight, left, right, right_a, right_b, magnitude, scaling):
        factor = Difference(right) if right_a is None else LowRank(right_a, right_b)
        return merged(weight, Kronecker(left, factor), magnitude, scaling, choices)

    def sums(weight, adapters, strengths, scalings):
        total = weight
        for adapter, strength, scaling in zip(adapters, strengths, scalings, strict=True):
            update = LowRank(adapter["lora_a"], adapter["lora_b"])
            alone = merged(weight, update, adapter["magnitude"], scaling, choices)
            total = total + strength * (alone - weight)
        return total

    def convolution(groups=1, **numbers):
        return LayerKind("conv", groups=groups)

    def windows(groups, **numbers):
        return Convolution(**numbers)

    return {
        "convolution": Own(choices, convolution, windows),
        "embedding": Own({k: v for k, v in choices.items() if k != "dropout"},
                         lambda **_: LayerKind("embedding"), Embedding),
        "loha": one(merge=loha),
        "lokr": one(merge=lokr),
        "sums": one(merge=sums),
    }  # fmt: skip


@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("norm_gradient", ["exact", "detached"])
@pytest.mark.parametrize("dropout", [None, "input", "low_rank"])
def test_this_package_is_right_in_every_part(form, norm_gradient, dropout):
    choices = {"form": form, "norm_gradient": norm_gradient}
    given = choices if dropout is None else choices | {"dropout": dropout}
    report = checked(Conventions(**choices, dropout=dropout), **own(given))
    assert report.findings == ()
    ran = {run.function for run in report.runs}
    layers = {"init", "forward", "gradients", "merge"}
    assert ran >= {f"{part}.{name}" for part in ("convolution", "embedding") for name in layers}
    # The direction form has no plain update, and a sum has no form of its own.
    assert ("sums.merge" in ran) == (form == "weight")
    assert ("loha without m" in report.left_out) == (form == "direction")


def test_plain_numpy_is_right_except_in_a_row_of_zeros():
    report = check_implementation(PARTS, Conventions(dropout="input"))
    assert report.ok
    assert report.diagnoses == ()
    assert {each.case for each in report.findings} == {"embedding, zero dimension"}


@pytest.mark.parametrize("case", UPDATES, ids=lambda case: case.name)
def test_the_reference_of_an_update_equals_numbers_one_by_one(case):
    arrays, s = case.arrays, case.config.scaling
    merged = expected_of_update(case, "float64")["merged"].value
    for i, j in np.ndindex(*merged.shape):
        v = [direction(case, i, k) for k in range(merged.shape[1])]
        gain = (
            arrays["magnitude"][i] / np.sqrt(np.sum(np.square(v))) if "magnitude" in arrays else 1
        )
        np.testing.assert_allclose(merged[i, j], gain * v[j], rtol=1e-13)
    assert s != 1


def direction(case, i, j):
    """Return V[i, j]."""
    arrays = case.arrays
    row = arrays["weight"][i]
    base = row[j] / np.sqrt(np.sum(row**2)) if case.config.form == "direction" else row[j]
    if case.kind == "loha":
        delta = np.prod([
            sum(arrays[f"{name}_b"][i, k] * arrays[f"{name}_a"][k, j] for k in range(3))
            for name in ("first", "second")
        ])  # fmt: skip
    else:
        right = arrays["right"] if "right" in arrays else arrays["right_b"] @ arrays["right_a"]
        (p, k), (q, c) = divmod(i, len(right)), divmod(j, right.shape[1])
        delta = arrays["left"][p, q] * right[k, c]
    return base + case.config.scaling * delta


@pytest.mark.parametrize("case", SUMS, ids=lambda case: case.name)
def test_the_reference_of_a_sum_equals_rows_one_by_one(case):
    merged, weight = expected_of_sum(case, "float64")["merged"].value, case.arrays["weight"]
    for i, row in enumerate(weight):
        total = row.copy()
        for adapter, config, t in zip(
            case.adapters("float64"), case.configs, case.strengths, strict=True
        ):
            v = row + config.scaling * adapter["lora_b"][i] @ adapter["lora_a"]
            m = adapter["magnitude"]
            alone = v if m is None else m[i] * v / np.sqrt(np.sum(v**2))
            total += t * (alone - row)
        np.testing.assert_allclose(merged[i], total, rtol=1e-13, atol=1e-15)


def test_a_sum_that_is_wrong_at_strength_0_alone_does_not_end_the_check():
    """Some deviations divide by the sum of the strengths."""

    def merge(weight, strengths, **others):
        return (
            0 * weight
            if not sum(strengths)
            else PARTS.sums.merge(weight, strengths=strengths, **others)
        )

    report = checked(sums=one(merge=merge))
    assert {finding.case for finding in report.findings} == {"no strength"}


def test_each_adapter_of_a_sum_has_a_scaling_of_its_own():
    def merge(scalings, **others):
        return PARTS.sums.merge(scalings=[scalings[0]] * len(scalings), **others)

    several = {case.name for case in SUMS if len(case.strengths) > 1}
    assert {found.case for found in checked(sums=one(merge=merge)).findings} == several


def test_numbers_for_each_dimension_are_tuples_of_ints():
    seen = []

    def forward(stride, padding, dilation, groups, **_):
        seen.extend((stride, padding, dilation))
        assert isinstance(groups, int)
        raise NotImplementedError

    checked(convolution=one(forward=forward))
    assert seen
    assert all(isinstance(n, tuple) and set(map(type, n)) == {int} for n in seen)


def test_cases_that_since_leaves_out_are_not_listed_as_left_out():
    def merge(**_):
        raise NotImplementedError

    report = checked(merge=merge, since=4)
    assert report.left_out
    assert "tall" not in report.left_out


def test_an_adapter_of_a_sum_that_is_written_to_is_reported():
    def merge(weight, adapters, strengths, scalings):
        total = PARTS.sums.merge(weight, adapters, strengths, scalings)
        adapters[-1]["lora_a"] *= 2
        return total

    found = problems(checked(sums=one(merge=merge)))
    assert ("sums.merge", "two adapters", "adapters", "was written to") in found


def test_a_case_that_is_not_implemented_is_left_out_and_said():
    def merge(weight, groups, **others):
        if groups > 1:
            raise NotImplementedError("groups")
        return PARTS.convolution.merge(weight=weight, groups=groups, **others)

    report = checked(convolution=one(merge=merge))
    assert report.ok
    assert "grouped convolution" in report.left_out
    assert "grouped convolution" not in {run.case for run in report.runs}
    assert "grouped convolution" in str(report).splitlines()[-1]


def test_a_part_of_which_nothing_is_implemented_is_left_out_as_a_whole():
    def merge(**_):
        raise NotImplementedError

    report = checked(loha=one(merge=merge), sums=PARTS.sums)
    assert {"loha", "loha, square", "loha without m"} <= set(report.left_out)


def test_the_gradient_of_ids_is_refused():
    def gradients(x, **others):
        found = PARTS.embedding.gradients(x=x, **others)
        return {**found, "x": np.zeros(x.shape)}

    report = checked(embedding=one(gradients=gradients))
    rule = "is not one of lora_a, lora_b, magnitude, weight"
    assert ("embedding.gradients", "embedding", "x", rule) in problems(report)


def test_alpha_is_passed_as_scaling_to_every_part():
    seen = {}

    def keeping(name, merge):
        def call(**arguments):
            seen.setdefault(name, []).append(arguments.get("scaling", arguments.get("scalings")))
            return merge(**arguments)

        return one(merge=call)

    parts = {name: keeping(name, getattr(PARTS, name).merge) for name in ("loha", "sums")}
    checked(Conventions(scaling="alpha", dtypes=("float64",)), **parts)
    assert seen["loha"] == [case.config.alpha for case in UPDATES if case.kind == "loha"
                            and case.config.form == "weight"]  # fmt: skip
    assert seen["sums"] == [[config.alpha for config in case.configs] for case in SUMS]


def test_a_declared_eps_stays_in_every_part():
    eps = faults.Fault("sum(axis=-1))\n", "sum(axis=-1)) + 1e-6\n", None, source="naive_parts")
    module = faults.planted(eps)
    names = ("convolution", "embedding", "loha", "lokr", "sums")
    merges = {name: one(merge=getattr(module, name).merge) for name in names}
    assert {each.function.split(".")[0] for each in checked(**merges).findings} == set(names)
    assert checked(Conventions(eps=1e-6), **merges).ok


def test_with_the_norm_of_input_columns_operators_and_sums_do_not_run():
    with pytest.raises(ValueError, match="impl must have"):
        checked(nothing=1)
    report = checked(Conventions(norm_axis="input"), lokr=PARTS.lokr, sums=PARTS.sums,
                     convolution=PARTS.convolution)  # fmt: skip
    assert {run.case for run in report.runs} == {"lokr, square"}


class TestSince:
    def test_only_later_cases_run(self):
        report = check_implementation(PARTS, since=4)
        assert {run.case for run in report.runs} == {
            *(case.name for case in (*UPDATES, *SUMS) if "direction" not in case.name),
            "lora+",
            "scaled adamw",
        }

    @pytest.mark.parametrize(("since", "error"), [(0, ValueError), (1.5, TypeError)])
    def test_a_version_must_be_a_count(self, since, error):
        with pytest.raises(error, match="since"):
            check_implementation(PARTS, since=since)

    def test_convolutions_came_with_version_3(self):
        assert {case.since for case in operator_catalogue()} == {3}
        assert "convolution" in {run.case for run in check_implementation(PARTS, since=3).runs}
        assert "convolution.merge" not in {
            run.function for run in check_implementation(PARTS, since=4).runs
        }


def test_every_call_is_told_before_it_runs_and_listed_after():
    told = []

    def merge(**arguments):
        assert len(told) == len(calls) + 1
        calls.append(arguments)
        return PARTS.loha.merge(**arguments)

    calls = []
    report = check_implementation(
        one(loha=one(merge=merge)), progress=lambda *step: told.append(step)
    )
    total = len(calls)
    assert told[0] == ("loha.merge: loha, float32", 0, total)
    assert [done for _, done, _ in told[:total]] == list(range(total))
    assert told[-1][1:] == (total, total)
    assert [(run.function, run.case) for run in report.runs[:2]] == [("loha.merge", "loha")] * 2
    assert sum(run.checked for run in report.runs) == report.checked == total


def test_a_call_that_raises_is_listed_without_numbers():
    def merge(**_):
        raise ZeroDivisionError

    runs = checked(lokr=one(merge=merge)).runs
    assert {run.checked for run in runs} == {0}
    assert len(runs) == 2 * sum(case.kind == "lokr" for case in UPDATES)


HARDEST = (
    ("dropout", Conventions(dropout="input")),
    ("detached", Conventions(norm_gradient="detached")),
    ("grouped convolution", Conventions()),
    ("convolution, low-rank dropout", Conventions(dropout="low_rank")),
    ("scaled embedding", Conventions()),
    ("loha without m", Conventions()),
    ("lokr, factored", Conventions()),
    ("dora and lora", Conventions()),
    ("adamw", Conventions()),
    ("lora+", Conventions()),
    ("scaled adamw", Conventions()),
)


@pytest.mark.parametrize(("name", "conventions"), HARDEST, ids=[name for name, _ in HARDEST])
def test_every_two_deviations_can_be_computed_together(name, conventions):
    """An error here would end the check of an implementation that has another fault."""
    (part,) = (one for one in parts() if name in {case.name for case in one.cases})
    (case,) = (case for case in conventions.accepted(part.cases) if case.name == name)
    base = conventions.changes if part.keeps_conventions else {}
    for one, other in itertools.combinations(part.known.values(), 2):
        if not one.keys() & other.keys():
            results = results_of(case, "float64", {**base, **one, **other})
            with contextlib.suppress(ValueError, ArithmeticError):  # the case does not allow it
                for quantity in results.names:
                    results.of(quantity)


LEAVES = {"x": "dx", "lora_a": "da", "lora_b": "db", "magnitude": "dm", "weight": "dw"} | {
    "bias": "dbias"
}
FORWARD_OF = {
    "": {**FORWARD, **LOW_RANK},
    "convolution": {**FORWARD, **LOW_RANK, **CONVOLUTION},
    "embedding": {**FORWARD, **LOW_RANK, **EMBEDDING},
}
# The last one is of the backward alone. A framework gives no gradient to an array that
# the forward leaves out.
WITHOUT = {
    "an id that comes again keeps its last gradient alone": LEAVES.keys(),
    "the bias is left out": {"bias"},
    "the update is left out": {"lora_a", "lora_b"},
}
# A central difference cannot be taken there: numbers cancel, or a norm of 0 has no slope.
NOT_SMOOTH = (
    "rows of all sizes", "cancelling rows", "zero row of W", "dropout, zero row of W",
)  # fmt: skip


def slope_along(case, changes, moves, size=1e-5):
    """Return the derivative of ⟨dy, y⟩ along some moves of the arrays, by a central difference."""
    ends = []
    for sign in (1, -1):
        arrays = {**case.arrays}
        for name, move in moves.items():
            arrays[name] = arrays[name] + sign * size * move
        y = results_of(replace(case, arrays=arrays), "float64", changes).of("y").value
        ends.append(float(np.sum(y * case.arrays["dy"])))
    return (ends[0] - ends[1]) / (2 * size)


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path, known in FORWARD_OF.items() for name in known],
)
def test_a_wrong_forward_has_the_gradients_of_autograd(path, name):
    """A framework differentiates the wrong forward, so these are the numbers that it returns."""
    (part,) = (one for one in parts() if one.path == path and "forward" in one.functions)
    changes, rng = FORWARD_OF[path][name], np.random.default_rng(0)
    for case in part.cases:
        has_slope = case.name not in NOT_SMOOTH and case.arrays["lora_b"].any()
        unlike = case.extreme or case.config.norm_gradient == "detached"
        if unlike or not has_slope or "float64" not in case.dtypes:
            continue
        results = results_of(case, "float64", changes)
        for leaf, gradient in LEAVES.items():
            if gradient not in results.names or leaf in WITHOUT.get(name, ()):
                continue
            move = rng.standard_normal(case.arrays[leaf].shape)
            try:
                found = results.of(gradient).value * move
                wanted = slope_along(case, changes, {leaf: move})
            except ValueError:  # the shapes of the deviation do not fit
                continue
            size = np.sum(np.abs(found)) + abs(wanted) + 1
            assert abs(np.sum(found) - wanted) < 1e-6 * size, (case.name, gradient)
