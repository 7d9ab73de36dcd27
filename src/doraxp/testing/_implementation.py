"""Run the catalogue on another implementation, and report what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from doraxp._base.scalars import check_kind
from doraxp.testing._cases import Case, OptimizerCase
from doraxp.testing._catalogue import catalogue, optimizer_catalogue
from doraxp.testing._conventions import Conventions, call_layer, call_step
from doraxp.testing._deviations import BACKWARD, FORWARD, STEP
from doraxp.testing._diagnosis import Diagnosis, Run, diagnose, wanted_of
from doraxp.testing._libraries import Library
from doraxp.testing._runs import described


class Finding(NamedTuple):
    """One fault of a result that an implementation returned."""

    function: str
    case: str
    dtype: str
    quantity: str
    problem: str
    extreme: bool
    """Whether the formulas as written fail in this case: 0/0, or squares out of range."""


class Ran(NamedTuple):
    """One call of a function of an implementation, for one case in one dtype."""

    function: str
    case: str
    dtype: str
    extreme: bool
    checked: int
    """The number of arrays that were compared."""


class Report(NamedTuple):
    """The result of `check_implementation`."""

    findings: tuple[Finding, ...]
    diagnoses: tuple[Diagnosis, ...]
    """Diagnoses of all functions of a layer together, or else of each function by itself. There
    are several where each of them explains the same numbers, and it is empty where no known
    deviation does. Extreme cases are not used."""
    checked: int
    """The number of arrays that were compared."""
    left_out: tuple[str, ...]
    """The names of the layers that did not run, because the conventions leave them out."""
    runs: tuple[Ran, ...] = ()
    """One for each function, case and dtype that ran."""

    @property
    def ok(self) -> bool:
        """Whether there are no findings outside the extreme cases."""
        return all(one.extreme for one in self.findings)

    def __str__(self) -> str:
        extreme = sum(one.extreme for one in self.findings)
        lines = [
            f"{'right' if self.ok else 'wrong'}: {self.checked} arrays, "
            f"{len(self.findings) - extreme} findings, and {extreme} in extreme cases"
        ]
        for named in self.diagnoses:
            explained = f"error {named.before:.3g} bounds, so explained {named.after:.3g}"
            lines.append(
                f"  {', '.join(named.functions)}: {' and '.join(named.deviations)} ({explained})"
            )
        alike: dict[tuple[str, str, str], list[Finding]] = {}
        for one in self.findings:
            alike.setdefault((one.function, one.quantity, one.problem), []).append(one)
        for one, *more in alike.values():
            where = f"{one.function}, {one.case}, {one.dtype}, {one.quantity}"
            again = f" (and {len(more)} more)" if more else ""
            lines.append(f"  {where}: {one.problem}{again}")
        if self.left_out:
            lines.append(f"  not run, as the conventions say: {'; '.join(self.left_out)}")
        return "\n".join(lines)


def check_implementation(
    impl: Any,
    conventions: Conventions | None = None,
    *,
    since: int = 1,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Report:
    """Run the catalogue on an implementation of DoRA, and name what is wrong with it.

    Every function is given NumPy arrays by name, and returns NumPy arrays or objects that
    `numpy.asarray` can read. `impl` has one or more of these functions::

        init(weight) -> the magnitude of a fresh adapter, where B A is 0
        forward(x, weight, lora_a, lora_b, magnitude, bias, scaling) -> y
        gradients(dy, x, weight, lora_a, lora_b, magnitude, bias, scaling)
            -> dict with any of x, lora_a, lora_b, magnitude, weight and, unless it is None, bias
        merge(weight, lora_a, lora_b, magnitude, scaling) -> W'
        step(params, grads, state, learning_rate, beta1, beta2, eps, weight_decay)
            -> (params, state); AdamW, on dicts with lora_a, lora_b, magnitude; state is first None

    `bias` is None in some cases. If the conventions declare dropout, forward and gradients are
    also given `dropout_mask`: None, or an array of x's shape that holds 0 and 1/(1 − p). If
    numbers are wrong, every known deviation is tried, and then every pair of them. The report
    names those that explain all numbers.

    Parameters
    ----------
    impl : object
        An object with one or more of these functions as attributes.
    conventions : Conventions, optional
        The choices that it has made.
    since : int
        Run only the cases that came with this version of the catalogue or later.
    progress : callable, optional
        Called before each case with its description, the number of cases that are done and the
        number of all cases.

    Returns
    -------
    Report
        A function that raises, returns something else or writes to its inputs does not end the
        check: each of these is a finding.

    Raises
    ------
    TypeError
        `conventions` is not of type `Conventions`.
    ValueError
        `impl` does not have any of the functions.
    RuntimeError
        The conventions name bfloat16, and ml_dtypes is not installed.

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
    conventions = Conventions() if conventions is None else conventions
    check_kind("conventions", conventions, Conventions)
    for dtype in conventions.dtypes:
        if Library("numpy").dtype(dtype) is None:
            raise RuntimeError(f"{dtype} cannot be made here: pip install ml_dtypes")
    functions = {
        name: getattr(impl, name)
        for name in ("init", "forward", "gradients", "merge", "step")
        if hasattr(impl, name)
    }
    if not functions:
        raise ValueError(
            "impl must have a function init, forward, gradients, merge or step, got "
            f"{type(impl).__name__} without any of them"
        )
    findings: list[Finding] = []
    runs: dict[bool, list[Run]] = {True: [], False: []}
    calls: list[tuple[str, Any, str]] = [
        (name, case, dtype)
        for name in functions
        for case in (_adamw_cases() if name == "step" else conventions.cases())
        if getattr(case, "since", 1) >= since
        for dtype in case.dtypes
        if dtype in conventions.dtypes
    ]
    for done, (name, case, dtype) in enumerate(calls):
        progress(f"{name}: {case.name}, {dtype}", done, len(calls))
        is_step = name == "step"
        run: Any = partial(call_step if is_step else call_layer, functions[name])
        runs[is_step].append(_observe(name, case, dtype, run, conventions, findings))
    layers, steps = runs[False], runs[True]
    known, base = {**FORWARD, **BACKWARD}, conventions.changes
    diagnoses = diagnose(layers, known, base)
    if not diagnoses:  # each function may be wrong in another way
        for name in functions:
            diagnoses += diagnose([run for run in layers if run.function == name], known, base)
    diagnoses += diagnose(steps, STEP, {})
    checked = sum(len(run.actual) for run in (*layers, *steps))
    ran = {run.case.name for run in layers}
    left_out = tuple(case.name for case in catalogue() if ran and case.name not in ran)
    every = tuple(
        Ran(run.function, run.case.name, run.dtype, _is_extreme(run.case), len(run.actual))
        for run in (*layers, *steps)
    )
    return Report(tuple(findings), tuple(diagnoses), checked, left_out, every)


def _adamw_cases() -> list[OptimizerCase]:
    return [case for case in optimizer_catalogue() if case.optimizer == "adamw"]


def _is_extreme(case: Any) -> bool:
    return isinstance(case, Case) and case.extreme


def _observe(
    name: str,
    case: Any,
    dtype: str,
    run: Callable[..., dict[str, Any]],
    conventions: Conventions,
    findings: list[Finding],
) -> Run:
    """Call one function on one case, return its numbers, and add its faults to the findings."""
    extreme = _is_extreme(case)

    def note(quantity: str, problem: str) -> None:
        findings.append(Finding(name, case.name, dtype, quantity, problem, extreme))

    wanted = wanted_of(case, dtype, {} if name == "step" else conventions.changes)
    try:
        with np.errstate(all="ignore"):  # an overflow shows in the numbers
            returned = run(name, conventions, case, dtype)
    except (Exception, SystemExit) as error:  # raised by the implementation: a finding
        note("all", f"raises {described(error)}")
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
