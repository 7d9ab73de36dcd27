"""`doraxp verify`: compare array libraries with the float64 reference, case by case."""

from __future__ import annotations

import argparse
from typing import Any

import doraxp
from doraxp._terminal.comparison_table import print_comparison
from doraxp._terminal.figures import write_json
from doraxp._terminal.messages import output_that_may_fail, print_error
from doraxp._terminal.progress import progress_by_parts
from doraxp._terminal.runtimes import versions
from doraxp._terminal.tables import new_console, print_names
from doraxp.cli._arguments import lacks, output
from doraxp.testing import VERSION, Comparison, check_usable, compare_backends

SUMMARY = "Compare the array libraries here with a float64 reference."
DETAILS = (
    "The catalogue of doraxp.testing runs on each library, and every number must be within the "
    "bound that rounding allows."
)
EXAMPLE = "doraxp verify --backend numpy"
STATUS_1 = "a number is outside its bound"


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
        "--device",
        choices=("cpu", "cuda"),
        help="where the libraries compute; with cuda alone all that find a CUDA device here: CuPy, "
        "PyTorch and JAX (default: where each library puts its arrays itself)",
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
    try:
        names = arguments.backend or _all_on(arguments.device)
        comparison = _compared(names, arguments.device)
    except (RuntimeError, ValueError) as error:
        print_error("doraxp verify", error)
        return 2
    if arguments.json is not None:
        write_json(arguments.json, _report(comparison, names, arguments.device))
    with output_that_may_fail("doraxp verify"):
        console = new_console()
        print_comparison(comparison, console)
        if arguments.json is not None:
            print_names(f"Figures: {arguments.json}", console)
    return 0 if comparison.ok else 1


def _all_on(device: str | None) -> list[str]:
    """Return the names of all libraries that can be used here, and compute on the device.

    Raises
    ------
    RuntimeError
        No library can; the message has the reasons of those that can elsewhere.
    """
    statuses = doraxp.backends.available()
    if device is None:
        return [status.name for status in statuses if status.usable]
    names, reasons = [], []
    for status in statuses:
        try:
            check_usable([status.name], device=device)
        except RuntimeError as error:
            reasons.append(str(error))
        except ValueError:  # it never computes on such a device
            continue
        else:
            names.append(status.name)
    if not names and reasons:
        raise RuntimeError(f"no library can compute on {device} here: {'; '.join(reasons)}")
    return names


def _compared(names: list[str], device: str | None) -> Comparison:
    """Compare with a progress bar."""
    with progress_by_parts() as progress:
        task = progress.add_task("")
        return compare_backends(
            names,
            device=device,
            progress=lambda what, done, total: progress.update(
                task, description=what, completed=done, total=total
            ),
        )


def _report(comparison: Comparison, names: list[str], device: str | None) -> dict[str, Any]:
    """Return all figures, in the types of JSON."""
    return {
        "catalogue": VERSION,
        "device": device,
        "versions": versions(*names),
        "ok": comparison.ok,
        "figures": [figure._asdict() | {"ok": figure.ok} for figure in comparison.figures],
        "agreements": [pair._asdict() for pair in comparison.agreements],
        "left_out": [
            {"backend": backend, "dtype": dtype} for backend, dtype in comparison.left_out
        ],
    }
