"""Find the known deviations, one or two together, that explain the numbers of an implementation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from doraxp.testing._cases import Case, OptimizerCase
from doraxp.testing._deviations import Changes
from doraxp.testing._formulas import RETURNED
from doraxp.testing._reference import Expected, expected, expected_steps
from doraxp.testing._runs import Actual


class Diagnosis(NamedTuple):
    """One or two deviations that explain every number that some functions returned."""

    functions: tuple[str, ...]
    deviations: tuple[str, ...]
    """One name, or two where only both together explain the numbers."""
    before: float
    """The largest error in units of its bound, against the reference."""
    after: float
    """The same against a reference with these deviations. It is at most 1."""


class Run(NamedTuple):
    """The results of one function for one case, and the expected results."""

    function: str
    case: Case | OptimizerCase
    dtype: str
    actual: dict[str, Actual]
    wanted: dict[str, Expected]


def wanted_of(
    case: Any, dtype: str, changes: Changes, names: Collection[str] = RETURNED
) -> dict[str, Expected]:
    """Return the expected results of a case, by the reference or by one that deviates."""
    if isinstance(case, OptimizerCase):
        return expected_steps(case, dtype, changes)
    return expected(case, dtype, changes, names)


def diagnose(runs: list[Run], known: Mapping[str, Changes], base: Changes) -> list[Diagnosis]:
    """Return the smallest sets of deviations that explain every number."""
    runs = [run for run in runs if not (isinstance(run.case, Case) and run.case.extreme)]
    before = max((_worst(run.actual, run.wanted) for run in runs), default=0.0)
    if before <= 1:
        return []
    functions = tuple(dict.fromkeys(run.function for run in runs))
    # Most deviations fail on the run with the largest error, so try that run first.
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
        # A deviation that changes no number that was returned cannot be part of a pair.
        candidates = [name for name in known if _moves(runs, {**base, **known[name]})]
    return []


def _moves(runs: list[Run], changes: Changes) -> bool:
    """Return whether a deviation changes any number that was returned."""
    for run in runs:
        if run.actual:
            wanted = _deviating(run, changes)
            for key in run.actual:
                if wanted is None or not np.array_equal(wanted[key].value, run.wanted[key].value):
                    return True
    return False


def _deviating(run: Run, changes: Changes) -> dict[str, Expected] | None:
    """Return the results under a deviation; None if the shapes of the case do not allow it."""
    try:
        return wanted_of(run.case, run.dtype, changes, run.actual)
    except ValueError:
        return None


def _explained(runs: list[Run], changes: Changes) -> float:
    """Return the largest error against the deviating reference, or the first that is above 1."""
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
