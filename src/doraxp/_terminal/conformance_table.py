"""The table of `doraxp conform` and the lines under it, by rich."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from doraxp._base.printable import printable
from doraxp._base.words import counted, first_of
from doraxp._terminal.tables import print_names, print_table
from doraxp.testing import Judgement, Report, grouped

if TYPE_CHECKING:
    from rich.console import Console

LINES = 20
"""Groups of findings that are printed."""


class Row(NamedTuple):
    """The numbers of one function."""

    cases: int
    arrays: int
    wrong: int
    """Findings that were not expected, outside the extreme cases."""
    expected: int
    extreme: int


def row_of_function(function: str, report: Report, judged: Judgement) -> Row:
    """Return the numbers of one function."""
    runs = [one for one in report.runs if one.function == function]
    wrong, expected, extreme = (
        sum(one.function == function for one in found)
        for found in (judged.wrong, (one for one, _ in judged.expected), judged.extreme)
    )
    cases = len({one.case for one in runs})
    return Row(cases, sum(one.checked for one in runs), wrong, expected, extreme)


def print_conformance(report: Report, judged: Judgement, console: Console) -> None:
    """Print a row for each function, what explains the findings, their groups, and the verdict."""
    rows = {
        function: row_of_function(function, report, judged)
        for function in dict.fromkeys(one.function for one in report.runs)
    }
    headings = ("function", *Row._fields)
    print_table(headings, ((name, *map(str, row)) for name, row in rows.items()), console)
    for raised in report.raised:
        _print(f"RAISED {raised}", console)
    for named in report.diagnoses:
        _print(f"NAMED {named}", console)
    for function in report.unnamed():
        unnamed = "no known mistake or pair of them explains the numbers"
        _print(f"UNNAMED {function}: {unnamed}{_advice(function, report)}", console)
    lines = [*_lines(judged)]
    for line in lines[:LINES]:
        _print(line, console)
    if len(lines) > LINES:
        _print(
            f"and {counted(len(lines) - LINES, 'more group')}: --json and --junit have all", console
        )
    for line in _not_checked(report):
        _print(line, console)
    _print(_verdict(report, judged), console)


def _advice(function: str, report: Report) -> str:
    """Return the advice on a function whose numbers no mistake explains; an optimizer has none.

    Functions of one part share their mistakes, so those with a name come first.
    """
    part, _, name = function.rpartition(".")
    if name.endswith("step"):
        return ""
    named = [one for diagnosis in report.diagnoses for one in diagnosis.functions]
    if same := [
        one for one in named if one.rpartition(".")[0] == part and not one.endswith("step")
    ]:
        return f"; mend {', '.join(dict.fromkeys(same))} first, and run again"
    first = {"gradients": "--norm-gradient detached, --layout in_out"}
    options = first.get(name, "--layout in_out, --form direction")
    return f"; declare your choices, such as {options} or --eps 1e-6"


def _not_checked(report: Report) -> Iterator[str]:
    """Yield what was not checked: gradients, cases of a function, and cases for other options."""
    yield from map(str, report.never_returned)
    yield from report.refusals()
    if others := sum(map(bool, report.needs)):
        options = (
            f"{_option(name, value)} ({counted(count, 'case')})"
            for (name, value), count in report.needed().items()
        )
        yield (
            f"{counted(others, 'case')} did not run: {'it needs' if others == 1 else 'they need'} "
            f"{', '.join(options)}; --json names the cases"
        )


def _option(name: str, value: Any) -> str:
    """Return the option of the command that declares a choice."""
    if name == "dtypes":
        return f"--dtype {' or '.join(value)}"
    option = f"--{name.replace('_', '-')}"
    return option if value is True else f"{option} {value}"


def _lines(judged: Judgement) -> Iterator[str]:
    """Yield a line for each stale entry and each group of findings, what is wrong first."""
    for entry in judged.unmatched:
        yield f"STALE {entry.name} matches no function and case of this run: remove the entry"
    for entry, pairs in judged.passing:
        where = first_of(map("/".join, pairs), "case")
        yield f"STALE {entry.name} passes in {where}: remove or narrow the entry"
    yield from (f"WRONG {line}" for line in grouped(judged.wrong))
    for entry in dict.fromkeys(entry for _, entry in judged.expected):
        count = sum(other == entry for _, other in judged.expected)
        yield f"expected {entry.name}, {counted(count, 'finding')}: {entry.reason} ({entry.link})"
    yield from grouped(judged.extreme)


def _verdict(report: Report, judged: Judgement) -> str:
    stale = len(judged.passing) + len(judged.unmatched)
    parts = [counted(report.checked, "array"), f"{len(judged.wrong)} wrong"]
    parts += [f"{counted(len(judged.expected), 'failure')} expected"] if judged.expected else []
    parts += [f"{counted(stale, 'expected failure')} that did not fail"] if stale else []
    return f"{'right' if judged.ok else 'WRONG'}: {', '.join(parts)}."


def _print(line: str, console: Console) -> None:
    """Print a line, and continue it on indented lines if it is too long for the terminal."""
    for part in textwrap.wrap(
        printable(line),
        console.width,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    ):
        print_names(part, console)
