"""`doraxp verify`: compare array libraries with the float64 reference, case by case."""

from __future__ import annotations

import argparse
from typing import Any

import doraxp
from doraxp._terminal.comparison_table import print_comparison
from doraxp._terminal.figures import write_json
from doraxp._terminal.messages import print_error
from doraxp._terminal.progress import progress_by_parts
from doraxp._terminal.runtimes import versions
from doraxp._terminal.tables import new_console, print_names
from doraxp.cli._arguments import lacks, output
from doraxp.testing import VERSION, Comparison, compare_backends

SUMMARY = (
    "Run the catalogue of doraxp.testing on array libraries, and compare every number with its "
    "float64 reference, within the bound that rounding allows. Exit status 1 if one is outside."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="array library, as doraxp.backends.available() names it; repeatable "
        "(default: all that can be used here)",
    )
    parser.add_argument(
        "--json",
        type=output(".json"),
        metavar="FILE",
        help="write the figures of every case and quantity",
    )


def run(arguments: argparse.Namespace) -> int:
    """Compare, print the table, write the figures."""
    if lacks("verify", "rich"):
        return 2
    names = arguments.backend
    if names is None:
        names = [status.name for status in doraxp.backends.available() if status.usable]
    with progress_by_parts() as progress:
        task = progress.add_task("")
        try:
            comparison = compare_backends(
                names,
                progress=lambda what, done, total: progress.update(
                    task, description=what, completed=done, total=total
                ),
            )
        except (RuntimeError, ValueError) as error:
            print_error("doraxp verify", error)
            return 2
    console = new_console()
    print_comparison(comparison, console)
    if arguments.json is not None:
        write_json(arguments.json, _report(comparison, names))
        print_names(f"Figures: {arguments.json}", console)
    return 0 if comparison.ok else 1


def _report(comparison: Comparison, names: list[str]) -> dict[str, Any]:
    """Return all figures, in the types of JSON."""
    return {
        "catalogue": VERSION,
        "versions": versions(*names),
        "ok": comparison.ok,
        "figures": [figure._asdict() | {"ok": figure.ok} for figure in comparison.figures],
        "agreements": [pair._asdict() for pair in comparison.agreements],
        "left_out": [
            {"backend": backend, "dtype": dtype} for backend, dtype in comparison.left_out
        ],
    }
