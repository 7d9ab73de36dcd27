"""`doraxp vectors`: the catalogue of doraxp.testing as files, for tests in any language."""

from __future__ import annotations

import argparse
from pathlib import Path

from doraxp._base.printable import printable
from doraxp._base.words import counted
from doraxp._terminal.messages import output_that_may_fail, print_error
from doraxp.testing import write_vectors

SUMMARY = "Write the test catalogue as files, for tests in any language."
DETAILS = (
    "The safetensors files and the JSON manifest have inputs, every intermediate, outputs, "
    "gradients and optimizer steps, each number with the error it may have."
)
EXAMPLE = "doraxp vectors --out vectors"
STATUS_1 = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="a folder that is new or empty"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the vectors in a DIR that is not empty"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the vectors and print how many cases they have."""
    try:
        count = write_vectors(arguments.out, force=arguments.force)
    except OSError as error:
        print_error("doraxp vectors", error)
        return 2
    with output_that_may_fail("doraxp vectors"):
        print(f"{counted(count, 'case')}, in float32 and float64: {printable(str(arguments.out))}")
    return 0
