"""`doraxp conform`: test another implementation of DoRA, and name its mistakes."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

from doraxp._terminal.conformance_table import print_conformance, row_of_function
from doraxp._terminal.figures import write_json, write_text
from doraxp._terminal.messages import output_that_may_fail, print_error, reason
from doraxp._terminal.progress import progress_by_parts
from doraxp._terminal.runtimes import versions
from doraxp._terminal.tables import plain_console, print_names
from doraxp.cli._arguments import CHECKPOINT, integer, lacks, output
from doraxp.cli._target import add_conventions, conventions_of, load_implementation
from doraxp.testing import (
    VERSION,
    Conventions,
    Judgement,
    Report,
    check_implementation,
    functions_of,
    judge,
    junit,
    read_expected_failures,
)

SUMMARY = "Test another implementation of DoRA, and name its mistakes."
DETAILS = "The implementation runs the catalogue of doraxp.testing."
EXAMPLE = "doraxp conform mine --json conform.json"
STATUS_1 = "a result is wrong or missing, or a failure that was expected passes"


FILES = "merge_files"
"""The function that merges files. `doraxp audit` checks it, and all others have cases."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "target",
        metavar="MODULE[:OBJECT]",
        help="a module, or an object in it, with functions that check_implementation calls; a "
        "class is called without arguments; the current directory is searched first",
    )
    parser.add_argument(
        "--expected",
        type=Path,
        metavar="FILE",
        help="failures that are expected, as TOML; one that passes is an error",
    )
    parser.add_argument(
        "--since",
        type=integer(1, VERSION),
        default=1,
        metavar="VERSION",
        help="run only the cases that came with this version of the catalogue or later",
    )
    parser.add_argument("--json", type=output(".json"), metavar="FILE", help="write the report")
    parser.add_argument(
        "--junit", type=output(".xml"), metavar="FILE", help="write the report as JUnit XML"
    )
    add_conventions(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check with a progress bar, print the table, write the reports."""
    if lacks("conform", "rich", extra="verify"):
        return 2
    try:
        expected = read_expected_failures(arguments.expected) if arguments.expected else ()
        impl = load_implementation(arguments.target)
        names = _functions(impl)
        if not names and isinstance(impl, ModuleType):
            _refuse_a_module_of_classes(impl, arguments.target)
        if FILES in names and lacks("conform", *CHECKPOINT, extra="checkpoint"):
            return 2
        conventions = conventions_of(impl, arguments)
        report = _checked(impl, names, conventions, arguments.since)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print_error("doraxp conform", f"{arguments.target}: {reason(error)}")
        return 2
    judged = judge(report, expected)
    if arguments.json is not None:
        write_json(arguments.json, _figures(arguments, conventions, report, judged))
    if arguments.junit is not None:
        write_text(arguments.junit, junit(arguments.target, report, judged))
    with output_that_may_fail("doraxp conform"):
        console = plain_console()
        print_conformance(report, judged, console)
        for path in filter(None, (arguments.json, arguments.junit)):
            print_names(f"Report: {path}", console)
    return 0 if judged.ok else 1


def _functions(impl: Any) -> tuple[str, ...]:
    """Return the names of the functions of an implementation that have cases.

    Raises
    ------
    ValueError
        Reading an attribute raises another error than AttributeError.
    """
    try:
        return functions_of(impl) + ((FILES,) if hasattr(impl, FILES) else ())
    except Exception as error:  # a property may raise anything
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"its functions must be attributes that can be read, got {got}") from error


def _refuse_a_module_of_classes(module: ModuleType, target: str) -> None:
    """Raise ValueError if the functions of a module are in a class, which must be named too.

    Classes of other packages, such as an optimizer with a method `step`, are named only if the
    module has no others.
    """
    classes = {key: one for key, one in vars(module).items() if isinstance(one, type)}
    found = {key: one for key, one in classes.items() if _functions(one)}
    package = target.partition(".")[0]
    own = [key for key, one in found.items() if one.__module__.partition(".")[0] == package]
    targets = [f"{target}:{key}" for key in own or found]
    if targets:
        raise ValueError(
            "OBJECT must be given, got a module whose functions are in a class: write "
            f"{' or '.join(targets)}"
        )


def _checked(impl: Any, names: tuple[str, ...], conventions: Conventions, since: int) -> Report:
    """Return the report of an implementation.

    Raises
    ------
    ValueError
        No case ran: this must not look like success.
    """
    reports = []
    with progress_by_parts() as progress:
        task = progress.add_task("")

        def tell(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        if names != (FILES,):
            reports.append(check_implementation(impl, conventions, since=since, progress=tell))
        if FILES in names:
            from doraxp.checkpoint import check_merge_files

            reports.append(check_merge_files(impl.merge_files, progress=tell))
    report = Report(*map(_sum, zip(*reports, strict=True)))
    if not report.runs:
        raise ValueError(
            f"one case must run, got 0: the conventions, --since {since} or NotImplementedError "
            "leave out all"
        )
    return report


def _sum(fields: tuple[Any, ...]) -> Any:
    """Return the sum of numbers, or all items of tuples."""
    first, *others = fields
    for other in others:
        first = first + other
    return first


def _figures(
    arguments: argparse.Namespace, conventions: Conventions, report: Report, judged: Judgement
) -> dict[str, Any]:
    """Return the report in the types of JSON."""
    findings = [
        *(one._asdict() | {"expected": None} for one in (*judged.wrong, *judged.extreme)),
        *(one._asdict() | {"expected": entry._asdict()} for one, entry in judged.expected),
    ]
    return {
        "target": arguments.target,
        "catalogue": VERSION,
        "since": arguments.since,
        "versions": versions("numpy"),
        "conventions": dataclasses.asdict(conventions),
        "ok": judged.ok,
        "functions": {
            function: row_of_function(function, report, judged)._asdict()
            for function in dict.fromkeys(one.function for one in report.runs)
        },
        "runs": [one._asdict() for one in report.runs],
        "findings": findings,
        "diagnoses": [one._asdict() for one in report.diagnoses],
        "passing": [
            entry._asdict() | {"passes_in": ["/".join(pair) for pair in pairs]}
            for entry, pairs in judged.passing
        ],
        "unmatched": [entry._asdict() for entry in judged.unmatched],
        "left_out": report.left_out,
        "needs": report.needs,
        "unexplained": report.unexplained,
        "refused": [one._asdict() for one in report.refused],
        "raised": [one._asdict() for one in report.raised],
        "never_returned": [one._asdict() for one in report.never_returned],
    }
