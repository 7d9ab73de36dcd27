"""`doraxp convert`: write an adapter in another format, exactly or not at all, or as LoRA."""

from __future__ import annotations

import argparse
from pathlib import Path

from doraxp._base.printable import printable
from doraxp._base.words import counted
from doraxp._terminal.messages import output_that_may_fail, print_error, print_warning
from doraxp._terminal.progress import progress_by_bytes
from doraxp.cli._arguments import (
    CHECKPOINT,
    add_choice,
    add_jobs,
    add_rename,
    add_residual,
    integer,
    lacks,
)
from doraxp.cli._closeness import figures_of, print_closeness, warn_of_left_out

SUMMARY = "Convert an adapter to the format of PEFT, mlx-lm or diffusers."
DETAILS = (
    "The copy is exact. An adapter that the format cannot hold is refused with the reason. --to "
    "lora approximates it by plain LoRA, and prints the error and the rank that would bring it to "
    "0.1."
)
EXAMPLE = "doraxp convert adapter --to mlx --out adapter-mlx"
STATUS_1 = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="a folder as PEFT or mlx-lm save it, or a file"
    )
    parser.add_argument(
        "--to",
        choices=("peft", "mlx", "diffusers", "lora"),
        required=True,
        help="the format of DST; lora is PEFT's without magnitudes, near to SRC",
    )
    parser.add_argument(
        "--rank", type=integer(1), metavar="R", help="rank of --to lora, which needs it and --base"
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="BASE",
        help="the model that the adapter belongs to; names of image trainers need it",
    )
    add_jobs(parser, "matrices of --to lora")
    parser.add_argument(
        "--all", action="store_true", help="with --to lora, list every module with its error"
    )
    add_choice(parser, "SRC")
    add_rename(parser, "SRC")
    add_residual(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DST", required=True, help="a folder that does not exist yet"
    )
    parser.add_argument("--force", action="store_true", help="replace DST if it is an adapter")


def run(arguments: argparse.Namespace) -> int:
    """Load and save."""
    if lacks("convert", *CHECKPOINT, extra="checkpoint"):
        return 2
    from doraxp.checkpoint import Fit, load_adapters, named_for, open_model, save_adapters

    try:
        if arguments.to == "lora":
            return _to_lora(arguments)
        if arguments.rank is not None:
            raise ValueError(f"--rank is for --to lora, got --to {arguments.to}")
        adapters = load_adapters(
            arguments.source,
            subfolder=arguments.subfolder,
            adapter_name=arguments.adapter_name,
        )
        if arguments.rename and arguments.base is None:
            raise ValueError("--rename finds modules in a model: give it, with --base BASE")
        if arguments.base is not None:
            fit = Fit(tuple(arguments.rename))
            before, model = len(adapters), open_model(arguments.base)
            adapters = named_for(model, adapters, fit, format=arguments.to)
            left = before - len({layer.names for layer in adapters.layers.values()})
            if left:
                modules = counted(left, "module")
                print_warning(
                    "doraxp convert", f"SRC has {modules} for another part of the model than BASE"
                )
        save_adapters(arguments.out, adapters, arguments.to, overwrite=arguments.force)
    except (ValueError, OSError) as error:
        print_error("doraxp convert", error)
        return 2
    with output_that_may_fail("doraxp convert"):
        print(
            f"{counted(len(adapters), 'module')}, {adapters.format} to {arguments.to}: "
            f"{printable(str(arguments.out))}"
        )
    return 0


def _to_lora(arguments: argparse.Namespace) -> int:
    """Save the plain LoRA whose merge is near that of SRC, and print its errors."""
    from doraxp.checkpoint import (
        Fit,
        Options,
        approximate,
        check_place,
        plan_merge,
        save_adapters,
    )

    if arguments.base is None or arguments.rank is None:
        raise ValueError(
            "--to lora takes the change that SRC makes to the weights of a model, at a rank: give "
            "both, with --base BASE --rank R"
        )
    check_place(arguments.out, overwrite=arguments.force)
    merge = plan_merge(
        arguments.base,
        arguments.source,
        Options(),
        fit=Fit(tuple(arguments.rename), arguments.base_is_residual),
        subfolder=arguments.subfolder,
        adapter_name=arguments.adapter_name,
    )
    with progress_by_bytes() as progress:
        bar = progress.add_task("", total=None)
        found = approximate(
            merge,
            arguments.rank,
            method="lora",
            jobs=arguments.jobs,
            on_bytes=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    save_adapters(arguments.out, found.adapters, overwrite=arguments.force)
    with output_that_may_fail("doraxp convert"):
        print_closeness(figures_of(found), "SRC", every=arguments.all, dora=False)
        print(f"{counted(len(found.adapters), 'module')} as LoRA: {printable(str(arguments.out))}")
    warn_of_left_out("convert", found.left_out, "SRC", "DST")
    return 0
