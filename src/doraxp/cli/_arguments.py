"""Checks of the arguments, made before any work that an error would lose."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import doraxp
from doraxp._base.extras import absent, lack
from doraxp._terminal.messages import print_error
from doraxp._terminal.runtimes import BACKENDS

if TYPE_CHECKING:
    from doraxp.checkpoint import Fit, Weighted


class FitArguments(TypedDict):
    """The arguments of `plan_merge` that say how an adapter fits a base."""

    fit: Fit
    subfolder: str | None
    adapter_name: str | None


CHECKPOINT = ("safetensors", "ml_dtypes", "threadpoolctl", "rich")
"""The modules that the extra `checkpoint` installs."""


def backend(text: str) -> str:
    """Parse the name of a library that can be used here."""
    if text not in BACKENDS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(BACKENDS)}, got {text!r}")
    if text == "numpy":  # always there; `available` imports all the others
        return text
    (status,) = (status for status in doraxp.backends.available() if status.name == text)
    if not status.usable:
        raise argparse.ArgumentTypeError(f"{text} cannot run here: {status.detail}")
    return text


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """Parse an integer in a range."""
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


def rate(text: str) -> float:
    """Parse a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number, finite and above 0, got {text!r}")
    return value


def output(suffix: str) -> Callable[[str], Path]:
    """Parse the path of a file that can be written."""

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


def add_model_and_adapter(parser: argparse.ArgumentParser, *, merged: bool = False) -> None:
    """Declare BASE, ADAPTER or --adapter, --scale and, for an audit, MERGED."""
    parser.add_argument(
        "base", type=Path, metavar="BASE", help="a safetensors file, or a model's folder"
    )
    last = parser.add_argument(
        "adapter",
        type=Path,
        metavar="ADAPTER",
        help="a folder as PEFT or mlx-lm save it, or a safetensors file",
    )
    if merged:
        last = parser.add_argument(
            "merged", type=Path, metavar="MERGED", help="a safetensors file, or a model's folder"
        )
    add_weighted(parser, last, "ADAPTER")


def add_weighted(parser: argparse.ArgumentParser, last: argparse.Action, instead: str) -> None:
    """Declare --adapter, in place of a positional argument, and --scale.

    `last` is the positional argument that is then left out: the last one.
    """
    parser.add_argument(
        "--adapter",
        dest="adapters",
        type=_weighted,
        action=_instead_of(last),
        default=[],
        metavar="PATH[:T]",
        help=f"in place of {instead}, repeatable: add T times the change of the weights by this "
        "adapter (default: 1)",
    )
    parser.add_argument(
        "--scale",
        type=_strength,
        default=1.0,
        metavar="T",
        help="take T times the change: 1 is the adapter, 0 the base (default: %(default)s)",
    )


def _instead_of(last: argparse.Action) -> type[argparse.Action]:
    """Return the action of a repeatable option that is given in place of a positional argument.

    Then there is one positional argument less. A positional argument that may be left out would
    not be found behind an option, so the last one is required until the option comes.
    """

    class Instead(argparse.Action):
        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: object,
            option_string: str | None = None,
        ) -> None:
            last.required = False
            setattr(namespace, self.dest, [*getattr(namespace, self.dest), values])

    return Instead


def _strength(text: str) -> float:
    """Parse a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def _weighted(text: str) -> tuple[Path, float]:
    """Parse PATH or PATH:T. A file or folder whose name ends in :T is taken as a path."""
    path, colon, strength = text.rpartition(":")
    if not text or (colon and not path):
        raise argparse.ArgumentTypeError(f"must be PATH or PATH:T, got {text!r}")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    return Path(path), _strength(strength)


def adapters_of(arguments: argparse.Namespace) -> list[Weighted]:
    """Return ADAPTER or those of --adapter, with their strengths times --scale.

    Raises
    ------
    ValueError
        Both are given.
    """
    from doraxp.checkpoint import Weighted

    if arguments.adapters and getattr(arguments, "merged", arguments) is None:
        arguments.adapter, arguments.merged = None, arguments.adapter
    alone = getattr(arguments, "adapter", None)
    if arguments.adapters and alone is not None:
        raise ValueError(f"give ADAPTER or --adapter, not both, got {alone} too")
    if arguments.adapters and getattr(arguments, "subfolder", None) is not None:
        raise ValueError(
            "--subfolder is for ADAPTER: with --adapter give PATH/NAME in place of PATH"
        )
    given = arguments.adapters or [(alone, 1.0)]
    return [Weighted(path, strength * arguments.scale) for path, strength in given]


def add_fit(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say how ADAPTER fits BASE, where the files do not."""
    add_choice(parser)
    add_rename(parser)
    add_residual(parser)
    parser.add_argument(
        "--architecture",
        metavar="CLASS",
        help="class of OUT in config.json, if ADAPTER brings a new head (default: as the files "
        "tell)",
    )
    parser.add_argument(
        "--labels",
        type=lambda text: tuple(text.split(",")),
        metavar="A,B,C",
        help="names of the classes in config.json, if ADAPTER brings a classifier",
    )


def add_residual(parser: argparse.ArgumentParser) -> None:
    """Declare --base-is-residual."""
    parser.add_argument(
        "--base-is-residual",
        action="store_true",
        help="BASE has the residual weights that PiSSA or OLoRA made of the model's",
    )


def add_choice(parser: argparse.ArgumentParser, adapter: str = "ADAPTER") -> None:
    """Declare the options that choose one of several adapters in the argument `adapter`."""
    parser.add_argument(
        "--subfolder",
        metavar="NAME",
        help=f"the adapter's folder in {adapter}, if that has several",
    )
    parser.add_argument(
        "--adapter-name", metavar="NAME", help="the adapter to take from a file that has several"
    )


def add_rename(parser: argparse.ArgumentParser, adapter: str = "ADAPTER") -> None:
    """Declare --rename, for the names in the argument `adapter`."""
    parser.add_argument(
        "--rename",
        type=_rename,
        action="append",
        default=[],
        metavar="REGEX=NEW",
        help=f"replace what the regular expression finds in the names of {adapter}; repeatable",
    )


def fit_of(arguments: argparse.Namespace) -> FitArguments:
    """Return the arguments of `plan_merge` that `add_fit` declared."""
    from doraxp.checkpoint import Fit

    return {
        "fit": Fit(
            tuple(arguments.rename),
            arguments.base_is_residual,
            arguments.architecture,
            arguments.labels,
        ),
        "subfolder": arguments.subfolder,
        "adapter_name": arguments.adapter_name,
    }


def _rename(text: str) -> tuple[str, str]:
    """Parse REGEX=NEW."""
    pattern, equal, new = text.rpartition("=")  # a lookahead has one too
    try:
        re.compile(pattern)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{pattern!r} is not a regular expression: {error}"
        ) from None
    if not equal:
        raise argparse.ArgumentTypeError(f"must be REGEX=NEW, got {text!r}")
    return pattern, new


def is_in_input(command: str, file: Path | None, inputs: Iterable[Path]) -> bool:
    """Return whether --json FILE would be written into one of the folders, after an error."""
    for folder in inputs:
        if file is not None and file.resolve().is_relative_to(folder.resolve()):
            print_error(f"doraxp {command}", f"--json must not be in {folder}, got {file}")
            return True
    return False


def add_jobs(parser: argparse.ArgumentParser, pieces: str) -> None:
    """Declare --jobs, the number of `pieces` that are worked on at the same time."""
    parser.add_argument(
        "--jobs",
        type=integer(1),
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help=f"number of {pieces} at a time (default: that of the cores, at most 4)",
    )


def lacks(command: str, *modules: str, extra: str | None = None) -> bool:
    """Return whether a module is missing, after an error message that says how to install it.

    The extra that installs the modules has the name of the command, unless `extra` is given.
    """
    missing = absent(modules)
    if missing:
        print_error(f"doraxp {command}", lack(extra or command, missing))
    return bool(missing)
