"""`doraxp inspect`: the modules of a DoRA adapter, and how they change the base."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doraxp._terminal.adapter_picture import save_adapter_picture
from doraxp._terminal.figures import write_json
from doraxp._terminal.tables import plain_console, print_table
from doraxp.cli._arguments import CHECKPOINT, lacks, output

if TYPE_CHECKING:
    from doraxp.checkpoint import AdapterSet

SUMMARY = (
    "List the modules of a DoRA adapter with rank, scale, size and effective rank of the update. "
    "With --base, show how far magnitudes and directions move, and how near rows are to cancelling."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="a folder as PEFT or mlx-lm save it, or a file"
    )
    parser.add_argument(
        "--base", type=Path, metavar="BASE", help="the model that the adapter belongs to"
    )
    parser.add_argument("--json", type=output(".json"), metavar="FILE", help="write all figures")
    parser.add_argument(
        "--plot",
        type=output(".png"),
        metavar="FILE",
        help="draw the magnitudes by layer and, with --base, ΔM against ΔD",
    )


def run(arguments: argparse.Namespace) -> int:
    """Read the adapter, print the table, write the figures and the picture."""
    if lacks("inspect", *CHECKPOINT, extra="checkpoint"):
        return 2
    if arguments.plot and lacks("inspect --plot", "matplotlib", extra="demo"):
        return 2
    from doraxp.checkpoint import CheckpointError, load_adapters

    try:
        adapters = load_adapters(arguments.path)
        report = _report(adapters, arguments.base)
    except (CheckpointError, OSError) as error:
        print(f"doraxp inspect: error: {error}", file=sys.stderr)
        return 2
    console = plain_console()
    headings = ("module", *next(iter(report["modules"].values())))
    rows = (
        (
            path,
            *(
                f"{value:.3g}" if isinstance(value, float) else str(value)
                for value in module.values()
            ),
        )
        for path, module in report["modules"].items()
    )
    print_table([heading.replace("_", "\n") for heading in headings], rows, console)
    console.print(f"{report['format']} adapter: {len(adapters)} modules, {report['bytes']:,} bytes")
    if arguments.json:
        write_json(arguments.json, report)
    if arguments.plot:
        save_adapter_picture(adapters, report["modules"], arguments.plot)
    return 0


def _report(adapters: AdapterSet, base: Path | None) -> dict[str, Any]:
    """Return all figures, in the types of JSON."""
    from doraxp.checkpoint import look_at, look_at_base, open_model

    against = {} if base is None else look_at_base(open_model(base), adapters)
    modules = {}
    for path, layer in adapters.items():
        modules[path] = {
            "kind": layer.kind.name,
            "rank": layer.config.rank,
            "alpha": layer.config.rank if layer.config.alpha is None else layer.config.alpha,
            **look_at(layer)._asdict(),
            **(against[path]._asdict() if base is not None else {}),
        }
    size = adapters.reader.path.stat().st_size
    return {"format": adapters.format, "bytes": size, "modules": modules}
