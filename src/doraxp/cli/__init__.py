"""The command line: `doraxp COMMAND`, or `python -m doraxp COMMAND`.

A command is a module with a `SUMMARY`, `add_arguments(parser)` and `run(arguments)`, which
returns the exit status. `main` imports the module of the command that is called, and all of them
only to list them. A command imports the modules that an extra installs only when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import doraxp
from doraxp._terminal.messages import accept_any_encoding, print_error

_COMMANDS = (
    "demo",
    "bench",
    "verify",
    "conform",
    "vectors",
    "merge",
    "audit",
    "convert",
    "inspect",
    "doctor",
    "extract",
)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the commands are."""

    def error(self, message: str) -> NoReturn:
        """Print the error without the usage, which --help has, and leave with status 2."""
        print_error(self.prog, message)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of `doraxp`.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; by default those of the process.

    Returns
    -------
    int
        The exit status. Bad arguments leave with SystemExit and status 2, as argparse does.
    """
    parser = _Parser(
        prog="doraxp", description="DoRA, weight-decomposed low-rank adaptation, on any array."
    )
    parser.add_argument("--version", action="version", version=f"doraxp {doraxp.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    argv = sys.argv[1:] if argv is None else argv
    called = argv[0] if argv else None
    for name in (called,) if called in _COMMANDS else _COMMANDS:
        module = import_module(f"doraxp.cli.{name}")
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    accept_any_encoding()
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except OSError as error:  # a disk that is full, say
        print_error(parser.prog, error)
        return 2
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells have it
    return status
