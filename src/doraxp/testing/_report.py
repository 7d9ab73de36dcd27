"""The report on an implementation: its findings by groups, and the results that it left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from doraxp._base.words import counted, first_of
from doraxp.testing._conventions import CHOICES
from doraxp.testing._diagnosis import Diagnosis
from doraxp.testing._parts import LAYER


class Finding(NamedTuple):
    """One fault of a result that an implementation returned, or did not return."""

    function: str
    case: str
    dtype: str
    quantity: str
    problem: str
    extreme: bool
    """Whether the formulas as written fail in this case: 0/0, or squares out of range."""


class Ran(NamedTuple):
    """One call of a function with one case in one dtype."""

    function: str
    case: str
    dtype: str
    extreme: bool
    checked: int
    """The number of arrays whose numbers were compared. An array of another shape or dtype, or with
    a number that is not finite, is a finding and not one of them."""


class Refused(NamedTuple):
    """One call that raised NotImplementedError, so that it was not checked."""

    function: str
    case: str
    dtype: str


class NeverReturned(NamedTuple):
    """Gradients that a function returned in no case, so that they were not checked."""

    function: str
    keys: tuple[str, ...]
    """Keys of the dict of gradients, such as "magnitude"."""

    def __str__(self) -> str:
        return f"{self.function} never returned {', '.join(self.keys)}: not checked"


class Raised(NamedTuple):
    """A function that raised in every call, or in every call that shows how a weight is stored."""

    function: str
    shapes: dict[str, tuple[int, ...]]
    """The shapes of the arrays that the first of these calls was given, by name."""
    square_works: bool
    """Whether calls with a square weight, which do not show how it is stored, returned arrays."""

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {shape}" for name, shape in self.shapes.items())
        layout = (
            "if your weight, A and B have other shapes, declare their layout with --layout or "
            f"Conventions(layout=...), which is one of {', '.join(CHOICES['layout'])}"
        )
        if self.square_works:
            return (
                f"{self.function} raises, or returns other shapes, wherever the weight is not "
                f"square; the first call was given {shapes}: {layout}"
            )
        advice = [layout] if self.function in LAYER else []
        advice.append("help(doraxp.testing.check_implementation) lists the arguments")
        first = f"{self.function} raises in every call; the first one was given {shapes}"
        return f"{first}: {'; '.join(advice)}"


class Report(NamedTuple):
    """The result of `check_implementation`."""

    findings: tuple[Finding, ...]
    diagnoses: tuple[Diagnosis, ...]
    """Diagnoses of all functions of a part together, or else of each function by itself. There
    are several where each of them explains the same numbers, and it is empty where no known
    deviation does. Extreme cases are not used."""
    checked: int
    """The number of arrays whose numbers were compared."""
    left_out: tuple[str, ...]
    """The names of the cases that did not run: the conventions leave them out, or every function
    of the part raises NotImplementedError for them."""
    runs: tuple[Ran, ...]
    """Every call, in order; an optimizer's case with all of its steps is one."""
    needs: tuple[dict[str, Any], ...] = ()
    """For each name of `left_out` the conventions that the case is for; of several dtypes one is
    enough. Empty where the functions raise NotImplementedError."""
    unexplained: tuple[str, ...] = ()
    """The functions with wrong numbers that no diagnosis explains."""
    never_returned: tuple[NeverReturned, ...] = ()
    """The functions that left out gradients in every case. This is allowed, and not a finding."""
    refused: tuple[Refused, ...] = ()
    """Every call that raised NotImplementedError, in order. This is allowed too. Where all
    functions of a part raise it, the case is also in `left_out`."""
    raised: tuple[Raised, ...] = ()
    """The functions that raised in every call, or wherever the weight is not square."""

    @property
    def ok(self) -> bool:
        """Whether there are no findings outside the extreme cases."""
        return all(one.extreme for one in self.findings)

    def __str__(self) -> str:
        extreme = sum(one.extreme for one in self.findings)
        lines = [
            f"{'right' if self.ok else 'wrong'}: {counted(self.checked, 'array')}, "
            f"{counted(len(self.findings) - extreme, 'finding')}, and {extreme} in extreme cases"
        ]
        lines += [f"  {one}" for one in (*self.raised, *self.diagnoses)]
        lines += [
            f"  {function}: no known mistake or pair of them explains the numbers"
            for function in self.unnamed()
        ]
        lines += [f"  {line}" for line in grouped(self.findings)]
        lines += [f"  {one}" for one in (*self.never_returned, *self.refusals())]
        if needed := self.needed():
            choices = (
                f"{name}={value!r} ({counted(count, 'case')})"
                for (name, value), count in needed.items()
            )
            lines.append(f"  cases not run need Conventions with {', '.join(choices)}")
        if self.left_out:
            lines.append(f"  not run: {'; '.join(self.left_out)}")
        return "\n".join(lines)

    def unnamed(self) -> tuple[str, ...]:
        """Return `unexplained` without the functions of `raised`, which have a line already."""
        raised = {one.function for one in self.raised}
        return tuple(name for name in self.unexplained if name not in raised)

    def needed(self) -> dict[tuple[str, Any], int]:
        """Return how many of the cases that did not run are for each choice, the most first."""
        return dict(Counter(item for needs in self.needs for item in needs.items()).most_common())

    def refusals(self) -> tuple[str, ...]:
        """Return a line for each function that raised NotImplementedError, with the cases."""
        ran = {(one.function, one.case) for one in self.runs}
        cases: dict[str, dict[str, None]] = {}
        for function, case, dtype in self.refused:
            name = f"{case} in {dtype}" if (function, case) in ran else case
            cases.setdefault(function, {})[name] = None
        return tuple(
            f"{function} raises NotImplementedError in {counted(len(names), 'case')}: "
            f"{first_of(names, 'case')}"
            for function, names in cases.items()
        )


def grouped(findings: Iterable[Finding]) -> tuple[str, ...]:
    """Return a line for each group of findings that differ in their numbers, case and dtype alone.

    Parameters
    ----------
    findings : sequence of Finding
        Such as those of a `Report`, or those of a `Judgement` that are wrong.

    Returns
    -------
    tuple of str
        A line has the first finding of its group, the number of the others, and the first of their
        cases. The findings in extreme cases have one line for each function, after all others.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from doraxp.testing import check_implementation
    >>> report = check_implementation(SimpleNamespace(init=lambda weight: None))
    >>> for line in grouped(report.findings):
    ...     print(line.partition(", initial: ")[2] or line)
    must be an array of numbers, got None (and 41 more: wide; square; one row; and 17 other cases)
    extreme init: 6 findings in zero row; huge; tiny
    """
    alike: dict[tuple[str, str, str], list[Finding]] = {}
    extreme: dict[str, list[Finding]] = {}
    for one in findings:
        if one.extreme:
            extreme.setdefault(one.function, []).append(one)
        else:
            alike.setdefault((one.function, one.quantity, _kind(one.problem)), []).append(one)
    return (
        *(_line(group) for group in alike.values()),
        *(
            f"extreme {function}: {counted(len(group), 'finding')} in "
            f"{first_of((one.case for one in group), 'case')}"
            for function, group in extreme.items()
        ),
    )


def _kind(problem: str) -> str:
    """Return a problem without its numbers; a right result of 0 has no relative error."""
    return re.sub(r", relative error \S+|\d[\d.e+-]*|\binf\b", "", problem)


def _line(group: list[Finding]) -> str:
    first, *more = group
    line = f"{first.function}, {first.case}, {first.dtype}, {first.quantity}: {first.problem}"
    if not more:
        return line
    others = first_of((one.case for one in more if one.case != first.case), "case")
    dtypes = ", ".join(dict.fromkeys(one.dtype for one in more))
    return f"{line} (and {len(more)} more: {others or f'{first.case} in {dtypes}'})"
