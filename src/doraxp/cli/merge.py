"""`doraxp merge`: merge adapters into a model on disk, tensor by tensor."""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doraxp._base.words import counted
from doraxp._terminal.figures import write_json
from doraxp._terminal.messages import output_that_may_fail, print_error
from doraxp._terminal.module_table import Column, print_modules
from doraxp._terminal.progress import progress_by_bytes
from doraxp._terminal.tables import plain_console, print_caption, print_names
from doraxp.cli._arguments import (
    CHECKPOINT,
    adapters_of,
    add_fit,
    add_jobs,
    add_model_and_adapter,
    backend,
    fit_of,
    integer,
    is_in_input,
    lacks,
    output,
)
from doraxp.cli._cluster import cluster
from doraxp.cli._merge_warnings import warn_of_changes, warn_of_norms, warn_of_traps

if TYPE_CHECKING:
    from rich.console import Console

    from doraxp.checkpoint import Change, Merge, MergedTensor

SUMMARY = "Merge adapters into a model on disk, in little memory."
DETAILS = (
    "The adapters may be DoRA, LoRA, LoHa or LoKr. The merge goes tensor by tensor. OUT appears "
    "when it is complete. After an interruption, the same command goes on where it stopped."
)
EXAMPLE = "doraxp merge base adapter --out merged --verify"
STATUS_1 = None
_PLANNED = (
    Column("kind", "stored as"),
    Column("update", "update"),
    Column("quantised", "in BASE"),
    Column("dtype", "dtype"),
    Column("rank", "rank"),
    Column("s", "s"),
)
_CHANGES = (
    Column("rank", "rank"),
    Column("magnitude", "ΔM", statistics.median),
    Column("direction", "ΔD", statistics.median),
    Column("largest", "largest\nchange", max),
    Column("kept", "kept", min),
    Column("cosine", "cosine", min),
)
"""The figures of `Change`, and how those of a kind of module become one."""
_CAPTION = (
    "ΔM: mean change of the norms of the rows. ΔD: mean 1 − cosine of the rows. "
    "Medians of a kind. Largest change: ‖w' − w‖ / ‖w‖ of one row. "
    "kept: the part of the update that the dtype of OUT stores, the least of a kind."
)
_QUANTISED = "cosine: of the update and of the change that is stored, with the noise of quantising."
_FATES = {
    "copied": "copied as they are",
    "dense": "dense in OUT",
    "requantised": "quantised again",
}
"""The words for each fate of a quantised weight."""
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model_and_adapter(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="OUT",
        required=True,
        help="a folder, or a file if BASE is a file",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="dtype of every floating-point tensor in OUT that is not quantised there (default: "
        "that of the tensor in BASE)",
    )
    parser.add_argument(
        "--compute",
        choices=("float32", "float64"),
        help="dtype to compute in (default: float32 for narrower tensors, else float64)",
    )
    parser.add_argument(
        "--rounding",
        choices=("nearest", "stochastic"),
        default="nearest",
        help="rounding of merged tensors to bfloat16 and float16; stochastic keeps updates that "
        "are smaller than the distance of two such numbers, in the mean (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=integer(0, (1 << 64) - 1),
        default=0,
        help="seed of --rounding stochastic: the same seed gives the same bytes (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--backend",
        type=backend,
        choices=("numpy", "cupy", "torch"),
        default="numpy",
        help="array library to compute with (default: %(default)s)",
    )
    parser.add_argument(
        "--targets",
        choices=("bf16", "same"),
        default="bf16",
        help="form of merged tensors that are quantised in BASE: bf16 keeps them dense, in "
        "bfloat16 or --dtype; same quantises them again in the format of BASE, which may "
        "lose the update (default: %(default)s)",
    )
    add_fit(parser, "OUT")
    add_jobs(parser, "shards to merge")
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="address of a Dask cluster that merges the shards; its workers must see the same "
        "files",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the tensors to merge, and write nothing"
    )
    parser.add_argument(
        "--all", action="store_true", help="list every tensor, not a row for each kind of module"
    )
    parser.add_argument(
        "--json", type=output(".json"), metavar="FILE", help="write the figures of every tensor"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read OUT again: compare copied bytes, and rows of each merged tensor with a dense "
        "merge in float64",
    )


def run(arguments: argparse.Namespace) -> int:
    """Plan, merge with a progress bar, and print the changes."""
    if lacks("merge", *CHECKPOINT, extra="checkpoint"):
        return 2
    if arguments.scheduler is not None and lacks(
        "merge --scheduler", "distributed", extra="distributed"
    ):
        return 2
    from doraxp.checkpoint import Options, check_target, plan_merge

    dtype = _DTYPES.get(arguments.dtype)
    try:
        adapters = adapters_of(arguments)
        paths = (arguments.base, *(Path(one.path) for one in adapters))
        if is_in_input("merge", arguments.json, paths):
            return 2
        options = Options(
            arguments.backend,
            arguments.compute,
            dtype,
            arguments.rounding,
            arguments.seed,
            arguments.targets,
        )
        merge = plan_merge(arguments.base, adapters, options, **fit_of(arguments))
        warn_of_traps(merge)
        warn_of_norms(merge)
        changes: Mapping[str, Change] = {}
        if arguments.dry_run:
            check_target(merge, arguments.out, force=arguments.force)
        else:
            changes = _merge(merge, arguments)
        figures = _figures(merge, changes)
        with output_that_may_fail("doraxp merge"):
            _print_figures(merge, figures, arguments)
        warn_of_changes(changes)
        if arguments.json is not None:
            write_json(arguments.json, _report(merge, figures, arguments))
    except (ValueError, OSError) as error:
        print_error("doraxp merge", error)
        return 2
    return 0


def _merge(merge: Merge, arguments: argparse.Namespace) -> dict[str, Change]:
    from doraxp.checkpoint import run_merge

    modules = () if arguments.backend == "numpy" else (arguments.backend,)
    try:
        with cluster(arguments.scheduler, *modules) as executor, progress_by_bytes() as progress:
            task = progress.add_task("", total=merge.size)
            return run_merge(
                merge,
                arguments.out,
                force=arguments.force,
                verify=arguments.verify,
                jobs=arguments.jobs,
                executor=executor,
                on_bytes=lambda count: progress.update(task, advance=count),
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "the same command goes on from the shards that are finished, in "
            f".{arguments.out.name}.partial"
        ) from None


def _print_figures(
    merge: Merge, figures: Mapping[str, Mapping[str, Any]], arguments: argparse.Namespace
) -> None:
    """Print the plan, or the changes and the state of OUT."""
    console = plain_console()
    columns = _PLANNED if arguments.dry_run else _CHANGES
    # In place of the same format again, for a narrow table.
    rows = {
        name: {**row, "dtype": "same"} if row.get("quantised") == row["dtype"] else row
        for name, row in figures.items()
    }
    print_modules("tensor", rows, columns, console, every=arguments.all)
    if not arguments.dry_run:
        has_cosine = any(row.get("cosine") is not None for row in figures.values())
        print_caption(f"{_CAPTION} {_QUANTISED}" if has_cosine else _CAPTION, console)
    _print_summary(merge, console)
    if not arguments.dry_run:
        state = "complete, and verified" if arguments.verify else "complete"
        print_names(f"{arguments.out}: {state}", console)


def _figures(merge: Merge, changes: Mapping[str, Change]) -> dict[str, dict[str, Any]]:
    """Return the figures of each tensor that changes, by name."""
    from doraxp.checkpoint import MergedTensor, SummedTensor, quantised_as

    figures: dict[str, dict[str, Any]] = {}
    for name, part, entry in merge.changed_parts():
        row: dict[str, Any] = {"kind": "replaced"}
        if isinstance(part, MergedTensor):
            row = _figures_of(part)
        elif isinstance(part, SummedTensor):
            row = {
                "kind": "sum",
                "strengths": list(part.strengths),
                "terms": [
                    _figures_of(one) if isinstance(one, MergedTensor) else {"kind": "replaced"}
                    for one in part.terms
                ],
            }
        before = quantised_as(part.source)
        if before is not None:
            row["quantised"] = before
        change = changes[name]._asdict() if name in changes else {}
        stored = dict(zip(("dtype", "shape", "bytes"), entry, strict=True))
        figures[name] = row | stored | change
    return figures


def _figures_of(part: MergedTensor) -> dict[str, Any]:
    """Return the figures of one adapter of a weight, as its file has them."""
    from doraxp.checkpoint import algorithm_of

    config = part.layer.config
    return {
        "kind": part.layer.kind.name,
        "update": algorithm_of(part.layer),
        "rank": config.rank,
        "s": config.scaling,
    }


def _report(
    merge: Merge, figures: Mapping[str, Mapping[str, Any]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return everything that the command prints and more, in the types of JSON."""
    return {
        "base": str(merge.model.path),
        "adapters": [
            {"path": str(adapters.reader.path), "format": adapters.format, "strength": strength}
            for adapters, strength in zip(merge.adapters, merge.strengths, strict=True)
        ],
        "out": None if arguments.dry_run else str(arguments.out.absolute()),
        "verified": arguments.verify and not arguments.dry_run,
        "options": vars(merge.options),
        "tensors": len(merge.tasks),
        "files": len(merge.model.shards),
        "bytes": merge.size,
        "left_out": [str(file) for file in merge.model.left_out],
        "added": merge.added,
        "config": merge.edits.entries(),
        "unused": list(merge.unused),
        "quantised": dict(merge.fates),
        "tokenizers_apart": merge.tokenizers_apart(),
        "changed": figures,
    }


def _print_summary(merge: Merge, console: Console) -> None:
    from doraxp.checkpoint import merged_in, parts_of

    merged = sum(any(merged_in(part) for part in parts_of(task)) for task in merge.changed.values())
    size = f"{counted(merge.size, 'byte')} in {counted(len(merge.model.shards), 'file')}"
    print_names(
        f"{_named(merge)}: {counted(merged, 'tensor', of=len(merge.tasks))} merged, "
        f"{len(merge.changed) - merged} replaced, the others copied; {size}",
        console,
    )
    if merge.fates:
        counts: Counter[str] = Counter(merge.fates.values())
        texts = (f"{counts[fate]} {text}" for fate, text in _FATES.items() if counts[fate])
        print_names(f"Quantised in BASE: {', '.join(texts)}", console)
    if merge.added:
        print_names(f"New in OUT: {', '.join(merge.added)}", console)
    if merge.edits:
        changed = [
            f"{key}: {json.dumps(value, ensure_ascii=False)}"
            for key, value in merge.edits.written().items()
        ]
        if merge.edits.dense:
            count = counted(len(merge.edits.dense), "dense module")
            changed.append(f"{count}, in the words of its format")
        print_names(f"Changed in config.json: {', '.join(changed)}", console)
    if merge.model.left_out:
        names = ", ".join(str(file) for file in merge.model.left_out)
        print_names(f"Left out: {names}", console)


def _named(merge: Merge) -> str:
    """Return the formats of the adapters, with strengths that are not 1."""
    strengths = (f", {one:g} times" if one != 1 else "" for one in merge.strengths)
    names = [
        f"{adapters.format} adapter{strength}"
        for adapters, strength in zip(merge.adapters, strengths, strict=True)
    ]
    return " + ".join(names)
