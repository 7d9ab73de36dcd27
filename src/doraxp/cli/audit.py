"""`doraxp audit`: check a merged model, whoever made it."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from doraxp._base.words import counted
from doraxp._terminal.figures import write_json
from doraxp._terminal.messages import output_that_may_fail, print_error
from doraxp._terminal.progress import progress_by_bytes
from doraxp._terminal.tables import plain_console, print_names, print_table
from doraxp.cli._arguments import (
    CHECKPOINT,
    adapters_of,
    add_fit,
    add_jobs,
    add_model_and_adapter,
    fit_of,
    is_in_input,
    lacks,
    output,
)

if TYPE_CHECKING:
    from rich.console import Console

    from doraxp.checkpoint import Verdict

SUMMARY = "Check that a merged model is right, whoever merged it."
DETAILS = "MERGED must be BASE with ADAPTER merged into it, and each tensor gets a verdict."
EXAMPLE = "doraxp audit base adapter merged"
STATUS_1 = "a tensor is not right"

_LISTED = 10
"""Tensors of each verdict that is not right, by name, without --all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model_and_adapter(parser, merged=True)
    parser.add_argument(
        "--all", action="store_true", help="list every tensor, also those that are right"
    )
    parser.add_argument("--json", type=output(".json"), metavar="FILE", help="write all figures")
    add_fit(parser)
    add_jobs(parser, "tensors to audit")


def run(arguments: argparse.Namespace) -> int:
    """Audit with a progress bar, print the verdicts, write the figures."""
    if lacks("audit", *CHECKPOINT, extra="checkpoint"):
        return 2
    from doraxp.checkpoint import Options, audit, plan_merge

    console = plain_console()
    try:
        adapters = adapters_of(arguments)
        paths = (arguments.base, *(Path(one.path) for one in adapters), arguments.merged)
        if is_in_input("audit", arguments.json, paths):
            return 2
        merge = plan_merge(arguments.base, adapters, Options(), **fit_of(arguments))
        with progress_by_bytes() as progress:
            task = progress.add_task("", total=merge.size)
            verdicts = audit(
                merge,
                arguments.merged,
                jobs=arguments.jobs,
                on_bytes=lambda count: progress.update(task, advance=count),
            )
        wrong = {name: verdict for name, verdict in verdicts.items() if not verdict.right}
        with output_that_may_fail("doraxp audit"):
            _print_verdicts(verdicts, console, every=arguments.all)
            share = counted(len(wrong), "tensor", "is", of=len(verdicts))
            state = f"{share} not right" if wrong else "right"
            print_names(f"{arguments.merged}: {state}", console)
        if arguments.json:
            tensors = {name: verdict._asdict() for name, verdict in verdicts.items()}
            write_json(arguments.json, {"right": not wrong, "tensors": tensors})
    except (ValueError, OSError) as error:
        print_error("doraxp audit", error)
        return 2
    return 1 if wrong else 0


def _print_verdicts(verdicts: Mapping[str, Verdict], console: Console, *, every: bool) -> None:
    """Print how many tensors have each verdict, and the first names of each that is not right."""
    counts = Counter(verdict.verdict for verdict in verdicts.values())
    rows = ((verdict, str(count)) for verdict, count in counts.most_common())
    print_table(("verdict", "tensors"), rows, console)
    listed: Counter[str] = Counter()
    for name, (verdict, right, detail, *_rest) in verdicts.items():
        if every or not right:
            listed[verdict] += 1
            if every or listed[verdict] <= _LISTED:
                print_names(f"{name}: {verdict}{f' ({detail})' if detail else ''}", console)
    rest = {verdict: count - _LISTED for verdict, count in listed.items() if count > _LISTED}
    if rest and not every:
        more = ", ".join(f"{count} more {verdict}" for verdict, count in rest.items())
        print_names(f"and {more}: --all lists them", console)
