"""Run the catalogue on another implementation, and report what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from doraxp._base.scalars import check_count, check_kind
from doraxp.testing._calls import GRADIENTS
from doraxp.testing._cases import HALF, Case
from doraxp.testing._changes import Changes
from doraxp.testing._conventions import AnyCase, Conventions
from doraxp.testing._diagnosis import Diagnosis, Run, diagnose
from doraxp.testing._libraries import Library
from doraxp.testing._parts import LAYER, Part, parts, results_of
from doraxp.testing._reference import Expected, Results
from doraxp.testing._report import Finding, NeverReturned, Raised, Ran, Refused, Report
from doraxp.testing._runs import Actual, described


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
            -> dict with any of x, lora_a, lora_b, magnitude, weight and, unless it is None, bias;
            the same keys in every case
        merge(weight, lora_a, lora_b, magnitude, scaling) -> W'
        step(params, grads, state, learning_rate, beta1, beta2, eps, weight_decay)
            -> (params, state); AdamW, on dicts with lora_a, lora_b, magnitude; state is first None
        loraplus_step(..., ratio), scaled_step(..., damping) -> (params, state); the same, where
            B has `ratio` times the rate, and on `doraxp.scaled_gradients`

    It may have more parts, each an object with functions of its own::

        convolution     init, forward, gradients, merge, also given groups and, with x, stride,
                        padding and dilation, tuples of a number for each dimension
        embedding       the same, with ids for x, without a bias; with x also given scale
        loha.merge(weight, first_a, first_b, second_a, second_b, magnitude, scaling) -> W'
        lokr.merge(weight, left, right, right_a, right_b, magnitude, scaling) -> W'
        sums.merge(weight, adapters, strengths, scalings) -> W + Σ t (W' − W)

    `bias` is None in some cases. If the conventions declare dropout, forward and gradients are
    also given `dropout_mask`: None, or an array of x's shape that holds 0 and 1/(1 − p). Without a
    magnitude an update is plain: W' = V. Of right, right_a and right_b one or two are None. The
    adapters of a sum are dicts. Shapes are those of `catalogue`, `operator_catalogue`,
    `update_catalogue` and `sum_catalogue`. A function that raises NotImplementedError leaves the
    case out, and the report has the call in `refused`.

    `gradients` may leave out keys, or map them to None, if it does so in every case that has such a
    gradient. Then nothing is checked there, and the report has the keys in `never_returned`. If it
    returns a gradient in some cases, each case without it is a finding. All other results are
    required.

    If numbers are wrong, every known deviation is tried, then every pair of them, then one or two
    for each wrong array, also beside a detached norm. In gradients, each is also tried in the
    forward alone. The report names those that explain all numbers.

    Parameters
    ----------
    impl : object
        An object with one or more of these functions as attributes.
    conventions : Conventions, optional
        The choices that it has made.
    since : int
        Run only the cases that this version of the catalogue, `VERSION`, or a later one brought.
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
        `conventions` is not of type `Conventions`, or `since` is not an int.
    ValueError
        `impl` does not have any of the functions, or `since` is below 1.
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
    since = check_count("since", since, least=1)
    for dtype in conventions.dtypes:
        if Library("numpy").dtype(dtype) is None:
            raise RuntimeError(f"{dtype} cannot be made here: pip install ml_dtypes")
    found = [(part, functions) for part in parts() if (functions := part.found_in(impl))]
    if not found:
        raise ValueError(
            "impl must have a function init, forward, gradients, merge or step, or one of a part, "
            f"got {type(impl).__name__} without any of them"
        )
    planned = [(part, _calls(part, own, conventions, since)) for part, own in found]
    total, done = sum(len(calls) for _, calls in planned), 0
    findings: list[Finding] = []
    diagnoses: list[Diagnosis] = []
    ran: list[Ran] = []
    left_out: list[tuple[str, dict[str, Any]]] = []
    unexplained: list[str] = []
    never_returned: list[NeverReturned] = []
    refused: list[Refused] = []
    raised: list[Raised] = []
    for part, calls in planned:
        changes = conventions.changes if part.keeps_conventions else {}
        observed: list[_Observed] = []
        for call in calls:
            progress(f"{call.name}: {call.case.name}, {call.dtype}", done, total)
            done += 1
            if (one := _observe(part, call, conventions, changes)) is not None:
                observed.append(one)
            else:
                refused.append(Refused(call.name, call.case.name, call.dtype))
        never_returned += _note_missing(observed)
        raised += _raised(observed)
        runs = [one.run for one in observed]
        ran += map(_told, runs)
        findings += (finding for one in observed for finding in one.findings)
        progress(f"{part.path or 'layer'}: looks for names", done, total)
        diagnoses += (named := diagnose(runs, part.known, changes))
        explained = {name for one in named for name in one.functions}
        wrong = dict.fromkeys(run.function for run in runs if run.worst > 1 and not _extreme(run))
        unexplained += [name for name in wrong if name not in explained]
        names = {run.case.name for run in runs}
        own = (case for case in part.cases if case.since >= since)
        left_out += [(case.name, conventions.lacks(case)) for case in own if case.name not in names]
    return Report(
        tuple(findings),
        tuple(diagnoses),
        sum(one.checked for one in ran),
        tuple(name for name, _ in left_out),
        tuple(ran),
        tuple(needs for _, needs in left_out),
        tuple(unexplained),
        tuple(never_returned),
        tuple(refused),
        tuple(raised),
    )


class _Call(NamedTuple):
    """A function with a case in a dtype."""

    name: str
    function: Callable[..., Any]
    case: AnyCase
    dtype: str


def _calls(
    part: Part, functions: dict[str, Any], conventions: Conventions, since: int
) -> list[_Call]:
    return [
        _Call(name, function, case, dtype)
        for name, function in functions.items()
        for case in conventions.accepted(part.cases)
        if case.since >= since
        for dtype in case.dtypes
        if dtype in conventions.dtypes
    ]


def _kept(case: Case, dtype: str, got: Actual, want: Expected) -> float:
    """Return ⟨stored − W, W' − W⟩ / ‖W' − W‖²: 1 where rounding took nothing of the update."""
    weight = case.stored(dtype)["weight"]
    whole = want.value - weight
    return float(np.sum((got.values - weight) * whole) / np.sum(whole * whole))


def _told(run: Run) -> Ran:
    return Ran(run.function, run.case.name, run.dtype, _extreme(run), len(run.actual))


def _extreme(run: Run) -> bool:
    return getattr(run.case, "extreme", False)


class _Observed(NamedTuple):
    """A run with its findings, and the keys of its gradients."""

    run: Run
    findings: list[Finding]
    given: tuple[str, ...] = ()
    """The keys that it returned."""
    missing: tuple[str, ...] = ()
    """The keys of the gradients that the case has, and that it did not return."""
    shapes: dict[str, tuple[int, ...]] | None = None
    """The shapes of the arrays that it was given, if it raised."""


def _observe(
    part: Part, call: _Call, conventions: Conventions, changes: Changes
) -> _Observed | None:
    """Call one function on one case; return its numbers and faults, None if it refuses the case."""
    name, function, case, dtype = call
    findings: list[Finding] = []

    def note(quantity: str, problem: str) -> None:
        extreme = getattr(case, "extreme", False)
        findings.append(Finding(name, case.name, dtype, quantity, problem, extreme))

    own, given = name.split(".")[-1], {}

    def recording(**arguments: Any) -> Any:
        given.update(arguments)
        return function(**arguments)

    try:
        with np.errstate(all="ignore"):  # an overflow shows in the numbers
            returned = part.call(recording, own, conventions, case, dtype)
    except NotImplementedError:
        return None
    except (Exception, SystemExit) as error:  # raised by the implementation: a finding
        note("all", f"raises {described(error)}")
        run = Run(name, case, dtype, {}, {}, 0.0)
        return _Observed(run, findings, shapes=dict(_shapes(given)))
    results, actual, wanted, worst = results_of(case, dtype, changes), {}, {}, 0.0
    for quantity, got in returned.items():
        if isinstance(got, str):
            note(quantity, got)
            continue
        want = results.of(quantity)
        problem = got.mismatch(want)
        if problem is None:
            actual[quantity], wanted[quantity] = got, want
            worst = max(worst, share := want.share(got.values))
            if share > 1:
                problem = f"is {share:.3g} times its bound off"
                if not np.isnan(relative := want.relative(got.values)):
                    problem += f", relative error {relative:.2g}"
                if quantity == "merged" and isinstance(case, Case) and dtype in HALF:
                    problem += f", keeps {_kept(case, dtype, got, want):.2f} of the update"
        if problem is not None:
            note(quantity, problem)
    run = Run(name, case, dtype, actual, wanted, worst)
    if own != "gradients" or "all" in returned:  # a fault of the whole result is a finding
        return _Observed(run, findings)
    return _Observed(run, findings, *_keys(results, returned))


def _keys(results: Results, returned: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys of the gradients of a case: those returned, and those left out."""
    keys = {key: quantity for key, quantity in GRADIENTS.items() if quantity in results.names}
    return (
        tuple(key for key, quantity in keys.items() if quantity in returned),
        tuple(key for key, quantity in keys.items() if quantity not in returned),
    )


def _note_missing(observed: list[_Observed]) -> list[NeverReturned]:
    """Add a finding for each gradient that other cases have; return those that no case has."""
    given = {(one.run.function, key) for one in observed for key in one.given}
    never: dict[str, set[str]] = {}
    for one in observed:
        run = one.run
        for key in one.missing:
            if (run.function, key) not in given:
                never.setdefault(run.function, set()).add(key)
                continue
            problem = "must be returned here as in other cases, got no array for the key " + key
            where = (run.function, run.case.name, run.dtype, GRADIENTS[key])
            one.findings.append(Finding(*where, problem, _extreme(run)))
    return [
        NeverReturned(function, tuple(key for key in GRADIENTS if key in keys))
        for function, keys in never.items()
    ]


def _shapes(value: Any, name: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the shape of each array, also of those in dicts and lists."""
    if isinstance(value, np.ndarray):
        yield name, value.shape
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _shapes(each, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from _shapes(each, f"{name}[{place}]")


def _raised(observed: list[_Observed]) -> Iterator[Raised]:
    """Yield the functions that raised in every call, or wherever the weight is not square."""
    for function in dict.fromkeys(one.run.function for one in observed):
        calls = [one for one in observed if one.run.function == function]
        shapes = [one.shapes for one in calls if one.shapes is not None]
        compared = [one.run.case for one in calls if one.run.actual]
        by_layout = function in LAYER and compared and all(map(_is_square, compared))
        if shapes and (len(shapes) == len(calls) or by_layout):
            yield Raised(function, shapes[0], bool(compared))


def _is_square(case: Any) -> bool:
    *_, rows, columns = case.arrays["weight"].shape
    return bool(rows == columns)
