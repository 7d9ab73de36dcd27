"""`doraxp inspect`: the modules of an adapter, and how they change the base."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doraxp._base.words import counted
from doraxp._terminal.adapter_picture import save_adapter_picture
from doraxp._terminal.figures import write_json
from doraxp._terminal.messages import output_that_may_fail, print_error
from doraxp._terminal.module_table import Column, print_modules
from doraxp._terminal.progress import progress_by_bytes, progress_by_parts
from doraxp._terminal.tables import plain_console, print_caption, print_names
from doraxp.cli._arguments import CHECKPOINT, add_choice, add_rename, is_in_input, lacks, output

if TYPE_CHECKING:
    from doraxp.checkpoint import AdapterSet, Against, Fit

SUMMARY = "List the modules of an adapter, with rank and size."
DETAILS = (
    "The adapter may be DoRA, LoRA, LoHa or LoKr. With --base, show how far magnitudes and "
    "directions move, and how near rows are to cancelling."
)
EXAMPLE = "doraxp inspect adapter --base base"
STATUS_1 = None


_FACTORS = (
    Column("kind", "stored as"),
    Column("update", "update"),
    Column("rank", "rank"),
    Column("alpha", "alpha"),
    Column("update_norm", "update\nnorm", statistics.median),
    Column("effective_rank", "effective\nrank", statistics.median),
    Column("magnitude_mean", "mean m", statistics.median),
)
_WITH_BASE = (
    Column("rank", "rank"),
    Column("quantised", "base"),
    *_FACTORS[4:],
    Column("magnitude_change", "ΔM", statistics.median),
    Column("direction_change", "ΔD", statistics.median),
    Column("conditioning", "condi-\ntioning", min),
    Column("zero_rows", "zero\nrows", sum),
)
_CAPTION = "Effective rank: exp of the entropy of the singular values of ΔW. Medians."
_CAPTION_WITH_BASE = (
    "ΔM: mean change of the norms of the rows. ΔD: mean 1 − cosine of the rows. "
    "Medians. Conditioning: the least n / (‖w‖ + ‖s ΔW‖) of a row; 0 cancels."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="a folder as PEFT or mlx-lm save it, or a file"
    )
    parser.add_argument(
        "--base", type=Path, metavar="BASE", help="the model that the adapter belongs to"
    )
    add_choice(parser, "PATH")
    add_rename(parser, "PATH")
    parser.add_argument(
        "--all", action="store_true", help="list every module, not a row for each kind of module"
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
    inputs = (arguments.path, arguments.base)
    if is_in_input("inspect", arguments.json, (path for path in inputs if path is not None)):
        return 2
    from doraxp.checkpoint import CheckpointError, Fit, load_adapters

    try:
        adapters = load_adapters(
            arguments.path,
            subfolder=arguments.subfolder,
            adapter_name=arguments.adapter_name,
        )
        report = _report(adapters, arguments.base, Fit(tuple(arguments.rename)))
    except (CheckpointError, OSError) as error:
        print_error("doraxp inspect", error)
        return 2
    if arguments.json:
        write_json(arguments.json, report)
    if arguments.plot:
        save_adapter_picture(adapters, report["modules"], arguments.plot)
    with output_that_may_fail("doraxp inspect"):
        _print(report, has_base=arguments.base is not None, every=arguments.all)
    return 0


def _print(report: Mapping[str, Any], *, has_base: bool, every: bool) -> None:
    """Print the table of the modules, and the size of the adapter."""
    console = plain_console()
    columns, caption = (_WITH_BASE, _CAPTION_WITH_BASE) if has_base else (_FACTORS, _CAPTION)
    print_modules("module", report["modules"], columns, console, every=every)
    print_caption(caption, console)
    size = f"{counted(len(report['modules']), 'module')}, {counted(report['bytes'], 'byte')}"
    print_names(f"{report['format']} adapter: {size}", console)


def _report(adapters: AdapterSet, base: Path | None, fit: Fit) -> dict[str, Any]:
    """Return all figures, in the types of JSON, with a progress bar."""
    from doraxp.checkpoint import algorithm_of, look_at, look_at_base, open_model

    against: Mapping[str, Against] = {}
    if base is not None:
        model = open_model(base)
        with progress_by_bytes() as progress:
            bar = progress.add_task("", total=None)
            against = look_at_base(
                model,
                adapters,
                fit=fit,
                on_bytes=lambda done, total: progress.update(bar, completed=done, total=total),
            )
    modules = {}
    with progress_by_parts() as progress:
        bar = progress.add_task("modules", total=len(adapters))
        for path, layer in adapters.items():
            modules[path] = {
                "kind": layer.kind.name,
                "update": algorithm_of(adapters.layers[path]),
                "rank": layer.config.rank,
                "alpha": layer.config.rank if layer.config.alpha is None else layer.config.alpha,
                **look_at(layer)._asdict(),
                **(_given(against[path]) if path in against else {}),
            }
            progress.advance(bar)
    size = adapters.reader.path.stat().st_size
    return {"format": adapters.format, "bytes": size, "modules": modules}


def _given(against: Against) -> dict[str, Any]:
    """Return the figures beside a base; only a quantised weight has a format."""
    return {key: value for key, value in against._asdict().items() if value is not None}
