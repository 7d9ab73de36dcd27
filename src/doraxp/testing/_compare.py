"""Run the catalogue on array libraries, and compare every number with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

import doraxp
from doraxp._base.words import counted
from doraxp.testing._cases import Case, OptimizerCase
from doraxp.testing._catalogue import catalogue
from doraxp.testing._libraries import Library, check_device, check_kind_of_device
from doraxp.testing._optimizer_cases import optimizer_catalogue
from doraxp.testing._reference import (
    Expected,
    expected,
    expected_steps,
    in_the_dtype,
)
from doraxp.testing._rounding import UNIT_ROUNDOFF, Precision
from doraxp.testing._runs import described, run_case


class Figure(NamedTuple):
    """One quantity of one case in one dtype on one backend."""

    backend: str
    """The name of the library, with the device if one was asked for: `torch on cuda`."""
    case: str
    dtype: str
    quantity: str
    error: float
    """The largest error over the largest number; NaN where rounding leaves no correct digit."""
    dense: float
    """The same error of the dense formulas, computed by NumPy in the dtype. In float64 it is 0,
    because these formulas are the reference."""
    resolution: float
    """2u of the dtype that the quantity is returned in: the unit in which to show both errors."""
    share: float
    """The largest error in units of its bound. A share above 1 is wrong."""
    failure: str | None
    """Another fault, such as a wrong shape, in words; None without one."""

    @property
    def ok(self) -> bool:
        """Whether the error is within its bound and there is no other fault."""
        return self.failure is None and self.share <= 1


class Agreement(NamedTuple):
    """How near two backends are to each other."""

    backends: tuple[str, str]
    share: float
    """The largest difference in units of the sum of both bounds. Above 1 the two disagree."""


class Comparison(NamedTuple):
    """The result of `compare_backends`."""

    figures: tuple[Figure, ...]
    agreements: tuple[Agreement, ...]
    left_out: tuple[tuple[str, str], ...]
    """Each backend and dtype that did not run, because the library does not have the dtype."""

    @property
    def ok(self) -> bool:
        """Whether every number is within its bound and every two backends agree."""
        return all(one.ok for one in self.figures) and all(
            pair.share <= 1 for pair in self.agreements
        )

    def __str__(self) -> str:
        worst = max(self.figures, key=lambda figure: figure.share)
        backends = ", ".join(dict.fromkeys(figure.backend for figure in self.figures))
        lines = [
            f"{'right' if self.ok else 'wrong'}: {counted(len(self.figures), 'figure')} on "
            f"{backends}, the worst at {100 * worst.share:.0f} % of its bound: {worst.case}, "
            f"{worst.dtype}, {worst.quantity}"
        ]
        lines += [
            f"  {one.backend}, {one.case}, {one.dtype}, {one.quantity}: "
            f"{one.failure or f'is {one.share:.3g} times its bound off'}"
            for one in self.figures
            if not one.ok
        ]
        lines += [
            f"  {' and '.join(pair.backends)} disagree: {pair.share:.3g} times two bounds apart"
            for pair in self.agreements
            if pair.share > 1
        ]
        return "\n".join(lines)


def compare_backends(
    names: Sequence[str],
    *,
    device: str | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Comparison:
    """Run the catalogue on every named backend, and compare it with the float64 reference.

    ::

        |actual − reference| ≤ bound      the sum of all rounding errors that may happen

    The bound is that of the precision in which the backend computes, see `Library.precision`: CuPy
    computes layers of 16 bits in mixed precision, unless it is told not to.

    Parameters
    ----------
    names : sequence of str
        Names of `doraxp.backends.available()`.
    device : {"cpu", "cuda"}, optional
        Where all of them compute; by default where each puts its arrays itself. Products of float32
        are computed without TF32.
    progress : callable, optional
        Called before each case with its description, the number of cases that are done and the
        number of all cases.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        A name is not that of a backend, or `names` is empty; or a backend never computes on this
        kind of device.
    RuntimeError
        A backend cannot be used here, or not on this device; the message says how to install it.

    Examples
    --------
    >>> compare_backends(["numpy"]).ok
    True
    """
    check_usable(names, device=device)
    libraries = [Library(name, device) for name in dict.fromkeys(names)]
    cases: list[Case | OptimizerCase] = [*catalogue(), *optimizer_catalogue()]
    runs = [(case, dtype) for case in cases for dtype in case.dtypes]
    figures: list[Figure] = []
    left_out: dict[tuple[str, str], None] = {}
    shares = dict.fromkeys(combinations([one.label for one in libraries], 2), 0.0)
    for done, (case, dtype) in enumerate(runs):
        wanted: dict[str, dict[str, Expected]] = {}
        dense = in_the_dtype(case, dtype)
        found: dict[str, dict[str, Any]] = {}
        for number, library in enumerate(libraries):
            name = library.label
            progress(
                f"{name}: {case.name}, {dtype}",
                done * len(libraries) + number,
                len(runs) * len(libraries),
            )
            if library.dtype(dtype) is None:
                left_out[name, dtype] = None
                continue
            wanted[name] = want = _wanted(case, dtype, library.precision(dtype))
            found[name] = actual = run_case(case, dtype, library)
            figures += _figures(name, case.name, dtype, want, dense, actual)
        for one, other in shares:
            if one in found and other in found:
                worst = _worst_difference(wanted[one], wanted[other], found[one], found[other])
                shares[one, other] = max(shares[one, other], worst)
    agreements = tuple(Agreement(pair, share) for pair, share in shares.items())
    return Comparison(tuple(figures), agreements, tuple(left_out))


def check_usable(names: Sequence[str], *, device: str | None = None) -> None:
    """Raise ValueError or RuntimeError unless every name is that of a backend that runs here.

    With `device`, "cpu" or "cuda", it must also compute on such a device here.
    """
    if isinstance(names, str):
        raise ValueError(f"names must be a list of names, got {names!r}")
    known = {status.name: status for status in doraxp.backends.available()}
    if not names:
        raise ValueError(f"names must hold at least one of {', '.join(known)}, got {names!r}")
    for name in names:
        if name not in known:
            raise ValueError(f"each name must be one of {', '.join(known)}, got {name!r}")
        if device is not None:
            check_kind_of_device(name, device)
        if not known[name].usable:
            raise RuntimeError(f"{name} cannot run here: {known[name].detail}")
        if device is not None:
            check_device(name, device)


def _wanted(case: Case | OptimizerCase, dtype: str, precision: Precision) -> dict[str, Expected]:
    if isinstance(case, OptimizerCase):
        return expected_steps(case, dtype)
    return expected(case, dtype, precision=precision)


def _figures(
    backend: str,
    case: str,
    dtype: str,
    wanted: dict[str, Expected],
    dense: dict[str, Any],
    actual: dict[str, Any],
) -> Iterator[Figure]:
    if isinstance(actual, Exception):  # one figure stands for all quantities of the case
        failure = f"raises {described(actual)}"
        yield Figure(backend, case, dtype, "all", np.inf, np.inf, 1.0, np.inf, failure)
        return
    for name, want in wanted.items():
        got = actual[name]
        failure = got.mismatch(want)
        error = np.inf if failure else want.relative(got.values)
        yield Figure(
            backend,
            case,
            dtype,
            name,
            error,
            want.relative(dense[name]),
            2 * UNIT_ROUNDOFF[want.dtype],
            np.inf if failure else want.share(got.values),
            failure,
        )


def _worst_difference(
    wanted: dict[str, Expected], others: dict[str, Expected], one: Any, other: Any
) -> float:
    if isinstance(one, Exception) or isinstance(other, Exception):
        return np.inf
    worst = 0.0
    for name, want in wanted.items():
        if one[name].mismatch(want) or other[name].mismatch(want):
            return np.inf
        both = want.bound + others[name].bound
        between = want._replace(value=one[name].values.astype(np.float64), bound=both)
        worst = max(worst, between.share(other[name].values))
    return worst
