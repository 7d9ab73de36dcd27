"""`doraxp demo`: a frozen network learns turned digits, by five methods, measured."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from doraxp.cli._arguments import backend, integer, lacks, output, rate
from doraxp.cli._experiment import (
    CHECKPOINTS,
    RANK_LIMIT,
    Results,
    Settings,
    experiment,
    figure,
)
from doraxp.cli._libraries import BACKENDS, versions
from doraxp.cli._report import write_json

SUMMARY = (
    "Train a small network on 1,797 real handwritten digits, freeze it, adapt it to digits turned "
    "by 90° with LoRA, DoRA and full fine-tuning, merge, and compare."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    defaults = Settings()
    parser.add_argument(
        "--backend",
        type=backend,
        default=defaults.backend,
        metavar="{" + ",".join(BACKENDS) + "}",
        help="array library to compute with; jax compiles during the first seed "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=integer(0),
        default=defaults.seed,
        help="the first of the seeds (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=integer(3),
        default=defaults.seeds,
        metavar="N",
        help="how many seeds the figures are the mean of, at least 3 (default: %(default)s)",
    )
    parser.add_argument(
        "--rank",
        type=integer(1, RANK_LIMIT),
        default=defaults.rank,
        help=f"of LoRA and DoRA, 1 to {RANK_LIMIT} (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=integer(CHECKPOINTS),
        default=defaults.steps,
        metavar="N",
        help="of AdamW, for the base and for each method (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        type=rate,
        metavar="RATE",
        help="one for all methods (default: for each the best of a sweep on validation digits)",
    )
    parser.add_argument(
        "--validate",
        action="store_true",
        help="measure on validation digits instead of test digits, as the sweep did",
    )
    parser.add_argument(
        "--json",
        type=output(".json"),
        metavar="FILE",
        help="write every figure of the table, for each seed, and of each layer's change",
    )
    parser.add_argument(
        "--plot",
        type=output(".png"),
        default="doraxp-demo.png",
        metavar="FILE",
        help="where to save the picture, as PNG (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the experiment, print the table, save the picture and the figures."""
    if lacks("demo", "rich", "matplotlib"):
        return 2
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from doraxp.cli._picture import save_picture
    from doraxp.cli._table import print_results
    from doraxp.cli._tables import print_names

    settings = Settings(
        **{field.name: getattr(arguments, field.name) for field in fields(Settings)}
    )
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=settings.total_steps)
        with np.errstate(over="ignore", invalid="ignore"):  # the table shows a rate too large
            results = experiment(
                settings,
                lambda what, seed: progress.update(
                    task, advance=1, description=f"seed {seed}: {what}"
                ),
            )
    console = Console()
    print_results(results, console)
    if arguments.json is not None:
        write_json(arguments.json, _report(results))
        print_names(f"Figures: {arguments.json}", console)
    save_picture(results, arguments.plot)
    print_names(f"Picture: {arguments.plot}", console)
    return 0


def _report(results: Results) -> dict[str, Any]:
    """Return all figures, in the types of JSON."""
    settings = results.settings
    return {
        "arguments": asdict(settings),
        "versions": versions("numpy", settings.backend),
        "digits": {"training": results.training_digits, "held out": results.held_out_digits},
        "base": {
            name: figure(getattr(run, name) for run in results.base)._asdict()
            for name in ("upright_accuracy", "turned_accuracy", "seconds")
        },
        "methods": {name: _method_report(results, name) for name in results.methods},
    }


def _method_report(results: Results, method: str) -> dict[str, Any]:
    runs = results.methods[method]
    report: dict[str, Any] = {
        "learning_rate": results.settings.rate(method),
        "trainable_parameters": runs[0].trainable_parameters,
    }
    for name in ("accuracy", "seconds", "merged_accuracy", "largest_difference"):
        value = results.figure(method, name)
        report[name] = None if value is None else value._asdict()
    report["layers"] = {
        layer: {
            name: figure(run.changes[layer][-1][index] for run in runs)._asdict()
            for index, name in enumerate(("magnitude_change", "direction_change"))
        }
        for layer in runs[0].changes
    }
    return report
