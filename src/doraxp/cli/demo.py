"""`doraxp demo`: a frozen network learns turned digits, by four methods."""

from __future__ import annotations

import argparse
from dataclasses import fields

import numpy as np

from doraxp._terminal.figures import write_json
from doraxp._terminal.messages import output_that_may_fail, print_error
from doraxp._terminal.progress import progress_by_parts
from doraxp._terminal.runtimes import BACKENDS
from doraxp._terminal.tables import new_console, print_names
from doraxp.cli._arguments import backend, integer, lacks, output, rate
from doraxp.demo import (
    CHECKPOINTS,
    PLANS,
    Settings,
    experiment,
    print_results,
    report,
    save_picture,
)

RANK_LIMITS = {name: plan.rank_limit for name, plan in PLANS.items()}
SUMMARY = "Train LoRA and DoRA on real digits, and compare them."
DETAILS = (
    "A small network learns 1,797 handwritten digits and is frozen. LoRA, DoRA and full "
    "fine-tuning adapt it to digits turned by 90°. Then LoRA and DoRA are merged into it."
)
EXAMPLE = "doraxp demo --steps 200"
STATUS_1 = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    defaults = Settings()
    parser.add_argument(
        "--network",
        choices=PLANS,
        default=defaults.network,
        help="layers of the network: linear ones, or two convolutions and a linear one "
        "(default: %(default)s)",
    )
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
        help="number of seeds, at least 3; figures are means over them (default: %(default)s)",
    )
    parser.add_argument(
        "--rank",
        type=integer(1, max(RANK_LIMITS.values())),
        default=defaults.rank,
        help="rank of LoRA and DoRA, 1 to "
        + " or ".join(f"{most} ({name})" for name, most in RANK_LIMITS.items())
        + " (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=integer(CHECKPOINTS),
        default=defaults.steps,
        metavar="N",
        help="steps of AdamW, for the base and for each method (default: %(default)s)",
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
    limit = RANK_LIMITS[arguments.network]
    if arguments.rank > limit:
        print_error(
            "doraxp demo",
            f"--rank must be in 1..{limit} for --network {arguments.network}, got {arguments.rank}",
        )
        return 2
    settings = Settings(
        **{field.name: getattr(arguments, field.name) for field in fields(Settings)}
    )
    with progress_by_parts() as progress:
        task = progress.add_task("", total=settings.total_steps)
        with np.errstate(over="ignore", invalid="ignore"):  # the table shows such a rate
            results = experiment(
                settings,
                lambda what, seed: progress.update(
                    task, advance=1, description=f"seed {seed}: {what}"
                ),
            )
    if arguments.json is not None:
        write_json(arguments.json, report(results))
    save_picture(results, arguments.plot)
    with output_that_may_fail("doraxp demo"):
        console = new_console()
        print_results(results, console)
        if arguments.json is not None:
            print_names(f"Figures: {arguments.json}", console)
        print_names(f"Picture: {arguments.plot}", console)
    return 0
