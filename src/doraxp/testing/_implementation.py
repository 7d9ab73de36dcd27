"""Run the catalogue on someone else's implementation, and say what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np

from doraxp._types import Form, NormGradient
from doraxp.testing._catalogue import (
    ADAPTER,
    HALF,
    Case,
    OptimizerCase,
    catalogue,
    compute_dtype,
    optimizer_catalogue,
)
from doraxp.testing._compare import Actual
from doraxp.testing._dense import QUANTITIES
from doraxp.testing._deviations import BACKWARD, FORWARD, STEP, Changes, eps
from doraxp.testing._libraries import Library, as_numpy, dtype_name
from doraxp.testing._reference import Expected, expected, expected_steps

GRADIENTS = {"x": "dx", "lora_a": "da", "lora_b": "db", "magnitude": "dm", "weight": "dw"} | {
    "bias": "dbias"
}


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """What an implementation means to do; all else that differs is wrong.

    Parameters
    ----------
    layout : {"out_in", "in_out"}
        How it stores the weight; "in_out" has A as (in, rank) and B as (rank, out) too.
    form : {"weight", "direction"}
    norm_gradient : {"exact", "detached"}
    norm_axis : {"output", "input"}
        One norm for each output row, or for each input column; the latter is run on square
        weights alone.
    bias_scaled : bool
        Whether m/n scales the bias.
    eps : float
        What it adds to the norm.
    scaling : {"s", "alpha"}
        Which number it takes by the name of `scaling`.
    stacks : bool
        Whether it takes weights with leading axes.
    dtypes : tuple of str
        The storage dtypes to run in.
    """

    layout: Literal["out_in", "in_out"] = "out_in"
    form: Form = "weight"
    norm_gradient: NormGradient = "exact"
    norm_axis: Literal["output", "input"] = "output"
    bias_scaled: bool = False
    eps: float = 0.0
    scaling: Literal["s", "alpha"] = "s"
    stacks: bool = False
    dtypes: tuple[str, ...] = ("float32", "float64")

    @property
    def changes(self) -> Changes:
        """The formulas of the reference that the conventions replace."""
        axis = FORWARD["the norm runs over the input axis"] if self.norm_axis == "input" else {}
        bias = FORWARD["the bias is scaled by m/n, so that forward is not merge"]
        return {**axis, **(bias if self.bias_scaled else {}), **(eps(self.eps) if self.eps else {})}

    def cases(self) -> Iterator[Case]:
        """Yield the layers of the catalogue in this form, those that it claims to take."""
        for case in catalogue():
            *stack, out, inner = case.arrays["weight"].shape
            choices = {case.config.form, case.config.norm_gradient}
            if choices - {"weight", "exact", self.form, self.norm_gradient}:
                continue
            if (not stack or self.stacks) and (self.norm_axis == "output" or out == inner):
                config = replace(case.config, form=self.form, norm_gradient=self.norm_gradient)
                yield replace(case, config=config)


class Finding(NamedTuple):
    """Something wrong with what an implementation returned."""

    function: str
    case: str
    dtype: str
    quantity: str
    problem: str
    extreme: bool
    """Whether the formulas themselves fail there, as they stand: 0/0, or squares out of range."""


class Diagnosis(NamedTuple):
    """Deviations that explain every number that some functions returned."""

    functions: tuple[str, ...]
    deviations: tuple[str, ...]
    """One, or two together."""
    before: float
    """Largest error in units of its bound, against the reference."""
    after: float
    """The same against a reference that deviates in these ways; not above 1."""


class Report(NamedTuple):
    """What `check_implementation` found."""

    findings: tuple[Finding, ...]
    diagnoses: tuple[Diagnosis, ...]
    """Of all functions that work on a layer together, or else of each by itself; several where
    each explains the same numbers, none where no known deviation does. Extreme cases aside."""
    checked: int
    """How many arrays were looked at."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, extreme cases aside."""
        return all(one.extreme for one in self.findings)

    def __str__(self) -> str:
        extreme = sum(one.extreme for one in self.findings)
        lines = [
            f"{'right' if self.ok else 'wrong'}: {self.checked} arrays, "
            f"{len(self.findings) - extreme} findings, and {extreme} in extreme cases"
        ]
        for one in self.diagnoses:
            explained = f"error {one.before:.3g} bounds, so explained {one.after:.3g}"
            lines.append(
                f"  {', '.join(one.functions)}: {' and '.join(one.deviations)} ({explained})"
            )
        lines += [
            f"  {one.function}, {one.case}, {one.dtype}, {one.quantity}: {one.problem}"
            for one in self.findings
        ]
        return "\n".join(lines)


class Run(NamedTuple):
    """What one function returned for one case, and what it should have."""

    function: str
    case: Case | OptimizerCase
    dtype: str
    actual: dict[str, Actual]
    wanted: dict[str, Expected]


def check_implementation(impl: Any, conventions: Conventions | None = None) -> Report:
    """Run the catalogue on an implementation of DoRA, and name what is wrong with it.

    Every function takes its arguments by name, as NumPy arrays, and returns NumPy arrays or what
    `numpy.asarray` takes. Offer those that there are::

        forward(x, weight, lora_a, lora_b, magnitude, bias, scaling) -> y
        gradients(dy, x, weight, lora_a, lora_b, magnitude, bias, scaling)
            -> dict with any of x, lora_a, lora_b, magnitude, weight, bias
        merge(weight, lora_a, lora_b, magnitude, scaling) -> W'
        step(params, grads, state, learning_rate, beta1, beta2, eps, weight_decay)
            -> (params, state); AdamW, on dicts with lora_a, lora_b, magnitude; state is first None

    bias is None in some cases. Where numbers are wrong, every known deviation is tried, then every
    two together, and those that explain all numbers are named.

    Parameters
    ----------
    impl : object
        With some of these callables as attributes.
    conventions : Conventions, optional
        What it means to do.

    Returns
    -------
    Report
        Nothing that the implementation does ends the check: what raises, returns something else,
        or writes to its inputs is a finding.

    Raises
    ------
    ValueError
        `impl` offers none of the functions.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> def merge(weight, lora_a, lora_b, magnitude, scaling):
    ...     v = weight + lora_b @ lora_a
    ...     return magnitude[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)
    >>> report = check_implementation(SimpleNamespace(merge=merge))
    >>> report.diagnoses[0].deviations
    ('s is left out',)
    """
    conventions = conventions or Conventions()
    functions = {
        name: getattr(impl, name)
        for name in ("forward", "gradients", "merge", "step")
        if hasattr(impl, name)
    }
    if not functions:
        raise ValueError("impl must offer forward, gradients, merge or step, got none of them")
    findings: list[Finding] = []
    runs: dict[bool, list[Run]] = {True: [], False: []}
    for name, function in functions.items():
        is_step = name == "step"
        run: Any = partial(_step if is_step else _layer, function)
        for case in _adamw_cases() if is_step else conventions.cases():
            for dtype in case.dtypes:
                if dtype in conventions.dtypes:
                    one = _observe(name, case, dtype, run, conventions, findings)
                    runs[is_step].append(one)
    layers, steps = runs[False], runs[True]
    known, base = {**FORWARD, **BACKWARD}, conventions.changes
    diagnoses = _diagnose(layers, known, base)
    if not diagnoses:  # what one function gets wrong, the others may not know of
        for name in functions:
            diagnoses += _diagnose([run for run in layers if run.function == name], known, base)
    diagnoses += _diagnose(steps, STEP, {})
    checked = sum(len(run.actual) for run in (*layers, *steps))
    return Report(tuple(findings), tuple(diagnoses), checked)


def _adamw_cases() -> list[OptimizerCase]:
    return [case for case in optimizer_catalogue() if case.optimizer == "adamw"]


def _observe(
    name: str,
    case: Any,
    dtype: str,
    run: Callable[..., dict[str, Any]],
    conventions: Conventions,
    findings: list[Finding],
) -> Run:
    """Call one function on one case; keep its numbers, and note what is wrong with them."""
    extreme = isinstance(case, Case) and case.extreme

    def note(quantity: str, problem: str) -> None:
        findings.append(Finding(name, case.name, dtype, quantity, problem, extreme))

    wanted = _wanted(case, dtype, {} if name == "step" else conventions.changes)
    try:
        with np.errstate(all="ignore"):  # what overflows on the way shows in the numbers
            returned = run(name, conventions, case, dtype)
    except Exception as error:  # of someone else's code: it is a finding
        note("all", f"raises {type(error).__name__}: {error}")
        return Run(name, case, dtype, {}, wanted)
    actual = {}
    for quantity, got in returned.items():
        if isinstance(got, str):
            note(quantity, got)
            continue
        want = wanted[quantity]
        problem = got.mismatch(want)
        if problem is None:
            actual[quantity] = got
            if (share := want.share(got.values)) > 1:
                problem = (
                    f"is {share:.3g} times its bound off, relative error "
                    f"{want.relative(got.values):.2g}"
                )
        if problem is not None:
            note(quantity, problem)
    return Run(name, case, dtype, actual, wanted)


def _wanted(
    case: Any, dtype: str, changes: Changes, names: Collection[str] = QUANTITIES
) -> dict[str, Expected]:
    if isinstance(case, OptimizerCase):
        return expected_steps(case, dtype, changes)
    return expected(case, dtype, changes, names)


def _layer(
    function: Callable[..., Any], name: str, conventions: Conventions, case: Case, dtype: str
) -> dict[str, Any]:
    """Return what forward, gradients or merge gives, by the names of the quantities."""
    library, wide = Library("numpy"), compute_dtype(dtype)
    turned = conventions.layout == "in_out"
    arrays: dict[str, Any] = {}
    for key, values in case.stored(dtype).items():
        array = library.asarray(values, wide if key in ADAPTER else dtype)
        matrix = key in ("weight", "lora_a", "lora_b")
        arrays[key] = np.ascontiguousarray(array.swapaxes(-1, -2)) if turned and matrix else array
    arrays.setdefault("bias", None)
    takes = {
        "forward": ("x", "weight", *ADAPTER, "bias"),
        "gradients": ("dy", "x", "weight", *ADAPTER, "bias"),
        "merge": ("weight", *ADAPTER),
    }[name]
    s = case.config.scaling if conventions.scaling == "s" else case.config.alpha
    given = {key: arrays[key] for key in takes}
    returned, written = _call(function, given, scaling=s)
    if name != "gradients":
        returned = {{"forward": "y", "merge": "merged"}[name]: returned}
    else:
        returned = {GRADIENTS[key]: array for key, array in returned.items() if array is not None}
    turn_back = {"merged", "dw", "da", "db"} if turned else set()
    found = {key: _actual(array, key in turn_back) for key, array in returned.items()}
    return found | written


def _step(
    function: Callable[..., Any], _: str, __: Conventions, case: OptimizerCase, dtype: str
) -> dict[str, Any]:
    """Return the parameters after each of the three steps."""
    params, *grads = (
        {key: values.astype(dtype) for key, values in arrays.items()}
        for arrays in (case.params, *case.grads)
    )
    state: Any = None
    found: dict[str, Any] = {}
    for t, gradient in enumerate(grads, start=1):
        (params, state), written = _call(
            function, {"params": params, "grads": gradient}, state=state, **case.numbers
        )
        found |= {f"{key} {t}": _actual(params[key], False) for key in case.params} | written
    return found


def _call(
    function: Callable[..., Any], given: dict[str, Any], **others: Any
) -> tuple[Any, dict[str, str]]:
    """Call, and say which of the given arrays were written to."""
    before = {key: _copied(value) for key, value in given.items()}
    returned = function(**given, **others)
    written = {
        key: "was written to"
        for key, value in given.items()
        if repr(_bits(before[key])) != repr(_bits(value))
    }
    return returned, written


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: array.copy() for key, array in value.items()}
    return None if value is None else value.copy()


def _bits(value: Any) -> Any:
    """Return what differs where a number does, NaN or not."""
    if isinstance(value, dict):
        return {key: array.tobytes() for key, array in value.items()}
    return None if value is None else value.tobytes()


def _actual(array: Any, turn: bool) -> Actual:
    array = np.array(array)  # a copy: the next call may write to it
    name = dtype_name(array)
    values = as_numpy(array) if name in (*HALF, "float32", "float64") else array
    return Actual(values.swapaxes(-1, -2) if turn else values, name)


def _diagnose(runs: list[Run], known: Mapping[str, Changes], base: Changes) -> list[Diagnosis]:
    """Return the smallest sets of deviations that explain every number."""
    runs = [run for run in runs if not (isinstance(run.case, Case) and run.case.extreme)]
    before = max((_worst(run.actual, run.wanted) for run in runs), default=0.0)
    if before <= 1:
        return []
    functions = tuple(dict.fromkeys(run.function for run in runs))
    # Most deviations fail on the run that is worst explained: it goes first.
    runs = sorted(runs, key=lambda run: -_worst(run.actual, run.wanted))
    candidates = list(known)
    for size in (1, 2):
        found = []
        for names in combinations(candidates, size):
            changed = [key for name in names for key in known[name]]
            if len(set(changed)) == len(changed):
                merged = {key: formula for name in names for key, formula in known[name].items()}
                if (after := _explained(runs, {**base, **merged})) <= 1:
                    found.append(Diagnosis(functions, names, before, after))
        if found:
            return found
        # One that moves none of these numbers is part of no pair that explains them.
        candidates = [name for name in known if _moves(runs, {**base, **known[name]})]
    return []


def _moves(runs: list[Run], changes: Changes) -> bool:
    """Say whether a deviation changes anything that was returned."""
    for run in runs:
        if run.actual:
            wanted = _deviating(run, changes)
            for key in run.actual:
                if wanted is None or not np.array_equal(wanted[key].value, run.wanted[key].value):
                    return True
    return False


def _deviating(run: Run, changes: Changes) -> dict[str, Expected] | None:
    """Return what a deviation gives; None where the shapes of the case have no such deviation."""
    try:
        return _wanted(run.case, run.dtype, changes, run.actual)
    except ValueError:
        return None


def _explained(runs: list[Run], changes: Changes) -> float:
    """Return the largest error against the deviating reference, or the first above 1."""
    worst = 0.0
    for run in runs:
        if run.actual:
            wanted = _deviating(run, changes)
            worst = np.inf if wanted is None else max(worst, _worst(run.actual, wanted))
            if worst > 1:
                break
    return worst


def _worst(actual: dict[str, Actual], wanted: dict[str, Expected]) -> float:
    return max((wanted[key].share(got.values) for key, got in actual.items()), default=0.0)
