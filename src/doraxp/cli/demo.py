"""`doraxp demo`: a frozen network learns turned digits, by five methods, measured."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import doraxp
from doraxp.cli._experiment import (
    CHECKPOINTS,
    RANK_LIMIT,
    Results,
    Settings,
    experiment,
    figure,
)

SUMMARY = (
    "Train a small network on 1,797 real handwritten digits, freeze it, adapt it to digits turned "
    "by 90° with LoRA, DoRA and full fine-tuning, merge, and compare."
)
BACKENDS = ("numpy", "torch", "jax", "cupy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options. Their types refuse what would fail only after the training."""
    defaults = Settings()
    parser.add_argument(
        "--backend",
        type=_backend,
        default=defaults.backend,
        metavar="{" + ",".join(BACKENDS) + "}",
        help="array library to compute with; jax compiles during the first seed "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_integer(0),
        default=defaults.seed,
        help="the first of the seeds (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=_integer(3),
        default=defaults.seeds,
        metavar="N",
        help="how many seeds the figures are the mean of, at least 3 (default: %(default)s)",
    )
    parser.add_argument(
        "--rank",
        type=_integer(1, RANK_LIMIT),
        default=defaults.rank,
        help=f"of LoRA and DoRA, 1 to {RANK_LIMIT} (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=_integer(CHECKPOINTS),
        default=defaults.steps,
        metavar="N",
        help="of AdamW, for the base and for each method (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        type=_rate,
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
        type=_output(".json"),
        metavar="FILE",
        help="write every figure of the table, for each seed, and of each layer's change",
    )
    parser.add_argument(
        "--plot",
        type=_output(".png"),
        default="doraxp-demo.png",
        metavar="FILE",
        help="where to save the picture, as PNG (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the experiment, print the table, save the picture and the figures."""
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"doraxp demo: error: {' and '.join(missing)} not installed: "
            "pip install 'doraxp[demo]'",
            file=sys.stderr,
        )
        return 2
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from doraxp.cli._picture import save_picture
    from doraxp.cli._table import print_results

    settings = Settings(
        **{field.name: getattr(arguments, field.name) for field in fields(Settings)}
    )
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=settings.total_steps)
        results = experiment(
            settings,
            lambda what, seed: progress.update(task, advance=1, description=f"seed {seed}: {what}"),
        )
    console = Console()
    print_results(results, console)
    save_picture(results, arguments.plot)
    console.print(f"Picture: {arguments.plot}", soft_wrap=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(_report(results), indent=2) + "\n", "utf-8")
        console.print(f"Figures: {arguments.json}", soft_wrap=True)
    return 0


def _report(results: Results) -> dict[str, Any]:
    """Return all figures, in the types of JSON."""
    settings = results.settings
    return {
        "arguments": asdict(settings),
        "versions": {
            "doraxp": doraxp.__version__,
            "python": platform.python_version(),
            **{
                name: str(importlib.import_module(name).__version__)
                for name in ("numpy", settings.backend)
            },
        },
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


def _backend(text: str) -> str:
    if text not in BACKENDS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(BACKENDS)}, got {text!r}")
    if text == "numpy":  # always there; to ask about the others is to import them all
        return text
    (status,) = (status for status in doraxp.backends.available() if status.name == text)
    if not status.usable:
        raise argparse.ArgumentTypeError(f"{text} cannot run here: {status.detail}")
    return text


def _integer(least: int, most: int | None = None) -> Callable[[str], int]:
    rule = f"at least {least}" if most is None else f"in {least}..{most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be an integer, {rule}, got {text!r}")
        return value

    return parse


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number, finite and above 0, got {text!r}")
    return value


def _output(suffix: str) -> Callable[[str], Path]:
    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(f"must end in {suffix}, got {text!r}")
        if path.is_dir() or not path.parent.is_dir():
            raise argparse.ArgumentTypeError(
                f"must be a file in a folder that exists, got {text!r}"
            )
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"must be writable, got {text!r}")
        return path

    return parse
