"""`doraxp completion`: a script that lets a shell complete the commands and their options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from doraxp.cli._arguments import lacks
from doraxp.cli._parser import new_parser

SUMMARY = "Print a script that completes commands in bash, zsh or fish."
DETAILS = (
    "Save it once where the shell looks for such scripts: the page on the command line has the "
    "place for each shell."
)
EXAMPLE = "doraxp completion bash > doraxp.bash"
STATUS_1 = None
_SHELLS = ("bash", "zsh", "fish")
_PATHS = ("BASE", "ADAPTER", "MERGED", "TUNED", "SRC", "DST", "OUT", "DIR", "PATH", "FILE")
"""The metavars of arguments that are files or folders, which a shell completes itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "shell", choices=_SHELLS, metavar="SHELL", help="the shell: bash, zsh or fish"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    if lacks("completion", "shtab"):
        return 2
    import shtab

    parser = new_parser()
    for action in _actions(parser):
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        if metavar.partition("[")[0] in _PATHS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, arguments.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of all commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from command._actions
