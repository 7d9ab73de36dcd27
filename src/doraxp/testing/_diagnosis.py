"""Find the known deviations, one or a few, that explain the numbers of an implementation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from doraxp.testing._changes import (
    HAND_WRITTEN,
    RIGHT_GRADIENTS,
    Changes,
    added_to,
    combined,
    hand_written,
)
from doraxp.testing._deviations import DETACHED
from doraxp.testing._formulas import GRADIENTS
from doraxp.testing._parts import results_of
from doraxp.testing._reference import Expected
from doraxp.testing._runs import Actual

Names: TypeAlias = tuple[str, ...]


class Diagnosis(NamedTuple):
    """Deviations that explain every number that some functions returned."""

    functions: tuple[str, ...]
    """Those that returned wrong numbers."""
    deviations: tuple[str, ...]
    """One name, or two where only both together explain the numbers, or one or two for each wrong
    array. "the norm is detached" or "the gradients keep the right formulas" may come besides."""
    before: float
    """The largest error in units of its bound, against the reference."""
    after: float
    """The same against a reference with these deviations. It is at most 1."""

    def __str__(self) -> str:
        this = "this mistake is" if len(self.deviations) == 1 else "these mistakes are"
        return (
            f"{', '.join(self.functions)}: {' and '.join(self.deviations)} (largest error "
            f"{self.before:.3g} bounds; {self.after:.3g} if {this} in the reference)"
        )


class Run(NamedTuple):
    """The results of one function for one case, and the expected results."""

    function: str
    case: Any
    dtype: str
    actual: dict[str, Actual]
    wanted: dict[str, Expected]

    worst: float
    """The largest error in units of its bound."""


def diagnose(runs: list[Run], known: Mapping[str, Changes], base: Changes) -> list[Diagnosis]:
    """Return the smallest sets of deviations that explain every number.

    They are diagnoses of all functions together, or else of each function by itself. Extreme cases
    are not used.
    """
    runs = [run for run in runs if run.actual and not getattr(run.case, "extreme", False)]
    by_function: dict[str, list[Run]] = {}
    for run in runs:
        by_function.setdefault(run.function, []).append(run)
    own = {
        name: _smallest(of_one, known, base)
        for name, of_one in by_function.items()
        if _worst(of_one) > 1
    }
    of_all = _jointly(runs, [names for found in own.values() for names in found], known, base)
    if of_all:
        wrong = tuple(own)
        return [Diagnosis(wrong, names, _worst(runs), after) for names, after in of_all.items()]
    return [
        Diagnosis((name,), names, _worst(by_function[name]), after)
        for name, found in own.items()
        for names, after in found.items()
    ]


def _smallest(runs: list[Run], known: Mapping[str, Changes], base: Changes) -> dict[Names, float]:
    """Return the smallest sets of names that explain the numbers of one function."""
    by_hand = _by_hand(runs, known)
    alone = [(name,) for name in known]
    of_forward = [(name, HAND_WRITTEN) for name in by_hand]
    if found := _explaining(runs, alone, known, base) or _explaining(runs, of_forward, known, base):
        return found
    # A deviation that changes no number that was returned cannot be part of a larger set.
    small_first = sorted(runs, key=lambda run: sum(one.value.size for one in run.wanted.values()))
    moving = {
        name: changes
        for name, changes in known.items()
        if any(_moved(run, added_to(base, changes)) for run in small_first)
    }
    hand_pairs = (
        (*pair, HAND_WRITTEN)
        for pair in _pairs(runs, {**moving, **by_hand}, base)
        if by_hand.keys() & set(pair)
    )
    return (
        _explaining(runs, _pairs(runs, moving, base), known, base)
        or _explaining(runs, hand_pairs, known, base)
        or _beside_detached(runs, known, base)
        or _explaining(runs, _of_each_array(runs, moving, base), known, base)
    )


def _by_hand(runs: list[Run], known: Mapping[str, Changes]) -> dict[str, Changes]:
    """Return the deviations that gradients may have in the forward alone."""
    if not any(name in GRADIENTS for run in runs for name in run.actual):
        return {}
    parts = {name: hand_written(changes) for name, changes in known.items()}
    return {
        name: added_to(RIGHT_GRADIENTS[0], part)
        for name, part in parts.items()
        if part is not known[name]
    }


def _pairs(runs: list[Run], known: Mapping[str, Changes], base: Changes) -> Iterator[Names]:
    """Yield the pairs of names that may explain the numbers of one function."""
    worst = max(runs, key=lambda run: run.worst)
    moved = {name: _moved(worst, added_to(base, changes)) for name, changes in known.items()}
    wrong = {name for name, got in worst.actual.items() if worst.wanted[name].share(got.values) > 1}
    for one, other in combinations(known, 2):
        if wrong <= moved[one] | moved[other]:
            yield one, other


def _of_each_array(runs: list[Run], known: Mapping[str, Changes], base: Changes) -> Iterator[Names]:
    """Yield one set with a mistake, or two, in each wrong array. Each changes this array alone."""
    worst = max(runs, key=lambda run: run.worst)
    moved = {one: _moved(worst, added_to(base, changes)) for one, changes in known.items()}
    names: Names = ()
    for array in dict.fromkeys(name for run in runs for name in run.actual):
        of_array = [_of_array(run, array) for run in runs if array in run.actual]
        if _worst(of_array) <= 1:
            continue
        own = {name: known[name] for name in known if moved[name] == {array}}
        alone = ((name,) for name in own)
        found = _explaining(of_array, alone, own, base) or _explaining(
            of_array, _pairs(of_array, own, base), own, base
        )
        if not found:
            return
        names += next(iter(found))
    yield names


def _of_array(run: Run, array: str) -> Run:
    """Return a run with one of its arrays."""
    got, wanted = run.actual[array], run.wanted[array]
    return run._replace(actual={array: got}, wanted={array: wanted}, worst=wanted.share(got.values))


def _beside_detached(
    runs: list[Run], known: Mapping[str, Changes], base: Changes
) -> dict[Names, float]:
    """Return the sets of "the norm is detached" and two others that explain one function.

    PEFT detaches the norm, so a gradient may have this choice beside two mistakes.
    """
    detached = known.get(DETACHED, {})
    if (
        not detached
        or set(detached) & set(base)
        or not any(_moved(run, added_to(base, detached)) for run in runs)
    ):
        return {}
    base = added_to(base, detached)
    others = {name: own for name, own in known.items() if not set(own) & set(detached)}
    found = _smallest([_against(run, base) for run in runs], others, base)
    return {(DETACHED, *names): after for names, after in found.items()}


def _against(run: Run, changes: Changes) -> Run:
    """Return a run that is compared with a reference that deviates."""
    results = results_of(run.case, run.dtype, changes)
    wanted = {name: results.of(name) for name in run.actual}
    worst = max(wanted[name].share(got.values) for name, got in run.actual.items())
    return run._replace(wanted=wanted, worst=worst)


def _jointly(
    runs: list[Run], own: list[Names], known: Mapping[str, Changes], base: Changes
) -> dict[Names, float]:
    """Return the smallest sets that explain all numbers: a function's own, or a union of two."""
    unions = (tuple(dict.fromkeys(one + other)) for one, other in combinations(own, 2))
    sets = dict.fromkeys((*own, *(names for names in unions if len(names) == 2)))
    for size in sorted(set(map(len, sets))):
        of_size = (names for names in sets if len(names) == size)
        if found := _explaining(runs, of_size, known, base):
            return found
    return {}


def _explaining(
    runs: list[Run], sets: Iterable[Names], known: Mapping[str, Changes], base: Changes
) -> dict[Names, float]:
    """Return those of some sets of names that explain every number, with the largest error."""
    # Most deviations fail on the run with the largest error, so try that run first.
    runs = sorted(runs, key=lambda run: -run.worst)
    found = {}
    for names in sets:
        for changes in _formulas_of(names, known):
            if (after := _error(runs, added_to(base, changes))) <= 1:
                found[names] = after
                break
    return found


def _formulas_of(names: Names, known: Mapping[str, Changes]) -> Iterator[Changes]:
    """Yield the formulas of some names at once; nothing if two names replace the same formula."""
    parts = [known[name] for name in names if name != HAND_WRITTEN]
    if HAND_WRITTEN not in names:
        ways: tuple[Changes, ...] = ({},)
    else:
        parts, ways = [hand_written(part) for part in parts], RIGHT_GRADIENTS
    if (changes := combined(parts)) is not None:
        yield from (added_to(way, changes) for way in ways)


def _error(runs: list[Run], changes: Changes) -> float:
    """Return the largest error against the deviating reference, or the first that is above 1."""
    worst = 0.0
    for run in runs:
        for wanted, got in _compared(run, changes):
            worst = max(worst, np.inf if wanted is None else wanted.share(got.values))
            if worst > 1:
                return worst
    return worst


def _moved(run: Run, changes: Changes) -> set[str]:
    """Return the names of one run's results that a deviation changes."""
    return {
        name
        for name, (wanted, _) in zip(run.actual, _compared(run, changes), strict=False)
        if wanted is None or not np.array_equal(wanted.value, run.wanted[name].value)
    }


def _compared(run: Run, changes: Changes) -> Iterator[tuple[Expected | None, Actual]]:
    """Yield each result under a deviation, None if the case does not allow it, and the actual."""
    try:
        results = results_of(run.case, run.dtype, changes)
        for name, got in run.actual.items():
            yield results.of(name), got
    except (ValueError, ArithmeticError):  # shapes that do not fit, the root of a negative number
        yield None, next(iter(run.actual.values()))


def _worst(runs: list[Run]) -> float:
    return max((run.worst for run in runs), default=0.0)
