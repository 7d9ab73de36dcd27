"""`doraxp convert`: write a DoRA adapter in another format, exactly or not at all."""

from __future__ import annotations

import argparse
from pathlib import Path

from doraxp._base.printable import printable
from doraxp._terminal.messages import print_error, print_warning
from doraxp.cli._arguments import CHECKPOINT, add_choice, add_rename, lacks

SUMMARY = (
    "Convert a DoRA adapter to the format of PEFT, mlx-lm or diffusers, exactly. An adapter that "
    "the format cannot hold is refused with the reason."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="a folder as PEFT or mlx-lm save it, or a file"
    )
    parser.add_argument(
        "--to", choices=("peft", "mlx", "diffusers"), required=True, help="the format of DST"
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="BASE",
        help="the model that the adapter belongs to; names of image trainers need it",
    )
    add_choice(parser)
    add_rename(parser)
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
                print_warning(
                    "doraxp convert", f"{left} modules are for another part of the model than BASE"
                )
        save_adapters(arguments.out, adapters, arguments.to, overwrite=arguments.force)
    except (ValueError, OSError) as error:
        print_error("doraxp convert", error)
        return 2
    print(
        f"{len(adapters)} modules, {adapters.format} to {arguments.to}: "
        f"{printable(str(arguments.out))}"
    )
    return 0
