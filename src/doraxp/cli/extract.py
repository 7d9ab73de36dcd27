"""`doraxp extract`: a DoRA adapter from a model and a full fine-tune of it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doraxp._base.words import counted
from doraxp._terminal.figures import write_json
from doraxp._terminal.messages import output_that_may_fail, print_error
from doraxp._terminal.progress import progress_by_bytes
from doraxp._terminal.tables import plain_console, print_names
from doraxp.cli._arguments import (
    CHECKPOINT,
    adapters_of,
    add_jobs,
    add_rename,
    add_residual,
    add_weighted,
    integer,
    is_in_input,
    lacks,
    output,
)
from doraxp.cli._closeness import figures_of, print_closeness, warn_of_left_out

if TYPE_CHECKING:
    from doraxp.checkpoint import Extraction

SUMMARY = "Make a DoRA adapter of a full fine-tune, or of a sum."
DETAILS = (
    "The merged weights of the adapter are near those of TUNED, nearer than those of SVD LoRA at "
    "the same rank. With --adapter, the sum of adapters becomes one."
)
EXAMPLE = "doraxp extract base merged --rank 4 --out extracted"
STATUS_1 = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "base", type=Path, metavar="BASE", help="a safetensors file, or a model's folder"
    )
    tuned = parser.add_argument(
        "tuned", type=Path, metavar="TUNED", help="the same model after a full fine-tune"
    )
    add_weighted(parser, tuned, "TUNED")
    add_rename(parser, "the adapters")
    add_residual(parser)
    parser.add_argument(
        "--rank",
        type=integer(1),
        required=True,
        metavar="R",
        help="rank of the adapter; alpha is R too",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="a folder that does not exist yet"
    )
    parser.add_argument("--force", action="store_true", help="replace DIR if it is an adapter")
    parser.add_argument(
        "--modules",
        type=_pattern,
        metavar="REGEX",
        help="take only the modules of TUNED whose paths contain this regular expression (default: "
        "all matrices and convolutions that differ)",
    )
    add_jobs(parser, "matrices to work on")
    parser.add_argument(
        "--all", action="store_true", help="list every module, not a row for each kind of module"
    )
    parser.add_argument(
        "--json", type=output(".json"), metavar="FILE", help="write the figures of every module"
    )


def run(arguments: argparse.Namespace) -> int:
    """Extract with a progress bar, save, and print the errors."""
    if lacks("extract", *CHECKPOINT, extra="checkpoint"):
        return 2
    given = (path for path, _ in arguments.adapters)
    inputs = (arguments.base, *given, *([arguments.tuned] if arguments.tuned else []))
    if is_in_input("extract", arguments.json, inputs):
        return 2
    from doraxp.checkpoint import check_place, save_adapters

    try:
        _check_arguments(arguments)
        check_place(arguments.out, overwrite=arguments.force)
        found = _extract(arguments)
        save_adapters(arguments.out, found.adapters, overwrite=arguments.force)
        modules = figures_of(found)
        target = "the sum" if arguments.adapters else "TUNED"
        with output_that_may_fail("doraxp extract"):
            print_closeness(modules, target, every=arguments.all)
            equal = f", {counted(len(found.equal), 'equal one')} left out" if found.equal else ""
            summary = f"{arguments.out}: an adapter of {counted(len(modules), 'module')}{equal}"
            print_names(summary, plain_console())
        warn_of_left_out("extract", found.left_out, target, "DIR")
        if arguments.json is not None:
            write_json(arguments.json, _report(found, modules, arguments))
    except (ValueError, OSError) as error:
        print_error("doraxp extract", error)
        return 2
    return 0


def _pattern(text: str) -> str:
    """Parse a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None
    return text


def _extract(arguments: argparse.Namespace) -> Extraction:
    from doraxp.checkpoint import Fit, Options, approximate, extract, plan_merge

    with progress_by_bytes() as progress:
        bar = progress.add_task("", total=None)

        def update(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        if arguments.adapters:
            fit = Fit(tuple(arguments.rename), arguments.base_is_residual)
            merge = plan_merge(arguments.base, adapters_of(arguments), Options(), fit=fit)
            return approximate(merge, arguments.rank, jobs=arguments.jobs, on_bytes=update)
        return extract(
            arguments.base,
            arguments.tuned,
            arguments.rank,
            modules=arguments.modules,
            jobs=arguments.jobs,
            on_bytes=update,
        )


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError where options do not belong to what is extracted from."""
    if arguments.adapters and arguments.tuned is not None:
        raise ValueError(f"give TUNED or --adapter, not both, got {arguments.tuned} too")
    if arguments.adapters and arguments.modules is not None:
        raise ValueError("--modules is for TUNED: with --adapter all modules are extracted")
    for option, is_given in (
        ("--scale", arguments.scale != 1),
        ("--rename", arguments.rename),
        ("--base-is-residual", arguments.base_is_residual),
    ):
        if is_given and not arguments.adapters:
            raise ValueError(f"{option} is for --adapter, and TUNED is given")


def _report(
    found: Extraction, modules: Mapping[str, Mapping[str, Any]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return everything that the command prints and more, in the types of JSON."""
    adapters = adapters_of(arguments) if arguments.adapters else []
    return {
        "base": str(arguments.base),
        "tuned": None if arguments.tuned is None else str(arguments.tuned),
        "adapters": [{"path": str(one.path), "strength": one.strength} for one in adapters],
        "out": str(arguments.out.absolute()),
        "rank": arguments.rank,
        "modules": modules,
        "equal": list(found.equal),
        "left_out": dict(found.left_out),
    }
