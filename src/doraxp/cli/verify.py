"""`doraxp verify`: hold array libraries to the float64 reference, case by case."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import doraxp
from doraxp.cli._arguments import lacks, output
from doraxp.cli._libraries import versions
from doraxp.testing import VERSION, Comparison, compare_backends

SUMMARY = (
    "Run the catalogue of doraxp.testing on array libraries, and hold every number to its float64 "
    "reference within the bound that rounding allows. Exit status 1 where one is outside."
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
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from doraxp.cli._tables import print_names
    from doraxp.cli._verify_table import print_comparison

    names = arguments.backend
    if names is None:
        names = [status.name for status in doraxp.backends.available() if status.usable]
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("")
        try:
            comparison = compare_backends(
                names,
                progress=lambda what, done, total: progress.update(
                    task, description=what, completed=done, total=total
                ),
            )
        except (RuntimeError, ValueError) as error:
            print_names(f"doraxp verify: error: {error}", errors)
            return 2
    console = Console()
    print_comparison(comparison, console)
    if arguments.json is not None:
        report = {"catalogue": VERSION, "versions": versions(*names), **_report(comparison)}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        print_names(f"Figures: {arguments.json}", console)
    return 0 if comparison.ok else 1


def _report(comparison: Comparison) -> dict[str, Any]:
    """Return all figures, in the types of JSON, which has no infinity."""
    return {
        "ok": comparison.ok,
        "figures": [
            {name: _finite(value) for name, value in figure._asdict().items()} | {"ok": figure.ok}
            for figure in comparison.figures
        ],
        "agreements": [
            {"backends": pair.backends, "share": _finite(pair.share)}
            for pair in comparison.agreements
        ],
        "left_out": [
            {"backend": backend, "dtype": dtype} for backend, dtype in comparison.left_out
        ],
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
