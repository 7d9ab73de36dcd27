"""`doraxp doctor`: what to know about a base before an adapter is trained on it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doraxp._base.printable import printable
from doraxp._base.words import counted
from doraxp._terminal.figures import write_json
from doraxp._terminal.messages import output_that_may_fail, print_error
from doraxp._terminal.module_table import Column, kind_of, print_modules
from doraxp._terminal.progress import progress_by_bytes
from doraxp._terminal.tables import plain_console, print_caption, print_names, print_table
from doraxp.cli._arguments import CHECKPOINT, integer, is_in_input, lacks, output

if TYPE_CHECKING:
    from rich.console import Console

    from doraxp.checkpoint import Diagnosis, Finding

SUMMARY = "Check a model before an adapter is trained on it."
DETAILS = (
    "The tables have the modules that the targets match, their dtypes, the rows that become NaN, "
    "and sizes by rank."
)
EXAMPLE = "doraxp doctor base --target-modules q_proj v_proj"
STATUS_1 = "training breaks: an error is in the list"

_VERSION = 1
"""Of the figures in --json."""
_COLUMNS = (
    Column("kind", "stored as"),
    Column("dtype", "dtype"),
    Column("quantised", "quantised"),
    Column("rows", "rows", sum),
    Column("zero", "zero", sum),
    Column("broken", "NaN in\nPEFT", sum),
    Column("fragile", "fragile", sum),
)
_LISTED = 3
"""Modules, or kinds of modules, by name in a finding without --all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "base", type=Path, metavar="BASE", help="a safetensors file, or a model's folder"
    )
    parser.add_argument(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="paths of modules, or ends of paths; a single name with other signs than letters, "
        "digits, _, - and . is a regular expression for whole paths (default: all-linear)",
    )
    parser.add_argument(
        "--exclude-modules",
        nargs="+",
        metavar="NAME",
        help="modules that get no adapter, named in the same way",
    )
    parser.add_argument(
        "--ranks",
        nargs="+",
        type=integer(1),
        metavar="R",
        help="ranks to count parameters for (default: 4 8 16 32 64)",
    )
    parser.add_argument(
        "--all", action="store_true", help="list every module, not a row for each kind of module"
    )
    parser.add_argument("--json", type=output(".json"), metavar="FILE", help="write all figures")


def run(arguments: argparse.Namespace) -> int:
    """Diagnose with a progress bar, print the tables and the findings, write the figures."""
    if lacks("doctor", *CHECKPOINT, extra="checkpoint"):
        return 2
    if is_in_input("doctor", arguments.json, [arguments.base]):
        return 2
    from doraxp.checkpoint import diagnose, open_model

    try:
        model = open_model(arguments.base)
        with progress_by_bytes() as progress:
            bar = progress.add_task("", total=None)
            found = diagnose(
                model,
                _modules(arguments.target_modules),
                exclude_modules=_modules(arguments.exclude_modules or []),
                ranks=arguments.ranks,
                on_bytes=lambda done, total: progress.update(bar, completed=done, total=total),
            )
    except (ValueError, OSError) as error:
        print_error("doraxp doctor", error)
        return 2
    if arguments.json:
        write_json(arguments.json, _report(found))
    with output_that_may_fail("doraxp doctor"):
        _print(found, arguments.base, every=arguments.all)
    return 1 if found.breaks else 0


def _modules(words: list[str]) -> str | list[str]:
    """Return names as `adapt` takes them: a single one may be a regular expression."""
    if words == ["all-linear"] or (len(words) == 1 and not re.fullmatch(r"[\w.-]+", words[0])):
        return words[0]
    return words


def _print(found: Diagnosis, base: Path, *, every: bool) -> None:
    console = plain_console()
    figures = {
        path: {
            **module._asdict(),
            **({} if module.rows is None else module.rows._asdict()),
            "broken": None if module.rows is None else module.rows.broken,
        }
        for path, module in found.modules.items()
        if module.is_target
    }
    if figures:
        print_modules("target", figures, _COLUMNS, console, every=every)
        print_caption(
            "NaN in PEFT: rows with the norm 0, infinity or NaN. Fragile: their squares are near "
            "underflow.",
            console,
        )
        print_names("", console)
        _print_costs(found, console)
        print_names("", console)
    for finding in found.findings:
        print_caption(printable(_line(finding, every=every)), console)
    count = sum(finding.level == "error" for finding in found.findings)
    state = counted(count, "error") if count else "ready for training"
    size = f"{counted(found.parameters, 'number')}, {counted(found.bytes, 'byte')}"
    targets = counted(len(figures), "target")
    print_names(f"{base}: {targets}, {size}: {state}", console)


def _print_costs(found: Diagnosis, console: Console) -> None:
    headings = ["rank", "trained\nparameters", "% of\nthe base", "A, B, m\nMiB", "AdamW\nMiB"]
    rows = [
        [
            str(cost.rank),
            f"{cost.parameters:,}",
            f"{cost.percent:.3g}",
            f"{cost.adapter_bytes / 2**20:,.1f}",
            f"{cost.adamw_bytes / 2**20:,.1f}",
        ]
        for cost in found.costs
    ]
    print_table(headings, rows, console)


def _line(finding: Finding, *, every: bool) -> str:
    """Return a finding with its modules: all names if they are few, else the first kinds.

    With `every`, a finding that is more than a note has all names.
    """
    names = list(finding.modules)
    more = ""
    if len(names) > _LISTED and not (every and finding.level != "note"):
        kinds = list(dict.fromkeys(map(kind_of, names)))
        names = kinds[:_LISTED]
        more = f" and {len(kinds) - _LISTED} more" if len(kinds) > _LISTED else ""
    about = f" ({', '.join(names)}{more})" if names else ""
    return f"{finding.level}: {finding.text}.{about}"


def _report(found: Diagnosis) -> dict[str, Any]:
    """Return all figures, in the types of JSON."""
    modules = {
        path: module._asdict() | {"rows": None if module.rows is None else module.rows._asdict()}
        for path, module in found.modules.items()
    }
    return {
        "version": _VERSION,
        "breaks": found.breaks,
        "parameters": found.parameters,
        "bytes": found.bytes,
        "findings": [finding._asdict() for finding in found.findings],
        "targets": found.targets._asdict(),
        "tied": found.tied,
        "costs": [cost._asdict() for cost in found.costs],
        "modules": modules,
    }
