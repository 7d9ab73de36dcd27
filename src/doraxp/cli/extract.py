"""`doraxp extract`: a DoRA adapter from a model and a full fine-tune of it."""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doraxp._terminal.figures import write_json
from doraxp._terminal.messages import output_that_may_fail, print_error, print_warning
from doraxp._terminal.module_table import Column, print_modules
from doraxp._terminal.progress import progress_by_bytes
from doraxp._terminal.tables import plain_console, print_caption, print_names
from doraxp.cli._arguments import CHECKPOINT, add_jobs, integer, is_in_input, lacks, output

if TYPE_CHECKING:
    from doraxp.checkpoint import Extraction

SUMMARY = (
    "Extract a DoRA adapter from a full fine-tune: the adapter of BASE whose merged weights are "
    "near those of TUNED, nearer than those of SVD LoRA at the same rank."
)
_COLUMNS = (
    Column("kind", "stored as"),
    Column("rank", "rank"),
    Column("update_norm", "update\nnorm", statistics.median),
    Column("relative_lora_error", "error of\nSVD LoRA", statistics.median),
    Column("relative_error", "error of\nDoRA", statistics.median),
    Column("ratio", "DoRA ÷\nLoRA", max),
)
_CAPTION = (
    "Update norm: ‖W* − W‖, with W* of TUNED. Errors: ‖W' − W*‖ as a part of it; 0 is TUNED "
    "itself, 1 is BASE. SVD LoRA: the truncated SVD of W* − W at the same rank. Medians of a kind; "
    "of DoRA ÷ LoRA, the largest."
)
_NAMED = 3
"""Tensors that a warning names."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "base", type=Path, metavar="BASE", help="a safetensors file, or a model's folder"
    )
    parser.add_argument(
        "tuned", type=Path, metavar="TUNED", help="the same model after a full fine-tune"
    )
    parser.add_argument(
        "--rank", type=integer(1), required=True, metavar="R", help="of the adapter; alpha is R too"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="a folder that does not exist yet"
    )
    parser.add_argument("--force", action="store_true", help="replace DIR if it is an adapter")
    parser.add_argument(
        "--modules",
        type=_pattern,
        metavar="REGEX",
        help="only the modules whose paths contain this regular expression (default: all matrices "
        "and convolutions that differ)",
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
    if is_in_input("extract", arguments.json, (arguments.base, arguments.tuned)):
        return 2
    from doraxp.checkpoint import check_place, save_adapters

    try:
        check_place(arguments.out, overwrite=arguments.force)
        found = _extract(arguments)
        save_adapters(arguments.out, found.adapters, overwrite=arguments.force)
        modules = _figures(found)
        with output_that_may_fail("doraxp extract"):
            _print_figures(found, modules, arguments)
        _warn_of_left_out(found.left_out)
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
    from doraxp.checkpoint import extract

    with progress_by_bytes() as progress:
        bar = progress.add_task("", total=None)
        return extract(
            arguments.base,
            arguments.tuned,
            arguments.rank,
            modules=arguments.modules,
            jobs=arguments.jobs,
            on_bytes=lambda done, total: progress.update(bar, completed=done, total=total),
        )


def _figures(found: Extraction) -> dict[str, dict[str, Any]]:
    """Return the figures of each module, by path."""
    return {
        path: {
            "kind": found.adapters[path].kind.name,
            "rank": found.adapters[path].config.rank,
            "shape": found.adapters[path].shape,
            **one._asdict(),
            "relative_lora_error": one.lora_error / one.update_norm,
            "relative_error": one.error / one.update_norm,
            "ratio": one.ratio,
        }
        for path, one in found.closeness.items()
    }


def _print_figures(
    found: Extraction, modules: Mapping[str, Mapping[str, Any]], arguments: argparse.Namespace
) -> None:
    console = plain_console()
    print_modules("module", modules, _COLUMNS, console, every=arguments.all)
    print_caption(_CAPTION, console)
    equal = f", {len(found.equal)} equal ones left out" if found.equal else ""
    print_names(f"{arguments.out}: an adapter of {len(modules)} modules{equal}", console)


def _warn_of_left_out(left_out: Mapping[str, float]) -> None:
    """Warn of tensors that the fine-tune changed and that the adapter lacks."""
    if not left_out:
        return
    names = sorted(left_out, key=lambda name: -left_out[name])
    first = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
    message = f"{len(names)} tensors of TUNED differ and are not in DIR: {first}"
    known = [name for name in names if math.isfinite(left_out[name])]
    if known:
        message += f"; the largest relative change is {left_out[known[0]]:.2g}, of {known[0]}"
    if len(known) < len(names):
        message += f"; {len(names) - len(known)} are new, or have another shape or no numbers"
    print_warning("doraxp extract", message)


def _report(
    found: Extraction, modules: Mapping[str, Mapping[str, Any]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return everything that the command prints and more, in the types of JSON."""
    return {
        "base": str(arguments.base),
        "tuned": str(arguments.tuned),
        "out": str(arguments.out.absolute()),
        "rank": arguments.rank,
        "modules": modules,
        "equal": list(found.equal),
        "left_out": dict(found.left_out),
    }
